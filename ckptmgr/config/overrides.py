r"""Overrides from a command line: ``key=value`` changes, ``+key=value`` adds, ``~key`` removes.

A key that is changed must be there, one that is added must not, or be null: a typing error is an error, not a new key.
Parts of a
list go by index, ``callbacks.0.patience=3``; ``+callbacks.2={…}`` appends to a list of two. Values are YAML: numbers,
``null``, ``[1, 2]``, ``{a: 1}``, ``'quoted text'``; no value is null. A dot that belongs to a key is written ``\.``.

A mapping changes the keys that it names and leaves the others, unless it names another ``_target_``: then it is another
object, and stands for itself. Overrides are applied from left to right.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig

from ckptmgr.config.merge import is_other_object, merged
from ckptmgr.config.tree import MISSING, Path, Tree, freeze, join_key, plain, split_key
from ckptmgr.config.yaml_source import parse_value
from ckptmgr.errors import ConfigError
from ckptmgr.launch.redact import REDACTED, is_secret_name, redact_argv, redact_text

__all__ = ["Override", "apply_overrides", "override_tree", "parse_override"]

# Up to the first equals sign that no backslash stands before.
_KEY = re.compile(r"((?:[^=\\]|\\.)*)=(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Override:
    """One override, read.

    Attributes:
        verb: What to do with the key.
        parts: The key.
        value: The new value; `None` for a removal.
        where: The override's number and text, for messages.
    """

    verb: Literal["change", "add", "remove"]
    parts: tuple[str, ...]
    value: Any
    where: str


def apply_overrides(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return a configuration with the overrides applied. The given one stays as it is.

    Args:
        config: Interpolations in it stay as text.
        overrides: ``key=value``, ``+key=value`` or ``~key``, applied from left to right.

    Raises:
        ConfigError: An override cannot be read or does not fit. Names its number, its text, and the nearest keys.

    Example:
        >>> from omegaconf import OmegaConf
        >>> config = OmegaConf.create({"optimizer": {"lr": 0.1}, "callbacks": [{"patience": 1}]})
        >>> new = apply_overrides(config, ["optimizer.lr=1e-3", "callbacks.0.patience=3", "+seed=1"])
        >>> print(OmegaConf.to_yaml(new, sort_keys=True).strip())
        callbacks:
        - patience: 3
        optimizer:
          lr: 0.001
        seed: 1
    """
    return freeze(override_tree(plain(config), overrides), where="after the overrides")


def override_tree(tree: Tree, overrides: Sequence[str]) -> Tree:
    """Apply overrides to a plain tree, and return a new one. See `apply_overrides`."""
    tree = _copy(tree)
    for number, text in enumerate(overrides, 1):
        override = parse_override(text, number)
        _apply(tree, override)
    return tree


def parse_override(text: str, number: int = 1) -> Override:
    """Read one override.

    Raises:
        ConfigError: It cannot be read. Names its number and its text.
    """
    # What is said about an override ends up in the logs of jobs.
    where = f"override {number}, {redact_argv([text], os.environ).argv[0]!r}"
    for prefix, hint in (
        ("++", "`+key=value` adds a key, `key=value` changes one"),
        ("--", "overrides have no dashes: write key=value"),
    ):
        if text.startswith(prefix):
            raise ConfigError(f"{where}: {prefix!r} is nothing that an override starts with", next=hint)
    verb: Literal["change", "add", "remove"] = {"+": "add", "~": "remove"}.get(text[:1], "change")  # type: ignore[assignment]
    body = text if verb == "change" else text[1:]
    split = _KEY.fullmatch(body)
    key, *rest = split.groups() if split else (body,)
    if verb == "remove" and rest:
        raise ConfigError(f"{where}: a removal has no value", next=f"write ~{key}")
    if verb != "remove" and not rest:
        raise ConfigError(
            f"{where}: there is no `=` in it", next="write key=value, +key=value to add, or ~key to remove"
        )
    try:
        parts = tuple(split_key(key))
    except ValueError as error:
        raise ConfigError(f"{where}: the key cannot be read: {error}", next="write a key like optimizer.lr") from error
    if parts[0] == "includes":
        raise ConfigError(
            f"{where}: includes are read before any override", next="change the `includes:` list in the file"
        )
    value = parse_value(rest[0], where=where) if rest else None
    # Here, so that an interpolation that cannot be read is known as this override's.
    freeze({parts[-1]: value}, where=where)
    return Override(verb=verb, parts=parts, value=value, where=where)


def _apply(tree: Tree, override: Override) -> None:
    container: Any = tree
    path: Path = ()
    for part in override.parts[:-1]:
        place = _find(container, part, path, override)
        if place is None:
            if override.verb != "add" or isinstance(container, list):
                raise _no_such_key(tree, container, part, path, override)
            place = part
            container[place] = {}
        elif override.verb == "add" and container[place] in (MISSING, None):
            container[place] = {}
        path = (*path, place)
        container = container[place]
        if not isinstance(container, (dict, list)):
            raise _no_container(container, path, override)
    last = override.parts[-1]
    place = _find(container, last, path, override)
    match override.verb:
        case "add":
            _add(container, last, place, path, override)
        case "change" | "remove" if place is None:
            raise _no_such_key(tree, container, last, path, override)
        case "change":
            container[place] = _changed(container[place], override, (*path, place or last), tree)
        case "remove":
            del container[place]


def _find(container: Any, part: str, path: Path, override: Override) -> Any:
    """Return the key or index under which a container holds a part; `None` if it does not."""
    if isinstance(container, dict):
        return part if part in container else None
    if not re.fullmatch(r"[0-9]{1,9}", part):
        raise ConfigError(
            f"{override.where}: {join_key(path)} is a list, and {part!r} is no index",
            why=_list_shown(container),
            next=f"write an index: {join_key((*path, 0))}",
        )
    return int(part) if int(part) < len(container) else None


def _add(container: Any, last: str, place: Any, path: Path, override: Override) -> None:
    key = join_key((*path, place if place is not None else last))
    # Null is how a default says that there is nothing yet.
    if place is not None and container[place] not in (MISSING, None):
        raise ConfigError(
            f"{override.where}: {key} is there already",
            why=f"it is {_shown(container[place], last)}",
            next=f"write {key}=… without the plus to change it",
        )
    if isinstance(container, list):
        if place is None and int(last) > len(container):
            raise ConfigError(
                f"{override.where}: {join_key(path)} has {_count(container)}, and the next index is {len(container)}",
                next=f"write +{join_key((*path, len(container)))}=… to append",
            )
        container[int(last) :] = [override.value, *container[int(last) + 1 :]]
    else:
        container[last] = override.value


def _changed(old: Any, override: Override, path: Path, tree: Tree) -> Any:
    new = override.value
    if isinstance(old, dict) and isinstance(new, dict):
        if not is_other_object(old, new):
            _check_known(old, new, path, override)
        return merged(old, new)
    is_open = new is None or (isinstance(new, str) and "${" in new) or new == MISSING
    if isinstance(old, dict) and old and not is_open:
        raise ConfigError(
            f"{override.where}: {join_key(path)} is a mapping, and this would replace it whole",
            why=f"its keys are {', '.join(old)}",
            next=f"change a key of it: {join_key((*path, next(iter(old))))}=…, or write {join_key(path)}=null first",
        )
    if isinstance(old, list) and any(isinstance(each, dict) for each in old) and not (is_open or isinstance(new, list)):
        raise ConfigError(
            f"{override.where}: {join_key(path)} is a list, and this would replace it whole",
            why=_list_shown(old),
            next=f"change one of it, as in {join_key((*path, 0))}.key=…, or give a list",
        )
    return new


def _check_known(old: Tree, new: Tree, path: Path, override: Override) -> None:
    for key, value in new.items():
        if key not in old:
            raise _no_such_key(old, old, key, path, override, base=path)
        before = old[key]
        if isinstance(value, dict) and isinstance(before, dict) and not is_other_object(before, value):
            _check_known(before, value, (*path, key), override)


def _no_such_key(
    tree: Tree, container: Any, part: str, path: Path, override: Override, *, base: Path = ()
) -> ConfigError:
    missing = join_key((*path, part))
    if isinstance(container, list):
        return ConfigError(
            f"{override.where}: {join_key(path)} has {_count(container)}, and none at index {part}",
            why=_list_shown(container),
            next=f"write +{join_key((*path, len(container)))}=… to append" if override.verb != "remove" else None,
        )
    near = _nearest(tree, container, part, path, base)
    siblings = ", ".join(list(container)[:12]) + (", …" if len(container) > 12 else "")
    why = (
        f"the nearest is {' or '.join(near)}"
        if near
        else f"{join_key(path) or 'the top'} holds {siblings or 'nothing'}"
    )
    rest = override.parts[len(path) + 1 :]
    adds = f"write +{join_key((*path, part, *rest))}=… to add a key" if override.verb != "remove" else None
    corrects = f"write {'.'.join([near[0], join_key(rest)] if rest else near[:1])}" if near else None
    return ConfigError(
        f"{override.where}: there is no key {missing}",
        why=why,
        next=", or ".join(hint for hint in (corrects, adds) if hint) or None,
    )


def _nearest(tree: Tree, container: Tree, part: str, path: Path, base: Path) -> list[str]:
    """Return up to three keys that may be meant: siblings spelled alike, then keys of that name anywhere."""
    alike = difflib.get_close_matches(part, list(container), n=3, cutoff=0.6)
    if not alike and part.isdecimal():
        # An index, where things have names.
        alike = list(container)[int(part) : int(part) + 1]
    if alike:
        return [join_key((*path, each)) for each in alike]
    everywhere = [(*base, *each) for each in _places(tree)]
    same = [join_key(place) for place in everywhere if place[-1] == part]
    wanted = join_key((*path, part))
    return same[:3] or difflib.get_close_matches(wanted, [join_key(place) for place in everywhere], n=3, cutoff=0.75)


def _places(tree: Any, path: Path = ()) -> list[Path]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found: list[Path] = []
    for key, value in pairs:
        found.append((*path, key))
        found.extend(_places(value, (*path, key)))
    return found


def _no_container(value: object, path: Path, override: Override) -> ConfigError:
    key = join_key(path)
    if isinstance(value, str) and value.startswith("${"):
        hint = f"override what it refers to, or replace {key} as a whole"
    else:
        hint = f"write +{key}.…= to put a mapping there" if value is None else f"replace {key} as a whole"
    return ConfigError(f"{override.where}: {key} has no keys: it is {_shown(value, str(path[-1]))}", next=hint)


def _shown(value: object, name: str = "") -> str:
    match value:
        case None:
            return "null"
        case dict():
            return f"a mapping with {', '.join(value) or 'no keys'}"
        case list():
            return f"a list of {len(value)}"
    text = REDACTED if is_secret_name(name) else redact_text(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}…"


def _count(container: list[Any]) -> str:
    return f"{len(container)} {'entry' if len(container) == 1 else 'entries'}"


def _list_shown(container: list[Any]) -> str:
    entries = [
        f"{i}: {e.get('_target_') or _shown(e) if isinstance(e, dict) else _shown(e)}" for i, e in enumerate(container)
    ]
    shown = ", ".join(entries[:8]) + (", …" if len(entries) > 8 else "")
    return f"it holds {shown}" if entries else "it is empty"


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(each) for each in tree] if isinstance(tree, list) else tree
