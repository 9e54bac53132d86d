"""The stack of a machine that follows a pickle, and what it may grow to."""

from __future__ import annotations

from ckptmgr.diagnose.byte_source import ByteSource
from ckptmgr.diagnose.pickle_facts import PickleFacts, PickleLimits
from ckptmgr.diagnose.pickle_opcodes import BadPickleError, PickleWindow
from ckptmgr.diagnose.pickle_values import Dict, Object, Set, Symbol

__all__ = ["LimitReachedError", "PickleStack"]


class LimitReachedError(Exception):
    """A pickle is larger than it is followed; the message says in what."""


class PickleStack:
    """Stack, marks and memo, with a count of all that is made.

    Args:
        source: Where the pickle is.
        start: Offset of its first instruction.
        limits: How far it is followed.
    """

    def __init__(self, source: ByteSource, start: int, limits: PickleLimits) -> None:
        self.facts = PickleFacts(end=start)
        self._source = source
        self._window = PickleWindow(source, start)
        self._limits = limits
        self._stack: list[Symbol] = []
        self._marks: list[int] = []
        self._memo: dict[int, Symbol] = {}
        self._nobjects = 0
        self._text_nbytes = 0

    def _pop(self) -> Symbol:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise BadPickleError("it takes more from its stack than is there")
        return self._stack.pop()

    def _top(self) -> Symbol:
        if not self._stack:
            raise BadPickleError("its stack is empty")
        return self._stack[-1]

    def _to_mark(self) -> list[Symbol]:
        if not self._marks:
            raise BadPickleError("a mark is missing")
        first = self._marks.pop()
        items = self._stack[first:]
        del self._stack[first:]
        return items

    def _pairs(self, items: list[Symbol]) -> list[tuple[Symbol, Symbol]]:
        self._made(len(items) // 4)
        return list(zip(items[::2], items[1::2], strict=False))

    def _extend(self, items: list[Symbol]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Set):
            target.members.extend(items)
        elif isinstance(target, Object):
            if target.members is None:
                target.members = []
            target.members.extend(items)

    def _set_items(self, pairs: list[tuple[Symbol, Symbol]]) -> None:
        target = self._top()
        if isinstance(target, Dict):
            target.pairs.extend(pairs)
        elif isinstance(target, Object):
            if target.pairs is None:
                target.pairs = []
            target.pairs.extend(pairs)

    def _made(self, count: int = 1) -> None:
        self._nobjects += count
        if self._nobjects > self._limits.max_objects:
            raise LimitReachedError(f"it makes more than {self._limits.max_objects} objects")

    def _push_made(self, value: Symbol) -> None:
        self._made()
        self._stack.append(value)

    def _count_text(self, nbytes: int) -> None:
        self._text_nbytes += nbytes
        if self._text_nbytes > self._limits.max_text_nbytes:
            raise LimitReachedError(f"its texts are longer than {self._limits.max_text_nbytes} bytes")
