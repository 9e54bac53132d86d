from pathlib import Path

import pytest
from run_samples import create_run, save, start

from ckptmgr.errors import CheckpointNotFoundError, CorruptCheckpointError, Fenced
from ckptmgr.format.layout import attempt_key
from ckptmgr.format.manifest import AttemptLine, Continuation
from ckptmgr.format.record import encode_record
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lineage import claim_attempt, refuse_if_fenced
from ckptmgr.storage.local import LocalStorage
from ckptmgr.storage.protocol import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = LocalStorage(tmp_path / "run")
    create_run(storage)
    return storage


def steps_on_line(storage: Storage) -> list[int]:
    return [id.step for id in Catalog(storage).on_line]


def test_attempts_are_numbered_without_gaps_even_where_the_listing_was_old(storage: Storage) -> None:
    assert [claim_attempt(storage, []).attempt for _ in range(4)] == [1, 2, 3, 4]


def test_latest_follows_the_newest_attempt_through_its_ancestors(storage: Storage) -> None:
    one = start(storage)
    save(storage, one, 10)
    at_20 = save(storage, one, 20, number=1)
    save(storage, one, 30, number=2)
    two = start(storage, at_20)
    assert steps_on_line(storage) == [10, 20]
    save(storage, two, 25)
    assert steps_on_line(storage) == [10, 20, 25]
    assert Catalog(storage).latest().step == 25


def test_a_late_commit_of_a_process_that_was_taken_over_lies_on_nobodys_line(storage: Storage) -> None:
    one = start(storage)
    at_10 = save(storage, one, 10)
    two = start(storage, at_10)
    save(storage, two, 20)
    with pytest.raises(Fenced, match="attempt 2 took it over"):
        save(storage, one, 500, number=1)
    assert Catalog(storage).latest().step == 20


def test_a_claim_that_comes_while_the_manifest_is_written_fences_the_save(storage: Storage) -> None:
    class TakenOver:
        """A storage in which another process claims the run just before the manifest is created."""

        url = storage.url
        list, read, readinto, delete = storage.list, storage.read, storage.readinto, storage.delete

        def write(self, key: str, parts: object, *, exclusive: bool = False) -> None:
            if key.endswith("manifest.json"):
                start(storage, None)
            storage.write(key, parts, exclusive=exclusive)  # type: ignore[arg-type]

    one = start(storage)
    with pytest.raises(Fenced):
        save(TakenOver(), one, 10)  # type: ignore[arg-type]
    assert steps_on_line(storage) == []


def test_a_claim_without_a_line_fences_but_leads_nowhere(storage: Storage) -> None:
    one = start(storage)
    save(storage, one, 10)
    claim_attempt(storage, [one])
    assert Catalog(storage).latest().step == 10
    with pytest.raises(Fenced):
        refuse_if_fenced(storage, one)


def test_a_start_from_nothing_has_an_empty_line(storage: Storage) -> None:
    save(storage, start(storage), 10)
    start(storage, None)
    with pytest.raises(CheckpointNotFoundError, match="not on the line"):
        Catalog(storage).latest()


def test_a_second_save_at_the_branch_step_is_beyond_the_branch(storage: Storage) -> None:
    one = start(storage)
    at_10 = save(storage, one, 10, number=0)
    save(storage, one, 10, number=1)
    start(storage, at_10)
    assert [id.save for id in Catalog(storage).on_line] == [0]


@pytest.mark.parametrize(
    "continues",
    [
        Continuation(checkpoint="0000000010-000001-000000", attempt=1, step=10),
        Continuation(checkpoint="0000000010-000009-000000", attempt=9, step=10),
        Continuation(checkpoint="../../etc", attempt=1, step=10),
    ],
    ids=["itself", "newer", "no-id"],
)
def test_a_forged_line_is_refused_and_does_not_loop(storage: Storage, continues: Continuation) -> None:
    line = AttemptLine(version=1, attempt=1, continues=continues, recorded_at="")
    claim_attempt(storage, [])
    storage.write(attempt_key(1, "line"), [encode_record(line)])
    with pytest.raises(CorruptCheckpointError, match="line of attempts is broken"):
        _ = Catalog(storage).line
