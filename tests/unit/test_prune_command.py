"""``ckptmgr prune``: what goes, why, and when it must not touch a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_samples import create_run, save, start

from ckptmgr.cli.main import run
from ckptmgr.errors import RunInUseError
from ckptmgr.format.layout import CheckpointId, attempt_key, manifest_key, note_key
from ckptmgr.format.manifest import AttemptClaim, Note
from ckptmgr.format.record import encode_record
from ckptmgr.policy import KeepLast
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import claim_attempt, record_end
from ckptmgr.run.upkeep import judge, prune_run
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.protocol import Storage
from ckptmgr.testing.faulty import FaultyStorage
from ckptmgr.testing.memory import MemoryStorage

Output = pytest.CaptureFixture[str]


def fill(storage: Storage) -> None:
    """Steps 100 to 600 with losses, 200 tagged, 300 the best; 700 beside the line; a torn save of 650; ended."""
    create_run(storage)
    first = start(storage)
    for number, step in enumerate((100, 200, 300, 400, 500)):
        loss = abs(step - 300) / 100
        tags = ["paper"] if step == 200 else []
        last = save(storage, first, step, number=number, metrics={"loss": loss, "acc": step / 1000}, tags=tags)
    save(storage, first, 700, number=8, metrics={"loss": -1.0})
    second = start(storage, continues=last)
    save(storage, second, 600, metrics={"loss": 3.0})
    torn = CheckpointId(650, second, 1)
    storage.write(torn.folder + "model.safetensors", [b"half"])
    record_end(storage, second, "preempted", step=650)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    fill(open_storage(tmp_path / "run"))
    return tmp_path / "run"


def steps(run_dir: Path) -> list[int]:
    return [id.step for id in Catalog(open_storage(run_dir)).committed]


def files(run_dir: Path) -> set[str]:
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}


def row(table: str, step: int) -> str:
    return next(line for line in table.splitlines() if line.split()[0:1] == [str(step)])


def test_without_options_the_defaults_of_the_managers_are_kept_and_named(run_dir: Path, capsys: Output) -> None:
    assert run(["prune", str(run_dir)]) == 0
    output = capsys.readouterr()
    assert steps(run_dir) == [200, 300, 400, 500, 600, 700]
    assert "kept: best 1 by loss (min), last 3, what is tagged (the default)" in output.err
    assert "deleted 1 checkpoint" in output.err
    assert row(output.out, 100).rstrip().endswith("drop     nothing keeps it")
    assert row(output.out, 200).rstrip().endswith("keep     tagged paper")
    assert row(output.out, 300).rstrip().endswith("keep     best loss")
    assert row(output.out, 600).rstrip().endswith("keep     newest, last 3")
    assert row(output.out, 700).rstrip().endswith("keep     not on the line")


def test_what_was_deleted_is_gone_with_its_files_and_the_rest_is_whole(run_dir: Path) -> None:
    assert run(["prune", str(run_dir), "--keep-last", "1"]) == 0
    assert steps(run_dir) == [200, 600, 700]
    catalog = Catalog(open_storage(run_dir))
    assert catalog.torn == []
    assert len(list((run_dir / "checkpoints").iterdir())) == 3
    assert catalog.latest().step == 600
    assert all(verify_checkpoint(catalog, id) == [] for id in catalog.committed)


def test_a_dry_run_touches_nothing_and_says_the_same(run_dir: Path, capsys: Output) -> None:
    before = files(run_dir)
    assert run(["prune", str(run_dir), "--keep-last", "1", "--dry-run"]) == 0
    output = capsys.readouterr()
    assert files(run_dir) == before
    assert "would delete 4 checkpoints" in output.err
    assert "would be cleared away" in output.err
    assert "drop" in row(output.out, 500)


def test_pruning_claims_an_attempt_that_leads_nowhere_and_ends_it(run_dir: Path) -> None:
    line = Catalog(open_storage(run_dir)).line
    assert run(["prune", str(run_dir), "--keep-last", "1"]) == 0
    catalog = Catalog(open_storage(run_dir))
    assert catalog.attempts[3] == {"claim", "end"}
    assert catalog.line == line


def test_where_nothing_is_to_be_deleted_nothing_is_claimed(run_dir: Path, capsys: Output) -> None:
    assert run(["prune", str(run_dir), "--keep-last", "9"]) == 0  # clears the torn save away
    before = files(run_dir)
    assert run(["prune", str(run_dir), "--keep-last", "9"]) == 0
    assert files(run_dir) == before
    assert "nothing to delete" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--keep-best", "acc:2:max"], [200, 400, 500, 600, 700]),
        (["--keep-best", "loss:2", "--keep-best", "acc:1:max"], [200, 300, 400, 500, 600, 700]),
        (["--keep-best", "loss"], [200, 300, 600, 700]),
        (["--keep-every", "300"], [200, 300, 600, 700]),
        (["--keep-every", "300ba", "--keep-last", "2"], [200, 300, 500, 600, 700]),
        (["--keep-within", "7d"], [100, 200, 300, 400, 500, 600, 700]),
        (["--budget", "1"], [200, 600, 700]),
        (["--budget", "1GB"], [100, 200, 300, 400, 500, 600, 700]),
        (["--keep-last", "9", "--abandoned"], [100, 200, 300, 400, 500, 600]),
    ],
)
def test_options_say_what_to_keep(run_dir: Path, options: list[str], left: list[int]) -> None:
    assert run(["prune", str(run_dir), *options]) == 0
    assert steps(run_dir) == left


def test_a_budget_alone_keeps_the_best_and_as_many_of_the_newest_as_fit(run_dir: Path, capsys: Output) -> None:
    nbytes = Catalog(open_storage(run_dir)).latest().nbytes
    assert run(["prune", str(run_dir), "--budget", str(4 * nbytes)]) == 0
    assert steps(run_dir) == [200, 300, 500, 600, 700]
    assert f"over the budget of {4 * nbytes} bytes" in row(capsys.readouterr().out, 400)


def test_a_metric_that_came_late_decides(run_dir: Path) -> None:
    storage = open_storage(run_dir)
    id = next(id for id in Catalog(storage).committed if id.step == 100)
    note = Note(version=1, checkpoint=str(id), attempt=2, created_at="", metrics={"loss": -5.0})
    storage.write(note_key(id, 2, 0), [encode_record(note)])
    assert run(["prune", str(run_dir), "--keep-best", "loss"]) == 0
    assert steps(run_dir) == [100, 200, 600, 700]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-best", "los:1:min"], "no checkpoint on the line has a value of 'los'"),
        (["--keep-best", "acc"], "does not say which way is better"),
        (["--keep-best", "3"], "names no metric"),
        (["--keep-best", "loss:0"], "KeepBest(k) was given 0"),
        (["--keep-last", "0"], "KeepLast(k) was given 0"),
        (["--keep-every", "10min"], "is a time"),
        (["--keep-every", "often"], "'often' is no interval"),
        (["--keep-within", "a while"], "KeepWithin(age) was given 'a while'"),
        (["--budget", "lots"], "Budget(limit) was given 'lots'"),
        (["--keep-last", "x"], "'x'"),
    ],
)
def test_an_option_that_cannot_be_meant_deletes_nothing(
    run_dir: Path, capsys: Output, options: list[str], message: str
) -> None:
    before = files(run_dir)
    assert run(["prune", str(run_dir), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert files(run_dir) == before


def test_what_is_damaged_is_not_judged_and_stays(run_dir: Path, capsys: Output) -> None:
    next(run_dir.glob("checkpoints/0000000400-*/model.safetensors")).unlink()
    (next(run_dir.glob("checkpoints/0000000500-*")) / "manifest.json").write_bytes(b"{}")
    assert run(["prune", str(run_dir), "--keep-last", "1", "--abandoned"]) == 0
    assert steps(run_dir) == [200, 400, 500, 600]
    table = capsys.readouterr().out
    assert "damaged" in row(table, 400)
    assert "damaged" in row(table, 500)


def test_json_tells_all_of_it_on_stdout_alone(run_dir: Path, capsys: Output) -> None:
    assert run(["prune", str(run_dir), "--keep-last", "2", "--json"]) == 0
    output = capsys.readouterr()
    document = json.loads(output.out)
    by_step = {entry["step"]: entry for entry in document["checkpoints"]}
    assert by_step[100] == {
        "id": "0000000100-000001-000000",
        "step": 100,
        "is_kept": False,
        "reasons": ["nothing keeps it"],
        "nbytes": by_step[200]["nbytes"],
        "metrics": {"loss": 2.0, "acc": 0.1},
        "tags": [],
    }
    assert [step for step, entry in by_step.items() if entry["is_kept"]] == [200, 500, 600, 700]
    assert document["deleted"] == [by_step[step]["id"] for step in (100, 300, 400)]
    assert document["torn"] == ["0000000650-000002-000001"]
    assert document["nbytes"] == 3 * by_step[100]["nbytes"]
    assert output.err == ""


# Who may delete


@pytest.fixture
def trainer() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    yield process
    process.communicate("\n")


def claim_by(run_dir: Path, **who: object) -> None:
    """Replace what the next attempt's claim says about its process."""
    storage = open_storage(run_dir)
    claim = claim_attempt(storage, Catalog(storage).attempts)
    storage.delete(attempt_key(claim.attempt, "claim"))
    fields = {name: getattr(claim, name) for name in AttemptClaim.__struct_fields__}
    storage.write(attempt_key(claim.attempt, "claim"), [encode_record(AttemptClaim(**{**fields, **who}))])


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_run_in_which_a_process_of_this_host_trains_is_left_alone(
    run_dir: Path, capsys: Output, trainer: subprocess.Popen[str], force: list[str]
) -> None:
    claim_by(run_dir, pid=trainer.pid)
    before = files(run_dir)
    assert run(["prune", str(run_dir), "--keep-last", "1", *force]) == 11
    assert f"process {trainer.pid} on" in capsys.readouterr().err
    assert files(run_dir) == before


def test_a_run_whose_process_was_killed_can_be_pruned(run_dir: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    claim_by(run_dir, pid=process.pid)
    assert run(["prune", str(run_dir), "--keep-last", "1"]) == 0
    assert steps(run_dir) == [200, 600, 700]


def test_a_run_that_another_host_may_train_in_wants_force(run_dir: Path, capsys: Output) -> None:
    claim_by(run_dir, host="elsewhere")
    assert run(["prune", str(run_dir), "--keep-last", "1"]) == 11
    assert "RunInUseError [in-use]" in (error := capsys.readouterr().err)
    assert "elsewhere" in error
    assert len(steps(run_dir)) == 7
    assert run(["prune", str(run_dir), "--keep-last", "1", "--force"]) == 0
    assert steps(run_dir) == [200, 600, 700]


def test_a_trainer_that_starts_meanwhile_wins(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    fill(storage)

    def start_once(number: int, point: str) -> None:
        if point.endswith("manifest.json: done"):
            started.append(start(storage, continues=Catalog(storage).latest()))

    started: list[int] = []
    catalog = Catalog(FaultyStorage(storage, on_point=start_once))
    drop = [verdict.id for verdict in judge(catalog, KeepLast(1)) if not verdict.is_kept]
    with pytest.raises(RunInUseError, match="has started"):
        prune_run(catalog, drop)
    assert len(started) == 1
    left = Catalog(storage)
    assert [id.step for id in left.committed] == [100, 200, 300, 400, 600, 700]  # the newest of the drops went first
    assert all(verify_checkpoint(left, id) == [] for id in left.committed)
    assert save(storage, started[0], 610).step == 610


def test_who_started_between_the_look_and_the_claim_is_not_fenced() -> None:
    storage = MemoryStorage()
    fill(storage)
    catalog = Catalog(storage)
    attempt = start(storage, continues=catalog.latest())
    with pytest.raises(RunInUseError, match="in use"):
        prune_run(catalog, list(catalog.committed[:1]))
    assert len(Catalog(storage).committed) == 7
    assert save(storage, attempt, 610).step == 610


def test_a_failure_on_the_way_is_told_and_the_attempt_ends(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    fill(storage)
    catalog = Catalog(FaultyStorage(storage, fail_at=9))
    with pytest.raises(OSError, match="cannot go on"):
        prune_run(catalog, catalog.on_line[:3])
    left = Catalog(storage)
    assert left.attempts[3] == {"claim", "end"}
    assert all(verify_checkpoint(left, id) == [] for id in left.committed)
    prune_run(left, left.on_line[:1])
    assert Catalog(storage).torn == []


def test_a_checkpoint_with_files_of_another_that_goes_too_is_never_left_without_them(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    fill(storage)
    catalog = Catalog(storage)
    order: list[str] = []
    faulty = Catalog(FaultyStorage(storage, on_point=lambda number, point: order.append(point)))
    drop = catalog.on_line[:3]
    prune_run(faulty, drop)
    deletes = [point.split()[1].rstrip(":") for point in order if point.startswith("delete") and point.endswith("done")]
    manifests = [manifest_key(id) for id in drop]
    assert set(deletes[:3]) == set(manifests)
    assert not set(deletes[3:]) & set(manifests)


def test_on_a_terminal_somebody_is_asked(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self, *_: object) -> str:
            return "n\n"

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("click.confirm", lambda question, **_: False)
    before = files(run_dir)
    assert run(["prune", str(run_dir), "--keep-last", "1"]) == 1
    assert "nothing was deleted" in capsys.readouterr().err
    assert files(run_dir) == before
    assert run(["prune", str(run_dir), "--keep-last", "1", "--yes"]) == 0
    assert steps(run_dir) == [200, 600, 700]
