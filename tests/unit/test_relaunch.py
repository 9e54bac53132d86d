"""Which recorded starts are repeated, how, and which are refused. The record may come from anybody."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ckptmgr.errors import ResumeRefusedError
from ckptmgr.launch.relaunch import RUN_DIR_VARIABLE, Relaunch, relaunch_command, shell_line
from ckptmgr.launch.start_record import StartRecord

DESCRIBE = """
import msgspec, os, sys
from ckptmgr.launch.start_record import describe_start
sys.stdout.buffer.write(msgspec.json.encode(describe_start()))
"""
REPORT = "import os, sys\nprint(sys.argv, os.getcwd(), os.environ.get('CKPTMGR_RUN_DIR'), __name__, flush=True)\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "pkg").mkdir(parents=True)
    (root / "pyproject.toml").touch()
    (root / "train.py").write_text(DESCRIBE)
    (root / "pkg" / "__init__.py").write_text("raise SystemExit('a package was imported')")
    (root / "pkg" / "fit.py").write_text(DESCRIBE)
    run = root / "runs" / "a"
    run.mkdir(parents=True)
    (run / "ckptmgr.json").touch()
    return root


def record(project: Path, **fields: Any) -> StartRecord:
    facts: dict[str, Any] = {
        "version": 1,
        "started_at": "2026-01-01T00:00:00.000Z",
        "kind": "script",
        "target": "train.py",
        "script": str(project / "train.py"),
        "script_in_project": "train.py",
        "cwd": str(project),
        "cwd_in_project": ".",
        "project_root": str(project),
        "executable": "/nowhere/python",
        "versions": {},
        "host": "h",
        "pid": 1,
        "platform": "p",
    }
    return msgspec.convert(facts | fields, StartRecord)


def relaunch(project: Path, start: StartRecord, **options: Any) -> Relaunch:
    return relaunch_command(start, run_dir="runs/a", cwd=project, **options)


def refusal(project: Path, start: StartRecord, **options: Any) -> ResumeRefusedError:
    with pytest.raises(ResumeRefusedError) as refused:
        relaunch(project, start, **options)
    assert refused.value.why
    assert refused.value.next
    return refused.value


def run(command: Relaunch) -> str:
    return subprocess.run(
        command.argv,
        cwd=command.cwd,
        env=os.environ | command.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


# Round trips: a real start is recorded, and what it is relaunched as really runs.


@pytest.mark.parametrize(
    ("words", "folder", "argv"),
    [
        (["train.py", "--lr", "0.1", "a b"], ".", "['train.py', '--lr', '0.1', 'a b']"),
        (["../train.py"], "pkg", "['../train.py']"),
        (["-u", "-W", "ignore", "train.py"], ".", "['train.py']"),
    ],
)
def test_a_script_runs_again_as_it_was_typed(project: Path, words: list[str], folder: str, argv: str) -> None:
    done = subprocess.run([sys.executable, *words], cwd=project / folder, capture_output=True, timeout=60, check=True)
    start = msgspec.json.decode(done.stdout, type=StartRecord)
    (project / "train.py").write_text(REPORT)
    command = relaunch(project, start)
    assert run(command) == f"{argv} {project / folder} {project / 'runs' / 'a'} __main__\n"
    assert command.argv[0] == sys.executable
    assert command.notes == ()


def test_a_module_runs_again_and_no_package_is_imported_to_find_it(project: Path) -> None:
    (project / "pkg" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "pkg.fit", "x"], cwd=project, capture_output=True, timeout=60, check=True
    )
    start = msgspec.json.decode(done.stdout, type=StartRecord)
    (project / "pkg" / "__init__.py").write_text("import sys; sys.stderr.write('imported')")
    (project / "pkg" / "fit.py").write_text(REPORT)
    command = relaunch(project, start)
    assert command.argv[1:] == ("-m", "pkg.fit", "x")
    assert run(command).startswith(f"['{project / 'pkg' / 'fit.py'}', 'x']")
    assert "pkg" not in sys.modules


def test_an_absolute_script_stays_absolute(project: Path) -> None:
    command = relaunch(project, record(project, target=str(project / "train.py")))
    assert command.argv[1] == str(project / "train.py")


def test_a_run_is_relaunched_in_another_clone_of_the_project(project: Path, tmp_path: Path) -> None:
    start = record(project, cwd=str(project / "pkg"), cwd_in_project="pkg", target="../train.py", args=["x"])
    clone = project.rename(tmp_path / "clone")
    command = relaunch(clone, start)
    assert (command.argv[1:], command.cwd) == (("../train.py", "x"), clone / "pkg")


def test_the_checkpoint_to_go_on_from_is_handed_over(project: Path) -> None:
    assert relaunch(project, record(project)).env == {RUN_DIR_VARIABLE: str(project / "runs" / "a")}
    assert relaunch(project, record(project), selector="1200").env == {
        RUN_DIR_VARIABLE: str(project / "runs" / "a") + "@1200"
    }
    remote = relaunch_command(record(project), run_dir="s3://b/run", cwd=project, selector="best")
    assert remote.env == {RUN_DIR_VARIABLE: "s3://b/run@best"}


def test_torchrun_runs_again(project: Path) -> None:
    start = record(project, launcher=["--standalone", "--nproc_per_node=2"], args=["x"], interpreter_flags=["-u"])
    command = relaunch(project, start)
    assert command.argv[1:] == (
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("train.py", "x"),
    )


def test_a_program_started_by_torchrun_keeps_its_own_options(project: Path) -> None:
    from torch.distributed.run import parse_args

    # torchrun has options of its own that begin with --n.
    for kind, target in (("script", "train.py"), ("module", "pkg.fit")):
        args = ["--n", "5", "--nproc", "3"]
        start = record(project, kind=kind, target=target, launcher=["--standalone"], args=args)
        for nproc in (None, 2):
            meant = parse_args(list(relaunch(project, start, nproc=nproc).argv[3:]))
            assert (meant.training_script, meant.training_script_args, meant.module) == (target, args, kind == "module")


# On another number of processes.


def test_a_script_goes_on_on_as_many_processes_as_are_asked_for(project: Path) -> None:
    options = ["--nproc_per_node", "8", "--max-restarts=3", "--monitor_interval", "0.5", "--rdzv-endpoint=localhost:0"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    command = relaunch(project, record(project, launcher=options, args=["x"]), nproc=2)
    assert command.argv[1:] == (*torchrun, "2", "--max-restarts=3", "--monitor-interval=0.5", "train.py", "x")
    assert command.has_launcher
    assert command.notes == ()
    assert relaunch(project, record(project), nproc=4).argv[1:] == (*torchrun, "4", "train.py")
    alone = relaunch(project, record(project, launcher=options), nproc=1)
    assert alone.argv[1:] == ("train.py",)
    assert not alone.has_launcher


def test_a_job_that_goes_back_is_not_started_again_by_torchrun(project: Path) -> None:
    # Each start would go back to step 1200, whatever was trained since.
    start = record(project, launcher=["--nproc-per-node=8", "--max-restarts=3"])
    command = relaunch(project, start, nproc=2, selector="1200")
    assert "--max-restarts=3" not in command.argv
    assert "--max-restarts=3" in command.notes[0]


def test_options_of_torchrun_that_reach_further_are_left_out_and_named(project: Path) -> None:
    command = relaunch(project, record(project, launcher=["--log-dir", "/etc", "--no-python", "--role=x"]), nproc=2)
    assert command.argv[4:] == ("--nproc-per-node", "2", "train.py")
    assert all(word in command.notes[0] for word in ("--log-dir", "/etc", "--no-python"))


@pytest.mark.parametrize("options", [["--nnodes=2"], ["--nnodes", "1:4"], ["--node_rank", "1"]])
def test_a_job_of_several_machines_is_not_squeezed_into_one(project: Path, options: list[str]) -> None:
    refused = refusal(project, record(project, launcher=options), nproc=2)
    assert options[0] in str(refused.why)
    assert "torchrun" in str(refused.next)


def test_ranks_of_an_unknown_launcher_go_on_under_torchrun_if_that_is_asked_for(project: Path) -> None:
    topology = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "8"}
    assert "train.py" in relaunch(project, record(project, topology=topology), nproc=8).argv


def test_another_number_of_processes_lets_no_other_code_run(project: Path, tmp_path: Path) -> None:
    script = tmp_path / "elsewhere.py"
    script.write_text(REPORT)
    start = record(project, target=str(script), script=str(script), script_in_project=None)
    assert "--allow-command" in str(refusal(project, start, nproc=2).next)


def test_a_console_script_of_the_project_runs_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = project.parent / "bin"
    scripts.mkdir()
    (scripts / "fit").write_text(REPORT)
    info = project / "fit-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: fit\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nfit = pkg.fit:main\nevil = json.tool:main\n")
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(scripts))
    start = record(project, kind="entry-point", target="fit", script=None, script_in_project=None, args=["x"])
    assert relaunch(project, start).argv[1:] == (str(scripts / "fit"), "x")
    (scripts / "evil").touch()
    assert "outside" in str(refusal(project, msgspec.structs.replace(start, target="evil")).why)
    assert "not installed" in str(refusal(project, msgspec.structs.replace(start, target="gone")).why)


# What is refused, and what allowing it changes.


def test_a_script_outside_of_the_project_wants_to_be_allowed(project: Path, tmp_path: Path) -> None:
    script = tmp_path / "elsewhere.py"
    script.write_text(REPORT)
    start = record(project, target=str(script), script=str(script), script_in_project=None, args=["--x", "a b"])
    refused = refusal(project, start)
    assert "outside" in str(refused.why)
    assert "--allow-command" in str(refused.next)
    assert f"{RUN_DIR_VARIABLE}={project / 'runs' / 'a'} python {script} --x 'a b'" in str(refused.next)
    assert relaunch(project, start, allow_command=True).argv[1:] == (str(script), "--x", "a b")


def test_a_path_that_leaves_the_project_by_dots_or_links_is_refused(project: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").touch()
    (project / "link.py").symlink_to(tmp_path / "elsewhere.py")
    (project / "loop.py").symlink_to(project / "loop.py")
    for path in ("../elsewhere.py", "link.py", "loop.py", "/etc/passwd", "gone.py", "a\0b.py"):
        refusal(project, record(project, target=path, script=None, script_in_project=path))


def test_a_script_in_a_run_directory_is_refused(project: Path) -> None:
    for folder in ("runs/a", "runs/a/checkpoints"):
        (project / folder).mkdir(exist_ok=True)
        (project / folder / "evil.py").touch()
        path = f"{folder}/evil.py"
        refused = refusal(project, record(project, target=path, script=None, script_in_project=path))
        assert "lies in the run directory" in str(refused.why)


def test_a_run_directory_that_pretends_to_be_a_project_is_refused(project: Path) -> None:
    run_dir = project / "runs" / "a"
    (run_dir / "pyproject.toml").touch()
    (run_dir / "train.py").touch()
    with pytest.raises(ResumeRefusedError, match="run directory"):
        relaunch_command(record(project), run_dir=".", cwd=run_dir)


def test_installed_programs_are_refused_even_where_the_environment_lies_in_the_project(project: Path) -> None:
    environment = project / ".venv"
    packages = environment / "lib" / "python3" / "site-packages"
    packages.mkdir(parents=True)
    (environment / "pyvenv.cfg").touch()
    (environment / "bin").mkdir()
    for path in (environment / "bin" / "pip", packages / "pip.py"):
        path.touch()
        relative = path.relative_to(project).as_posix()
        assert "environment" in str(refusal(project, record(project, script_in_project=relative, script=None)).why)


@pytest.mark.parametrize("module", ["pip", "this", "zipfile", "sys", "torch.distributed.run", "gone", "a b", "", "..x"])
def test_a_module_that_is_not_the_projects_is_refused(project: Path, module: str) -> None:
    refusal(project, record(project, kind="module", target=module, script=None, script_in_project=None))


def test_a_module_that_shadows_another_from_a_run_directory_is_refused(project: Path) -> None:
    run_dir = project / "runs" / "a"
    (run_dir / "numpy.py").touch()
    (project / "fit.py").touch()
    start = record(project, kind="module", target="fit", cwd=str(run_dir), cwd_in_project="runs/a")
    command = relaunch(project, start)
    assert command.cwd == project
    assert "working directory" in command.notes[0]
    refusal(project, msgspec.structs.replace(start, target="numpy"))


@pytest.mark.parametrize("cwd", ["/", "/nowhere", "relative", "", "\0"])
def test_a_working_directory_that_is_gone_or_elsewhere_is_not_used(project: Path, cwd: str) -> None:
    command = relaunch(project, record(project, cwd=cwd, cwd_in_project=None))
    assert command.cwd == project
    assert command.argv[1:] == ("train.py",)
    assert len(command.notes) == 1


def test_interpreter_options_that_could_load_code_are_left_out(project: Path) -> None:
    flags = ["-u", "-O", "-Xdev", "-Wignore::DeprecationWarning", "-Werror"]
    unsafe = ["-Wignore::evil.Warning", "-Xpycache_prefix=/x", "-i", "-S", "-Xpresite=evil", "--help"]
    start = record(project, interpreter_flags=flags + unsafe)
    command = relaunch(project, start)
    assert command.argv[1:] == (*flags, "train.py")
    assert all(flag in command.notes[0] for flag in unsafe)
    assert relaunch(project, start, allow_command=True).argv[1:] == (*flags, *unsafe, "train.py")


@pytest.mark.parametrize(
    "options",
    [
        ["--no-python"],
        ["--nnodes=4"],
        ["--nnodes"],
        ["--rdzv-endpoint", "evil.example:29400"],
        ["--rdzv-conf=x=y"],
        ["--log-dir", "/etc"],
        ["evil.py"],
        ["-m"],
        ["--standalone=1"],
    ],
)
def test_options_of_torchrun_that_reach_further_want_to_be_allowed(project: Path, options: list[str]) -> None:
    start = record(project, launcher=options)
    assert "torchrun" in str(refusal(project, start).why)
    assert relaunch(project, start, allow_command=True).argv[3:] == (*options, "train.py")


def test_ranks_of_an_unknown_launcher_are_not_relaunched_as_one_process(project: Path) -> None:
    topology = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "8"}
    assert "8 ranks" in str(refusal(project, record(project, topology=topology), allow_command=True).why)


@pytest.mark.parametrize("kind", ["command", "stdin", "interactive", "notebook"])
def test_code_that_is_in_no_file_is_refused_with_a_snippet_to_paste(project: Path, kind: str) -> None:
    for allow_command in (False, True):
        refused = refusal(project, record(project, kind=kind, target=None), allow_command=allow_command)
        assert f"{RUN_DIR_VARIABLE}={project / 'runs' / 'a'}" in str(refused.next)
        assert f"CheckpointManager('{project / 'runs' / 'a'}')" in str(refused.next)


def test_redacted_arguments_are_never_passed_on(project: Path) -> None:
    start = record(project, args=["--token", "[redacted]"], is_redacted=True)
    for allow_command in (False, True):
        refused = refusal(project, start, allow_command=allow_command)
        assert f"{RUN_DIR_VARIABLE}={project / 'runs' / 'a'} python train.py --token '[redacted]'" in str(refused.next)


def test_the_whole_file_system_is_no_project(project: Path) -> None:
    with pytest.raises(ResumeRefusedError, match="whole file system"):
        relaunch_command(record(project), run_dir="runs/a", cwd=Path("/"))


# What is printed and how it is started.


@pytest.mark.parametrize(
    "word", ["a b", "it's", "$(x)", "\x1b[2Kls", "caf\xe9", "\u202egnp.sh", "a\nb", "back\\slash", ""]
)
def test_a_printed_command_is_the_same_command_when_pasted_and_hides_nothing(word: str) -> None:
    line = shell_line([sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))", word])
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ascii([word])


def test_the_shell_line_changes_directory_and_names_the_run(project: Path) -> None:
    line = relaunch(project, record(project)).shell_line
    assert line == f"cd {project} && {RUN_DIR_VARIABLE}={project}/runs/a {shlex.quote(sys.executable)} train.py"


STARTER = """
import sys
from pathlib import Path
from ckptmgr.launch.relaunch import Relaunch, start
start(Relaunch((sys.executable, "child.py"), Path("inner"), {"CKPTMGR_RUN_DIR": "r"}))
"""


def child(project: Path, code: str) -> subprocess.Popen[str]:
    (project / "inner").mkdir()
    (project / "inner" / "child.py").write_text(code)
    return subprocess.Popen([sys.executable, "-c", STARTER], cwd=project, stdout=subprocess.PIPE, text=True)


def test_the_exit_status_of_the_relaunched_program_passes_through(project: Path) -> None:
    process = child(project, REPORT + "sys.exit(75)")
    output, _ = process.communicate(timeout=60)
    assert output == f"['child.py'] {project / 'inner'} r __main__\n"
    assert process.returncode == 75


def test_a_signal_reaches_the_relaunched_program_itself(project: Path) -> None:
    code = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('ready', flush=True)\n"
    process = child(project, code + "signal.pause()")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
