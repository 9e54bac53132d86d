"""What the calls of a pickle would return: tensors, arrays and containers; anything else is an object of its class."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from ckptmgr.diagnose.pickle_opcodes import Blob, LongText
from ckptmgr.diagnose.pickle_values import Array, Dict, Global, Object, Set, Storage, Symbol, Tensor

__all__ = [
    "STORAGE_DTYPES",
    "array_from_state",
    "call",
    "itemsize",
    "numpy_dtype",
    "numpy_itemsize",
    "shape_of",
    "storage_from_id",
]

_MAX_DIMS = 64

STORAGE_DTYPES: Final = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "QInt32Storage": "qint32",
    "QInt8Storage": "qint8",
    "QUInt2x4Storage": "quint2x4",
    "QUInt4x2Storage": "quint4x2",
    "QUInt8Storage": "quint8",
    "ShortStorage": "int16",
    "TypedStorage": "uint8",
    "UntypedStorage": "uint8",
}
_ITEMSIZE: Final = {
    **dict.fromkeys(("bool", "uint8", "int8", "qint8", "quint8", "bits8", "quint4x2", "quint2x4"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16", "bits16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32", "qint32", "complex32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    "complex128": 16,
}
_NUMPY_KINDS: Final = {"f": "float", "i": "int", "u": "uint", "c": "complex", "b": "bool"}


def itemsize(dtype: str) -> int | None:
    """Return the bytes of one element of a dtype of torch; None if that is not known."""
    return _ITEMSIZE.get(dtype)


def shape_of(value: Symbol) -> tuple[int, ...] | None:
    """Return sizes that a tensor can have; None for anything else."""
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMS:
        return None
    sizes = tuple(value)
    return sizes if all(type(size) is int and 0 <= size < 1 << 63 for size in sizes) else None


def numpy_dtype(text: Symbol) -> str:
    """Return a NumPy type string, such as ``<f4``, in torch's words; its own where it has none there."""
    if not isinstance(text, str):
        return "unknown"
    code = text.strip("<>=|")
    kind, size = code[:1], code[1:]
    if code in ("?", "b1"):
        return "bool"
    if kind in _NUMPY_KINDS and size.isdecimal() and len(size) < 3:
        return f"{_NUMPY_KINDS[kind]}{int(size) * 8}"
    if kind in ("O", "V") and (not size or size.isdecimal()):
        return "object" if kind == "O" else "structured"
    return text[:40]


def numpy_itemsize(of: Symbol) -> int | None:
    """Return the bytes of an element of a NumPy dtype in a pickle: 0 if it is or has an object, None if not known."""
    if not isinstance(of, Object) or of.of != "numpy.dtype" or not isinstance(of.args, tuple) or not of.args:
        return None
    code, state = of.args[0], of.state
    match = re.fullmatch(r"([biufcmMSVUO])(\d{1,9})", code) if isinstance(code, str) else None
    if match is None or not isinstance(state, tuple) or len(state) < 8 or state[2] is not None:
        return None
    kind, nbytes = match.group(1), int(match.group(2))
    if type(state[7]) is not int or kind == "O" or state[7] & 1:
        return 0 if type(state[7]) is int else None
    if kind == "V":
        return state[5] if type(state[5]) is int and state[5] > 0 else None
    return nbytes * (4 if kind == "U" else 1) or None


def storage_from_id(identity: Symbol) -> Symbol:
    """Return what a persistent id stands for: a storage, or a class with its source; else an object."""
    if not isinstance(identity, tuple) or len(identity) < 2 or not isinstance(identity[0], str):
        return Object("persistent id", identity)
    if identity[0] == "module" and isinstance(identity[1], Global):
        return identity[1]
    if identity[0] != "storage" or len(identity) < 5 or not isinstance(identity[1], Global):
        return Object("persistent id", identity)
    _, kind, key, location, numel = identity[:5]
    dtype = STORAGE_DTYPES.get(kind.name.rpartition(".")[2], "unknown")
    if type(numel) is not int or numel < 0 or not isinstance(key, (str, int)):
        return Object("persistent id", identity)
    storage = Storage(dtype, str(key), location if isinstance(location, str) else "", numel)
    view = identity[5] if len(identity) > 5 else None
    if isinstance(view, tuple) and len(view) == 3 and all(type(part) is int for part in view[1:]):
        # A view of a storage, in files of before 2018: its tensors lie at an offset in the whole.
        storage.key = f"{storage.key}+{view[1]}"
    return storage


def call(name: str, args: Symbol) -> Symbol:
    """Return what a function gives for arguments, as far as that is known without calling it.

    Args:
        name: As ``module.qualified_name``.
        args: A tuple of symbols; anything else in a pickle that contradicts itself.
    """
    known = _CALLS.get(name)
    if known is not None and isinstance(args, tuple):
        made = known(args)
        if made is not None:
            return made
    return Object(name, args)


def array_from_state(state: Symbol) -> Array | None:
    """Return the array that ``numpy.ndarray.__setstate__`` makes."""
    if not isinstance(state, tuple) or len(state) < 3:
        return None
    shape = shape_of(state[1])
    return None if shape is None else Array(_dtype_name(state[2]), shape)


def _dtype_name(value: Symbol) -> str:
    if isinstance(value, Global):
        return value.name.removeprefix("torch.")
    if isinstance(value, Object) and isinstance(value.args, tuple) and value.args:
        return numpy_dtype(value.args[0]) if isinstance(value.args[0], str) else _dtype_name(value.args[0])
    return numpy_dtype(value)


def _strided(args: Sequence[Symbol], dtype: str | None = None) -> Symbol:
    if len(args) < 4 or not isinstance(args[0], Storage):
        return None
    shape, stride = shape_of(args[2]), shape_of(args[3])
    if shape is None or type(args[1]) is not int or args[1] < 0:
        return None
    metadata = args[6] if len(args) > 6 and dtype is None else args[7] if len(args) > 7 else None
    return Tensor(dtype or args[0].dtype, shape, args[0], args[1], stride or (), _math_bit(metadata))


def _math_bit(metadata: Symbol) -> str | None:
    for key, word in (("conj", "conjugate"), ("neg", "negative")):
        if isinstance(metadata, Dict) and metadata.get(key) is True:
            return word
    return None


def _strided_v3(args: Sequence[Symbol]) -> Symbol:
    return _strided(args, _dtype_name(args[6])) if len(args) > 6 else None


def _first(args: Sequence[Symbol]) -> Symbol:
    return args[0] if args and isinstance(args[0], (Tensor, Array)) else None


def _compiled(args: Sequence[Symbol]) -> Symbol:
    # It is made of the module that was compiled, and holds nothing else that is saved.
    return args[0] if args and isinstance(args[0], Object) else None


def _sparse(args: Sequence[Symbol]) -> Symbol:
    if len(args) < 2 or not isinstance(args[1], tuple):
        return None
    shape = next((shape for part in args[1] if (shape := shape_of(part)) is not None), None)
    tensors = [part for part in args[1] if isinstance(part, Tensor)]
    return None if shape is None or not tensors else Tensor(tensors[-1].dtype, shape, note="sparse")


def _meta(args: Sequence[Symbol]) -> Symbol:
    shape = shape_of(args[1]) if len(args) > 1 else None
    return None if shape is None else Tensor(_dtype_name(args[0]), shape, note="without elements")


def _subclass(args: Sequence[Symbol]) -> Symbol:
    shape = shape_of(args[2]) if len(args) > 2 else None
    return None if shape is None else Tensor(_dtype_name(args[1]), shape, note="a tensor subclass")


def _nested(args: Sequence[Symbol]) -> Symbol:
    return Tensor(args[0].dtype, (), note="nested") if args and isinstance(args[0], Tensor) else None


def _converted(args: Sequence[Symbol]) -> Symbol:
    if len(args) < 2 or not isinstance(args[0], (Tensor, Array)):
        return None
    return Tensor(_dtype_name(args[1]), args[0].shape)


def _by_type(args: Sequence[Symbol]) -> Symbol:
    # Once only: the function that it is given may be itself.
    if len(args) < 3 or not isinstance(args[0], Global) or args[0].name in _RECURSIVE:
        return None
    return call(args[0].name, args[2])


def _mapping(kind: str) -> Callable[[Sequence[Symbol]], Symbol]:
    def make(args: Sequence[Symbol]) -> Symbol:
        made = Dict(kind=kind)
        given = args[0] if args else None
        if isinstance(given, Dict):
            made.pairs.extend(given.pairs)
        elif isinstance(given, (list, tuple)):
            made.pairs.extend(
                (pair[0], pair[1]) for pair in given if isinstance(pair, (list, tuple)) and len(pair) == 2
            )
        return made

    return make


def _set(args: Sequence[Symbol]) -> Symbol:
    return Set(list(args[0]) if args and isinstance(args[0], (list, tuple)) else [])


def _sequence(args: Sequence[Symbol]) -> Symbol:
    return args[0] if args and isinstance(args[0], (list, tuple)) else None


def _encoded(args: Sequence[Symbol]) -> Symbol:
    if args and isinstance(args[0], str):
        return Blob(-1, len(args[0]), args[0].encode("latin-1", "replace"))
    if args and isinstance(args[0], LongText):
        return Blob(-1, args[0].nbytes, args[0].head.encode("latin-1", "replace"))
    return Blob(-1, 0, b"") if not args else None


def _reconstructed(args: Sequence[Symbol]) -> Symbol:
    # How protocols 0 and 1 make an object without calling its class.
    return Object(args[0].name, tuple(args[2:])) if len(args) == 3 and isinstance(args[0], Global) else None


def _empty_array(args: Sequence[Symbol]) -> Symbol:
    return Array("unknown", ()) if args and isinstance(args[0], Global) else None


def _frombuffer(args: Sequence[Symbol]) -> Symbol:
    shape = shape_of(args[2]) if len(args) > 2 else None
    return None if shape is None else Array(_dtype_name(args[1]), shape)


def _numpy(name: str) -> tuple[str, str]:
    return f"numpy.core.{name}", f"numpy._core.{name}"


_CALLS: Final[dict[str, Callable[[Any], Symbol]]] = {
    "torch._utils._rebuild_tensor": _strided,
    "torch._utils._rebuild_tensor_v2": _strided,
    "torch._utils._rebuild_tensor_v3": _strided_v3,
    "torch._utils._rebuild_qtensor": _strided,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch.nn.parameter.Buffer": _first,
    "torch._dynamo.eval_frame.OptimizedModule": _compiled,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_wrapper_subclass": _subclass,
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch._utils._rebuild_device_tensor_from_numpy": _converted,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _converted,
    "torch._tensor._rebuild_from_type_v2": _by_type,
    "torch._tensor._rebuild_from_type": _by_type,
    "torch.Size": _sequence,
    "collections.OrderedDict": _mapping("collections.OrderedDict"),
    "collections.Counter": _mapping("collections.Counter"),
    "collections.defaultdict": lambda args: Dict(kind="collections.defaultdict"),
    "builtins.dict": _mapping("dict"),
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.list": _sequence,
    "builtins.tuple": _sequence,
    "builtins.bytearray": lambda args: args[0] if args and isinstance(args[0], Blob) else _encoded(args),
    "_codecs.encode": _encoded,
    "copyreg._reconstructor": _reconstructed,
    **dict.fromkeys(_numpy("multiarray._reconstruct"), _empty_array),
    **dict.fromkeys(_numpy("numeric._frombuffer"), _frombuffer),
}
_RECURSIVE: Final = frozenset({"torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type"})
