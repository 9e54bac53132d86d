"""Lightning on several ranks: real processes that torchrun starts, over gloo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "lightning_program.py"

pytestmark = pytest.mark.timeout(400)


class Training:
    """Starts of one run, and what its ranks have said in all of them."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def start(self, ranks: int, **options: Any) -> str:
        """Train on so many ranks; return the output, once all processes have ended."""
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        done = subprocess.run(
            [*launcher, str(PROGRAM), str(self.run_dir), json.dumps(options)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        return done.stdout + done.stderr

    def said(self, rank: int) -> list[dict[str, Any]]:
        lines = Path(f"{self.run_dir}-log", f"rank-{rank}").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def steps(self, rank: int) -> dict[int, dict[str, Any]]:
        """Return what was trained in each step, as the last start that came there did."""
        return {line["step"]: line for line in self.said(rank) if "step" in line}

    def samples(self, epoch: int) -> Counter[int]:
        """Return how often each sample of an epoch was trained, counting steps that were done again once."""
        ranks = [int(path.name.removeprefix("rank-")) for path in Path(f"{self.run_dir}-log").iterdir()]
        lines = [line for rank in ranks for line in self.steps(rank).values() if line["epoch"] == epoch]
        return Counter(sample for line in lines for sample in line["samples"])


def exit_codes(output: str) -> list[int]:
    return [int(code) for code in re.findall(r"^  exitcode +: (-?\d+)", output, re.MULTILINE)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A run of two ranks that nothing has interrupted."""
    training = Training(tmp_path_factory.mktemp("straight") / "run")
    training.start(2)
    assert training.said(0)[-1]["end"] == 8
    return training


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path / "run")


def goes_on_like(training: Training, straight: Training) -> bool:
    return all(
        training.steps(rank) == straight.steps(rank) and training.said(rank)[-1] == straight.said(rank)[-1]
        for rank in (0, 1)
    )


def test_a_rank_that_is_killed_costs_no_bit(training: Training, straight: Training) -> None:
    assert -9 in exit_codes(training.start(2, die=[1, 5], manager={"background": False}))
    # The other seed would show where something random is not restored.
    assert "from step 4 (epoch 0, 4 batches trained)" in training.start(2, seed=9)
    assert goes_on_like(training, straight)


def test_sigterm_to_one_rank_stops_all_at_one_step_with_code_75(training: Training, straight: Training) -> None:
    output = training.start(2, signal=[1, 1])
    assert exit_codes(output) == [75, 75]
    (stopped,) = re.findall(r"told to stop, and step (\d+) is saved", output)
    # The ranks talk at the end of an epoch, if not before. After the last step of all, ranks would differ by design:
    # DDP gives rank 0's running statistics to the others with the next batch, and a resume does at once.
    assert int(stopped) <= 4
    assert [max(training.steps(rank)) + 1 for rank in (0, 1)] == [int(stopped)] * 2
    assert f"from step {stopped} " in training.start(2, seed=9)
    assert goes_on_like(training, straight)


def test_sigterm_in_validation_on_one_rank_stops_all_of_them(training: Training) -> None:
    output = training.start(2, val=True, signal=[1, "val", 0])
    assert exit_codes(output) == [75, 75]
    assert "told to stop, and step 2 is saved" in output


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_goes_on_on_other_numbers_of_ranks_with_each_sample_once(training: Training, workers: int) -> None:
    same = {"samples": 64, "batch_size": 2, "workers": workers}
    # Of 64 samples, 4 ranks train 2 * 8, 2 ranks 4 * 4, one rank 8 * 2, and 4 ranks the rest.
    assert "step 2 " in training.start(4, **same, steps=2)
    assert "world size 4 -> 2: going on after 16 samples" in training.start(2, **same, steps=6, seed=6)
    assert "world size 2 -> 1: going on after 32 samples" in training.start(1, **same, steps=14, seed=7)
    assert "world size 1 -> 4: going on after 48 samples" in training.start(4, **same, seed=8)
    for epoch in (0, 1):
        assert training.samples(epoch) == Counter(range(64))


def test_an_elastic_sampler_of_the_user_keeps_the_global_batch(training: Training) -> None:
    training.start(2, user_sampler=8, steps=2)
    assert "world size 2 -> 1: going on after 16 samples" in training.start(1, user_sampler=8)
    assert training.samples(0) == Counter(range(32))
    assert training.said(0)[-1]["end"] == 8


def test_an_epoch_of_one_rank_is_not_gone_on_with_on_two(training: Training) -> None:
    training.start(1, steps=3)
    output = training.start(2)
    assert "batch 3 of epoch 0 was counted on 1 rank, and this job has 2 ranks" in output
    assert "go on with 1 rank until the end of the epoch" in output
    # Refused before anything was trained.
    assert max(training.steps(0)) == 2


def test_all_ranks_that_fail_alike_save_their_last_step(training: Training) -> None:
    training.start(2, fail=5, manager={"save_on_exception": True, "every_n_train_steps": 100})
    assert "from step 5 " in training.start(2, steps=6)


def test_a_rank_that_fails_alone_saves_nothing_and_says_why(training: Training) -> None:
    options = {"save_on_exception": True, "every_n_train_steps": 100, "ranks_timeout": 3}
    output = training.start(2, fail=[1, 5], manager=options)
    assert "nothing was saved after" in output
    assert "saved step" not in output
    assert "training starts from nothing" in training.start(2, steps=1)
