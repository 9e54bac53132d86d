"""A checkpoint's entries under the names of the live modules, where these differ by a prefix alone.

A module and whatever goes by the names of its parameters are renamed together: moments never stay behind under names
that mean nothing, or another parameter.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ckptmgr.errors import StateMismatchError
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.names import WrapperPrefixes, module_names
from ckptmgr.state.prefixes import NameRule, find_rule, shapes_of

__all__ = ["RenamedEntries", "in_live_names"]


@dataclass(frozen=True, slots=True)
class RenamedEntries:
    """What `in_live_names` returns.

    Attributes:
        entries: All entries; those that fit as they are, are the given ones.
        notes: One sentence with its logging level for each module that was renamed.
        names: Parameter names of the checkpoint, ``<entry>/<name>``, and what they are called now.
    """

    entries: dict[str, CapturedEntry]
    notes: tuple[tuple[int, str], ...]
    names: Mapping[str, str]

    def options(self, saved: Mapping[str, Any] | None, before: Mapping[str, CapturedEntry]) -> Mapping[str, Any] | None:
        """Return the description of options in the checkpoint, with its groups under the new names.

        Args:
            saved: By `changed_options.describe_options`; None where the checkpoint has none.
            before: The entries as they were.
        """
        if not self.names or saved is None:
            return saved
        result = dict(saved)
        for name, described in saved.items():
            if "groups" in described:
                tree = before[name].tree if name in before else {}
                groups = [{**group, "of": self._of(group["of"], tree)} for group in described["groups"]]
                result[name] = {**described, "groups": groups}
        return result

    def _of(self, name: str, tree: Mapping[str, Any]) -> str:
        # A group goes by the first of its names in the alphabet, which may be another one now.
        members = next((group["params"] for group in tree.get("groups", ()) if name in group["params"]), [name])
        return min(self.names.get(member, member) for member in members)


def in_live_names(state: Mapping[str, object], entries: Mapping[str, CapturedEntry]) -> RenamedEntries:
    """Give entries the names of the live modules, for each module whose names one rule matches completely.

    Args:
        state: The live objects by entry; nothing is changed.
        entries: The checkpoint's.

    Raises:
        StateMismatchError: A module could be renamed, and an optimizer names a parameter that it has not.
    """
    renamed = dict(entries)
    names: dict[str, str] = {}
    notes: list[tuple[int, str]] = []
    for name, value in state.items():
        entry = entries.get(name)
        if entry is None or entry.handler != "module" or not isinstance(value, nn.Module):
            continue
        try:
            found = _renamed_module(value, entry)
        except (KeyError, TypeError, AttributeError, ValueError):
            # The handler's own check meets it again, and says of which entry it is.
            continue
        if found is None:
            continue
        rule, pairs, renamed[name] = found
        names.update({f"{name}/{old}": f"{name}/{new}" for old, new in pairs.items()})
        level = logging.WARNING if rule.removed or rule.added else logging.INFO
        notes.append((level, f"{name}: all {len(pairs)} names of the checkpoint fit {rule}"))
    modules = tuple(f"{name}/" for name, entry in renamed.items() if entry is not entries[name])
    for name, entry in entries.items():
        if modules and entry.handler == "optimizer" and _is_named(entry.tree):
            renamed[name] = _with_tree(entry, _renamed_optimizer(name, entry.tree, names, modules))
    return RenamedEntries(renamed, tuple(notes), names)


def _renamed_module(module: nn.Module, entry: CapturedEntry) -> tuple[NameRule, dict[str, str], CapturedEntry] | None:
    tree = entry.tree
    prefixes = WrapperPrefixes(module)
    live = shapes_of({prefixes.own_name(key): item for key, item in module.state_dict().items()})
    found = find_rule(shapes_of({**tree["tensors"], **tree.get("values", {})}), live)
    if found is None:
        return None
    rule, pairs = found
    result = {**tree, "tensors": {pairs[name]: tensor for name, tensor in tree["tensors"].items()}}
    if "values" in tree:
        result["values"] = {pairs[name]: value for name, value in tree["values"].items()}
    if "versions" in tree:
        # Of a wrapper and what it wraps, the inner one has the state.
        places = {rule.key_of_live(own): own for _, _, own in sorted(module_names(module), key=lambda it: len(it[2]))}
        keys = {path: rule.key_of_saved(f"{path}." if path else "") for path in tree["versions"]}
        if any(key not in places for key in keys.values()):
            return None
        result["versions"] = {
            places[str(keys[path])].removesuffix("."): version for path, version in tree["versions"].items()
        }
    return rule, pairs, _with_tree(entry, result)


def _is_named(tree: Any) -> bool:
    # Anything else is left to the handler's own check.
    return (
        isinstance(tree, Mapping)
        and not tree.get("positional")
        and isinstance(tree.get("groups"), list)
        and all(isinstance(group, Mapping) and "params" in group for group in tree["groups"])
    )


def _renamed_optimizer(
    entry: str, tree: Mapping[str, Any], names: Mapping[str, str], modules: tuple[str, ...]
) -> dict[str, Any]:
    def new(name: str) -> str:
        if name not in names and name.startswith(modules):
            raise StateMismatchError(
                f"{entry!r}: its state for {name!r} cannot be matched with a parameter",
                why="the module's names in the checkpoint differ from the live ones by a prefix, and this is none of "
                "them",
                next="build the module as in the run that saved it, or restore the module alone",
            )
        return names.get(name, name)

    result = dict(tree)
    result["groups"] = [{**group, "params": [new(name) for name in group["params"]]} for group in tree["groups"]]
    for key in ("state", "parameters"):
        if key in tree:
            result[key] = {new(name): value for name, value in tree[key].items()}
    return result


def _with_tree(entry: CapturedEntry, tree: Any) -> CapturedEntry:
    return replace(entry, tree=tree)
