"""Iterate a loader over epochs, know the position in the data, and go on there after a restart."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ckptmgr.errors import StateMismatchError, UsageError
from ckptmgr.state.batch_sizes import batches_passed, batches_to_pass, recut_position
from ckptmgr.state.elastic_position import begun_by_user, sampler_state
from ckptmgr.state.generators import capture_generators, restore_generators
from ckptmgr.state.loader_facts import (
    describe_loader,
    differences,
    generators_of,
    keeps_workers,
    length_of,
    loader_kind,
    set_data_epoch,
    simple_attributes,
)
from ckptmgr.state.loader_skip import skipping_loader
from ckptmgr.state.resume_plan import How, OnResume, is_boundary, plan_resume
from ckptmgr.state.rng import AnyGenerator, capture_rng, restore_rng, same_rng

__all__ = ["DataPosition", "OnResume"]

_PROGRESS_EVERY_S = 10.0
_VERSION = 1
# Of a position in an epoch with several batch sizes: a reader of version 1 would take all for the last one.
_RECUT_VERSION = 2


class DataPosition(Iterator[Any]):
    """An iterator over the batches of all epochs that can say where it is and go on there in another process.

    It hands out what ``for epoch in range(epochs): for batch in loader`` would, and draws from the same random number
    generators in the same order; ``set_epoch`` is called where sampler or data set have it. A batch counts as trained
    once it was handed out: a position taken after batch k resumes at batch k + 1.

    To resume in mid-epoch, the RNG of the epoch's start is put in place, the loader is iterated anew, the trained
    batches are passed over, and the RNG of the checkpoint is put in place. What *passed over* means:

    ==================================  ================================================================================
    loader                              what happens to trained batches
    ==================================  ================================================================================
    ``DataLoader``, no workers          skipped in the sampler; nothing is read
    ``DataLoader`` with workers         skipped if a sample cannot depend on what its worker read before
                                        (:class:`~ckptmgr.state.per_sample_seed.PerSampleSeed`, plain tensors), else
                                        read again and discarded; the cost is said
    has ``state_dict``                  its state is loaded; a map-style data set with workers that is not known to be
                                        free of random numbers is read again, since no worker RNG is in that state
    anything else                       read again and discarded; the cost is said
    ==================================  ================================================================================

    Whatever cannot be exact is said by name through ``notify``: changed workers, worker RNG that lived through earlier
    epochs (``persistent_workers=True``), ``in_order=False``, global random draws for each batch that come in between
    the training steps, and numbers kept on sampler or data set that differ from those of the run that saved.

    With another batch size, a map-style ``DataLoader`` goes on with the samples that were not trained yet, in the order
    of the interrupted epoch; that is said too. With an :class:`~ckptmgr.state.elastic_sampler.ElasticSampler`, so it
    does with another number of ranks. Other loaders are refused in mid-epoch.

    Args:
        loader: A ``DataLoader``, a loader with ``state_dict`` and ``load_state_dict``, any other iterable that can be
            iterated repeatedly, or a function that returns an iterable.
        epochs: How many epochs to hand out in total, those before a restart included. None: without end.
        on_resume: ``"auto"`` is exact and reads as little as that allows. ``"skip"`` never reads trained batches again,
            ``"replay"`` always does. ``"restart"`` gives up the position: an epoch that was interrupted begins anew.
        notify: Takes one sentence for the user.
        on_epoch_end: Called with the epoch when its last batch was trained and the loader has ended, before the next
            epoch begins; a position taken there resumes with the next epoch.

    Attributes:
        epoch: Epoch of the batch handed out last, from 0.
        batch: Batches handed out in this epoch.
        has_lost_workers: Workers died, or failed, while a batch was fetched. The position is as it was before.

    Raises:
        UsageError: The loader can be iterated only once or not at all, or ``on_resume="skip"`` is impossible with it.
    """

    def __init__(
        self,
        loader: Any,
        *,
        epochs: int | None = None,
        on_resume: OnResume = "auto",
        notify: Callable[[str], None],
        on_epoch_end: Callable[[int], None] | None = None,
    ) -> None:
        if on_resume not in ("auto", "skip", "replay", "restart"):
            raise UsageError(f"on_resume={on_resume!r}", why="it is 'auto', 'skip', 'replay' or 'restart'")
        if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0):
            raise UsageError(f"epochs={epochs!r}", why="it is a whole number of at least 0, or None for no end")
        self._loader = loader
        self._kind = loader_kind(loader)
        if on_resume == "skip" and self._kind == "read":
            raise UsageError(
                f"on_resume='skip' is impossible with {type(loader).__qualname__}",
                why="its batches have to be read to get to the next one",
                next="use on_resume='auto', or a loader with state_dict() and load_state_dict()",
            )
        self._epochs = epochs
        self._on_resume = on_resume
        self._notify = notify
        self._on_epoch_end = on_epoch_end
        self.epoch = 0
        self.batch = 0
        self._stepped_at = (0, 0)
        self.has_lost_workers = False
        self._is_exhausted = False
        self._is_over = False
        self._expects_end = False
        self._iterator: Iterator[Any] | None = None
        self._epoch_start: dict[str, Any] | None = None
        self._workers: dict[str, Any] | None = None
        self._generators: dict[str, AnyGenerator] = {}
        self._attributes_at_start: dict[str, Any] = {}
        self._recut: Mapping[str, Any] | None = None
        self._pending: Mapping[str, Any] | None = None
        self._pending_rng: Mapping[str, Any] | None = None
        self._warn_of_inexact_loader()

    @property
    def is_last_batch(self) -> bool | None:
        """Whether the batch handed out last is the last of its epoch; None where the loader has no length."""
        length = length_of(self._loader)
        return None if length is None else self.batch >= length

    @property
    def is_over(self) -> bool:
        """Whether all epochs were handed out."""
        return self._is_over

    @property
    def is_pending(self) -> bool:
        """Whether batches were handed out since `mark_step`: what they left behind is in no weights yet."""
        return (self.epoch, self.batch) != self._stepped_at

    def mark_step(self) -> None:
        """Remember that everything that was handed out is trained."""
        self._stepped_at = (self.epoch, self.batch)

    @property
    def pending_rng(self) -> Mapping[str, Any] | None:
        """The RNG tree of a loaded position that is not in place yet: what a capture of this moment has to hold."""
        return self._pending_rng

    def __iter__(self) -> DataPosition:
        return self

    def __next__(self) -> Any:
        if self._pending is not None:
            if self._epochs is not None and self.epoch >= self._epochs:
                # Fewer epochs are wanted now than had begun then.
                raise StopIteration
            self._resume(self._pending)
        while not self._is_over:
            if self._iterator is None and not self._begin_epoch():
                break
            assert self._iterator is not None
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._end_epoch()
                continue
            except Exception:
                self.has_lost_workers = getattr(self._loader, "num_workers", 0) > 0
                raise
            if self._expects_end:
                # A stateful loader that had rolled over to the next epoch by itself.
                self.epoch, self.batch, self._expects_end = self.epoch + 1, 0, False
            self.batch += 1
            if self.batch == 1:
                # A data set may create its generators at the first read.
                self._generators = generators_of(self._loader)
            return batch
        self._is_over = True
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batch handed out last.

        Take it together with :func:`~ckptmgr.state.rng.capture_rng`, between two batches.

        Returns:
            Nested dicts and lists of ``torch.uint8`` tensors and JSON-like values; ``"loader_state"`` is what the
            loader's own ``state_dict`` returned, copied. Trees of the epoch's start are shared between positions of one
            epoch and must not be changed.
        """
        if self._pending is not None:
            return dict(self._pending)
        attributes = simple_attributes(self._loader)
        has_begun = self._epoch_start is not None
        position = {
            "version": _VERSION,
            "epoch": self.epoch,
            "batch": self.batch,
            "is_exhausted": self._is_exhausted,
            "is_last_batch": self.is_last_batch if self.batch else False,
            "facts": describe_loader(self._loader),
            "epoch_start": self._epoch_start,
            "generators": capture_generators(self._generators if has_begun else generators_of(self._loader)),
            "workers": self._workers,
            "attributes": attributes,
            "reading_changes_dataset": has_begun and _of_dataset(attributes) != _of_dataset(self._attributes_at_start),
            "loader_state": self._loader_state() if has_begun else None,
            **sampler_state(self._loader, self.batch, self._recut),
        }
        return position if self._recut is None else {**position, "version": _RECUT_VERSION, "recut": self._recut}

    def load_state_dict(self, state: Mapping[str, Any], *, rng: Mapping[str, Any] | None = None) -> None:
        """Go on from a saved position: checked now, carried out when the next batch is asked for.

        Args:
            state: What :meth:`state_dict` returned.
            rng: RNG tree captured with it. It is put in place when the loader stands at the position, just before the
                next batch is fetched. None: the RNG of that moment is kept.

        Raises:
            UsageError: Batches were handed out already.
            StateMismatchError: The position is in mid-epoch and the loader is not the one of the run that saved: other
                length, sampler or kind, or another batch size where that cannot be exact. Nothing was changed.
        """
        if self._iterator is not None or self._is_over:
            raise UsageError(
                "a data position can be loaded only before the first batch",
                why=f"batch {self.batch} of epoch {self.epoch} was handed out already",
                next="make a new DataPosition, or restore before iterating",
            )
        if state.get("version") not in (_VERSION, _RECUT_VERSION):
            raise StateMismatchError(
                f"a data position of version {state.get('version')} cannot be read",
                why=f"this version reads up to {_RECUT_VERSION}",
                next="resume with the version of ckptmgr that saved it",
            )
        if self._on_resume == "restart" and not is_boundary(state):
            self._restart_epoch(state, rng)
            return
        changed = differences(state["facts"], describe_loader(self._loader))
        recut = None if is_boundary(state) else recut_position(state, self._loader)
        if recut is not None:
            state, changed = {**state, **recut[0]}, []
            self._notify(recut[1])
        if changed and not is_boundary(state):
            raise StateMismatchError(
                f"the loader is not the one that stood at batch {state['batch']} of epoch {state['epoch']}",
                why="; ".join(changed),
                next="resume with the loader of that run, or from a checkpoint at the end of an epoch; "
                "on_resume='restart' trains the epoch from its beginning once more",
            )
        if changed:
            self._notify(f"the loader has changed since epoch {state['epoch']}: {'; '.join(changed)}")
        self._pending, self._pending_rng = state, rng
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self.mark_step()

    def _restart_epoch(self, state: Mapping[str, Any], rng: Mapping[str, Any] | None) -> None:
        self.epoch = int(state["epoch"])
        self._notify(f"epoch {self.epoch} begins anew: {batches_passed(state)} batches of it are trained once more")
        for note in restore_rng(rng) if rng is not None else ():
            self._notify(note)
        self.mark_step()

    def _loader_state(self) -> Any:
        # Only after the epoch began: asked earlier, torchdata's loader starts iterating and draws random numbers.
        return copy.deepcopy(self._loader.state_dict()) if self._kind == "stateful" else None

    def _begin_epoch(self) -> bool:
        if self._is_exhausted:
            if self.batch == 0:
                what = f"{type(self._loader).__qualname__} gave no batch in epoch {self.epoch}"
                if self._epochs is None:
                    raise UsageError(
                        what,
                        why="without a number of epochs, this would go on for ever",
                        next="check the length of the data set, or pass epochs=",
                    )
                self._notify(f"{what}; check the length of the data set")
            if self._epochs is not None and self.epoch + 1 >= self._epochs:
                return False
            self.epoch, self.batch, self._is_exhausted = self.epoch + 1, 0, False
        elif self._epochs is not None and self.epoch >= self._epochs:
            return False
        set_data_epoch(self._loader, self.epoch)
        self._recut = begun_by_user(self._loader)
        self._generators = generators_of(self._loader)
        self._attributes_at_start = simple_attributes(self._loader)
        self._epoch_start = {"rng": capture_rng(), "generators": capture_generators(self._generators)}
        if keeps_workers(self._loader):
            reused = self._loader._iterator is not None
            rng = (self._workers or {}).get("rng") if reused else self._epoch_start["rng"]
            self._workers = {"are_reused": reused, "rng": rng}
        else:
            self._workers = None
        self._iterator = self._iterate()
        return True

    def _end_epoch(self) -> None:
        self._iterator = None
        self._is_exhausted, self._expects_end = True, False
        if self._on_epoch_end is not None:
            self._on_epoch_end(self.epoch)

    def _iterate(self) -> Iterator[Any]:
        source: Any = self._loader
        return iter(source() if callable(source) and not isinstance(source, Iterable) else source)

    def _resume(self, state: Mapping[str, Any]) -> None:
        before = capture_rng()
        target = before if self._pending_rng is None else self._pending_rng
        plan = plan_resume(state, self._loader, on_resume=self._on_resume)
        for message in plan.messages:
            self._notify(message)
        self._workers, self._recut = state["workers"], state.get("recut")
        try:
            iterator = self._rebuild(state, plan.how)
        except BaseException:
            restore_rng(before)
            raise
        self._generators = generators_of(self._loader)
        notes = restore_generators(self._generators, state["generators"])
        notes += restore_rng(target)
        for note in notes:
            self._notify(note)
        self._compare_attributes(state)
        self._pending = self._pending_rng = None
        self._iterator = iterator
        self._epoch_start = state["epoch_start"]
        if plan.how == "boundary":
            self._is_exhausted = bool(state["is_exhausted"])
            if state["is_last_batch"] and not self._is_exhausted:
                self._end_epoch()
        else:
            self._expects_end = self._kind == "stateful" and bool(state["is_last_batch"])

    def _rebuild(self, state: Mapping[str, Any], how: How) -> Iterator[Any] | None:
        workers = state["workers"]
        needs_workers = keeps_workers(self._loader) and self._loader._iterator is None and workers is not None
        if state["epoch_start"] is not None:
            set_data_epoch(self._loader, self.epoch)
        if how == "boundary":
            if self._kind == "stateful" and state["is_exhausted"] and state["loader_state"] is not None:
                # The data set inside may keep a state that the next epoch goes on from.
                self._loader.load_state_dict(copy.deepcopy(state["loader_state"]))
                self._iterate()
            elif needs_workers:
                self._make_workers(state)
            return None
        if how == "load":
            self._loader.load_state_dict(copy.deepcopy(state["loader_state"]))
            return self._iterate()
        if needs_workers and workers["are_reused"]:
            self._make_workers(state)
        self._put_epoch_start(state)
        self._attributes_at_start = simple_attributes(self._loader)
        if how == "skip":
            # An epoch of workers that lived on began without the draw of a seed for new ones.
            lived_on = workers is not None and workers["are_reused"] and not keeps_workers(self._loader)
            before_first = functools.partial(self._put_epoch_start, state) if lived_on else None
            passed = batches_passed(state)
            skipped = skipping_loader(
                self._loader, passed, before_first=before_first, batches=batches_to_pass(self._loader, self._recut)
            )
            iterator = iter(skipped)
            skipped.prime()
            if skipped.draws_per_batch:
                self._say_draws("the sampler")
            return iterator
        return self._replay(batches_passed(state))

    def _put_epoch_start(self, state: Mapping[str, Any]) -> None:
        restore_rng(state["epoch_start"]["rng"])
        restore_generators(generators_of(self._loader), state["epoch_start"]["generators"])

    def _make_workers(self, state: Mapping[str, Any]) -> None:
        """Start the workers that, without a restart, would live since an earlier epoch; the epoch then resets them."""
        if state["workers"]["rng"] is not None:
            restore_rng(state["workers"]["rng"])
        self._iterate()

    def _replay(self, nbatches: int) -> Iterator[Any]:
        batches = batches_to_pass(self._loader, self._recut)
        iterator = self._iterate() if batches is None else iter(skipping_loader(self._loader, 0, batches=batches))
        after_first: dict[str, Any] | None = None
        reported_at = time.monotonic()
        for done in range(nbatches):
            try:
                next(iterator)
            except StopIteration:
                raise StateMismatchError(
                    f"the loader ended after {done} batches, {nbatches} of epoch {self.epoch} were already trained",
                    why="the data are not those of the run that saved, or their order was not repeated",
                    next="resume with the data of that run, or from a checkpoint at the end of an epoch",
                ) from None
            if after_first is None:
                after_first = capture_rng()
            if time.monotonic() - reported_at > _PROGRESS_EVERY_S:
                reported_at = time.monotonic()
                self._notify(f"replayed {done + 1} of {nbatches} batches")
        if after_first is not None and not same_rng(after_first, capture_rng()):
            self._say_draws("reading")
        return iterator

    def _say_draws(self, who: str) -> None:
        self._notify(
            f"perhaps not exact: {who} draws from a global random number generator for each batch, in between the "
            "training steps; what depends on earlier draws (a shuffle buffer) may differ. "
            "Give it a generator object of its own"
        )

    def _compare_attributes(self, state: Mapping[str, Any]) -> None:
        live = simple_attributes(self._loader)
        for path, value in state["attributes"].items():
            if path in live and live[path] != value:
                self._notify(
                    f"perhaps not exact: {path} was {value} in the run that saved and is {live[path]} now; batches "
                    "that depend on it differ. Give its owner set_epoch(), or state_dict() and a StatefulDataLoader"
                )

    def _warn_of_inexact_loader(self) -> None:
        dataset = getattr(self._loader, "dataset", None)
        if self._kind != "stateful" and callable(getattr(dataset, "load_state_dict", None)):
            self._notify(
                f"perhaps not exact: {type(dataset).__qualname__} has a state of its own, and "
                f"{type(self._loader).__qualname__} does not save it; use torchdata's StatefulDataLoader"
            )
        if getattr(self._loader, "num_workers", 0) > 1 and getattr(self._loader, "in_order", True) is False:
            self._notify("not exact: in_order=False hands out batches in the order in which workers finish them")


def _of_dataset(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in attributes.items() if path.startswith("dataset")}
