"""The command line: what it prints, where, and with which exit code. Never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
import pytest
from run_samples import create_run, save, start

import ckptmgr.cli.ls
from ckptmgr.cli.main import COMMANDS, run
from ckptmgr.cli.output import format_age, format_nbytes
from ckptmgr.errors import Fenced
from ckptmgr.format.layout import attempt_key, manifest_key
from ckptmgr.format.manifest import Manifest
from ckptmgr.format.record import encode_record
from ckptmgr.launch.start_record import StartRecord, describe_start
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import claim_attempt, record_end
from ckptmgr.storage.open import open_storage

Output = pytest.CaptureFixture[str]


def started_as_a_program() -> StartRecord:
    """However these tests were started: a worker of several has no command that could be repeated."""
    return msgspec.structs.replace(describe_start(), kind="module", target="pytest", args=("-q",))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with a line of steps 100, 200 (tagged), 250, and step 300 beside it."""
    root = tmp_path / "run"
    storage = open_storage(root)
    create_run(storage)
    first = start(storage)
    storage.write(attempt_key(first, "start"), [encode_record(started_as_a_program())])
    save(storage, first, 100, metrics={"loss": 0.5})
    branch = save(storage, first, 200, number=1, metrics={"loss": 0.25, "acc": float("nan")}, tags=["paper"])
    save(storage, first, 300, number=2)
    second = start(storage, continues=branch)
    save(storage, second, 250, metrics={"loss": 0.3})
    record_end(storage, second, "preempted", step=250)
    return root


def shard(run_dir: Path, step: int) -> Path:
    return next(run_dir.glob(f"checkpoints/{step:010d}-*/model.safetensors"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def state_of(table: str, step: int) -> str:
    return next(line for line in table.splitlines() if line.split()[0:1] == [str(step)])


def printed_json(run_dir: Path | str, command: str, capsys: Output) -> tuple[int, dict]:
    status = run([command, "--json", str(run_dir)])
    return status, json.loads(capsys.readouterr().out)


# ls


def test_ls_says_which_checkpoint_is_latest_which_is_best_and_which_is_not_on_the_line(
    run_dir: Path, capsys: Output
) -> None:
    assert run(["ls", str(run_dir)]) == 0
    table = capsys.readouterr().out
    assert "paper" in state_of(table, 200)
    assert "best loss" in state_of(table, 200)
    assert "acc=nan" in state_of(table, 200)
    assert state_of(table, 250).rstrip().endswith("latest")
    assert state_of(table, 300).rstrip().endswith("not on the line")


def test_ls_as_json_holds_the_same_facts(run_dir: Path, capsys: Output) -> None:
    status, document = printed_json(run_dir, "ls", capsys)
    assert status == 0
    by_step = {entry["step"]: entry for entry in document["checkpoints"]}
    assert [step for step, entry in by_step.items() if entry["is_latest"]] == [250]
    assert [step for step, entry in by_step.items() if entry["best_of"]] == [200]
    assert [step for step, entry in by_step.items() if not entry["is_on_line"]] == [300]
    assert by_step[200]["metrics"] == {"loss": 0.25, "acc": "nan"}
    assert by_step[200]["tags"] == ["paper"]


def test_a_checkpoint_that_lacks_a_file_is_listed_as_damaged_and_is_not_the_latest(
    run_dir: Path, capsys: Output
) -> None:
    shard(run_dir, 250).unlink()
    assert run(["ls", str(run_dir)]) == 0
    table = capsys.readouterr().out
    assert "model.safetensors is missing" in state_of(table, 250)
    assert "latest" in state_of(table, 200)


def test_a_torn_save_is_told_and_does_not_count(run_dir: Path, capsys: Output) -> None:
    (shard(run_dir, 250).parent / "manifest.json").unlink()
    assert run(["ls", str(run_dir)]) == 0
    output = capsys.readouterr()
    assert "cut off" in output.err
    assert "250" not in output.out


def test_an_unreadable_manifest_does_not_keep_the_others_from_being_listed(run_dir: Path, capsys: Output) -> None:
    flip(shard(run_dir, 250).parent / "manifest.json", 200)
    assert run(["ls", str(run_dir)]) == 0
    table = capsys.readouterr().out
    assert "damaged" in state_of(table, 250)
    assert "latest" in state_of(table, 200)


def test_a_broken_line_is_told_and_what_is_there_is_listed(run_dir: Path, capsys: Output) -> None:
    storage = open_storage(run_dir)
    start(storage, continues=Catalog(storage).resolve("250"))
    flip(run_dir / attempt_key(2, "line"), 100)
    flip(shard(run_dir, 250).parent / "manifest.json", 200)
    status, document = printed_json(run_dir, "ls", capsys)
    assert status == 0
    assert len(document["checkpoints"]) == 4
    assert "line.json" in document["problem"]


def test_an_empty_run_is_no_error(tmp_path: Path, capsys: Output) -> None:
    create_run(open_storage(tmp_path / "run"))
    assert run(["ls", str(tmp_path / "run")]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert "no checkpoint" in output.err


def test_a_directory_of_runs_is_told_from_a_place_without_any(run_dir: Path, capsys: Output) -> None:
    for place, hint in ((run_dir.parent, f"ckptmgr ls {run_dir.parent}"), (run_dir.parent / "x", "give the directory")):
        assert run(["show", str(place)]) == 10
        assert hint in capsys.readouterr().err


def test_a_configuration_is_no_run(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "cnn.yaml"
    path.write_text("trainer: {}")
    for command in ("show", "ls", "resume", "verify", "prune"):
        assert run([command, str(path)]) == 2
        assert f"ckptmgr run {path}" in capsys.readouterr().err


def test_what_stands_in_a_run_cannot_write_over_the_terminal(run_dir: Path, capsys: Output) -> None:
    storage = open_storage(run_dir)
    save(storage, 2, 400, number=1, tags=["\x1b[2J", "[bold]x[/bold]", "a\nb"])
    for arguments in (["ls", str(run_dir)], ["show", f"{run_dir}@400"]):
        assert run(arguments) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "\\x1b[2J" in out
        assert "[bold]x[/bold]" in out
        assert "a\\nb" in out


# show


def test_show_of_a_run_tells_its_attempts_and_how_they_ended(run_dir: Path, capsys: Output) -> None:
    assert run(["show", str(run_dir)]) == 0
    table = capsys.readouterr().out
    assert "killed after step 300 was saved" in table
    assert "went back to step 200" in table
    assert "preempted at step 250" in table
    _, document = printed_json(run_dir, "show", capsys)
    assert [attempt["outcome"] for attempt in document["attempts"]] == [
        "killed after step 300 was saved",
        "preempted at step 250",
    ]
    assert [attempt["began"] for attempt in document["attempts"]] == ["started", "went back to step 200"]
    assert document["attempts"][0]["start"]["versions"]["ckptmgr"]
    assert document["ncheckpoints"] == 4


@pytest.mark.parametrize("selector", ["200", "paper", "best", "0000000200-000001-000001"])
def test_show_of_a_checkpoint_tells_what_is_in_it(run_dir: Path, capsys: Output, selector: str) -> None:
    status, document = printed_json(f"{run_dir}@{selector}", "show", capsys)
    assert status == 0
    assert (document["step"], document["is_intact"], document["tags"]) == (200, True, ["paper"])
    assert document["entries"] == [
        {
            "name": "model",
            "handler": "module",
            "handler_version": 1,
            "scope": "replicated",
            "tensor_scopes": {"replicated": 2},
            "ntensors": 2,
            "nbytes": 64,
            "dtypes": ["F32"],
            "fingerprint": None,
        }
    ]
    assert [Path(file["path"]).name for file in document["files"]] == ["model.safetensors", "state.json"]
    assert run(["show", f"{run_dir}@{selector}"]) == 0
    assert "model.safetensors" in capsys.readouterr().out


def test_a_damaged_record_of_an_attempt_is_told_beside_the_others(run_dir: Path, capsys: Output) -> None:
    flip(run_dir / attempt_key(1, "claim"), 100)
    assert run(["show", str(run_dir)]) == 0
    assert "claim.json is damaged" in capsys.readouterr().err


# verify


def test_verify_of_a_whole_run_is_quiet_on_stdout_but_for_the_verdicts(run_dir: Path, capsys: Output) -> None:
    assert run(["verify", str(run_dir)]) == 0
    output = capsys.readouterr()
    assert output.out.count("whole") == 4
    assert output.err == ""


def test_verify_names_the_damaged_tensor(run_dir: Path, capsys: Output) -> None:
    flip(shard(run_dir, 200), -1)
    assert run(["verify", str(run_dir)]) == 12
    output = capsys.readouterr()
    assert "model/weight" in output.out
    assert output.err.count("model/weight") == 1
    assert "CorruptCheckpointError [corrupt]: damaged: 1 of 4 checkpoints" in output.err
    status, document = printed_json(run_dir, "verify", capsys)
    assert status == 12
    assert {entry["step"]: entry["is_whole"] for entry in document["checkpoints"]} == {
        100: True,
        200: False,
        250: True,
        300: True,
    }
    assert document["checkpoints"][1]["damages"][0]["tensor"] == "model/weight"


def test_verify_of_one_checkpoint_looks_at_no_other(run_dir: Path, capsys: Output) -> None:
    shard(run_dir, 200).unlink()
    assert run(["verify", f"{run_dir}@100"]) == 0
    assert run(["verify", f"{run_dir}@200"]) == 12
    assert "damaged: step 200" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ckptmgr.json", "attempts/000001/start.json", "attempts/000002/line.json"])
def test_verify_finds_a_damaged_record_of_the_run(run_dir: Path, capsys: Output, name: str) -> None:
    flip(run_dir / name, 100)
    assert run(["verify", str(run_dir)]) == 12
    assert Path(name).name in capsys.readouterr().err


def test_a_manifest_of_a_newer_format_is_no_damage_but_fails(run_dir: Path, capsys: Output) -> None:
    path = run_dir / manifest_key(Manifest.id.fget(_manifest(run_dir, 250)))  # type: ignore[attr-defined]
    newer = path.read_bytes()
    body = json.loads(newer)["record"] | {"version": 99}
    path.chmod(0o644)
    path.write_bytes(_reencoded(body))
    assert run(["verify", str(run_dir)]) == 1
    output = capsys.readouterr()
    assert "not readable by this version" in output.out
    assert output.err.rstrip().endswith("upgrade: pip install --upgrade ckptmgr")
    assert run(["ls", str(run_dir)]) == 0
    assert "format version 99" in state_of(capsys.readouterr().out, 250)


def _manifest(run_dir: Path, step: int) -> Manifest:
    from ckptmgr.run.catalog import Catalog

    return Catalog(open_storage(run_dir)).resolve(str(step))


def _reencoded(body: dict) -> bytes:
    import msgspec

    kind = msgspec.defstruct("Any", [(name, object) for name in body])
    return encode_record(kind(**body))


def test_nothing_to_verify_is_not_found(tmp_path: Path) -> None:
    create_run(open_storage(tmp_path / "run"))
    assert run(["verify", str(tmp_path / "run")]) == 10


# Wrong input

MORE_ARGUMENTS = {"export": ["target.safetensors"]}


# What an import or a doctor is given is no run.
@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"run", "completion", "import", "doctor"}))
def test_what_is_no_run_is_told_in_three_lines(tmp_path: Path, capsys: Output, command: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.ckpt").touch()
    for name, status in (("missing", 10), ("empty", 10), ("other", 10), ("file", 1)):
        assert run([command, str(tmp_path / name), *MORE_ARGUMENTS.get(command, [])]) == status
        output = capsys.readouterr()
        assert output.out == ""
        assert [line.split(":")[0].strip() for line in output.err.splitlines()[1:]] == ["why", "next"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["ls"],
        ["ls", "a", "b"],
        ["ls", "--nonsense", "a"],
        ["ls", "run@100"],
        ["show", "run@"],
        ["show", "@latest"],
        ["verify", "run@a b"],
        ["--nonsense"],
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_to_do(arguments: list[str], capsys: Output) -> None:
    assert run(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("UsageError [usage]: ")
    assert "next: " in output.err


def test_a_checkpoint_that_is_not_there_exits_with_10(run_dir: Path, capsys: Output) -> None:
    for command in ("show", "verify", "resume"):
        assert run([command, f"{run_dir}@77"]) == 10
        assert "step 77" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (Fenced("taken over", why="w", next="n"), 11, "Fenced [fenced]: taken over\n  why:  w\n  next: n\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (click.Abort(), 130, "interrupted\n"),
        (ZeroDivisionError("so\nwhat \x1b[2J"), 1, "ckptmgr failed unexpectedly\n  why:  ZeroDivisionError: so\n"),
    ],
)
def test_whatever_is_raised_becomes_a_message_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: Output, error: BaseException, status: int, message: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.delenv("CKPTMGR_TRACEBACK", raising=False)
    monkeypatch.setattr(ckptmgr.cli.ls, "holds_run", fail)
    assert run(["ls", "x"]) == status
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert "Traceback" not in err
    assert "\x1b" not in err
    monkeypatch.setenv("CKPTMGR_TRACEBACK", "1")
    assert run(["ls", "x"]) == status
    assert "Traceback" in capsys.readouterr().err


# Real processes


def ckptmgr_process(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptmgr", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False
    )


BLOCKED = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "lightning", "pytorch_lightning"):
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Blocker())
from ckptmgr.cli.main import main
main()
"""


@pytest.mark.parametrize("command", ["run", "export", "import"])
def test_the_help_of_a_command_that_works_with_torch_imports_none(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, command, "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"run", "completion", "export", "import"}))
def test_no_command_imports_torch(run_dir: Path, command: str) -> None:
    options = ["--print", "--allow-command"] if command == "resume" else []
    for arguments in ([command, "--help"], [command, str(run_dir), *options], [command, "/nowhere"]):
        done = subprocess.run(
            [sys.executable, "-c", BLOCKED, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert "must not be imported" not in done.stderr
        assert done.returncode == (10 if "/nowhere" in arguments else 0), done.stderr


def test_help_loads_nothing_but_click_and_names_every_command(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['ckptmgr', '--help']\n"
        "from ckptmgr.cli.main import run\nassert run(['--help']) == 0\n"
        "heavy = {'rich', 'msgspec', 'numpy', 'fsspec', 'torch'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert all(name in done.stdout for name in COMMANDS)


def test_a_reader_that_goes_away_costs_no_traceback(run_dir: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptmgr", "ls", str(run_dir)], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode == 128 + signal.SIGPIPE


# resume

TRAIN = """
import os, sys
from ckptmgr.format.layout import attempt_key
from ckptmgr.format.record import encode_record
from ckptmgr.launch.start_record import describe_start
from ckptmgr.storage.open import open_storage
if "CKPTMGR_RUN_DIR" in os.environ:
    print("resumed", sys.argv, os.getcwd(), os.environ["CKPTMGR_RUN_DIR"])
    sys.exit(75)
open_storage("run").write(attempt_key(3, "start"), [encode_record(describe_start())])
"""


@pytest.fixture
def project(run_dir: Path) -> Path:
    """The directory of the run, as a project with a script that was started."""
    root = run_dir.parent
    (root / "pyproject.toml").touch()
    (root / "train.py").write_text(TRAIN)
    subprocess.run([sys.executable, "train.py", "--lr", "0.1"], cwd=root, timeout=60, check=True)
    return root


def test_resume_starts_the_recorded_script_again_and_passes_its_exit_code_on(project: Path) -> None:
    done = ckptmgr_process("resume", "run", cwd=project)
    assert done.stdout == f"resumed ['train.py', '--lr', '0.1'] {project} {project / 'run'}\n"
    assert done.returncode == 75
    done = ckptmgr_process("resume", "../run@paper", cwd=project / "run")
    assert done.returncode == 75
    assert done.stdout.endswith(f"{project / 'run'}@paper\n")


def test_resume_prints_a_command_that_does_the_same(project: Path) -> None:
    done = ckptmgr_process("resume", "run", "--print", cwd=project)
    assert done.returncode == 0
    pasted = subprocess.run(["sh", "-c", done.stdout], cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert pasted.stdout == f"resumed ['train.py', '--lr', '0.1'] {project} {project / 'run'}\n"
    document = json.loads(ckptmgr_process("resume", "run", "--json", cwd=project).stdout)
    assert document["argv"][1:] == ["train.py", "--lr", "0.1"]


def test_resume_from_outside_of_the_project_wants_to_be_allowed(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / ".git").mkdir(parents=True)
    done = ckptmgr_process("resume", str(project / "run"), cwd=elsewhere)
    assert done.returncode == 1
    assert "--allow-command" in done.stderr
    assert "train.py --lr 0.1" in done.stderr
    done = ckptmgr_process("resume", str(project / "run"), "--allow-command", cwd=elsewhere)
    assert done.returncode == 75


def test_a_run_whose_start_is_not_recorded_is_refused_with_what_to_do(run_dir: Path) -> None:
    (run_dir / attempt_key(1, "start")).unlink()
    done = ckptmgr_process("resume", "run", cwd=run_dir.parent)
    assert done.returncode == 1
    assert "CKPTMGR_RUN_DIR=run" in done.stderr


def test_a_start_that_ended_before_it_could_train_does_not_stand_for_the_run(project: Path) -> None:
    storage = open_storage(project / "run")
    looked = claim_attempt(storage, Catalog(storage).attempts).attempt
    storage.write(attempt_key(looked, "start"), [encode_record(describe_start())])
    record_end(storage, looked, "failed", step=None, error="Error: it does not fit\n  why:  a reason")
    assert "train.py" in ckptmgr_process("resume", "run", "--print", cwd=project).stdout
    shown = ckptmgr_process("show", "run", cwd=project).stdout
    assert "it does not fit" in shown
    assert "a reason" not in shown


# Small words


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5120.0 TiB")]
)
def test_sizes_are_for_people(nbytes: int, text: str) -> None:
    assert format_nbytes(nbytes) == text


@pytest.mark.parametrize(
    ("time", "text"),
    [
        ("2026-01-01T00:00:00.000Z", "0 s"),
        ("2025-12-31T23:59:00.000Z", "60 s"),
        ("2025-12-31T23:50:00.000Z", "10 min"),
        ("2025-12-30T00:00:00.000Z", "2 d"),
        ("2027-01-01T00:00:00.000Z", "0 s"),
        ("nonsense", "?"),
        ("2026-01-01", "?"),
    ],
)
def test_ages_are_for_people_and_survive_a_clock_that_is_wrong(time: str, text: str) -> None:
    assert format_age(time, now=datetime(2026, 1, 1, tzinfo=UTC)) == text
