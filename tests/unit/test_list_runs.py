"""``ckptmgr ls`` of a directory that holds runs."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from run_samples import create_run, save, start

from ckptmgr.cli.main import run
from ckptmgr.errors import StorageError
from ckptmgr.format.layout import RUN_MARKER, attempt_key, note_key
from ckptmgr.format.manifest import Note
from ckptmgr.format.record import encode_record
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.discover import find_runs
from ckptmgr.run.lineage import claim_attempt, record_end
from ckptmgr.run.overview import look_at_all
from ckptmgr.storage.below import FolderView
from ckptmgr.storage.open import open_storage
from ckptmgr.storage.protocol import Entry, Storage

Output = pytest.CaptureFixture[str]


def make(storage: Storage, *, outcome: str | None = "finished", step: int = 20) -> None:
    create_run(storage)
    attempt = start(storage)
    save(storage, attempt, step - 10, metrics={"loss": 0.25})
    save(storage, attempt, step, number=1, metrics={"loss": 0.5})
    if outcome is not None:
        record_end(storage, attempt, outcome, step=step, error="Boom: x" if outcome == "failed" else None)  # type: ignore[arg-type]


def claim_by(storage: Storage, *, host: str, pid: int) -> None:
    claim = claim_attempt(storage, Catalog(storage).attempts)
    record = encode_record(
        type(claim)(**{**{f: getattr(claim, f) for f in claim.__struct_fields__}, "host": host, "pid": pid})
    )
    storage.delete(attempt_key(claim.attempt, "claim"))
    storage.write(attempt_key(claim.attempt, "claim"), [record])
    storage.write(attempt_key(claim.attempt, "start"), [b"{}"])


def listed(place: Path | str, capsys: Output) -> dict[str, dict]:
    assert run(["ls", str(place), "--json"]) == 0
    return {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["runs"]}


def test_each_run_is_listed_with_how_it_is_doing(tmp_path: Path, capsys: Output) -> None:
    for outcome in ("finished", "failed", "preempted"):
        make(open_storage(tmp_path / outcome), outcome=outcome)
    make(open_storage(tmp_path / "running"), outcome=None)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name, host in (("crashed", socket.gethostname()), ("unknown", "elsewhere")):
        make(open_storage(tmp_path / name))
        claim_by(open_storage(tmp_path / name), host=host, pid=dead.pid)
    runs = listed(tmp_path, capsys)
    assert {name: entry["state"] for name, entry in runs.items()} == {
        name: name for name in ("finished", "failed", "preempted", "running", "crashed", "unknown")
    }
    assert runs["failed"]["detail"] == "Boom: x"
    assert f"process {dead.pid} on elsewhere" in runs["unknown"]["detail"]
    assert runs["crashed"]["nattempts"] == 2

    assert run(["ls", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    failed = next(line for line in table.splitlines() if line.startswith("failed"))
    assert failed.split()[:3] == ["failed", "failed", "20"]
    assert "loss=0.25@10" in failed
    assert "Boom: x" in failed


def test_the_run_that_was_saved_into_last_comes_first(tmp_path: Path, capsys: Output) -> None:
    for name in ("b", "c", "a"):
        make(open_storage(tmp_path / name))
    create_run(open_storage(tmp_path / "empty"))
    assert list(listed(tmp_path, capsys)) == ["a", "c", "b", "empty"]


def test_one_entry_holds_what_the_newest_and_the_best_checkpoint_tell(tmp_path: Path, capsys: Output) -> None:
    storage = open_storage(tmp_path / "x" / "y")
    make(storage, step=120)
    late = Catalog(storage).committed[-1]
    note = Note(version=1, checkpoint=str(late), attempt=1, created_at="", metrics={"loss": 0.125})
    storage.write(note_key(late, 1, 0), [encode_record(note)])
    entry = listed(tmp_path, capsys)["x/y"]
    newest = Catalog(storage).latest()
    assert entry == {
        "name": "x/y",
        "url": str(tmp_path / "x" / "y"),
        "state": "finished",
        "detail": "",
        "step": 120,
        "epoch": None,
        "saved_at": newest.created_at,
        "created_at": "2026-01-01T00:00:00.000Z",
        "best": {"metric": "loss", "value": 0.125, "step": 120},
        "ncheckpoints": 2,
        "nattempts": 1,
        "nbytes": sum(path.stat().st_size for path in (tmp_path / "x" / "y").rglob("*") if path.is_file()),
        "problem": None,
    }


def test_runs_are_found_four_levels_deep_and_not_within_runs_nor_behind_links(tmp_path: Path) -> None:
    for place in ("a", "b/c/d/e", "b/c/d/e2/f", "a/nested", ".hidden/x"):
        create_run(open_storage(tmp_path / place))
    (tmp_path / "link").symlink_to(tmp_path / "b")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list(find_runs(open_storage(tmp_path))) == ["a", "b/c/d/e"]


def test_a_damaged_run_does_not_keep_the_others_from_being_listed(tmp_path: Path, capsys: Output) -> None:
    make(open_storage(tmp_path / "good"))
    make(open_storage(tmp_path / "bad"))
    for manifest in (tmp_path / "bad").rglob("manifest.json"):
        manifest.write_bytes(b"{}")
    (tmp_path / "bad" / attempt_key(1, "line")).write_bytes(b"{}")
    (tmp_path / "bad" / attempt_key(1, "end")).write_bytes(b"{}")
    runs = listed(tmp_path, capsys)
    assert runs["good"]["step"] == 20
    assert (runs["bad"]["step"], runs["bad"]["state"], runs["bad"]["ncheckpoints"]) == (None, "unknown", 2)
    assert run(["ls", str(tmp_path)]) == 0


@pytest.mark.parametrize("place", ["nothing", "."])
def test_where_there_is_no_run_the_message_says_where_it_looked(tmp_path: Path, capsys: Output, place: str) -> None:
    (tmp_path / "data").mkdir()
    assert run(["ls", str(tmp_path / place)]) == 10
    assert "up to 4 levels below" in capsys.readouterr().err


def test_a_run_on_its_own_is_listed_as_before_with_how_it_is_doing(tmp_path: Path, capsys: Output) -> None:
    make(open_storage(tmp_path), outcome="preempted")
    assert run(["ls", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [entry["step"] for entry in document["checkpoints"]] == [10, 20]
    assert document["state"] == "preempted"
    assert run(["ls", str(tmp_path)]) == 0
    assert "the run is preempted" in capsys.readouterr().err


def test_runs_in_an_object_store_are_found_by_one_listing(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"memory://{uuid4().hex}"
    for name in ("a", "b/c", "a/nested"):
        make(open_storage(f"{place}/{name}"))
    storage = open_storage(place)
    listings = []

    def count(prefix: str = "", inner=storage.list) -> list[Entry]:
        listings.append(prefix)
        return inner(prefix)

    monkeypatch.setattr(storage, "list", count)
    overviews = look_at_all(find_runs(storage))
    assert {(run.name, run.step, run.life.state) for run in overviews} == {
        ("a", 20, "finished"),
        ("b/c", 20, "finished"),
    }
    assert listings == [""]
    assert set(listed(place, capsys)) == {"a", "b/c"}


@pytest.mark.parametrize("command", ["ls", "show", "verify", "prune"])
def test_a_run_that_has_lost_its_marker_is_still_a_run(tmp_path: Path, capsys: Output, command: str) -> None:
    make(open_storage(tmp_path))
    (tmp_path / RUN_MARKER).unlink()
    # Verifying finds that something is missing; the others answer.
    assert run([command, str(tmp_path)]) == (12 if command == "verify" else 0)
    assert "20" in capsys.readouterr().out


def test_a_view_of_a_folder_is_read_only(tmp_path: Path) -> None:
    view = FolderView(open_storage(tmp_path), "run/", [Entry("run/ckptmgr.json", 1)])
    assert view.list() == [Entry("ckptmgr.json", 1)]
    for change in (lambda: view.write("x", [b""]), lambda: view.delete("ckptmgr.json")):
        with pytest.raises(StorageError, match="it is open for reading alone"):
            change()


def test_pruning_is_not_counted_as_a_start(tmp_path: Path, capsys: Output) -> None:
    make(open_storage(tmp_path / "run"))
    assert run(["prune", str(tmp_path / "run"), "--keep-last", "1"]) == 0
    capsys.readouterr()
    assert listed(tmp_path, capsys)["run"]["nattempts"] == 1
