"""YAML as configurations are written: strict, and read the same way wherever it comes from.

Scalars mean what they mean to OmegaConf: ``1e-3`` is a number, ``on`` and ``yes`` are true, dates are text. What YAML
allows beyond text, numbers, booleans, null, lists and mappings is refused, and so is what a reader would misread: a key
that is written twice, or one that is no text (``on:`` is true, ``1:`` a number).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from omegaconf import DictConfig

from ckptmgr.config.tree import MAX_DEPTH, MAX_NODES, Tree, freeze
from ckptmgr.errors import ConfigError

__all__ = ["MAX_NBYTES", "dump_flow", "dump_tree", "parse_config", "parse_tree", "parse_value"]

MAX_NBYTES = 1 << 20
_MAX_LETTERS = 4 << 20
_QUOTES = "put it in quotes if it is meant as text"
_QUOTE = "put text in quotes that reach YAML: key='\"…\"'"

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null"))
_ESCAPED_MISSING = re.compile(r"\\+\?\?\?")

# YAML 1.1 reads 1e-3 as text. This is OmegaConf's expression.
_FLOAT = re.compile(
    r"""^(?:
      [-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    | [-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
    | \.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?
    | [-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
    | [-+]?\.(?:inf|Inf|INF)
    | \.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_RESOLVERS = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in (_TAG + "timestamp", _TAG + "float", _TAG + "value")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _first in "-+0123456789.":
    _RESOLVERS.setdefault(_first, []).append((_TAG + "float", _FLOAT))


class _Loader(_SafeLoader):  # type: ignore[misc]
    yaml_implicit_resolvers = _RESOLVERS


class _Dumper(_SafeDumper):  # type: ignore[misc]
    # The same table as the loader's: a text is quoted exactly if it would be read as something else.
    yaml_implicit_resolvers = _RESOLVERS

    def represent_data(self, data: object) -> yaml.Node:
        # NumPy's numbers, enumerations and the like are subclasses that YAML does not know.
        for kind in (str, int, float):
            if isinstance(data, kind) and not isinstance(data, bool):
                return super().represent_data(kind(data))
        return super().represent_data(data)

    def ignore_aliases(self, data: object) -> bool:
        return True


class _LineDumper(_Dumper):
    def represent_data(self, data: object) -> yaml.Node:
        node = super().represent_data(data)
        if isinstance(node, yaml.ScalarNode) and len(node.value.splitlines()) > 1:
            node.style = '"'
        return node


class _Refused(Exception):
    def __init__(self, what: str, mark: yaml.Mark, *, next: str) -> None:
        super().__init__(what)
        self.what = what
        self.mark = mark
        self.next = next


def parse_config(text: str | bytes, *, where: str) -> DictConfig:
    """Read a configuration from YAML text. Includes are not followed, interpolations stay as text.

    Args:
        text: One YAML document. Bytes are UTF-8. Nothing but comments is an empty configuration.
        where: What is read, for messages.

    Raises:
        ConfigError: This is no configuration. Names the place.
    """
    return freeze(parse_tree(text, where=where), where=where)


def parse_tree(text: str | bytes, *, where: str) -> Tree:
    """Read a configuration from YAML text, as a plain tree.

    Raises:
        ConfigError: As `parse_config`.
    """
    tree = _parse(_decode(text, where), where)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{where}: a configuration is a mapping of keys to values, and this is {_kind(tree)}",
            next="write `key: value` lines" + ("" if isinstance(tree, list) else "; is it the file that you mean?"),
        )
    return tree


def parse_value(text: str, *, where: str) -> Any:
    """Read one value: a YAML scalar, or a list or mapping in brackets. Nothing is null, as in OmegaConf's dotlist.

    Raises:
        ConfigError: The text is no YAML value, or one that is hardly meant on a command line: a comment, a mapping
            without braces, an anchor.
    """
    return _parse(_decode(text, where), where, is_value=True)


def dump_tree(tree: object) -> str:
    """Return YAML text that `parse_tree` reads as the same tree."""
    text: str = yaml.dump(
        tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 16, default_flow_style=False
    )
    return text


def dump_flow(value: object) -> str:
    """Return one line of YAML, as it could be the value of an override."""
    text: str = yaml.dump(
        value, Dumper=_LineDumper, sort_keys=False, allow_unicode=True, width=1 << 30, default_flow_style=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _decode(text: str | bytes, where: str) -> str:
    try:
        nbytes = len(text) if isinstance(text, bytes) else len(text.encode())
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: the text is not UTF-8", next="save it as UTF-8") from error
    if nbytes > MAX_NBYTES:
        raise ConfigError(
            f"{where}: {nbytes:,} bytes or more, and a configuration has at most {MAX_NBYTES:,}",
            next="name large tables by path; is it the file that you mean?",
        )
    if isinstance(text, bytes):
        if text.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ConfigError(f"{where}: the text is UTF-16", next="save it as UTF-8")
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            is_binary = b"\0" in text
            raise ConfigError(
                f"{where}: {'this is binary data' if is_binary else 'the text is not UTF-8'}",
                why=f"byte {error.start} is {text[error.start]:#04x}",
                next="give a YAML file" if is_binary else "save it as UTF-8",
            ) from error
    if "\0" in text:
        raise ConfigError(f"{where}: this is binary data", why="it holds NUL bytes", next="give a YAML file")
    if re.match(r"\s*<(?:!doctype|html|\?xml|head|body)", text, re.IGNORECASE):
        raise ConfigError(f"{where}: this is HTML, not YAML", next="download the raw file")
    return text


def _parse(text: str, where: str, *, is_value: bool = False) -> Any:
    try:
        # Composing is recursive in C, so depth is bounded on the flat events, before it.
        _check_events(text, is_value=is_value)
        loader = _Loader(text)
        try:
            return _Reader(loader).read()
        finally:
            loader.dispose()
    except _Refused as error:
        raise ConfigError(f"{where}{_place(error.mark)}: {error.what}", next=error.next) from None
    except yaml.MarkedYAMLError as error:
        what = " ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        if "nesting depth" in what:
            # Newer libyaml has a limit of its own, and looks ahead farther than our events.
            what = f"nested more than {MAX_DEPTH} deep"
            raise ConfigError(f"{where}{_place(mark)}: {what}", next="make it flatter") from error
        line = (text.splitlines()[mark.line : mark.line + 1] or [""])[0] if mark is not None else ""
        hint = _QUOTES
        if "\t" in line:
            hint = "indent with spaces, not with tabs"
        elif "${" in line:
            hint = "within braces or brackets, put ${…} in quotes"
        raise ConfigError(f"{where}{_place(mark)}: this is not YAML: {what}", next=hint) from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        what = str(error).partition("\n")[0]
        raise ConfigError(f"{where}: this is not YAML: {what}", next="correct the file") from error


def _check_events(text: str, *, is_value: bool) -> None:
    depth = documents = 0
    end = yaml.Mark("", 0, 0, 0, None, None)
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _Refused("several documents in one file", event.start_mark, next="leave out the `---` line")
        elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            depth += 1
            if depth > MAX_DEPTH:
                raise _Refused(f"nested more than {MAX_DEPTH} deep", event.start_mark, next="make it flatter")
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            depth -= 1
        if is_value:
            _check_value_event(event, depth)
        if isinstance(event, (yaml.NodeEvent, yaml.CollectionEndEvent)):
            end = event.end_mark
    if is_value and (dropped := text[end.index :].strip()):
        raise _Refused(f"YAML takes {dropped!r} for a comment", end, next=_QUOTE)


def _check_value_event(event: yaml.Event, depth: int) -> None:
    if isinstance(event, yaml.DocumentStartEvent) and event.explicit:
        raise _Refused("`---` starts a document in YAML", event.start_mark, next=_QUOTE)
    if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
        sign, meaning = ("*", "refers to") if isinstance(event, yaml.AliasEvent) else ("&", "sets")
        raise _Refused(f"`{sign}{event.anchor}` {meaning} an anchor in YAML", event.start_mark, next=_QUOTE)
    if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)) and depth == 1 and not event.flow_style:
        brackets = "[a, b]" if isinstance(event, yaml.SequenceStartEvent) else "{a: 1}"
        kind = "a list" if isinstance(event, yaml.SequenceStartEvent) else "a mapping"
        raise _Refused(
            f"this is {kind} in YAML", event.start_mark, next=f"write {brackets} if that is meant, or {_QUOTE}"
        )


class _Reader:
    """Builds the plain tree from YAML's nodes. Every use of an alias counts: a bomb stops at the limit."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._nodes = 0
        self._letters = 0

    def read(self) -> Any:
        node = self._loader.get_single_node()
        return None if node is None else self._value(node, 0)

    def _value(self, node: yaml.Node, depth: int) -> Any:
        self._count(node, depth)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return dict(self._items(node, depth))
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._value(child, depth + 1) for child in node.value]
        if isinstance(node, yaml.ScalarNode):
            if node.tag == _TAG + "merge":
                return node.value
            if node.tag in _SCALAR_TAGS:
                return self._scalar(node)
        raise _Refused(
            f"the tag {node.tag.replace(_TAG, '!!')} is not one for configurations",
            node.start_mark,
            next="leave it out: a configuration holds text, numbers, booleans, null, lists and mappings",
        )

    def _count(self, node: yaml.Node, depth: int) -> None:
        self._nodes += 1
        self._letters += len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        if depth > MAX_DEPTH:
            raise _Refused(
                f"nested more than {MAX_DEPTH} deep, or an alias that holds itself",
                node.start_mark,
                next="make it flatter",
            )
        if self._nodes > MAX_NODES or self._letters > _MAX_LETTERS:
            raise _Refused(
                f"more than {MAX_NODES:,} values once every alias is expanded",
                node.start_mark,
                next="name large tables by path; use ${key} instead of aliases of aliases",
            )

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            value = self._loader.construct_object(node)
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise _Refused(f"{node.value[:40]!r} cannot be read: {error}", node.start_mark, next=_QUOTES) from error
        if isinstance(value, str) and _ESCAPED_MISSING.fullmatch(value):
            raise _Refused(
                f"the text {value!r} cannot be in a configuration", node.start_mark, next="??? is a value to be given"
            )
        return value

    def _items(self, node: yaml.MappingNode, depth: int) -> Iterator[tuple[str, Any]]:
        merged: dict[str, Any] = {}
        written: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                for key, value in self._merged(value_node, depth):
                    merged.setdefault(key, value)
                continue
            key = self._key(key_node, depth)
            if key in written:
                raise _Refused(
                    f"the key {key!r} is there twice in one mapping",
                    key_node.start_mark,
                    next="leave one of them out",
                )
            written[key] = self._value(value_node, depth + 1)
        yield from (merged | written).items()

    def _key(self, node: yaml.Node, depth: int) -> str:
        key = self._value(node, depth + 1)
        if not isinstance(key, str):
            shown = f"`{node.value}`" if isinstance(node, yaml.ScalarNode) else "this key"
            raise _Refused(
                f"{shown} is {_kind(key)} to YAML, and keys are text",
                node.start_mark,
                next=f'put it in quotes: "{node.value}"'
                if isinstance(node, yaml.ScalarNode)
                else "write it as a value",
            )
        if not key:
            raise _Refused("a key is empty", node.start_mark, next="name it")
        return key

    def _merged(self, node: yaml.Node, depth: int) -> Iterator[tuple[str, Any]]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for each in nodes:
            if not isinstance(each, yaml.MappingNode):
                raise _Refused(
                    "`<<` merges mappings, and this is none", each.start_mark, next="name an alias of a mapping"
                )
            self._count(each, depth + 1)
            yield from self._items(each, depth + 1)


def _place(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
    return "a mapping"
