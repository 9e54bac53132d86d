"""A selective restore: the live objects and the entries that are handed to the handlers for a selection."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ckptmgr.errors import UsageError
from ckptmgr.state.capture import check_state, restore_state
from ckptmgr.state.cast_loss import measure_losses
from ckptmgr.state.dtype_policy import take_dtypes
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.handlers import REGISTRY, HandlerRegistry
from ckptmgr.state.names import ParameterNames
from ckptmgr.state.optimizer import unwrap_optimizer
from ckptmgr.state.rename_rules import RenameRules, RuledEntries
from ckptmgr.state.renamed_entries import RenamedEntries, in_live_names
from ckptmgr.state.selected_parts import Build, ModuleParts, OptimizerParts, is_module_tree, is_optimizer_tree
from ckptmgr.state.selection import Choice, Selection, SelectionReport, covers

__all__ = ["SelectedState", "select_state"]

_log = logging.getLogger("ckptmgr")

_NOTES = {
    "data": "epochs are counted from 0",
    "rng": "the random number generators stay as they are",
    "progress": "steps are counted from 0",
}


@dataclass(frozen=True, slots=True)
class SelectedState:
    """What is left of a checkpoint, and of the live state, for a selection.

    Attributes:
        state: The live objects that are restored, or that name the parameters of one that is.
        entries: What is put into them, by the names of the live state.
        words: What is restored of the loop's own: of the words that were given.
        live_options: Options by optimizer that stay as the program has built them.
        report: What is not restored.
    """

    state: dict[str, object]
    entries: dict[str, CapturedEntry]
    words: frozenset[str]
    live_options: Mapping[str, frozenset[str]]
    report: SelectionReport
    _selection: Selection
    _checked: dict[str, CapturedEntry]
    _build: Build
    _ruled: RuledEntries
    _in_live: RenamedEntries
    _registry: HandlerRegistry

    def check(self) -> None:
        """Compare what is selected with the live objects. Changes nothing.

        Raises:
            StateMismatchError: Something does not fit; tells everything that does not.
        """
        check_state(self.state, self._checked, registry=self._registry)

    def restore(self) -> None:
        """Verify, then put what is selected into the live objects. A restore that fails leaves them as they were.

        Raises:
            StateMismatchError: Something does not fit, or an object refused its state.
        """
        self.check()
        undo = take_dtypes(list(self._build.retyped.values()))
        try:
            restore_state(self.state, self.entries, registry=self._registry)
        except BaseException:
            undo()
            raise

    def tell(self, source: str) -> None:
        """Log what was not restored, and what was changed on the way.

        Args:
            source: The checkpoint.
        """
        for level, note in self._in_live.notes:
            _log.log(level, "%s", note)
        self.report.log(source, dtype=self._selection.dtype)

    def options(self, saved: Mapping[str, Any] | None, before: Mapping[str, CapturedEntry]) -> dict[str, Any] | None:
        """Return the checkpoint's description of options, by the live names and for what is restored alone.

        Args:
            saved: As it was stored; None where the checkpoint has none.
            before: The checkpoint's entries as they were.
        """
        if saved is None:
            return None
        later = self._in_live.names
        names = {old: later.get(new, new) for old, new in self._ruled.names.items()}
        every = {**{old: new for old, new in later.items() if old not in names.values()}, **names}
        described = RenamedEntries(self.entries, (), every).options(saved, before) or {}
        now = {self._ruled.entry_names.get(name, name): options for name, options in described.items()}
        return {name: options for name, options in now.items() if name in self.state}


def select_state(
    state: Mapping[str, object],
    entries: Mapping[str, CapturedEntry],
    selection: Selection,
    *,
    words: Mapping[str, str] | None = None,
    absent: Collection[str] = (),
    unread: Collection[str] = (),
    also: Mapping[str, str] | None = None,
    registry: HandlerRegistry = REGISTRY,
) -> SelectedState:
    """Apply a selection to a checkpoint and to the live objects. Changes nothing.

    Args:
        state: The live objects by entry.
        entries: The checkpoint's, without the loop's own.
        selection: What to restore.
        words: Words for what the loop itself adds, with the names of its entries.
        absent: Those of the words that the checkpoint has nothing of.
        unread: Further entries of the checkpoint, which nobody has asked for: they are left out in any case, as is
            what is in ``entries`` only because something of it is renamed into another entry.
        also: Further names of entries in patterns, as ``optimizer`` for each of several.
        registry: Where handlers are found.

    Raises:
        UsageError: The selection does not fit these objects and this checkpoint, or contradicts itself.
        StateMismatchError: The names of a module cannot be matched.
    """
    ruled = RenameRules(selection.rename).apply(entries)
    in_live = in_live_names(state, ruled.entries)
    saved = in_live.entries
    names = ParameterNames.of_state(state)
    parts: dict[str, ModuleParts | OptimizerParts | None] = {}
    live: dict[str, CapturedEntry] = {}
    for name in (*state, *(name for name in saved if name not in state)):
        handler = registry.find(name, state[name]) if name in state else None
        kinds = {it for it in (handler and handler.name, saved[name].handler if name in saved else None) if it}
        if handler is not None and kinds in ({"module"}, {"optimizer"}):
            live[name] = CapturedEntry(name, handler.name, handler.version, handler.capture(state[name], names))
        parts[name] = _parts(name, kinds, saved.get(name), live.get(name), state.get(name), names)
    reserved = set((words or {}).values())
    further = [name for name in unread if name not in parts and name not in entries and name not in reserved]
    own = {word: entry if word in {*parts, *further} else word for word, entry in (words or {}).items()}
    leaves: dict[str, tuple[str, ...]] = {}
    for name, part in parts.items():
        own_leaves = part.leaves if part is not None and part.leaves else {name: ()}
        word = (also or {}).get(name)
        for path, others in own_leaves.items():
            leaves[path] = others if word is None else (*others, word + path[len(name) :])
    leaves.update(dict.fromkeys(further, ()))
    leaves.update({path: ((words or {})[word],) for word, path in own.items()})
    choice = Choice(selection, leaves)
    for word, path in own.items():
        if (words or {})[word] in unread:
            choice.leave_out(path, None)
    strays = {*unread} - state.keys()
    for name in (*further, *(name for name in parts if name in strays)):
        for path in _paths(name, parts.get(name)):
            choice.leave_out(path, None)
    optimizers = {name: part for name, part in parts.items() if isinstance(part, OptimizerParts)}
    _follow(choice, parts, optimizers)
    notes = _refuse_contradiction(choice, state, {name: part.learning_rate for name, part in optimizers.items()})
    taken = [name for name, part in parts.items() if choice.taken_of(_paths(name, part))]
    # An optimizer's parameters go by the names that the modules give them.
    naming = {name for name in live if live[name].handler == "module" and any(o in taken for o in optimizers)}
    groups = {name: part.told if part is not None and part.leaves else [name] for name, part in parts.items()}
    groups.update({path: [path] for path in (*further, *(path for word, path in own.items() if word not in absent))})
    moves = ((old.partition("/")[0], new.partition("/")[0]) for old, new in ruled.names.items())
    moved = {old for old, new in moves if old != new}
    followed_by = {path: _NOTES[word] for word, path in own.items() if word in _NOTES}
    for pattern in selection.resize:
        if not any(
            covers(pattern, path) for part in parts.values() if isinstance(part, ModuleParts) for path in part.leaves
        ):
            raise choice.no_match(pattern)
    build = Build(selection.dtype, resize=selection.resize)
    checking = Build("live" if selection.dtype == "saved" else selection.dtype, resize=selection.resize)
    made = _entries(parts, saved, live, taken, naming, choice, build)
    return SelectedState(
        state={name: value for name, value in state.items() if name in taken or name in naming},
        entries=made,
        words=frozenset(word for word, path in own.items() if choice.takes(path)),
        live_options={name: part.kept_options(choice) for name, part in optimizers.items() if name in taken},
        report=SelectionReport(
            not_restored=choice.not_restored(groups, partial=moved, notes=followed_by),
            cast=build.cast,
            renamed={**ruled.entry_names, **{old: in_live.names.get(new, new) for old, new in ruled.names.items()}},
            notes=(*notes, *build.notes),
            resized=build.resized,
            losses=measure_losses(build.casts),
        ),
        _selection=selection,
        # Live tensors take another dtype only once all has been checked; so the check casts the saved ones.
        _checked=_entries(parts, saved, live, taken, naming, choice, checking) if build.retyped else made,
        _build=build,
        _ruled=ruled,
        _in_live=in_live,
        _registry=registry,
    )


def _refuse_contradiction(
    choice: Choice, objects: Mapping[str, object], learning_rates: Mapping[str, str]
) -> tuple[str, ...]:
    """Refuse a schedule that goes on from a learning rate that is left out; say where one begins from a restored rate.

    Args:
        choice: What is restored.
        objects: The live objects, by the path of what is restored of them.
        learning_rates: By optimizer, the path of its learning rate.

    Raises:
        UsageError: The schedule would put the rate of the checkpoint back at its next step, or a wrong one.
    """
    notes: list[str] = []
    known = {id(unwrap_optimizer(objects[name])): path for name, path in learning_rates.items() if name in objects}
    for name, value in objects.items():
        if not isinstance(value, LRScheduler) or isinstance(value, ReduceLROnPlateau):
            continue
        rate = known.get(id(unwrap_optimizer(value.optimizer)))
        if rate is None or choice.takes(name) == choice.takes(rate):
            continue
        if choice.takes(name):
            raise UsageError(
                f"{rate!r} is left out and {name!r}, which drives it, is not",
                why="the schedule goes on from the rates of the checkpoint, and would not fit the live one",
                next=f"leave out {name!r} too; to go on with the schedule from another rate, use "
                "on_changed_options='apply'",
            )
        notes.append(
            f"{name} begins anew, and the learning rate that it goes on from is the checkpoint's: leave out {rate} "
            "too, and it begins from the program's"
        )
    return tuple(notes)


def _parts(
    name: str,
    kinds: set[str],
    saved: CapturedEntry | None,
    live: CapturedEntry | None,
    value: Any,
    names: ParameterNames,
) -> ModuleParts | OptimizerParts | None:
    """Return the parts of an entry; None for one that is restored as a whole."""
    trees = [entry.tree for entry in (saved, live) if entry is not None]
    saved_tree, live_tree = (entry.tree if entry else None for entry in (saved, live))
    if kinds == {"module"} and all(map(is_module_tree, trees)):
        return ModuleParts(name, saved_tree, live_tree, value)
    if kinds == {"optimizer"} and all(map(is_optimizer_tree, trees)):
        return OptimizerParts(name, saved_tree, live_tree, value, names)
    # What is no state of its handler is refused by the handler's own check.
    return None


def _paths(name: str, part: ModuleParts | OptimizerParts | None) -> list[str]:
    return list(part.leaves) if part is not None and part.leaves else [name]


def _follow(choice: Choice, parts: Mapping[str, Any], optimizers: Mapping[str, OptimizerParts]) -> None:
    """Leave out the moments of parameters that are left out of a module, and what goes with a learning rate."""
    gone = {
        path: choice.reason(path)
        for part in parts.values()
        if isinstance(part, ModuleParts)
        for path in part.left_out(choice)
    }
    for part in optimizers.values():
        part.follow(choice, gone)


def _entries(
    parts: Mapping[str, ModuleParts | OptimizerParts | None],
    saved: Mapping[str, CapturedEntry],
    live: Mapping[str, CapturedEntry],
    taken: Iterable[str],
    naming: Iterable[str],
    choice: Choice,
    build: Build,
) -> dict[str, CapturedEntry]:
    made: dict[str, CapturedEntry] = {}
    # Modules first: what their tensors become decides about the state of optimizers.
    for name in sorted(parts, key=lambda name: isinstance(parts[name], OptimizerParts)):
        part = parts[name]
        if name in taken and name in saved:
            entry = saved[name]
            tree = entry.tree if part is None or not part.leaves else part.tree(choice, build)
            made[name] = CapturedEntry(name, entry.handler, entry.version, tree)
        elif name in naming and name not in taken:
            made[name] = live[name]
    return made
