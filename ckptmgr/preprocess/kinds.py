"""Which kind a preprocessor is of: the registry, and a preprocessor with its class as one tree."""

from __future__ import annotations

from typing import Any

from ckptmgr.errors import CorruptCheckpointError, FormatVersionError, UnsupportedStateError, UsageError
from ckptmgr.preprocess.class_names import class_name, source_digest
from ckptmgr.preprocess.dataclass_kind import DataclassKind
from ckptmgr.preprocess.functions_kind import FunctionKind
from ckptmgr.preprocess.kind import Allow, PreprocessorKind
from ckptmgr.preprocess.module_kind import ModuleKind
from ckptmgr.preprocess.own_methods import DictKind, JsonKind, StatefulKind
from ckptmgr.preprocess.pandas_kind import PandasKind
from ckptmgr.preprocess.parts import Parts
from ckptmgr.preprocess.sentencepiece_kind import SentencePieceKind
from ckptmgr.preprocess.sklearn_kind import SklearnKind
from ckptmgr.preprocess.tokenizers_kind import TokenizersKind
from ckptmgr.preprocess.transformers_kind import TransformersKind
from ckptmgr.preprocess.transforms_kind import TransformsKind
from ckptmgr.preprocess.values_kind import ValuesKind

__all__ = [
    "PARTS",
    "build_preprocessor",
    "capture_preprocessor",
    "find_kind",
    "is_known_only_here",
    "kind_of_name",
    "register_kind",
]


def capture_preprocessor(value: Any) -> dict[str, Any]:
    """Return a preprocessor with its kind and class as one tree.

    Returns:
        ``{"kind": name, "kind_version": number, "class": "module.qualified_name", "source": digest of the class's
        source or None, "state": the kind's tree}``.

    Raises:
        UnsupportedStateError: It is of no kind, or has a part without stored form.
    """
    kind = find_kind(value)
    return {
        "kind": kind.name,
        "kind_version": kind.version,
        "class": class_name(value),
        "source": None if isinstance(kind, FunctionKind) else _own_source(value),
        "state": kind.capture(value),
    }


def build_preprocessor(tree: Any, allow: Allow) -> Any:
    """Make a new preprocessor from what `capture_preprocessor` gave.

    Args:
        tree: The tree, perhaps from a file that nobody should trust.
        allow: Imports an allowed class or function by name, or raises NotAllowedError.

    Raises:
        CorruptCheckpointError: It is no such tree.
        FormatVersionError: A newer version wrote it.
        NotAllowedError: It names code that nobody has allowed.
        StateMismatchError: A function has changed since, or the class cannot be built from its state alone.
        UsageError: The library that it needs is not installed.
    """
    if not isinstance(tree, dict) or not {"kind", "kind_version", "state"} <= tree.keys():
        raise CorruptCheckpointError(
            "what the checkpoint holds is no preprocessor",
            why="it has no kind, version and state",
            next="verify the checkpoint: `ckptmgr verify`",
        )
    return kind_of_name(tree["kind"], tree["kind_version"]).build(tree["state"], allow)


PARTS = Parts(capture_preprocessor, build_preprocessor)

# Kinds of which no other handler of state knows: they may stand in the state under any name.
_ONLY_HERE: tuple[PreprocessorKind, ...] = (
    TokenizersKind(),
    TransformersKind(),
    SentencePieceKind(),
    SklearnKind(),
    TransformsKind(PARTS),
    PandasKind(),
)
_BY_TYPE: tuple[PreprocessorKind, ...] = (ModuleKind(PARTS), ValuesKind(PARTS), FunctionKind(PARTS))
_BY_METHODS: tuple[PreprocessorKind, ...] = (StatefulKind(), JsonKind(), DictKind(), DataclassKind(PARTS))
_BUILT_IN = (*_ONLY_HERE, *_BY_TYPE, *_BY_METHODS)
_registered: list[PreprocessorKind] = []


def register_kind(kind: PreprocessorKind) -> None:
    """Add a kind of preprocessor; it is asked before the built-in ones, the latest first.

    Raises:
        UsageError: It is no kind, or its name is taken.
    """
    if any(kind is known for known in _registered):
        return
    if not isinstance(kind, PreprocessorKind):
        raise UsageError(
            f"{kind!r} is no kind of preprocessor",
            why="a kind has name, version, changes_in_training, and the methods of PreprocessorKind",
            next="see ckptmgr.preprocess.kind.PreprocessorKind",
        )
    if any(kind.name == known.name for known in (*_BUILT_IN, *_registered)):
        raise UsageError(
            f"the name {kind.name!r} of a kind of preprocessor is taken",
            why="the name says in a checkpoint which kind builds it",
            next="give the kind another name",
        )
    _registered.append(kind)


def find_kind(value: object) -> PreprocessorKind:
    """Return the kind of a preprocessor: a registered one, by type, or by its methods.

    Raises:
        UnsupportedStateError: There is none. Says how to go on.
    """
    if not isinstance(value, type):
        for kind in (*reversed(_registered), *_BUILT_IN):
            if kind.handles(value):
                return kind
    what = f"the class {value.__qualname__}" if isinstance(value, type) else f"a {class_name(value)}"
    raise UnsupportedStateError(
        f"{what} is no preprocessor that can be stored",
        why="a checkpoint holds no pickled objects, and this one does not say what its state is",
        next="give it state_dict() and load_state_dict(), or to_json() and from_json(), make it a dataclass, "
        "or register a kind with ckptmgr.preprocess.kinds.register_kind(...)",
    )


def kind_of_name(name: Any, version: Any) -> PreprocessorKind:
    """Return the kind that captured a tree.

    Raises:
        CorruptCheckpointError: Nobody knows the name.
        FormatVersionError: The tree is of a newer version.
    """
    for kind in (*reversed(_registered), *_BUILT_IN):
        if isinstance(name, str) and kind.name == name:
            if type(version) is not int or not 1 <= version <= kind.version:
                raise FormatVersionError(
                    f"the preprocessor was captured by version {version} of the kind {name!r}",
                    why=f"this program knows versions up to {kind.version}",
                    next="use the version of ckptmgr, or of the package with the kind, that the run used",
                )
            return kind
    raise CorruptCheckpointError(
        f"the preprocessor is of the kind {name!r}, which nobody knows",
        next="register the kind that the run used with ckptmgr.preprocess.kinds.register_kind(...)",
    )


def is_known_only_here(value: object) -> bool:
    """Say whether it is a preprocessor of a library of which no other handler of state knows."""
    return any(kind.handles(value) for kind in _ONLY_HERE)


def _own_source(value: object) -> str | None:
    """Return the digest of the class's source if the class is the program's own: a library's is in the environment."""
    root = type(value).__module__.partition(".")[0]
    return None if root in _LIBRARIES else source_digest(type(value))


_LIBRARIES = frozenset(
    {"builtins", "collections", "numpy", "pandas", "sentencepiece", "sklearn", "tokenizers", "torch", "torchvision"}
    | {"transformers", "functools"}
)
