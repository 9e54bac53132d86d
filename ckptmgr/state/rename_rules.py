"""Rules that the user gives for names that have changed since a checkpoint was saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ckptmgr.errors import UsageError
from ckptmgr.state.entry import CapturedEntry

__all__ = ["RenameRules", "RuledEntries"]


@dataclass(frozen=True, slots=True)
class RuledEntries:
    """What `RenameRules.apply` returns.

    Attributes:
        entries: All entries by their new names; modules that no rule touches are the given ones.
        names: Names of the checkpoint that a rule is for, ``<entry>/<name>``, and what they are called now.
        entry_names: The same for whole entries.
    """

    entries: dict[str, CapturedEntry]
    names: dict[str, str] = field(default_factory=dict)
    entry_names: dict[str, str] = field(default_factory=dict)


class RenameRules:
    """Old names and new ones: exact, or with one ``*`` at the same end of both. An entry's name stands for all of it.

    Args:
        rename: What the user gave.

    Raises:
        UsageError: A rule cannot be meant as it was given.
    """

    def __init__(self, rename: Mapping[str, str]) -> None:
        if not isinstance(rename, Mapping):
            raise UsageError(
                f"rename={rename!r}", why="it is a dict of old and new names", next="rename={'model/a.*': 'model/b.*'}"
            )
        for old, new in rename.items():
            _check_rule(old, new)
        self.as_given = dict(rename)
        # The longest rule that fits a name holds.
        self._rules = sorted(self.as_given.items(), key=lambda rule: -len(rule[0]))

    def apply(self, entries: Mapping[str, CapturedEntry]) -> RuledEntries:
        """Give a checkpoint's entries, tensors and optimizer states their new names.

        Raises:
            UsageError: A rule is for nothing in the checkpoint, two names become one, or a tensor would come into an
                entry that is no module.
        """
        if not self._rules:
            return RuledEntries(dict(entries))
        used: set[str] = set()
        renamed, names = self._modules({n: e for n, e in entries.items() if _is_module(e)}, used)
        entry_names: dict[str, str] = {}
        for name, entry in entries.items():
            if _is_module(entry):
                continue
            new = self.as_given.get(name, name)
            if name in self.as_given:
                used.add(name)
            if new in renamed:
                raise _clash(name, new, new)
            if new != name:
                entry_names[name] = new
            tree = self._optimizer_tree(entry.tree, names, used) if entry.handler == "optimizer" else entry.tree
            renamed[new] = CapturedEntry(new, entry.handler, entry.version, tree)
        for rule in self.as_given:
            if rule not in used:
                known = [*names, *entries]
                nearest = next(iter(get_close_matches(rule, known, n=1, cutoff=0.0)), "")
                raise UsageError(
                    f"the rule {rule!r} renames nothing",
                    why="the checkpoint has no such name",
                    next=f"the nearest is {nearest!r}",
                )
        # In the order of the checkpoint, as far as its entries are still there.
        order = [entry_names.get(name, name) for name in entries]
        listed = {name: renamed.pop(name) for name in order if name in renamed}
        changed = {old: new for old, new in names.items() if old != new}
        return RuledEntries({**listed, **renamed}, changed, entry_names)

    def _new_name(self, name: str, used: set[str]) -> str:
        for old, new in self._rules:
            found = _renamed(name, old, new)
            if found is not None:
                used.add(old)
                return found
        return name

    def _modules(
        self, modules: Mapping[str, CapturedEntry], used: set[str]
    ) -> tuple[dict[str, CapturedEntry], dict[str, str]]:
        names: dict[str, str] = {}
        before: dict[str, str] = {}
        trees: dict[str, dict[str, Any]] = {}
        versions: dict[str, int] = {}
        for entry, captured in modules.items():
            if not any(captured.tree.get(part) for part in ("tensors", "values")):
                trees[entry] = {part: dict(items) for part, items in captured.tree.items()}
                versions[entry] = captured.version
            for part in ("tensors", "values"):
                for name, item in captured.tree.get(part, {}).items():
                    old = f"{entry}/{name}"
                    new = self._new_name(old, used)
                    if new in before:
                        raise _clash(before[new], old, new)
                    names[old], before[new] = new, old
                    target, slash, rest = new.partition("/")
                    if not slash or not rest:
                        raise UsageError(
                            f"{old!r} would become {new!r}, which is no name of a tensor",
                            why="a tensor's path is its entry, a slash and its name",
                            next=f"write the entry in front: '{entry}/{new}'",
                        )
                    tree = trees.setdefault(target, {"tensors": {}})
                    tree.setdefault(part, {})[rest] = item
                    versions.setdefault(target, captured.version)
        # Submodules by their old paths, with the paths where their own tensors have gone.
        gone: dict[str, dict[str, None]] = {}
        for old, new in names.items():
            gone.setdefault(_parent(old), {})[_parent(new)] = None
        for entry, captured in modules.items():
            for path, version in captured.tree.get("versions", {}).items():
                for place in gone.get(f"{entry}/{path}") or _places_below(f"{entry}/{path}", names):
                    target, _, rest = place.partition("/")
                    trees[target].setdefault("versions", {})[rest] = version
        touched = {path.partition("/")[0] for pair in names.items() if pair[0] != pair[1] for path in pair}
        return {
            name: CapturedEntry(name, "module", versions[name], tree) if name in touched else modules[name]
            for name, tree in trees.items()
        }, names

    def _optimizer_tree(self, tree: Any, names: Mapping[str, str], used: set[str]) -> Any:
        groups = tree.get("groups") if isinstance(tree, Mapping) else None
        if not isinstance(groups, list) or tree.get("positional"):
            # Positions are no names. Anything else is for the handler's own check to refuse.
            return tree
        new = {
            name: names[name] if name in names else self._new_name(name, used)
            for group in groups
            for name in group["params"]
        }
        before: dict[str, str] = {}
        for old, now in new.items():
            if now in before:
                raise _clash(before[now], old, now)
            before[now] = old
        result = dict(tree)
        result["groups"] = [{**group, "params": [new[name] for name in group["params"]]} for group in groups]
        for key in ("state", "parameters"):
            if key in tree:
                result[key] = {new.get(name, name): value for name, value in tree[key].items()}
        return result


def _places_below(path: str, names: Mapping[str, str]) -> Iterable[str]:
    """Return what a submodule without tensors of its own is called now: by where those below it have gone."""
    below = [(old[len(path) :], new) for old, new in names.items() if old.startswith(f"{path}.")]
    return dict.fromkeys(new.removesuffix(rest) for rest, new in below if new.endswith(rest))


def _parent(path: str) -> str:
    entry, _, name = path.partition("/")
    return f"{entry}/{name.rpartition('.')[0]}"


def _is_module(entry: CapturedEntry) -> bool:
    return (
        entry.handler == "module"
        and isinstance(entry.tree, Mapping)
        and isinstance(entry.tree.get("tensors"), Mapping)
        and isinstance(entry.tree.get("values", {}), Mapping)
    )


def _renamed(name: str, old: str, new: str) -> str | None:
    if old.endswith("*"):
        return new[:-1] + name[len(old) - 1 :] if name.startswith(old[:-1]) else None
    if old.startswith("*"):
        return name[: len(name) - len(old) + 1] + new[1:] if name.endswith(old[1:]) else None
    if name == old:
        return new
    # The name of an entry stands for all that lies in it.
    return new + name[len(old) :] if "/" not in old and name.startswith(f"{old}/") else None


def _check_rule(old: object, new: object) -> None:
    example = "such as {'model/backbone.*': 'model/encoder.*'}"
    if not isinstance(old, str) or not isinstance(new, str) or not old or not new:
        raise UsageError(f"rename has {old!r}: {new!r}", why="names are text", next=example)
    stars = [(text.startswith("*"), text.endswith("*"), text.count("*")) for text in (old, new)]
    if stars[0] != stars[1] or stars[0][2] > 1 or (stars[0][2] == 1 and not any(stars[0][:2])) or old == "*":
        raise UsageError(
            f"rename has {old!r}: {new!r}",
            why="a rule is two exact names, or has one * at the end of both or at the beginning of both",
            next=example,
        )


def _clash(first: str, second: str, name: str) -> UsageError:
    return UsageError(
        f"{first!r} and {second!r} would both be called {name!r}",
        why="one of them would be lost",
        next="make the rules of rename narrower, or rename both",
    )
