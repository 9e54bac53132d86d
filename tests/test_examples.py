"""Every example and every block of the README does what it says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*argv: str, cwd: Path) -> str:
    done = subprocess.run(argv, cwd=cwd, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(argv)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", ["lightning_fit.py", "plain_pytorch.py"])
def test_an_example_trains_and_says_so_when_it_is_started_again(name: str, tmp_path: Path) -> None:
    for _ in range(2):
        run(sys.executable, str(ROOT / "examples" / name), cwd=tmp_path)


def test_the_demo_proves_that_nothing_was_lost(tmp_path: Path) -> None:
    out = run(sys.executable, "examples/resume_after_kill.py", cwd=ROOT)
    assert out.count("bit-identical to the uninterrupted run: yes") == 2
    assert "resumed at step 100" in out


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES}
    assert {name: length for name, length in lengths.items() if length > 80} == {}


def test_every_block_of_the_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
    assert {kind for kind, _ in blocks} == {"console", "python"}
    commands = 0
    for number, (kind, text) in enumerate(blocks):
        if kind == "python":
            # A script, as the reader would write it: what `python -c` was given cannot be started again.
            script = tmp_path / f"block_{number}.py"
            script.write_text(text)
            run(sys.executable, script.name, cwd=tmp_path)
    for kind, text in blocks:
        for line in text.splitlines() if kind == "console" else []:
            command = line.removeprefix("$ ").split("#")[0].strip()
            if command.startswith("ckptmgr "):
                commands += 1
                run(sys.executable, "-m", *shlex.split(command), cwd=tmp_path)
            else:
                # `make demo` and `make test` are what runs this test.
                assert command.split()[0] in ("git", "make"), line
    assert commands >= 4


def test_the_block_for_several_ranks_goes_on_from_two_ranks_to_one(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    (tmp_path / "train.py").write_text(next(block for block in blocks if "DistributedDataParallel" in block))
    job = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    run(*job, cwd=tmp_path)
    shown = run(sys.executable, "-m", "ckptmgr", "ls", "runs/three", "--json", cwd=tmp_path)
    assert '"step": 16' in shown
    run(sys.executable, "train.py", cwd=tmp_path)


def test_every_make_target_that_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = [target for targets in re.findall(r"(?:^\$ |`)make ([a-z ]+)", README, re.M) for target in targets.split()]
    assert {"demo", "test", "lint", "types"} <= set(named)
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), target
