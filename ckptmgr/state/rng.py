"""State of the random number generators, as plain trees.

The global generators are those that training code draws from without naming one: Python's ``random``, NumPy's legacy
``numpy.random``, torch's default generator on the CPU, and torch's default generator of each CUDA device and of MPS.
A generator object that somebody holds (``torch.Generator``, ``numpy.random.Generator``, ``numpy.random.RandomState``,
``random.Random``) is captured by :func:`capture_generator`.

A tree holds dicts with string keys, ``torch.uint8`` tensors on the CPU, and values that JSON has. Nothing is pickled.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from xxhash import xxh3_128_digest

from ckptmgr.errors import StateMismatchError, UnsupportedStateError

__all__ = [
    "AnyGenerator",
    "capture_generator",
    "capture_rng",
    "derived_rng",
    "is_generator",
    "preserved_rng",
    "restore_generator",
    "restore_rng",
    "same_rng",
]

AnyGenerator: TypeAlias = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

_GENERATOR_TYPES = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_MT_WORDS = 624


def capture_rng() -> dict[str, Any]:
    """Return the state of every global generator of this process.

    CUDA devices are captured when CUDA is initialised in this process; before that no device has drawn anything, and
    asking would start CUDA in a program that may not want it.

    Returns:
        ``{"python": ..., "numpy": ..., "torch": uint8 tensor}``, with ``"cuda": {"0": uint8 tensor, ...}`` and
        ``"mps": uint8 tensor`` where they exist. About 10 KiB. Tensors are fresh copies on the CPU.
    """
    tree: dict[str, Any] = {
        "python": _python_tree(random.getstate()),
        "numpy": _numpy_tree(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        tree["cuda"] = {str(i): torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    if _mps_is_available():
        tree["mps"] = torch.mps.get_rng_state()
    return tree


def restore_rng(tree: Mapping[str, Any]) -> list[str]:
    """Put the global generators back into the captured state.

    Everything is checked before anything is set, so that an error leaves every generator as it was.

    Args:
        tree: What :func:`capture_rng` returned.

    Returns:
        One sentence for each state that could not be put in place because its device does not exist here, and for each
        device that the tree says nothing about. Empty when all generators were restored.

    Raises:
        StateMismatchError: A state is missing or malformed, or NumPy's global generator is of another kind.
    """
    python = _python_state(_entry(tree, "python"))
    numpy_state = _numpy_state(_entry(tree, "numpy"))
    torch_state = _torch_state(_entry(tree, "torch"), "the torch CPU generator")
    try:
        random.Random().setstate(python)
    except (TypeError, ValueError) as cause:
        raise _malformed("Python's random", cause) from cause
    _check_numpy(numpy_state, np.random.get_state(legacy=False), "NumPy's global generator")

    notes: list[str] = []
    saved_cuda: Mapping[str, Any] = tree.get("cuda") or {}
    ndevices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda: dict[int, torch.Tensor] = {}
    for name, state in saved_cuda.items():
        if int(name) < ndevices:
            cuda[int(name)] = _uint8(state, f"cuda:{name}")
        else:
            notes.append(f"the RNG state of cuda:{name} was not restored: this process has {ndevices} CUDA devices")
    if saved_cuda:
        notes.extend(
            f"the RNG of cuda:{i} was left as it is: the checkpoint holds no state for it"
            for i in range(ndevices)
            if i not in cuda
        )
    mps = tree.get("mps")
    if mps is not None and not _mps_is_available():
        notes.append("the RNG state of mps was not restored: this process has no MPS device")
        mps = None

    random.setstate(python)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)
    if cuda:
        # Else torch queues the states until CUDA starts, and then lets a queued torch.manual_seed overwrite them.
        torch.cuda.init()  # type: ignore[no-untyped-call]
    for i, state in cuda.items():
        torch.cuda.set_rng_state(state, i)
    if mps is not None:
        torch.mps.set_rng_state(_uint8(mps, "mps"))
    return notes


def derived_rng(tree: Mapping[str, Any], *, rank: int) -> dict[str, Any]:
    """Return states for a rank that had none, derived from another rank's: the same whenever it is asked for.

    Args:
        tree: What `capture_rng` returned on the other rank.
        rank: The rank that is to have states of its own.
    """
    seed = int.from_bytes(xxh3_128_digest(_uint8(_entry(tree, "torch"), "torch").numpy().tobytes(), seed=rank)[:8])
    derived = dict(tree)
    derived["python"] = _python_tree(random.Random(seed).getstate())
    if _entry(tree, "numpy").get("bit_generator") == "MT19937":
        derived["numpy"] = _numpy_tree(np.random.RandomState(seed % 2**32).get_state(legacy=False))
    derived["torch"] = torch.Generator().manual_seed(seed % 2**63).get_state()
    if "cuda" in tree:
        # Seed and offset, of 8 bytes each.
        words = np.array([seed % 2**63, 0], dtype=np.uint64)
        derived["cuda"] = {name: _bytes_tensor(words) for name in tree["cuda"]}
    return derived


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Run a block and put every global generator back as it was before, also when the block raises."""
    tree = capture_rng()
    try:
        yield
    finally:
        restore_rng(tree)


def same_rng(first: Any, second: Any) -> bool:
    """Say whether two trees of this module hold the same states, bit by bit."""
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same_rng(value, second[key]) for key, value in first.items())
    return bool(first == second)


def is_generator(value: object) -> bool:
    """Say whether :func:`capture_generator` can capture ``value``."""
    return isinstance(value, _GENERATOR_TYPES) and not isinstance(value, random.SystemRandom)


def capture_generator(generator: AnyGenerator) -> dict[str, Any]:
    """Return the state of one generator object as a plain tree.

    Args:
        generator: A ``torch.Generator`` (any device), ``numpy.random.Generator``, ``numpy.random.RandomState`` or
            ``random.Random``.

    Returns:
        ``{"kind": "torch" | "numpy" | "python", ...}``.

    Raises:
        UnsupportedStateError: Anything else, ``random.SystemRandom`` included: it has no state.
    """
    if isinstance(generator, torch.Generator):
        return {"kind": "torch", "device": str(generator.device), "state": generator.get_state()}
    if isinstance(generator, np.random.Generator):
        return {"kind": "numpy", "state": _numpy_tree(generator.bit_generator.state)}
    if isinstance(generator, np.random.RandomState):
        return {"kind": "numpy", "state": _numpy_tree(generator.get_state(legacy=False))}
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return {"kind": "python", "state": _python_tree(generator.getstate())}
    raise UnsupportedStateError(
        f"cannot capture a random number generator of type {type(generator).__qualname__}",
        why="only torch.Generator, numpy.random.Generator, numpy.random.RandomState and random.Random are known",
        next="use one of these, or leave it out of the state",
    )


def restore_generator(generator: AnyGenerator, tree: Mapping[str, Any]) -> None:
    """Put one generator object back into the captured state, in place.

    Args:
        generator: A live generator of the kind that was captured.
        tree: What :func:`capture_generator` returned.

    Raises:
        StateMismatchError: The kinds differ, or the state is malformed. The generator is as it was.
    """
    kind = _entry(tree, "kind")
    state = _entry(tree, "state")
    if isinstance(generator, torch.Generator) and kind == "torch":
        if generator.device.type != str(_entry(tree, "device")).split(":")[0]:
            raise _other_kind(f"a torch.Generator on {tree['device']}", f"one on {generator.device}")
        try:
            # set_state checks before it sets.
            generator.set_state(_uint8(state, "a torch.Generator"))
        except (RuntimeError, TypeError) as cause:
            raise _malformed("a torch.Generator", cause) from cause
    elif isinstance(generator, np.random.Generator) and kind == "numpy":
        decoded = _numpy_state(state)
        _check_numpy(decoded, generator.bit_generator.state, "a numpy.random.Generator")
        generator.bit_generator.state = decoded
    elif isinstance(generator, np.random.RandomState) and kind == "numpy":
        decoded = _numpy_state(state)
        _check_numpy(decoded, generator.get_state(legacy=False), "a numpy.random.RandomState")
        generator.set_state(decoded)
    elif isinstance(generator, random.Random) and kind == "python":
        python = _python_state(state)
        try:
            random.Random().setstate(python)
        except (TypeError, ValueError) as cause:
            raise _malformed("a random.Random", cause) from cause
        generator.setstate(python)
    else:
        raise _other_kind(f"a {kind} generator", f"a {type(generator).__module__}.{type(generator).__qualname__}")


def _mps_is_available() -> bool:
    return torch.backends.mps.is_available()


def _python_tree(state: tuple[Any, ...]) -> dict[str, Any]:
    version, words, gauss = state
    array = np.asarray(words[:-1], dtype=np.uint32)
    return {"version": version, "words": _bytes_tensor(array), "position": words[-1], "gauss_next": gauss}


def _python_state(tree: Any) -> tuple[Any, ...]:
    content = _uint8(_entry(tree, "words"), "Python's random").numpy()
    if content.nbytes != 4 * _MT_WORDS:
        raise _malformed("Python's random", ValueError(f"{content.nbytes} bytes instead of {4 * _MT_WORDS}"))
    words = content.view(np.uint32)
    return (_entry(tree, "version"), (*words.tolist(), _entry(tree, "position")), tree.get("gauss_next"))


def _numpy_tree(value: Any) -> Any:
    """Encode the state of a NumPy bit generator; integers as decimal strings, for PCG64 has some of 128 bits."""
    if isinstance(value, Mapping):
        return {key: _numpy_tree(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "bytes": _bytes_tensor(value)}
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return {"int": str(int(value))}
    return value


def _numpy_state(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    if tree.keys() == {"int"}:
        return int(tree["int"])
    if tree.keys() == {"dtype", "bytes"}:
        content = _uint8(tree["bytes"], "a NumPy generator").numpy()
        try:
            return content.view(np.dtype(tree["dtype"])).copy()
        except (TypeError, ValueError) as cause:
            raise _malformed("a NumPy generator", cause) from cause
    return {key: _numpy_state(item) for key, item in tree.items()}


def _check_numpy(state: Any, live: Any, where: str) -> None:
    name = state.get("bit_generator") if isinstance(state, Mapping) else None
    if name != live["bit_generator"]:
        raise _other_kind(f"{where} driven by {name}", f"one driven by {live['bit_generator']}")
    try:
        scratch = getattr(np.random, str(name))(0)
        scratch.state = {key: state[key] for key in scratch.state}
    except (AttributeError, KeyError, TypeError, ValueError) as cause:
        raise _malformed(where, cause) from cause


def _torch_state(value: Any, where: str) -> torch.Tensor:
    state = _uint8(value, where)
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError) as cause:
        raise _malformed(where, cause) from cause
    return state


def _bytes_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy())


def _uint8(value: Any, where: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
        raise _malformed(where, TypeError(f"a one-dimensional uint8 tensor is wanted, got {type(value).__name__}"))
    return value.cpu().contiguous()


def _entry(tree: Any, key: str) -> Any:
    if not isinstance(tree, Mapping) or key not in tree:
        raise StateMismatchError(
            f"the RNG state has no {key!r}",
            why="the tree was not written by this version, or it was changed",
            next="resume from another checkpoint, or restore without RNG",
        )
    return tree[key]


def _malformed(where: str, cause: Exception) -> StateMismatchError:
    return StateMismatchError(
        f"the saved state of {where} cannot be put in place",
        why=str(cause),
        next="resume from another checkpoint, or restore without RNG",
    )


def _other_kind(saved: str, live: str) -> StateMismatchError:
    return StateMismatchError(
        "a random number generator is of another kind than the saved one",
        why=f"the checkpoint holds the state of {saved}, the program has {live}",
        next="create the generator as in the run that saved, or restore without RNG",
    )
