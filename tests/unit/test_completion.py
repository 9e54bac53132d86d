"""Shells complete what could be typed: asked in the way that each of them asks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from run_samples import create_run, save, start

from ckptmgr.cli.main import COMMANDS, _commands, run
from ckptmgr.storage.open import open_storage

Output = pytest.CaptureFixture[str]
PROGRAM = "import sys; sys.argv[0] = 'ckptmgr'; from ckptmgr.cli.main import main; main()"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a run of steps 100, 200 (tagged) and 250."""
    storage = open_storage(tmp_path / "runs" / "x")
    create_run(storage)
    attempt = start(storage)
    save(storage, attempt, 100)
    save(storage, attempt, 200, number=1, tags=["paper"])
    save(storage, attempt, 250, number=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(shell: str, words: list[str], **environment: str) -> list[str]:
    """Ask as a shell does: the words, the last of which is being typed."""
    asking = {"_CKPTMGR_COMPLETE": f"{shell}_complete", **environment}
    if shell == "zsh":
        asking |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    elif shell == "fish":
        asking |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": words[-1]}
    else:
        asking |= {"COMP_LINE": " ".join(words)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **asking}, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


def test_commands_are_completed_without_importing_them(here: Path) -> None:
    assert asked("bash", ["ckptmgr", "re"]) == ["plain,resume"]
    assert {line.removeprefix("plain,") for line in asked("bash", ["ckptmgr", ""])} == set(COMMANDS)


def test_options_are_completed(here: Path) -> None:
    assert "plain,--json" in asked("bash", ["ckptmgr", "verify", "--"])
    assert "plain,--quiet" in asked("bash", ["ckptmgr", "verify", "--"])
    assert "plain,--traceback" in asked("bash", ["ckptmgr", "--"])


def test_a_run_is_completed_as_a_directory_and_a_configuration_as_a_file(here: Path) -> None:
    for command in ("show", "prune"):
        assert asked("bash", ["ckptmgr", command, "ru"]) == ["dir,ru"]
    assert asked("bash", ["ckptmgr", "run", "conf"]) == ["file,conf"]
    assert asked("bash", ["ckptmgr", "resume", "runs/x", "--to", "ru"]) == ["dir,ru"]


def test_checkpoints_are_completed_after_the_at_sign(here: Path) -> None:
    lines = asked("zsh", ["ckptmgr", "show", "runs/x@"])
    assert lines[1::3] == [f"runs/x@{name}" for name in ("latest", "best", "paper", "250", "200", "100")]
    assert asked("fish", ["ckptmgr", "verify", "runs/x@pa"]) == ["plain,runs/x@paper\tstep 200"]
    assert asked("fish", ["ckptmgr", "show", "runs/x@100", "runs/x@lat"]) == ["plain,runs/x@latest\tstep 250"]


def test_bash_is_given_only_what_follows_its_own_word_break(here: Path) -> None:
    assert asked("bash", ["ckptmgr", "show", "runs/x@2"], COMP_WORDBREAKS=" @:=") == ["plain,250", "plain,200"]
    assert asked("bash", ["ckptmgr", "show", "runs/x@25"], COMP_WORDBREAKS=" ") == ["plain,runs/x@250"]


@pytest.mark.parametrize("word", ["nothing@", "s3://bucket/run@", "@", "runs/x@zzz"])
def test_what_is_no_local_run_completes_nothing(here: Path, word: str) -> None:
    assert asked("bash", ["ckptmgr", "show", word]) in ([], [f"dir,{word}"])


def test_a_damaged_checkpoint_is_left_out(here: Path) -> None:
    next(here.glob("runs/x/checkpoints/0000000250-*/manifest.json")).write_text("{}")
    assert asked("zsh", ["ckptmgr", "show", "runs/x@25"]) == []
    assert "runs/x@200" in asked("zsh", ["ckptmgr", "show", "runs/x@2"])
    assert asked("fish", ["ckptmgr", "show", "runs/x@l"]) == ["plain,runs/x@latest\tstep 200"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_a_real_bash_completes_references(here: Path, capsys: Output) -> None:
    assert run(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    (here / "ckptmgr").write_text(f"#!{sys.executable}\n{PROGRAM}\n")
    (here / "ckptmgr").chmod(0o755)
    asking = """
        complete_line() { COMP_LINE=$1; COMP_POINT=${#1}; _ckptmgr_completion ckptmgr; echo "${COMPREPLY[@]}"; }
        complete_line 'ckptmgr sh'; complete_line 'ckptmgr show runs/x@la'; complete_line 'ckptmgr show runs/x@'
        complete_line 'ckptmgr show --'; complete -p ckptmgr
    """
    environment = {**os.environ, "PATH": f"{here}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script + asking], env=environment, capture_output=True, text=True, timeout=120
    )
    lines = done.stdout.splitlines()
    assert lines[:3] == ["show", "latest", "latest best paper 250 200 100"], done.stderr
    assert "--json" in lines[3]
    assert "-F _ckptmgr_completion ckptmgr" in lines[4]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_printed(shell: str, capsys: Output) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_CKPTMGR_COMPLETE={shell}_complete" in script
    assert run(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shell": shell, "script": script}


def test_an_unknown_shell_is_a_usage_error(capsys: Output) -> None:
    assert run(["completion", "tcsh"]) == 2
    assert "bash" in capsys.readouterr().err


def test_completing_does_not_import_torch(here: Path) -> None:
    code = (
        "import os, sys; from ckptmgr.cli.completion import answer; from ckptmgr.cli.main import _commands;"
        "os.environ['COMP_LINE'] = sys.argv[1]; answer(_commands, 'bash_complete');"
        "sys.exit('torch' in sys.modules or 'lightning' in sys.modules or 'rich' in sys.modules)"
    )
    for line in ("ckptmgr show runs/x@", "ckptmgr prune --", "ckptmgr "):
        subprocess.run([sys.executable, "-c", code, line], check=True, stdout=subprocess.DEVNULL)


def test_both_sides_of_a_comparison_are_completed(here: Path) -> None:
    assert asked("fish", ["ckptmgr", "diff", "runs/x@pa"]) == ["plain,runs/x@paper\tstep 200"]
    assert asked("fish", ["ckptmgr", "diff", "runs/x", "runs/x@pa"]) == ["plain,runs/x@paper\tstep 200"]
    # Weights alone are files.
    assert asked("fish", ["ckptmgr", "diff", "runs/x", "mod"]) == ["file,mod"]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_json_and_quiet(name: str) -> None:
    command = _commands.get_command(click.Context(_commands), name)
    assert command is not None
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--json", "--quiet"} <= options
