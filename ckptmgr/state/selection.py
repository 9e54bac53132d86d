"""Which parts of a checkpoint are restored: what the user chooses, and the account of what was left out.

A part goes by its path. ``model`` is an entry, ``model/head.weight`` a tensor of a module, ``optimizer/options/lr`` an
option of all groups of an optimizer, ``optimizer/state/model/head.weight`` its state for one parameter.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, Self, TypeAlias

from ckptmgr.errors import UsageError
from ckptmgr.state.cast_loss import CastLoss, losses_in_words
from ckptmgr.state.rename_rules import RenameRules

__all__ = ["Choice", "DtypePolicy", "NotRestored", "ResizePolicy", "Selection", "SelectionReport"]

_log = logging.getLogger("ckptmgr")

DtypePolicy: TypeAlias = Literal["strict", "live", "saved"]
ResizePolicy: TypeAlias = Literal["slice", "grow"]

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Selection:
    """Says which parts of a checkpoint are restored; the rest stays as the program has built it.

    A pattern stands for the paths that it matches as a whole, as file names are matched (``*``, ``?``, ``[…]``; case
    counts), and for all that lies below them. Paths are those of the live program, which is to say after ``rename``.

    =================================  ===================================================================
    path                               what it is
    =================================  ===================================================================
    ``model``, ``scheduler``, …        an entry of the state
    ``model/layers.3.weight``          a parameter, buffer or extra state of a module
    ``optimizer/options/lr``           an option of all parameter groups
    ``optimizer/state/model/fc.bias``  what the optimizer keeps for a parameter
    ``data``                           the position in the data; without it, epochs are counted from 0
    ``rng``                            the state of the global random number generators
    ``progress``                       step and metrics; without them, steps are counted from 0
    =================================  ===================================================================

    Where a part of a module is left out, so is what optimizers keep for its parameters. An entry of the user's that is
    called ``data``, ``rng`` or ``progress`` goes before the word; the loop's own are then ``ckptmgr_data`` and so on.

    Args:
        include: Patterns of what is restored.
        exclude: Patterns of what is left out of that.
        rename: Names in the checkpoint and what they are called now: exact ones, or with one ``*`` at the same end of
            both, as in ``{"model/backbone.*": "model/encoder.*"}``. For parameters and buffers, and with them for the
            state of optimizers. Of several rules for a name the longest holds.
        resize: Paths or patterns of tensors that have another number of rows (their first dimension) than the live
            ones, as after tokens were added to a vocabulary: ``slice`` takes the first rows of the checkpoint, ``grow``
            all of them, and keeps the further ones of the live tensor as the program has initialised them. What
            optimizers keep for a parameter is resized with it, with zeros for new rows; where that means nothing, it
            begins anew, and that is said.
        dtype: What to do where a floating-point tensor has another dtype than the live one: ``strict`` refuses,
            ``live`` casts the saved value, ``saved`` gives the live tensor the dtype of the checkpoint.

    Raises:
        UsageError: An argument cannot be meant as it was given. Whether a pattern matches anything is known only at the
            restore, which refuses one that does not.

    Example:
        >>> Selection.without("scheduler", "optimizer/options/lr").exclude
        ('scheduler', 'optimizer/options/lr')
    """

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    dtype: DtypePolicy = "strict"
    resize: Mapping[str, ResizePolicy] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(getattr(self, name), of=name))
        if not self.include:
            raise UsageError(
                "include=() selects nothing", why="there would be nothing to restore", next="leave it out for all"
            )
        if self.dtype not in ("strict", "live", "saved"):
            raise UsageError(
                f"dtype={self.dtype!r}",
                why="it is 'strict', 'live' for the dtype of the live tensors, or 'saved' for the checkpoint's",
            )
        object.__setattr__(self, "resize", _policies(self.resize))
        # What cannot be meant is refused here, and not after the checkpoint was read.
        object.__setattr__(self, "rename", RenameRules(self.rename).as_given)

    @classmethod
    def only(
        cls,
        *patterns: str,
        rename: Mapping[str, str] | None = None,
        dtype: DtypePolicy = "strict",
        resize: Mapping[str, ResizePolicy] | None = None,
    ) -> Self:
        """Restore nothing but this: ``Selection.only("model")``."""
        return cls(include=patterns, rename=rename or {}, dtype=dtype, resize=resize or {})

    @classmethod
    def without(
        cls,
        *patterns: str,
        rename: Mapping[str, str] | None = None,
        dtype: DtypePolicy = "strict",
        resize: Mapping[str, ResizePolicy] | None = None,
    ) -> Self:
        """Restore everything but this: ``Selection.without("scheduler", "data")``."""
        return cls(exclude=patterns, rename=rename or {}, dtype=dtype, resize=resize or {})

    @property
    def sources(self) -> tuple[str, ...]:
        """Entries of the checkpoint that rules rename something of, as far as the rules name them."""
        entries = (old.partition("/")[0] for old in self.rename)
        return tuple(dict.fromkeys(entry for entry in entries if "*" not in entry))

    def may_take(self, entry: str) -> bool:
        """Say whether anything of an entry can be selected: what cannot need not be read."""
        if any(covers(pattern, entry) for pattern in self.exclude):
            return False
        return any(
            # A wildcard may stand for a slash too.
            covers(pattern, entry) or pattern.startswith(f"{entry}/") or _has_wildcard(pattern.partition("/")[0])
            for pattern in self.include
        )


@dataclass(frozen=True, slots=True)
class NotRestored:
    """Something that was left out.

    Attributes:
        path: An entry, or the pattern that left parts of one out.
        names: The paths that it stands for.
        note: What follows from it, where that is not plain.
    """

    path: str
    names: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        if "/" not in self.path or self.names == (self.path,):
            return f"{self.path} ({self.note})" if self.note else self.path
        shown = ", ".join(self.names[:_SHOWN]) + (", …" if len(self.names) > _SHOWN else "")
        return f"{self.path} ({len(self.names)}: {shown})"


@dataclass(frozen=True, slots=True)
class SelectionReport:
    """What a selective restore did not restore, and what it changed on the way.

    Attributes:
        not_restored: Everything of the checkpoint and of the live state that was left out; empty if nothing was.
        cast: Paths of tensors whose dtype was changed, with the dtypes before and after.
        renamed: Names in the checkpoint, and what they are called now.
        resized: Paths of tensors with another number of rows, with the shapes before and after.
        notes: Further sentences for the user.
        losses: What casts have done to values, by path, where it is anything.
    """

    not_restored: tuple[NotRestored, ...] = ()
    cast: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    resized: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    losses: Mapping[str, CastLoss] = field(default_factory=dict)

    def log(self, source: str, *, dtype: DtypePolicy) -> None:
        """Tell everything: what was not restored in one message, at WARNING.

        Args:
            source: The checkpoint.
            dtype: The policy by which tensors were cast.
        """
        if self.not_restored:
            _log.warning("not restored from %s: %s", source, "; ".join(map(str, self.not_restored)))
        kinds: dict[tuple[str, str], list[str]] = {}
        for path, pair in self.cast.items():
            kinds.setdefault(pair, []).append(path)
        whose = "values of the checkpoint" if dtype == "live" else "tensors of the program"
        for (before, after), paths in kinds.items():
            lost = losses_in_words({path: self.losses[path] for path in paths if path in self.losses})
            if dtype == "live" and not lost:
                lost = "no value has changed"
            _log.warning(
                "%s cast from %s to %s: %s%s", whose, before, after, _listed(paths), f"; {lost}" if lost else ""
            )
        for path, (was, now) in self.resized.items():
            how = (
                "the first rows were taken" if now[0] < was[0] else "new rows stay as the program has initialised them"
            )
            _log.warning("%s resized from %s to %s: %s", path, was, now, how)
        changed = [f"{old} -> {new}" for old, new in self.renamed.items() if old != new]
        if changed:
            _log.info("renamed: %s", _listed(changed))
        for note in self.notes:
            _log.warning("%s", note)


class Choice:
    """A selection applied to the paths that there are.

    Args:
        selection: The user's.
        leaves: Everything that can be selected alone, by path, with the further paths that it goes by.

    Raises:
        UsageError: A pattern matches nothing, or nothing is left to restore. Names the nearest path.
    """

    def __init__(self, selection: Selection, leaves: Mapping[str, Sequence[str]]) -> None:
        self._leaves = leaves
        # Path → what left it out; None for what nothing has included.
        self._left_out: dict[str, str | None] = {}
        unused = dict.fromkeys((*selection.include, *selection.exclude))
        for path, others in leaves.items():
            included = _first_cover(selection.include, (path, *others), unused)
            excluded = _first_cover(selection.exclude, (path, *others), unused)
            if excluded is not None or included is None:
                self._left_out[path] = excluded
        for pattern in unused:
            raise self.no_match(pattern)
        if len(self._left_out) == len(leaves):
            raise UsageError(
                "the selection leaves nothing to restore",
                why=f"include={list(selection.include)} and exclude={list(selection.exclude)} leave none of "
                f"{len(leaves)} paths",
                next="exclude less, or leave the restore out",
            )

    def takes(self, path: str) -> bool:
        """Say whether a path is restored."""
        return path not in self._left_out

    def taken_of(self, paths: Iterable[str]) -> bool:
        """Say whether any of several paths is restored."""
        return any(self.takes(path) for path in paths)

    def reason(self, path: str) -> str | None:
        """Return the pattern that left a path out; None for one that was simply not included."""
        return self._left_out[path]

    def leave_out(self, path: str, because: str | None) -> None:
        """Leave out one path more, under the name of a pattern."""
        self._left_out.setdefault(path, because)

    def not_restored(
        self, groups: Mapping[str, Sequence[str]], *, partial: Collection[str] = (), notes: Mapping[str, str]
    ) -> tuple[NotRestored, ...]:
        """Return everything that was left out.

        Args:
            groups: The paths of each entry, as far as they are worth telling.
            partial: Entries that these paths are not all of: the rest was renamed into others.
            notes: What follows where an entry is left out.
        """
        found: list[NotRestored] = []
        for entry, paths in groups.items():
            gone = [path for path in paths if not self.takes(path)]
            if gone and not self.taken_of(paths) and entry not in partial:
                found.append(NotRestored(entry, tuple(gone), notes.get(entry, "")))
                continue
            by_pattern: dict[str, list[str]] = {}
            for path in gone:
                by_pattern.setdefault(self._left_out[path] or f"{path.rpartition('/')[0]}/*", []).append(path)
            found += [NotRestored(pattern, tuple(names)) for pattern, names in by_pattern.items()]
        return tuple(found)

    def no_match(self, pattern: str) -> UsageError:
        """Return the error for a pattern that matches nothing; it names the nearest path."""
        known = list(dict.fromkeys(name for leaf, others in self._leaves.items() for name in (leaf, *others)))
        whole = next((path for path in known if pattern.startswith(f"{path}/")), None)
        if whole is not None:
            return UsageError(
                f"the pattern {pattern!r} of the selection matches nothing",
                why=f"{whole!r} has no parts: it is restored as a whole or not at all",
                next=f"select or exclude {whole!r}",
            )
        if any(path.startswith(f"{pattern}.") for path in known):
            nearest = f"{pattern}.*"
        else:
            every = dict.fromkeys(name for path in known for name in (*_parents(path), path))
            nearest = next(iter(get_close_matches(pattern, every, n=1, cutoff=0.0)), "")
        return UsageError(
            f"the pattern {pattern!r} of the selection matches nothing",
            why=f"neither the checkpoint nor the live state has such a path, out of {len(known)}",
            next=f"the nearest is {nearest!r}; what is left out by mistake would be lost without a word",
        )


def covers(pattern: str, path: str) -> bool:
    """Say whether a pattern matches a path, or something that the path lies in."""
    return pattern == "*" or fnmatchcase(path, pattern) or any(fnmatchcase(p, pattern) for p in _parents(path))


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def _first_cover(patterns: Sequence[str], paths: Sequence[str], unused: dict[str, None]) -> str | None:
    first = None
    for pattern in patterns:
        if any(covers(pattern, path) for path in paths):
            unused.pop(pattern, None)
            first = first or pattern
    return first


def _has_wildcard(text: str) -> bool:
    return any(mark in text for mark in "*?[")


def _patterns(given: object, *, of: str) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Iterable):
        raise UsageError(f"{of}={given!r}", why="it is a pattern or a list of them", next=f"{of}=('model', …)")
    listed = tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str) or not pattern:
            raise UsageError(f"{of} has the pattern {pattern!r}", why="a pattern is text such as 'model/layers.3.*'")
    return listed


def _policies(given: object) -> dict[str, ResizePolicy]:
    example = "resize={'model/embed.weight': 'grow'}"
    if not isinstance(given, Mapping):
        raise UsageError(f"resize={given!r}", why="it is a dict of paths and what to do with them", next=example)
    for pattern, policy in given.items():
        if not isinstance(pattern, str) or not pattern or policy not in ("slice", "grow"):
            raise UsageError(
                f"resize has {pattern!r}: {policy!r}",
                why="'slice' takes the first rows of the checkpoint, 'grow' keeps further rows of the live tensor",
                next=example,
            )
    return dict(given)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    return f"{len(names)} ({shown})"
