"""What another number of ranks makes of a checkpoint, told before anybody starts them. Nothing is imported or built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptmgr.cli.topology import count_of_ranks, tensor_scopes
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format.manifest import EntryRecord
from ckptmgr.format.payload import Scope
from ckptmgr.run.reader import CheckpointReader

__all__ = ["Remapped", "remap"]

_POSITIONS = ("data-position", "lightning-data")


@dataclass(frozen=True, slots=True)
class Remapped:
    """What becomes of one entry.

    Attributes:
        entry: Its name.
        words: What happens to it.
        is_refused: A resume on so many ranks would refuse it, with the program as it was.
    """

    entry: str
    words: str
    is_refused: bool = False


def remap(reader: CheckpointReader, nproc: int) -> list[Remapped]:
    """Return what a resume on so many ranks makes of each entry of a checkpoint.

    Args:
        reader: Of the checkpoint. At most one document is read, for the position in the data.
        nproc: Number of ranks.

    Raises:
        CorruptCheckpointError: The document is damaged, or the position in it is not as the format says.
    """
    scopes = tensor_scopes(reader.manifest)
    saved = reader.manifest.topology.world_size
    return [
        _position(entry, _tree(reader, entry.name), saved, nproc)
        if entry.handler in _POSITIONS
        else Remapped(entry.name, _words(entry, scopes[entry.name], saved, nproc))
        for entry in reader.manifest.entries
    ]


def _words(entry: EntryRecord, scopes: Counter[Scope], saved: int, now: int) -> str:
    if entry.handler == "rng":
        return _own(saved, now, one="derives its own from that of rank 0", many="derive their own from that of rank 0")
    if saved > 1 and entry.scope == "per-rank":
        if entry.handler == "lightning-metrics":
            return _own(saved, now, one="has gathered nothing yet", many="have gathered nothing yet")
        return _own(saved, now, one="takes that of rank 0", many="take that of rank 0")
    words = []
    if scopes["sharded"]:
        how = "each rank takes back its shards" if saved == now else "put together from their shards, and cut anew"
        words.append(f"{scopes['sharded']} tensors: {how}, as the program shards them")
    if scopes["per-rank"]:
        how = "each takes back its own" if saved == now else "all take that of rank 0"
        words.append(f"{scopes['per-rank']} tensors that each rank had for itself: {how}")
    if scopes["replicated"] or not words:
        words.append(f"{'the others are ' if words else ''}the same on every rank")
    return "; ".join(words)


def _own(saved: int, now: int, *, one: str, many: str) -> str:
    """Tell of state that each rank has for itself: who takes it back, and what new ranks do."""
    kept = min(saved, now)
    words = f"{_ranks(0, kept - 1)} {'takes back its own' if kept == 1 else 'take back their own'}"
    if now > saved:
        words += f"; {_ranks(saved, now - 1)}, new, {one if now - saved == 1 else many}"
    elif now < saved:
        words += f"; that of {_ranks(now, saved - 1)} is left"
    return words


def _ranks(first: int, last: int) -> str:
    return f"rank {first}" if first == last else f"ranks {first} to {last}"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where training stood in its data.

    Attributes:
        is_boundary: Between two epochs.
        samples, length: Of an ElasticSampler: how many were trained, of how many; None for other loaders.
        global_batch_size: The same; None where the number of ranks decides about it.
        sampler_ranks: By how many ranks its batches were split.
        is_elastic: The data set says that its state means the same on any number of ranks.
    """

    epoch: int
    batches: int
    is_boundary: bool
    samples: int | None
    length: int | None
    global_batch_size: int | None
    sampler_ranks: int
    is_elastic: bool


def _tree(reader: CheckpointReader, name: str) -> Any:
    document = reader.read_state()
    entries = document.get("entries") if isinstance(document, dict) else None
    if not isinstance(entries, dict) or name not in entries:
        raise _not_as_meant(name, "the state document does not hold it")
    # As it is stored: the numbers and words that are looked at here are plain in it.
    return entries[name]


def _position(entry: EntryRecord, tree: Any, saved: int, now: int) -> Remapped:
    try:
        place = _place(tree, is_lightning=entry.handler == "lightning-data")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _not_as_meant(entry.name, f"{type(error).__name__}: {error}") from error
    if place is None:
        return Remapped(entry.name, "no loader had begun")
    refusal = _why_not_split(place, saved, now)
    if refusal is not None:
        return Remapped(entry.name, f"refused: {refusal}", is_refused=True)
    if place.is_boundary:
        return Remapped(entry.name, f"between two epochs, at epoch {place.epoch}: the next begins on any ranks")
    where = f"batch {place.batches} of epoch {place.epoch}"
    if saved == now:
        return Remapped(entry.name, f"goes on after {where}")
    if place.samples is not None:
        words = (
            f"goes on after {place.samples} of {place.length} samples of epoch {place.epoch}; the rest is shared out"
        )
        if place.global_batch_size is None:
            words += f", in batches of {now} times the loader's size unless the program gives the ElasticSampler"
        return Remapped(entry.name, words)
    if place.is_elastic:
        return Remapped(entry.name, f"goes on after {where}: the data set's state means the same on any ranks")
    words = f"refused: {where} was counted on {count_of_ranks(saved)}; without an ElasticSampler the samples that are "
    words += f"left cannot be told on {now}. Take a checkpoint at the end of an epoch"
    if entry.handler == "data-position":
        words += ", or batches(…, on_resume='restart')"
    return Remapped(entry.name, words, is_refused=True)


def _place(tree: Mapping[str, Any], *, is_lightning: bool) -> _Place | None:
    if is_lightning:
        data = tree["data"]
        if data is None:
            return None
        loaders, batches, is_boundary = data["loaders"], data["batches"], bool(data["is_last"])
    else:
        # The position of a plain loop is that of its one loader.
        data, loaders, batches = tree, [tree], tree["batch"]
        is_boundary = bool(tree["is_exhausted"] or tree["is_last_batch"] or tree["epoch_start"] is None)
    facts = [loader["facts"] for loader in loaders]
    sampler = loaders[0].get("sampler") if len(loaders) == 1 else None
    return _Place(
        epoch=int(data["epoch"]),
        batches=int(batches),
        is_boundary=is_boundary,
        samples=None if sampler is None else int(sampler["position"]),
        length=None if sampler is None else int(sampler["length"]),
        # The Lightning callback makes a sampler for as many ranks as there are, from the batch size of each.
        global_batch_size=None if sampler is None or is_lightning else int(facts[0]["batch_size"]),
        sampler_ranks=int(facts[0].get("world_size") or 1) if facts else 1,
        is_elastic=bool(facts) and all(fact.get("is_elastic") for fact in facts),
    )


def _why_not_split(place: _Place, saved: int, now: int) -> str | None:
    size = place.global_batch_size
    # With tensor parallelism fewer ranks split a batch than there are, and how many is up to the program.
    if size is None or place.sampler_ranks != saved or size % now == 0:
        return None
    fewer = next(count for count in range(now - 1, 0, -1) if size % count == 0)
    more = next((count for count in range(now + 1, 2 * now + 1) if size % count == 0), None)
    return (
        f"the global batch size {size} cannot be split over {now} ranks; {fewer}{f' or {more}' if more else ''} would "
        "do, or another global_batch_size in the program"
    )


def _not_as_meant(name: str, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"the position in the data, {name!r}, is not as the format says",
        why=why,
        next="`ckptmgr verify` tells whether the checkpoint is damaged",
    )
