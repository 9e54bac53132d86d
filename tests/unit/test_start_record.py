"""What a process start records: real processes, started in every way."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ckptmgr.format.record import decode_record, encode_record
from ckptmgr.launch.git import read_git_state
from ckptmgr.launch.invocation import Invocation, parse_command_line, torchrun_options
from ckptmgr.launch.start_record import StartRecord, describe_start

DESCRIBE = """
import msgspec, sys
from ckptmgr.launch.start_record import describe_start
sys.stdout.buffer.write(msgspec.json.encode(describe_start()) + b"\\n")
sys.stdout.flush()
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "pkg").mkdir(parents=True)
    (root / "pyproject.toml").touch()
    (root / "train.py").write_text(DESCRIBE)
    (root / "pkg" / "__init__.py").touch()
    (root / "pkg" / "fit.py").write_text(DESCRIBE)
    (root / "pkg" / "__main__.py").write_text(DESCRIBE)
    return root


def start(*words: str, cwd: Path, stdin: str = "", **env: str) -> StartRecord:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        input=stdin,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return msgspec.json.decode(done.stdout, type=StartRecord)


def test_a_script_is_recorded_relative_to_its_project(project: Path) -> None:
    record = start("-u", "-W", "ignore", "../train.py", "--lr", "0.1", cwd=project / "pkg")
    assert (record.kind, record.target, record.args) == ("script", "../train.py", ("--lr", "0.1"))
    assert record.interpreter_flags == ("-u", "-Wignore")
    assert (record.script, record.script_in_project) == (str(project / "train.py"), "train.py")
    assert (record.cwd, record.cwd_in_project) == (str(project / "pkg"), "pkg")
    assert record.project_root == str(project)
    assert record.argv == ("python", "-u", "-Wignore", "../train.py", "--lr", "0.1")
    assert not record.is_redacted


def test_a_script_that_changed_directory_is_recorded_where_it_started(project: Path) -> None:
    (project / "train.py").write_text("import os, sys\nos.chdir('/')\nsys.argv = ['x']\n" + DESCRIBE)
    record = start("train.py", "--lr", "0.1", cwd=project)
    assert (record.cwd, record.script, record.args) == (str(project), str(project / "train.py"), ("--lr", "0.1"))


@pytest.mark.parametrize("name", ["pkg.fit", "pkg"])
def test_a_module_is_recorded_by_its_name(project: Path, name: str) -> None:
    record = start("-m", name, "x=1", cwd=project)
    assert (record.kind, record.target, record.args) == ("module", name, ("x=1",))
    assert record.project_root == str(project)


def test_code_on_the_command_line_or_on_standard_input_is_not_recorded(project: Path) -> None:
    command = start("-c", DESCRIBE, "x", cwd=project)
    assert (command.kind, command.target, command.args, command.script) == ("command", None, ("x",), None)
    assert start("-", "x", cwd=project, stdin=DESCRIBE).kind == "stdin"
    assert start(cwd=project, stdin=DESCRIBE).kind == "stdin"
    assert "describe_start" not in msgspec.json.encode(command).decode()


def test_a_terminal_session_is_interactive(project: Path) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-q"], stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    os.close(follower)
    code = "from ckptmgr.launch.start_record import describe_start; print('kind', describe_start().kind); exit()\n"
    os.write(leader, code.encode())
    output, _ = process.communicate(timeout=60)
    os.close(leader)
    assert b"kind interactive" in output


def test_a_notebook_is_recognised_by_its_running_shell(project: Path) -> None:
    fake = "import sys, types\nclass ZMQInteractiveShell: pass\n"
    fake += "sys.modules['IPython'] = types.SimpleNamespace(get_ipython=lambda: {})\n"
    (project / "kernel.py").write_text(fake.format("ZMQInteractiveShell()") + DESCRIBE)
    assert start("kernel.py", cwd=project).kind == "notebook"
    (project / "kernel.py").write_text(fake.format("None") + DESCRIBE)
    assert start("kernel.py", cwd=project).kind == "script"


def test_an_installed_command_is_recorded_by_its_name(project: Path) -> None:
    # pytest is installed in every environment that runs this, and runs our code in its own process.
    (project / "test_it.py").write_text(
        "from ckptmgr.launch.invocation import current_invocation\n"
        "def test_it():\n    i = current_invocation()\n    assert (i.kind, i.target) == ('entry-point', 'pytest'), i\n"
    )
    command = [Path(sys.executable).parent / "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_child_of_multiprocessing_records_the_program_that_started_it(project: Path, method: str) -> None:
    (project / "train.py").write_text(
        "import multiprocessing\n"
        f"def child():\n    exec({DESCRIBE!r})\n"
        "if __name__ == '__main__':\n"
        f"    process = multiprocessing.get_context({method!r}).Process(target=child)\n"
        "    process.start()\n    process.join()\n"
    )
    record = start("train.py", "--lr", "0.1", cwd=project)
    assert record.kind == "script"
    assert record.args == ("--lr", "0.1")
    assert record.script_in_project == "train.py"


def test_secrets_are_taken_out_and_the_record_says_so(project: Path) -> None:
    record = start("train.py", "--token", "abc", "--x=swordfish99", cwd=project, DB_PASSWORD="swordfish99")
    assert record.args == ("--token", "[redacted]", "--x=[redacted]")
    assert record.is_redacted
    assert "swordfish99" not in msgspec.json.encode(record).decode()


def test_bytes_that_are_no_text_can_be_recorded(project: Path) -> None:
    done = subprocess.run(
        [sys.executable.encode(), b"train.py", b"caf\xe9"], cwd=project, capture_output=True, timeout=60, check=True
    )
    record = msgspec.json.decode(done.stdout, type=StartRecord)
    assert record.args == ("caf\\xe9",)
    assert record.is_redacted


def test_endless_arguments_are_cut_so_that_the_record_stays_small(project: Path) -> None:
    record = start("train.py", *["x" * 100_000] * 5, cwd=project)
    assert record.args[-1] == "[3 more arguments]"
    assert record.is_redacted


def test_ranks_and_job_numbers_are_recorded_and_no_other_variable(project: Path) -> None:
    record = start("train.py", cwd=project, WORLD_SIZE="2", RANK="1", SLURM_JOB_ID="77", HUGE="value-of-huge")
    assert {"WORLD_SIZE": "2", "RANK": "1", "SLURM_JOB_ID": "77"}.items() <= record.topology.items()
    assert "value-of-huge" not in msgspec.json.encode(record).decode()


def test_torch_is_not_imported_to_record_its_version(project: Path) -> None:
    blocker = "import sys\nsys.modules['torch'] = sys.modules['lightning'] = None\n"
    record = start("-c", blocker + DESCRIBE, cwd=project)
    assert {"python", "ckptmgr", "torch", "lightning", "numpy"} <= set(record.versions)


def test_a_record_survives_being_stored() -> None:
    record = describe_start()
    assert decode_record(encode_record(record), StartRecord, where="start.json") == record
    json.loads(encode_record(record))


# A git work tree.


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, timeout=60)


def test_git_state_names_commit_branch_and_what_is_not_committed(project: Path) -> None:
    git(project, "init")
    assert read_git_state(project / "pkg") is not None
    git(project, "add", ".")
    git(project, "commit", "-m", "first")
    clean = read_git_state(project / "pkg")
    assert clean is not None
    assert clean.branch == "main"
    assert clean.commit is not None
    assert len(clean.commit) == 40
    assert (clean.is_dirty, clean.diff_digest) == (False, None)

    (project / "train.py").write_text("changed")
    changed = read_git_state(project)
    (project / "new.py").touch()
    untracked = read_git_state(project)
    assert changed is not None
    assert untracked is not None
    assert changed.is_dirty
    assert len({clean.diff_digest, changed.diff_digest, untracked.diff_digest}) == 3


def test_the_runs_own_files_do_not_make_the_work_tree_dirty(project: Path) -> None:
    git(project, "init")
    git(project, "add", ".")
    git(project, "commit", "-m", "first")
    (project / "runs" / "a").mkdir(parents=True)
    (project / "runs" / "a" / "ckptmgr.json").touch()
    state = read_git_state(project, ignore=project / "runs" / "a")
    assert state is not None
    assert not state.is_dirty


def test_a_repository_in_a_run_directory_is_not_asked(project: Path, tmp_path: Path) -> None:
    # Its configuration could name a filter, which is a program.
    git(project, "init")
    git(project, "config", "filter.theirs.clean", f"touch {tmp_path}/executed; cat")
    (project / ".gitattributes").write_text("train.py filter=theirs\n")
    git(project, "add", ".")
    git(project, "commit", "-m", "first")
    (tmp_path / "executed").unlink(missing_ok=True)
    (project / "train.py").write_text(DESCRIBE + "\n")
    (project / "ckptmgr.json").touch()
    assert start("train.py", cwd=project).git is None
    assert start("-m", "pkg.fit", cwd=project).git is None
    assert not (tmp_path / "executed").exists()


def test_without_git_or_repository_or_time_there_is_no_state_and_no_error(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_git_state(project) is None
    git(project, "init")
    assert read_git_state(project, timeout_s=0) is None
    monkeypatch.setenv("PATH", "")
    assert read_git_state(project) is None


# Command lines, taken apart.


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python a.py -u -m x", Invocation("script", "a.py", ("-u", "-m", "x"))),
        ("python -- a.py x", Invocation("script", "a.py", ("x",))),
        ("python -Bum pkg x", Invocation("module", "pkg", ("x",), ("-B", "-u"))),
        ("python -mpkg", Invocation("module", "pkg")),
        ("python -OOc 1 x", Invocation("command", None, ("x",), ("-O", "-O"))),
        ("python -X dev -Xutf8=1 -W error a.py", Invocation("script", "a.py", (), ("-Xdev", "-Xutf8=1", "-Werror"))),
        ("python --check-hash-based-pycs never a", Invocation("script", "a", (), ("--check-hash-based-pycs", "never"))),
        ("python - x", Invocation("stdin", None, ("x",))),
        ("python -i", Invocation("stdin", None, (), ("-i",))),
        ("python", Invocation("stdin")),
        ("", Invocation("stdin")),
    ],
)
def test_a_command_line_is_taken_apart_as_the_interpreter_does(line: str, expected: Invocation) -> None:
    assert parse_command_line(line.split()) == expected


@pytest.mark.parametrize(
    ("parent", "options"),
    [
        ("python /v/bin/torchrun --nproc-per-node 2 a.py x", ("--nproc-per-node", "2")),
        ("python -m torch.distributed.run --standalone a.py x", ("--standalone",)),
        ("python /v/bin/torchrun a.py x", ()),
        ("python /v/bin/torchrun --standalone -- a.py x", ("--standalone",)),
        ("python /v/bin/torchrun --standalone b.py x", None),
        ("python /v/bin/accelerate launch a.py x", None),
        ("bash -c x", None),
        ("", None),
    ],
)
def test_torchrun_is_recognised_in_the_parent(parent: str, options: tuple[str, ...] | None) -> None:
    assert torchrun_options(parent.split(), Invocation("script", "a.py", ("x",))) == options


def test_torchrun_with_a_module_is_recognised() -> None:
    worker = Invocation("module", "pkg", ("x",), ("-u",))
    assert torchrun_options(["python", "torchrun", "--standalone", "-m", "pkg", "x"], worker) == ("--standalone",)
    assert torchrun_options(["python", "torchrun", "--standalone", "-m", "--", "pkg", "x"], worker) == ("--standalone",)
    assert torchrun_options(["python", "torchrun", "--standalone", "pkg", "x"], worker) is None
