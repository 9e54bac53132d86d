"""Follows a pickle without executing it: which globals it would import, and what it would build, as symbols.

A machine of its own instead of `pickletools.genops`: a global is often put together from texts of the memo, and only
whoever keeps stack and memo sees its name. Names that are reached through ``getattr``, ``__import__`` or
``attrgetter`` are followed too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ckptmgr.diagnose.byte_source import Bytes, ByteSource, Part
from ckptmgr.diagnose.known_globals import old_name
from ckptmgr.diagnose.pickle_calls import array_from_state, call, numpy_dtype, numpy_itemsize, shape_of, storage_from_id
from ckptmgr.diagnose.pickle_facts import LIMITS, TORCH_MAGIC, PickleFacts, PickleLimits
from ckptmgr.diagnose.pickle_opcodes import AmbiguousPickleError, BadPickleError, Blob, LongText, instructions
from ckptmgr.diagnose.pickle_stack import LimitReachedError, PickleStack
from ckptmgr.diagnose.pickle_values import Array, Dict, Global, Object, Set, Storage, Symbol

__all__ = ["describe_pickle"]

_ARRAY_WRAPPER: Final = "joblib.numpy_pickle.NumpyArrayWrapper"
_MAX_NESTED = 3


def describe_pickle(data: bytes | ByteSource, *, start: int = 0, limits: PickleLimits = LIMITS) -> PickleFacts:
    """Follow a pickle to its end without executing anything of it.

    Args:
        data: The bytes, or where they are. Not all of them need to belong to the pickle.
        start: Offset of its first instruction.
        limits: Where to give up; `PickleFacts.problems` says so.

    Returns:
        What could be found out. It never raises for what the bytes hold.

    Raises:
        StorageError: The bytes cannot be read.
    """
    source = Bytes(data) if isinstance(data, bytes) else data
    return _describe(source, start, limits, nested=0)


def _describe(source: ByteSource, start: int, limits: PickleLimits, *, nested: int) -> PickleFacts:
    facts = _Machine(source, start, limits, nested, joblib=False).run()
    if facts.has_joblib_arrays:
        # What a plain unpickler takes for instructions, joblib skips as data: whoever loads it, all is told.
        again = _Machine(source, start, limits, nested, joblib=True).run()
        again.globals = {**again.globals, **facts.globals}
        again.is_ambiguous = again.is_ambiguous or facts.is_ambiguous
        return again
    return facts


class _Machine(PickleStack):
    def __init__(self, source: ByteSource, start: int, limits: PickleLimits, nested: int, *, joblib: bool) -> None:
        super().__init__(source, start, limits)
        self._nested = nested
        self._joblib = joblib
        self._keys: dict[str, tuple[str, str]] = {}

    def run(self) -> PickleFacts:
        facts, limit, does = self.facts, self._limits.max_instructions, _DOES
        push = self._stack.append
        count = 0
        try:
            for name, argument in instructions(self._window):
                count += 1
                if count > limit:
                    raise LimitReachedError(f"it has more than {limit} instructions")
                if name == "INT" or name == "FLOAT" or name == "LONG":
                    push(argument)
                elif name == "STOP":
                    facts.root = self._pop()
                    facts.is_complete = True
                else:
                    does[name](self, argument)
        except EOFError as error:
            facts.problems.append(f"it is cut off: {error}")
        except AmbiguousPickleError as error:
            facts.is_ambiguous = True
            facts.problems.append(f"no program writes such a pickle: {error}")
        except BadPickleError as error:
            facts.problems.append(f"it is no valid pickle: {error}")
        except LimitReachedError as limit_reached:
            facts.problems.append(f"it was not followed to its end: {limit_reached}")
        facts.end = self._window.position
        facts.ninstructions = count
        return facts

    # Each `_do_` is one instruction; its argument is what stands in the pickle behind it.

    def _do_proto(self, version: int) -> None:
        self.facts.protocol = max(version, self.facts.protocol or 0)

    def _do_frame(self, nbytes: int) -> None:
        pass

    def _do_mark(self, _: None) -> None:
        self._made()
        self._marks.append(len(self._stack))

    def _do_pop(self, _: None) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _do_pop_mark(self, _: None) -> None:
        self._to_mark()

    def _do_dup(self, _: None) -> None:
        self._stack.append(self._top())

    def _do_none(self, _: None) -> None:
        self._stack.append(None)

    def _do_newtrue(self, _: None) -> None:
        self._stack.append(True)

    def _do_newfalse(self, _: None) -> None:
        self._stack.append(False)

    def _do_text(self, text: str | LongText) -> None:
        self._count_text(len(text) if isinstance(text, str) else len(text.head))
        self._stack.append(text)

    def _do_string(self, text: str | Blob) -> None:
        self._count_text(len(text) if isinstance(text, str) else len(text.head))
        self._stack.append(text)

    def _do_bytes(self, blob: Blob) -> None:
        self._count_text(len(blob.head))
        self._made()
        self._stack.append(blob)

    def _do_empty_list(self, _: None) -> None:
        self._push_made([])

    def _do_empty_tuple(self, _: None) -> None:
        self._stack.append(())

    def _do_empty_dict(self, _: None) -> None:
        # As much memory as two of anything else.
        self._made()
        self._push_made(Dict())

    def _do_empty_set(self, _: None) -> None:
        self._push_made(Set())

    def _do_list(self, _: None) -> None:
        self._push_made(self._to_mark())

    def _do_tuple(self, _: None) -> None:
        self._push_made(tuple(self._to_mark()))

    def _do_frozenset(self, _: None) -> None:
        self._push_made(Set(self._to_mark()))

    def _do_dict(self, _: None) -> None:
        self._push_made(Dict(self._pairs(self._to_mark())))

    def _do_tuple1(self, _: None) -> None:
        self._push_made((self._pop(),))

    def _do_tuple2(self, _: None) -> None:
        last = self._pop()
        self._push_made((self._pop(), last))

    def _do_tuple3(self, _: None) -> None:
        last, middle = self._pop(), self._pop()
        self._push_made((self._pop(), middle, last))

    def _do_append(self, _: None) -> None:
        self._extend([self._pop()])

    def _do_appends(self, _: None) -> None:
        self._extend(self._to_mark())

    def _do_additems(self, _: None) -> None:
        self._extend(self._to_mark())

    def _do_setitem(self, _: None) -> None:
        value = self._pop()
        self._set_items([(self._pop(), value)])

    def _do_setitems(self, _: None) -> None:
        self._set_items(self._pairs(self._to_mark()))

    def _do_put(self, key: int) -> None:
        if key not in self._memo and len(self._memo) >= self._limits.max_memo:
            raise LimitReachedError(f"its memo has more than {self._limits.max_memo} entries")
        self._memo[key] = self._top()

    def _do_memoize(self, _: None) -> None:
        self._do_put(len(self._memo))

    def _do_get(self, key: int) -> None:
        if key not in self._memo:
            raise BadPickleError(f"nothing is in its memo at {key}")
        self._stack.append(self._memo[key])

    def _do_global(self, names: tuple[str, str]) -> None:
        self._push_made(self._import(*names))

    def _do_stack_global(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        self._push_made(self._import(_name_text(module), _name_text(name)))

    def _do_ext(self, number: int) -> None:
        self._push_made(self._import("copyreg", f"extension[{number}]", "by its number in a registry"))

    def _do_inst(self, names: tuple[str, str]) -> None:
        # First the import, as in Python: it happens even where there is nothing to call it with.
        of = self._import(*names)
        self._push_made(self._called(of, tuple(self._to_mark())))

    def _do_obj(self, _: None) -> None:
        items = self._to_mark()
        if not items:
            raise BadPickleError("an object without a class")
        self._push_made(self._called(items[0], tuple(items[1:])))

    def _do_newobj(self, _: None) -> None:
        arguments = self._pop()
        self._push_made(self._called(self._pop(), arguments))

    def _do_newobj_ex(self, _: None) -> None:
        self._pop()
        self._do_newobj(None)

    def _do_reduce(self, _: None) -> None:
        arguments = self._pop()
        self._push_made(self._called(self._pop(), arguments))

    def _do_persid(self, identity: str) -> None:
        self._push_made(Object("persistent id", identity))

    def _do_binpersid(self, _: None) -> None:
        identity = self._pop()
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
            of, file, text = identity[1:]
            if isinstance(of, Global) and isinstance(file, str) and isinstance(text, (str, LongText)):
                self.facts.sources[of.name] = file
        storage = storage_from_id(identity)
        if isinstance(storage, Storage):
            self.facts.storages.setdefault(storage.root, storage)
        self._push_made(storage)

    def _do_next_buffer(self, _: None) -> None:
        self._push_made(Blob(-1, 0, b""))

    def _do_readonly_buffer(self, _: None) -> None:
        self._top()

    def _do_build(self, _: None) -> None:
        state = self._pop()
        target = self._top()
        if isinstance(target, Array):
            array = array_from_state(state)
            if array is not None:
                target.dtype, target.shape = array.dtype, array.shape
        elif isinstance(target, Global):
            self._note(target, "its attributes are replaced")
        elif isinstance(target, (Dict, Object)):
            target.state = state
            if isinstance(target, Object) and target.of == _ARRAY_WRAPPER:
                self.facts.has_joblib_arrays = True
                if self._joblib:
                    self._stack[-1] = self._array_between(state)

    # What the instructions are made of.

    def _import(self, module: str, name: str, how: str = "") -> Global:
        key = (module[:500], name[:500])
        if key not in self.facts.globals:
            self._count_text(len(module) + len(name))
            if len(self.facts.globals) >= self._limits.max_globals:
                raise LimitReachedError(f"it imports more than {self._limits.max_globals} names")
            self.facts.globals[key] = how
            self._keys[".".join(old_name(*key))] = key
        elif how and not self.facts.globals[key]:
            self.facts.globals[key] = how
        return Global(".".join(old_name(*key)))

    def _note(self, target: Global, words: str) -> None:
        key = self._keys.get(target.name)
        if key is not None:
            self.facts.globals[key] = words

    def _called(self, function: Symbol, arguments: Symbol) -> Symbol:
        first = arguments[0] if isinstance(arguments, tuple) and arguments else None
        if isinstance(first, str):
            self._count_text(len(first))
        elif isinstance(first, (list, tuple, Dict)):
            self._made(len(first))
        if isinstance(function, Global):
            if function.name in _REACHES:
                return self._reached(function, arguments)
            if function.name == "torch.storage._load_from_bytes":
                return self._nested_storage(first)
            return call(function.name, arguments)
        if isinstance(function, Object) and function.of in _GETTERS and isinstance(function.args, tuple):
            names = [name for name in function.args if isinstance(name, str)]
            if isinstance(first, Global) and names:
                return self._import(first.name, names[0], f"through {function.of}")
        return Object("the result of a call", arguments)

    def _reached(self, function: Global, arguments: Symbol) -> Symbol:
        """Follow ``getattr(module, name)`` and ``__import__(name)`` to what they give."""
        texts = [value for value in arguments if isinstance(value, str)] if isinstance(arguments, tuple) else []
        if function.name in _IMPORTS and texts:
            self._note(function, f"here of {texts[0][:100]!r}")
            return Global(texts[0][:500])
        if isinstance(arguments, tuple) and len(arguments) >= 2 and texts:
            owner = arguments[0]
            of = owner.name if isinstance(owner, Global) else owner.of if isinstance(owner, Object) else "an object"
            self._note(function, f"here of {of[:100]!r} and {texts[0][:100]!r}")
            if isinstance(owner, Global):
                return self._import(owner.name, texts[0], f"through {function.name}")
        return Object(function.name, arguments)

    def _nested_storage(self, blob: Symbol) -> Symbol:
        """Look into the file of torch that a plain pickle of a tensor holds, for each of its storages."""
        if not isinstance(blob, Blob) or self._nested >= _MAX_NESTED:
            return self._unexamined()
        inside: ByteSource = Part(self._source, blob.start, blob.nbytes) if blob.start >= 0 else Bytes(blob.head)
        if inside.read(0, 2) != b"\x80\x02":
            return self._unexamined()
        position = 0
        storage: Symbol = None
        for number in range(5):
            limits = PickleLimits(20_000, 2_000, 2_000, 1 << 16, 100)
            facts = _describe(inside, position, limits, nested=self._nested + 1)
            self._made(4 + facts.ninstructions // 4)
            for key, how in facts.globals.items():
                self._import(*key, how or "in a storage within it")
            if not facts.is_complete:
                return self._unexamined()
            if number == 0 and facts.root != TORCH_MAGIC:
                return self._unexamined()
            if number == 3:
                storage = facts.root
            position = facts.end
        if getattr(storage, "key", None) is None:
            return self._unexamined()
        storage.key = f"{self._window.position}/{storage.key}"
        if blob.start >= 0 and int.from_bytes(inside.read(position, 8), "little") == storage.numel:
            storage.start = blob.start + position + 8
        self.facts.storages[storage.key] = storage
        return storage

    def _unexamined(self) -> Object:
        self._note(Global("torch.storage._load_from_bytes"), "it unpickles bytes that could not be examined")
        return Object("torch.storage._load_from_bytes")

    def _array_between(self, state: Symbol) -> Symbol:
        """Pass the elements that joblib writes behind the description of an array."""
        values = dict(state.items()) if isinstance(state, Dict) else {}
        shape, of = shape_of(values.get("shape")), values.get("dtype")
        size = numpy_itemsize(of)
        if shape is None or size is None or of is None:
            raise BadPickleError("an array between the instructions whose size is not known")
        dtype = numpy_dtype(of.args[0])
        if self._window.position < self._window.frame_end:
            raise AmbiguousPickleError(f"an array lies within a frame, at {self._window.position}")
        if size == 0:
            return self._objects_between(shape)
        nbytes = size
        for extent in shape:
            nbytes *= extent
        if values.get("numpy_array_alignment_bytes") is not None:
            self._window.skip(self._window.uint(1))
        self._window.skip(nbytes)
        return Array(dtype, shape)

    def _objects_between(self, shape: tuple[int, ...]) -> Symbol:
        """Pass an array of objects, which is a pickle of its own."""
        if self._nested >= _MAX_NESTED:
            raise BadPickleError("pickles lie in pickles")
        inner = _describe(self._source, self._window.position, self._limits, nested=self._nested + 1)
        self._made(4 + inner.ninstructions // 4)
        for key, how in inner.globals.items():
            self._import(*key, how)
        if not inner.is_complete:
            raise BadPickleError("an array of objects that cannot be followed")
        self._window.position = inner.end
        return Array("object", shape)


def _name_text(value: Symbol) -> str:
    if isinstance(value, str):
        return value
    return "(a very long name)" if isinstance(value, LongText) else "(no name)"


_IMPORTS: Final = frozenset({"builtins.__import__", "importlib.import_module", "importlib.__import__"})
_REACHES: Final = _IMPORTS | {"builtins.getattr", "operator.attrgetter.__call__", "inspect.getattr_static"}
_GETTERS: Final = frozenset({"operator.attrgetter", "_operator.attrgetter"})
_DOES: Final[dict[str, Callable[[Any, Any], None]]] = {
    name[len("_do_") :].upper(): method for name, method in vars(_Machine).items() if name.startswith("_do_")
}
