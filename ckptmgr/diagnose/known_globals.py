"""What a global in a pickle is: taken by PyTorch's restricted loading, somebody's code, or dangerous."""

from __future__ import annotations

import _compat_pickle
import sys
from typing import Final, Literal, TypeAlias

__all__ = ["EXAMINED", "HARMLESS_BUILTINS", "PLAIN", "Verdict", "old_name", "verdict_of"]

Verdict: TypeAlias = Literal["plain", "code", "dangerous"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _with(prefix: str, names: str) -> set[str]:
    return {f"{prefix}{name}" for name in _words(names)}


_ELEMENTS = "BFloat16 Byte Char Double Float Half Int Long Short"

PLAIN: Final = frozenset(
    _with("", "_codecs.encode builtins.bytearray builtins.complex builtins.set")
    | _with("collections.", "Counter OrderedDict")
    | {f"{module}.{kind}Tensor" for module in ("torch.sparse", "torch.cuda.sparse") for kind in _words(_ELEMENTS)}
    | {f"{module}.{kind}Tensor" for module in ("torch", "torch.cuda") for kind in _words(f"{_ELEMENTS} Bool")}
    | {
        f"{module}.{kind}Storage"
        for module in ("torch", "torch.cuda")
        for kind in _words(f"{_ELEMENTS} Bool ComplexDouble ComplexFloat")
    }
    | _with("torch.", "QInt32Storage QInt8Storage QUInt2x4Storage QUInt4x2Storage QUInt8Storage")
    | _with("torch.storage.", "TypedStorage UntypedStorage")
    | _with("torch.", "Size Tensor device nn.parameter.Parameter serialization._get_layout")
    | _with("torch._tensor.", "_rebuild_from_type_v2")
    | _with(
        "torch._utils._rebuild_",
        "device_tensor_from_cpu_tensor device_tensor_from_numpy meta_tensor_no_storage nested_tensor parameter"
        " parameter_with_state qtensor sparse_tensor tensor tensor_v2 tensor_v3 wrapper_subclass",
    )
    | _with("torch.", "bool bfloat16 float16 float32 float64 complex32 complex64 complex128")
    | _with("torch.", "float4_e2m1fn_x2 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu")
    | {f"torch.{sign}int{nbits}" for sign in ("", "u") for nbits in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)}
    | _with("torch.", "bits16 bits1x8 bits2x4 bits4x2 bits8 qint32 qint8 quint2x4 quint4x2 quint8")
    | _with("torch.", "per_channel_affine per_channel_affine_float_qparams per_channel_symmetric")
    | _with("torch.", "per_tensor_affine per_tensor_symmetric")
)
"""The globals that `torch.load(weights_only=True)` of PyTorch 2.13 takes, when nobody has added any."""

EXAMINED: Final = "torch.storage._load_from_bytes"
"""What makes a tensor of a plain pickle. It would unpickle the bytes that it is given, and these are looked into."""

HARMLESS_BUILTINS: Final = _words(
    "Ellipsis NotImplemented bool bytearray bytes complex dict enumerate float frozenset int list object range reversed"
    " set slice str tuple zip ArithmeticError AssertionError AttributeError EOFError Exception FileNotFoundError"
    " ImportError IndexError KeyError KeyboardInterrupt LookupError MemoryError NotImplementedError OSError"
    " OverflowError RuntimeError StopIteration TypeError ValueError ZeroDivisionError UserWarning Warning"
)
"""Builtins that only make a value. Every other one, known or not, is dangerous."""

_HARMLESS_STDLIB_MODULES: Final = _words(
    "abc calendar cmath collections collections.abc copyreg dataclasses datetime _datetime decimal _decimal enum"
    " fractions ipaddress math numbers random _random re string typing uuid weakref _weakref zoneinfo array"
)
_HARMLESS: Final = _words(
    "argparse.Namespace pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePath pathlib.PurePosixPath"
    " pathlib.PureWindowsPath pathlib._local.PosixPath pathlib._local.WindowsPath pathlib._local.Path"
    " functools.partial functools._lru_cache_wrapper _functools.partial types.SimpleNamespace types.MappingProxyType"
    " types.GenericAlias logging.Logger logging.getLogger logging.LogRecord io.BytesIO io.StringIO _io.BytesIO"
    " _io.StringIO itertools.chain itertools.count itertools.cycle itertools.islice itertools.repeat _codecs.encode"
    " operator.itemgetter _operator.itemgetter time.struct_time configparser.ConfigParser queue.Queue"
    " joblib.numpy_pickle.NumpyArrayWrapper joblib.numpy_pickle.NDArrayWrapper torch.storage._TypedStorage"
    " torch.storage._UntypedStorage torch.storage._load_from_bytes"
)
"""Of modules whose other members are dangerous."""

_NEVER_HARMLESS: Final = _words(
    "copyreg.add_extension copyreg.pickle copyreg.constructor collections.namedtuple dataclasses.make_dataclass"
    " enum.global_enum re.compile_template typing.get_type_hints uuid._load_system_functions"
)
# Whatever lies in these modules, and is not named above, may run commands, read or write files, or load code.
_DANGEROUS_MODULES: Final = _words(
    "aiohttp antigravity bsddb cffi cloudpickle commands cython dill distutils fsspec httpx idlelib imp IPython"
    " jsonpickle llvmlite numba numexpr paramiko pexpect pip pkg_resources popen2 psutil pydoc _pytest pytest requests"
    " setuptools sh urllib2 urllib3 wheel joblib.externals joblib.numpy_pickle joblib.parallel"
    " numpy.distutils numpy.f2py numpy.lib._npyio_impl numpy.lib.npyio numpy.testing pandas.compat.pickle_compat"
    " pandas.core.computation pandas.io sklearn.externals torch._C._jit torch._dynamo torch._export torch._inductor"
    " torch.distributed.elastic torch.distributed.launcher torch.distributed.rpc torch.distributed.run torch.export"
    " torch.fx.experimental torch.fx.graph_module torch.fx._lazy_graph_module torch.hub torch.jit"
    " torch.multiprocessing torch.onnx torch.package torch.serialization torch.storage torch.testing"
    " torch.utils._config_module torch.utils.bottleneck torch.utils.collect_env torch.utils.cpp_extension"
    " torch.utils.data.datapipes torch.utils.model_zoo torch.utils.show_pickle"
)
_DANGEROUS: Final = _words(
    "joblib.load numpy.fromfile numpy.frompyfunc numpy.genfromtxt numpy.load numpy.loadtxt numpy.memmap numpy.save"
    " numpy.savetxt numpy.savez numpy.vectorize pandas.eval pandas.read_pickle torch.classes.load_library torch.compile"
    " torch.load torch.ops.load_library torch.save"
)
# As a member of any module: most modules hold some of these under their own name, so `torch.nn` `os` is `os`.
_REACHED: Final = _words(
    "asyncio builtins ctypes functools gc importlib inspect io marshal multiprocessing nt operator os pdb pickle posix"
    " pty runpy shutil socket subprocess sys tempfile threading types warnings"
)
_ALWAYS: Final = _words("eval exec __import__ import_module system popen runstring")
_NEVER_AN_ATTRIBUTE: Final = _ALWAYS | _words(
    "Popen check_output compile execv execve getattr setattr load_library load_module open read_bytes read_text"
    " rename rmdir rmtree run spawn touch unlink write_bytes write_text"
)


def old_name(module: str, name: str) -> tuple[str, str]:
    """Return the Python 3 name of a global of a Python 2 pickle; any other as it is."""
    mapped = _compat_pickle.NAME_MAPPING.get((module, name))
    if mapped is not None:
        return mapped
    return _compat_pickle.IMPORT_MAPPING.get(module, module), name


def verdict_of(module: str, name: str) -> Verdict:
    """Judge a global by its name.

    Args:
        module: As the pickle names it.
        name: Its qualified name; with dots, Python goes through attributes: ``torch.nn`` ``os.system`` is `os.system`.
    """
    verdicts = {_judge(module, name), _judge(*old_name(module, name))}
    return "dangerous" if "dangerous" in verdicts else "code" if "code" in verdicts else "plain"


def _judge(module: str, name: str) -> Verdict:
    full = f"{module}.{name}"
    if full in PLAIN and "." not in name:
        return "plain"
    if full in _HARMLESS or (module in ("builtins", "__builtin__") and name in HARMLESS_BUILTINS):
        return "code"
    parts, inner = module.split("."), name.split(".")
    is_known_bad = (
        full in _DANGEROUS
        or full in _NEVER_HARMLESS
        or any(".".join(parts[: count + 1]) in _DANGEROUS_MODULES for count in range(len(parts)))
        or inner[-1] in _ALWAYS
        or any(part in _REACHED for part in inner)
    )
    # Python's own is harmless where it is known to be so, and only as a whole: `pathlib` `Path.unlink` is a method.
    is_unknown_builtin = parts[0] in sys.stdlib_module_names | {"__builtin__"} and (
        module not in _HARMLESS_STDLIB_MODULES or len(inner) > 1
    )
    is_inner_working = len(inner) > 1 and any(part.startswith("__") or part in _NEVER_AN_ATTRIBUTE for part in inner)
    if is_known_bad or (is_unknown_builtin and parts[0] != "__main__") or is_inner_working:
        return "dangerous"
    return "code"
