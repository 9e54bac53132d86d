"""Start a ``DataLoader`` in the middle of an epoch without reading what was already trained.

Only the sampler runs; no sample is read. What makes this exact is the order in which random numbers are drawn. A plain
loader draws in this order when it is iterated:

1. ``iter(sampler)``: samplers that shuffle eagerly draw here;
2. the base seed of the workers, also with ``num_workers=0``;
3. at the first ``next`` of the sampler: torch's own samplers draw here. With workers that happens still inside ``iter``
   (prefetching), with ``num_workers=0`` at the first batch.

So the skip must not run inside ``iter(sampler)``, which would move step 3 before step 2 and shuffle differently. It
runs at the first ``next``, and :meth:`SkippedLoader.prime` runs it at a time of the caller's choosing. To resume: set
the RNG of the epoch's start, ``iter(skipped)``, ``skipped.prime()``, set the RNG of the checkpoint, go on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ckptmgr.errors import StateMismatchError, UnsupportedStateError, UsageError
from ckptmgr.state.rng import capture_rng, same_rng

__all__ = ["SkippedLoader", "skipping_loader", "why_not_skippable"]


def why_not_skippable(loader: object) -> str | None:
    """Return why batches of ``loader`` cannot be skipped without reading them, or None when they can."""
    if not isinstance(loader, DataLoader):
        return f"{type(loader).__qualname__} is not a torch DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return f"{type(loader.dataset).__qualname__} is an IterableDataset: it has no sampler that could start later"
    for name in ("__iter__", "_get_iterator", "_index_sampler"):
        # An override may keep an iterator of its own, which would go on where it was and not where we say.
        if getattr(type(loader), name) is not getattr(DataLoader, name):
            return f"{type(loader).__qualname__} overrides DataLoader.{name}"
    return None


def skipping_loader(
    loader: DataLoader[Any],
    nbatches: int,
    *,
    before_first: Callable[[], None] | None = None,
    batches: Iterable[Any] | None = None,
) -> SkippedLoader:
    """Return a view of ``loader`` whose next epoch starts after its first ``nbatches`` batches.

    Args:
        loader: A ``DataLoader``, or a subclass that leaves iteration alone, over a map-style dataset. Left as it is.
        nbatches: Batches to leave out, at least 0. In batches of the index sampler: samples when ``batch_size=None``.
        before_first: Called just before the sampler is asked for its first batch. Where this loader has workers and the
            one that the epoch began with had none, or the other way round, they ask at another place between other
            draws; the RNG of that place can be put here.
        batches: What to ask for the epoch's batches instead of the loader's own index sampler.

    Returns:
        An iterable over the rest of one epoch.

    Raises:
        UsageError: ``nbatches`` is negative.
        UnsupportedStateError: The loader cannot skip; :func:`why_not_skippable` says why.
    """
    if nbatches < 0:
        raise UsageError(f"cannot skip {nbatches} batches", why="the number must be at least 0")
    reason = why_not_skippable(loader)
    if reason is not None:
        raise UnsupportedStateError(
            f"cannot start {type(loader).__qualname__} after {nbatches} batches without reading them",
            why=reason,
            next="read the batches and discard them",
        )
    return SkippedLoader(loader, nbatches, before_first, batches)


class SkippedLoader:
    """The rest of one epoch of a ``DataLoader``; made by :func:`skipping_loader`.

    ``iter()`` gives torch's own iterator, ``len()`` the number of batches that are left.

    With ``persistent_workers=True`` the workers belong to the original loader, as in a run without interruption: if it
    has workers already they are reset, else the new ones are handed to it, and its next epoch reuses them with its own
    sampler.

    Attributes:
        loader: The original loader.
        nbatches: How many batches are left out.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        nbatches: int,
        before_first: Callable[[], None] | None = None,
        batches: Iterable[Any] | None = None,
    ) -> None:
        self.loader = loader
        self.nbatches = nbatches
        self._original = _index_sampler(loader)
        self._sampler = _SkippingSampler(
            self._original if batches is None else batches, nbatches, before_first or _nothing
        )

    def __iter__(self) -> Iterator[Any]:
        loader: Any = self.loader
        if loader.persistent_workers and loader.num_workers > 0 and loader._iterator is not None:
            iterator = loader._iterator
            iterator._index_sampler = self._sampler
            try:
                iterator._reset(loader)
            finally:
                # The epoch that begins holds its sampler's iterator already; the one after it takes this.
                iterator._index_sampler = self._original
            return iterator  # type: ignore[no-any-return]
        clone: Any = copy.copy(loader)
        # DataLoader.__setattr__ refuses to replace a sampler, so the entries are set below it.
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        clone.__dict__[name] = self._sampler
        clone.__dict__["_iterator"] = None
        iterator = iter(clone)
        if loader.persistent_workers and loader.num_workers > 0:
            iterator._index_sampler = self._original
            loader._iterator = iterator
            clone.__dict__["_iterator"] = None
        return iterator  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self._sampler)

    @property
    def draws_per_batch(self) -> bool | None:
        """Whether the sampler drew from a global generator after its first batch; None before the skip has run.

        In the original run such draws come between those of the training steps, so that the skip cannot repeat them:
        the order that follows is right only if no draw depends on an earlier one.
        """
        return None if self._sampler.latest is None else self._sampler.latest.draws_per_batch

    def prime(self) -> None:
        """Run the skip now, in the epoch that ``iter()`` began last; does nothing when it has run.

        With workers it ran inside ``iter()``, because the loader prefetches there. With ``num_workers=0`` it would run
        at the first batch, too late for a caller who sets the RNG in between.

        Raises:
            UsageError: ``iter()`` was not called.
            StateMismatchError: The sampler has fewer than ``nbatches`` batches.
        """
        if self._sampler.latest is None:
            raise UsageError("prime() before iter()", next="call iter() on the loader first")
        self._sampler.latest.skip()


class _SkippingSampler:
    def __init__(self, sampler: Iterable[Any], nbatches: int, before_first: Callable[[], None]) -> None:
        self.before_first = before_first
        self.sampler = sampler
        self.nbatches = nbatches
        self.latest: _SkippingIterator | None = None

    def __iter__(self) -> _SkippingIterator:
        # A loader with workers calls this twice and uses the second.
        self.latest = _SkippingIterator(iter(self.sampler), self.nbatches, self.before_first)
        return self.latest

    def __len__(self) -> int:
        if not isinstance(self.sampler, Sized):
            raise TypeError(f"{type(self.sampler).__qualname__} has no len()")
        return max(0, len(self.sampler) - self.nbatches)


class _SkippingIterator:
    def __init__(self, inner: Iterator[Any], nbatches: int, before_first: Callable[[], None]) -> None:
        self.draws_per_batch: bool | None = None
        self._inner = inner
        self._nbatches = nbatches
        self._before_first = before_first
        self._is_skipped = False

    def __iter__(self) -> _SkippingIterator:
        return self

    def __next__(self) -> Any:
        self.skip()
        return next(self._inner)

    def skip(self) -> None:
        if self._is_skipped:
            return
        self._is_skipped = True
        self._before_first()
        after_first: dict[str, Any] | None = None
        for done in range(self._nbatches):
            try:
                next(self._inner)
            except StopIteration:
                raise StateMismatchError(
                    f"the sampler ended after {done} batches, {self._nbatches} of this epoch were already trained",
                    why="the data set, the sampler or the batch size is not that of the run that saved",
                    next="resume with the loader of that run",
                ) from None
            if after_first is None:
                after_first = capture_rng()
        self.draws_per_batch = after_first is not None and not same_rng(after_first, capture_rng())


def _nothing() -> None:
    """Leave the RNG as it is."""


def _index_sampler(loader: DataLoader[Any]) -> Iterable[Any]:
    sampler: Iterable[Any] = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return sampler
