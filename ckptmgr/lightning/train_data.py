"""Where training stands in the Trainer's train loaders, and how to get there again.

Lightning iterates the train loaders at fixed places: once while it sets the data up, and again when an epoch after the
first begins. Random numbers are drawn there (seeds of workers, order of samples) and, for loaders that draw lazily, at
the first batch. Both states are recorded, so that another process can begin the epoch alike and pass over the trained
batches. Lightning's own position is not used: it counts a batch that was fetched and never trained, and a plain loader
would start over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import Subset

from ckptmgr.errors import StateMismatchError
from ckptmgr.lightning.batch_size import counted_anew, refuse_other_ranks
from ckptmgr.state.batch_sizes import batches_passed, batches_to_pass
from ckptmgr.state.elastic_position import sampler_state
from ckptmgr.state.generators import capture_generators, restore_generators
from ckptmgr.state.loader_facts import (
    describe_loader,
    differences,
    generators_of,
    keeps_workers,
    loader_kind,
    set_data_epoch,
    simple_attributes,
)
from ckptmgr.state.loader_skip import skipping_loader
from ckptmgr.state.per_sample_seed import PerSampleSeed
from ckptmgr.state.resume_plan import ResumePlan, plan_resume
from ckptmgr.state.rng import capture_rng, restore_rng

__all__ = ["TrainData", "capture_idle_loaders", "restore_idle_loaders"]

_VERSION = 1
# Of a position in an epoch with several batch sizes.
_RECUT_VERSION = 2


class TrainData:
    """Records the position in the train loaders, and restores it.

    Args:
        notify: Takes one sentence for the user about what is costly or not exact.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify
        self._said: set[str] = set()
        self._start: dict[str, Any] | None = None
        self._at_first_fetch: dict[str, Any] | None = None
        self._before_last_fetch: dict[str, Any] | None = None
        self._workers: list[dict[str, Any] | None] = []
        # Without workers the order is drawn at the first fetch of the epoch, else when the loader is iterated.
        self._is_order_late = False
        # Of several loaders, a shorter one begins again in mid-epoch: fetch → RNG before it.
        self._restarts: dict[int, dict[str, Any]] = {}
        self._recut: Mapping[str, Any] | None = None

    def before_iterating(self, loaders: list[Any], epoch: int) -> None:
        """Record what the epoch begins with. Called right before Lightning iterates the train loaders."""
        for loader in loaders:
            _tell_per_sample_seed(loader, epoch)
        self._workers = [self._describe_workers(i, loader) for i, loader in enumerate(loaders)]
        self._start = {
            "rng": capture_rng(),
            "loaders": [_loader_state(loader) for loader in loaders],
            "attributes": [simple_attributes(loader) for loader in loaders],
        }
        self._at_first_fetch = self._before_last_fetch = None
        self._is_order_late = not getattr(loaders[0], "num_workers", 0) if loaders else False
        self._restarts = {}
        self._recut = None

    def watch(self, fetcher: Any) -> None:
        """Record what each fetch begins with. Called right after Lightning has iterated the train loaders."""
        if not isinstance(fetcher.iterator, _WatchedIterator):
            fetcher.iterator = _WatchedIterator(fetcher.iterator, self, fetcher)

    def capture(self, loaders: list[Any], *, epoch: int, batches: int, is_last: bool) -> dict[str, Any]:
        """Return the position after ``batches`` trained batches of ``epoch``."""
        ahead = self._before_last_fetch
        states: list[Any] = [None] * len(loaders)
        if not is_last and batches:
            states = ahead["states"] if ahead is not None else _stateful_states(loaders)
        start = self._start
        recut = {} if is_last or self._recut is None else {"version": _RECUT_VERSION, "recut": self._recut}
        return {
            "version": _VERSION,
            **recut,
            "epoch": epoch,
            "batches": batches,
            "is_last": is_last,
            # The next epoch begins anew: what this one began with would only take space.
            "start": None if is_last else start,
            "at_first_fetch": None if is_last else self._at_first_fetch,
            "is_order_late": self._is_order_late,
            "at_last_fetch": None if is_last or ahead is None else ahead["rng"],
            "restarts": {} if is_last else dict(self._restarts),
            "workers": copy.deepcopy(self._workers),
            "loaders": [
                {
                    "facts": describe_loader(loader),
                    "attributes": simple_attributes(loader),
                    "reads_change": start is not None and simple_attributes(loader) != start["attributes"][i],
                    "state": states[i],
                    **_loader_state(loader),
                    # Several loaders may begin again in mid-epoch, each at a place of its own.
                    **(sampler_state(loader, batches, self._recut) if len(loaders) == 1 else {}),
                }
                for i, loader in enumerate(loaders)
            ],
        }

    def begun_elsewhere(self, position: Mapping[str, Any], loaders: list[Any]) -> dict[str, Any]:
        """Return the position of an imported checkpoint as if these loaders had begun its epoch just now.

        It says how many batches were trained, and perhaps what stateful loaders kept, and nothing else.
        """
        for loader in loaders:
            set_data_epoch(_OnlySampler(loader), position["epoch"])
        self.before_iterating(loaders, position["epoch"])
        begun = self.capture(loaders, epoch=position["epoch"], batches=position["batches"], is_last=False)
        states = position["states"]
        for index, saved in enumerate(begun["loaders"]):
            saved["state"] = states[index] if len(states) == len(loaders) else None
        return begun

    def check(self, position: Mapping[str, Any], loaders: list[Any]) -> Mapping[str, Any]:
        """Compare the loaders with those of the run that saved.

        Returns:
            The position; counted anew if a single loader has another batch size inside of an epoch.

        Raises:
            StateMismatchError: The position is inside of an epoch, and batch k of these loaders is another one.
        """
        saved = position["loaders"]
        if not position["is_last"]:
            refuse_other_ranks(position, loaders)
        if len(saved) == len(loaders) == 1 and not position["is_last"]:
            position, message = counted_anew(position, loaders[0])
            saved = position["loaders"]
            if message:
                self._say(message)
        changed = [] if len(saved) == len(loaders) else [f"there were {len(saved)} train loaders, now {len(loaders)}"]
        for live, loader in zip(saved, loaders, strict=False):
            changed += differences(live["facts"], describe_loader(loader))
        if changed and not position["is_last"]:
            raise StateMismatchError(
                "the train loader is not the one that stood "
                f"at batch {position['batches']} of epoch {position['epoch']}",
                why="; ".join(changed),
                next="resume with the loader of that run, or from a checkpoint at the end of an epoch",
            )
        if changed:
            self._say(f"the train loader has changed since epoch {position['epoch']}: {'; '.join(changed)}")
        return position

    def prepare(self, position: Mapping[str, Any], loaders: list[Any]) -> None:
        """Put in place what the interrupted epoch began with. Called instead of `before_iterating`."""
        self._start, self._at_first_fetch = position["start"], position["at_first_fetch"]
        self._is_order_late = bool(position["is_order_late"])
        self._before_last_fetch = None
        self._workers = copy.deepcopy(list(position["workers"]))
        self._restarts = dict(position["restarts"])
        self._recut = position.get("recut")
        for i, loader in enumerate(loaders):
            saved = position["loaders"][i]
            _tell_per_sample_seed(loader, position["epoch"])
            if simple_attributes(loader) != saved["attributes"]:
                set_data_epoch(loader, position["epoch"])
            set_data_epoch(_OnlySampler(loader), position["epoch"])
            if self._start is not None:
                _restore_loader(loader, self._start["loaders"][i])
        if self._start is not None:
            reused = next((w for w in self._workers if w is not None and w["are_reused"]), None)
            # Workers that lived on from an earlier epoch were seeded when they were made.
            restore_rng(reused["rng"] if reused is not None and reused["rng"] is not None else self._start["rng"])

    def go_to(self, position: Mapping[str, Any], fetcher: Any, loaders: list[Any]) -> None:
        """Pass over the trained batches. Called once Lightning has iterated the loaders after `prepare`."""
        assert self._start is not None
        plan = self._plan(position, loaders)
        for message in plan.messages:
            self._say(message)
        if plan.how == "load":
            self._load(position, fetcher, loaders)
        elif plan.how == "skip" or self._recut is not None:
            self._skip(position, fetcher, loaders[0], reads=plan.how != "skip")
        else:
            self._replay(position, fetcher, loaders)
        for loader, saved in zip(loaders, position["loaders"], strict=True):
            for note in restore_generators(generators_of(loader), saved["generators"]):
                self._say(note)
            live = simple_attributes(loader)
            for path, value in saved["attributes"].items():
                if path in live and live[path] != value:
                    self._say(
                        f"perhaps not exact: {path} was {value} in the run that saved and is {live[path]} now; "
                        "batches that depend on it differ"
                    )
        if fetcher.length is None:
            states = [copy.deepcopy(saved["state"]) for saved in position["loaders"]]
            self._before_last_fetch = {"rng": position["at_last_fetch"], "states": states}
        self.watch(fetcher)
        fetcher.iterator.nfetched = position["batches"] + (fetcher.length is None)

    def start_next_epoch(self, position: Mapping[str, Any], loaders: list[Any]) -> None:
        """Put the loaders into the state in which the interrupted run ended the epoch."""
        if len(position["loaders"]) != len(loaders):
            return
        for loader, saved in zip(loaders, position["loaders"], strict=True):
            for note in _restore_loader(loader, saved):
                self._say(note)

    def before_fetch(self, fetcher: Any) -> None:
        """Record what a fetch begins with."""
        if fetcher.length is None:
            # One batch is fetched ahead, so the position to save is that of before this fetch.
            states = copy.deepcopy(_stateful_states(fetcher.combined_loader.flattened))
            self._before_last_fetch = {"rng": capture_rng(), "states": states}
        elif self._at_first_fetch is None:
            self._at_first_fetch = capture_rng()

    def restarted(self, fetch: int, rng: dict[str, Any]) -> None:
        """Record that one of several loaders began again in this fetch, and the RNG before it."""
        self._restarts[fetch] = rng

    def _describe_workers(self, index: int, loader: Any) -> dict[str, Any] | None:
        if not keeps_workers(loader):
            return None
        known = self._workers[index] if index < len(self._workers) else None
        are_reused = loader._iterator is not None
        return {"are_reused": are_reused, "rng": known["rng"] if are_reused and known is not None else capture_rng()}

    def _plan(self, position: Mapping[str, Any], loaders: list[Any]) -> ResumePlan:
        batches = position["batches"]
        if len(loaders) == 1:
            saved = position["loaders"][0]
            if saved["state"] is None and batches and loader_kind(loaders[0]) == "stateful":
                return ResumePlan("replay", (f"reading {batches} batches again: the checkpoint has no loader's state",))
            state = {
                "epoch": position["epoch"],
                "batch": batches,
                "recut": position.get("recut"),
                "epoch_start": position["start"],
                "is_exhausted": False,
                "is_last_batch": False,
                "facts": saved["facts"],
                "workers": position["workers"][0],
                "loader_state": saved["state"],
                "reading_changes_dataset": saved["reads_change"],
                "reading_changes_attributes": saved["reads_change"],
            }
            return plan_resume(state, loaders[0], on_resume="auto")
        if all(saved["state"] is not None for saved in position["loaders"]):
            return ResumePlan("load")
        return ResumePlan("replay", (f"replaying {batches} batches of epoch {position['epoch']} of several loaders",))

    def _load(self, position: Mapping[str, Any], fetcher: Any, loaders: list[Any]) -> None:
        assert self._start is not None
        restore_rng(self._start["rng"])
        for loader, saved in zip(loaders, position["loaders"], strict=True):
            loader.load_state_dict(copy.deepcopy(saved["state"]))
        prefetched = getattr(fetcher, "prefetch_batches", 0)
        # Fetching ahead happens under another RNG than iterating, so it is done apart.
        fetcher.prefetch_batches = 0
        iter(fetcher)
        fetcher.prefetch_batches = prefetched
        if fetcher.length is None:
            self._fetch_ahead(position, fetcher)

    def _skip(self, position: Mapping[str, Any], fetcher: Any, loader: Any, *, reads: bool) -> None:
        assert self._start is not None
        workers = self._workers[0]
        if workers is not None and not workers["are_reused"]:
            # In the original run this epoch made the workers; reset ones would draw other numbers.
            loader._iterator = None
        self._begin_epoch(loader)
        passed = batches_passed({"batch": position["batches"], "recut": self._recut})
        skipped = skipping_loader(
            loader,
            0 if reads else passed,
            before_first=lambda: self._begin_order(position, loader),
            batches=batches_to_pass(loader, self._recut),
        )
        iterator = iter(skipped)
        skipped.prime()
        for _ in range(passed if reads else 0):
            next(iterator)
        if skipped.draws_per_batch:
            self._say(
                "perhaps not exact: the sampler draws from a global random number generator for each batch, in between "
                "the training steps; give it a generator object of its own"
            )
        fetcher.combined_loader._iterator.iterators[0] = iterator

    def _begin_epoch(self, loader: Any) -> None:
        assert self._start is not None
        _restore_loader(loader, self._start["loaders"][0])
        restore_rng(self._start["rng"])

    def _begin_order(self, position: Mapping[str, Any], loader: Any) -> None:
        """Put in place the RNG under which the run that saved asked its sampler for the first batch."""
        workers = self._workers[0]
        if self._is_order_late:
            if position["at_first_fetch"] is not None:
                restore_rng(position["at_first_fetch"])
        elif workers is not None and workers["are_reused"] and not keeps_workers(loader):
            # An epoch of workers that lived on began without the draw of a seed for new ones.
            self._begin_epoch(loader)

    def _replay(self, position: Mapping[str, Any], fetcher: Any, loaders: list[Any]) -> None:
        assert self._start is not None
        if any(workers is not None and workers["are_reused"] for workers in self._workers):
            for loader, saved in zip(loaders, self._start["loaders"], strict=True):
                _restore_loader(loader, saved)
            restore_rng(self._start["rng"])
            iter(fetcher)
        if position["at_first_fetch"] is not None:
            restore_rng(position["at_first_fetch"])
        # A loader without length has given Lightning its first batch already.
        passed = 1 if fetcher.length is None else 0
        try:
            for fetch in range(passed, position["batches"]):
                if fetch in position["restarts"]:
                    restore_rng(position["restarts"][fetch])
                next(fetcher.iterator)
        except StopIteration:
            raise StateMismatchError(
                f"the train loader ended before batch {position['batches']} of epoch {position['epoch']}",
                why="the data are not those of the run that saved",
                next="resume with the data of that run, or from a checkpoint at the end of an epoch",
            ) from None
        if fetcher.length is None:
            fetcher.batches = []
            self._fetch_ahead(position, fetcher)

    def _fetch_ahead(self, position: Mapping[str, Any], fetcher: Any) -> None:
        if position["at_last_fetch"] is not None:
            restore_rng(position["at_last_fetch"])
        try:
            fetcher.batches.append(next(fetcher.iterator))
        except StopIteration:
            fetcher.done = True

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._notify(message)


class _WatchedIterator(Iterator[Any]):
    def __init__(self, inner: Iterator[Any], data: TrainData, fetcher: Any) -> None:
        self._inner = inner
        self._data = data
        self._fetcher = fetcher
        # A loader without length has given Lightning its first batch already.
        self.nfetched = 1 if fetcher.length is None else 0

    def __next__(self) -> Any:
        self._data.before_fetch(self._fetcher)
        combined = self._fetcher.combined_loader
        several = len(combined.flattened) > 1
        before = (list(combined._iterator.iterators), capture_rng()) if several else None
        batch = next(self._inner)
        if before is not None and any(a is not b for a, b in zip(before[0], combined._iterator.iterators, strict=True)):
            self._data.restarted(self.nfetched, before[1])
        self.nfetched += 1
        return batch


class _OnlySampler:
    """A loader as `set_data_epoch` sees it, without its data set: Lightning tells the epoch to samplers alone."""

    def __init__(self, loader: Any) -> None:
        self.sampler = getattr(loader, "sampler", None)
        self.batch_sampler = getattr(loader, "batch_sampler", None)


def capture_idle_loaders(loaders: list[Any]) -> list[dict[str, Any]]:
    """Return the state that loaders carry from one pass to the next: that of the validation loaders."""
    return [_loader_state(loader) for loader in loaders]


def restore_idle_loaders(loaders: list[Any], states: list[Mapping[str, Any]]) -> None:
    """Put loaders between two passes into a captured state. Loaders that are others now stay as they are."""
    if len(loaders) == len(states):
        for loader, state in zip(loaders, states, strict=True):
            _restore_loader(loader, state)


def _loader_state(loader: Any) -> dict[str, Any]:
    dataset = _stateful_dataset(loader)
    return {
        "generators": capture_generators(generators_of(loader)),
        "dataset": None if dataset is None else copy.deepcopy(dataset.state_dict()),
    }


def _restore_loader(loader: Any, saved: Mapping[str, Any]) -> list[str]:
    notes = restore_generators(generators_of(loader), saved["generators"])
    dataset = _stateful_dataset(loader)
    if dataset is not None and saved["dataset"] is not None:
        dataset.load_state_dict(copy.deepcopy(saved["dataset"]))
    return notes


def _stateful_dataset(loader: Any) -> Any:
    """Return the data set if reading changes it in this process, and it can say how."""
    dataset = getattr(loader, "dataset", None)
    if getattr(loader, "num_workers", 0):
        return None
    has_state = all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))
    return dataset if has_state else None


def _stateful_states(loaders: list[Any]) -> list[Any]:
    return [loader.state_dict() if loader_kind(loader) == "stateful" else None for loader in loaders]


def _tell_per_sample_seed(loader: Any, epoch: int) -> None:
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, PerSampleSeed):
        dataset.set_epoch(epoch)
