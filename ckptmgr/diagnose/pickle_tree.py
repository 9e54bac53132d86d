"""What the object in a pickle is: a state dict, a whole module, a trainer's checkpoint; and its weights by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.pickle_modules import OF_EVERY_MODULE, attributes_of, is_module, parts_of_module
from ckptmgr.diagnose.pickle_values import Array, Dict, Object, Set, Symbol, Tensor, as_mapping, in_words, type_words
from ckptmgr.diagnose.plain_words import clean, listed, plural

__all__ = ["Recognised", "recognise", "tensor_facts", "tensors_in"]

_MAX_DEPTH = 40
_MAX_VISITS = 400_000
MAX_CONTENTS = 200

# Where training loops keep the weights, the likeliest first.
_WEIGHT_KEYS: Final = [
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "model_dict",
    "net_state_dict",
    "state_dict_ema",
    "model_ema",
    "ema",
    "teacher",
    "student",
    "generator",
    "netG",
    "G",
    "backbone",
    "encoder",
]
_TRAINING_KEYS: Final = frozenset(
    [
        "epoch",
        "epochs",
        "step",
        "global_step",
        "iteration",
        "iter",
        "optimizer",
        "optimizers",
        "optimizer_state_dict",
        "optim",
        "scheduler",
        "lr_scheduler",
        "scheduler_state_dict",
        "scaler",
        "best_acc",
        "best_acc1",
        "loss",
        "args",
        "config",
        "hparams",
        "arch",
    ]
)


@dataclass(slots=True)
class Recognised:
    """What a pickled object is.

    Attributes:
        kind: As in `Artifact.kind`; ``pickle`` where it is nothing in particular.
        title: In a few words.
        weights: The tensors by name.
        weights_key: Key that the weights are under; None where they are the whole.
        contents, versions, details: As in `Artifact`.
        problems: As in `Artifact`.
    """

    kind: str
    title: str
    weights: list[tuple[str, Tensor | Array]] = field(default_factory=list)
    weights_key: str | None = None
    contents: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class _Budget:
    """How much is still looked at. One value can stand at a million places of a hostile pickle."""

    def __init__(self) -> None:
        self.visits = _MAX_VISITS

    def has(self, count: int) -> bool:
        self.visits -= count
        return self.visits >= 0


def recognise(root: Symbol) -> Recognised:
    """Tell what an object is, by its keys and by what lies under them."""
    left = _Budget()
    found = _recognise(root, left)
    if left.visits < 0:
        found.problems.append("it holds too much to be listed: some of it is left out")
    return found


def _recognise(root: Symbol, left: _Budget) -> Recognised:
    if isinstance(root, (Tensor, Array)):
        of = "tensor" if isinstance(root, Tensor) else "NumPy array"
        return Recognised("tensor", f"a single {of}, {in_words(root)}", [("tensor", root)])
    if is_module(root):
        return Recognised(
            "pickled-module",
            f"a whole pickled module of class {clean(root.of)}",
            _tensors(root, left),
            contents=_module_contents(root, left),
        )
    mapping = as_mapping(root)
    if mapping is not None and len(mapping):
        return _mapping(mapping, left)
    if isinstance(root, (list, tuple)) and root and all(isinstance(value, Tensor) for value in root[:10_000]):
        weights = [(str(number), value) for number, value in enumerate(root[:10_000])]
        return Recognised("tensors", f"a {type_words(root)} of {plural(len(root), 'tensor')}", weights)
    if isinstance(root, Object):
        return _object(root, left)
    return Recognised("pickle", f"a pickled {clean(in_words(root))}", **_of(root, left))


def tensors_in(value: Symbol) -> list[tuple[str, Tensor | Array]]:
    """List the tensors of a state dict, nested or not, or of a module, with their names joined by dots."""
    return _tensors(value, _Budget())


def _tensors(value: Symbol, left: _Budget) -> list[tuple[str, Tensor | Array]]:
    return list(_walk(value, left))


def tensor_facts(weights: Sequence[tuple[str, Tensor | Array]]) -> tuple[TensorFacts, ...]:
    """Return tensors as facts, each tied to the first one whose memory it shares."""
    facts: list[TensorFacts] = []
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for raw, value in weights:
        name, tied = clean(raw, 300), None
        if isinstance(value, Tensor) and value.storage is not None:
            start, stop = _span(value)
            others = spans.setdefault(value.storage.key, [])
            tied = next((other for first, last, other in others if first < stop and start < last), None)
            if tied is None and len(others) < 64:
                others.append((start, stop, name))
        facts.append(TensorFacts(name, clean(value.dtype), value.shape, tied))
    return tuple(facts)


def _span(tensor: Tensor) -> tuple[int, int]:
    if 0 in tensor.shape:
        return 0, 0
    strides = tensor.stride if len(tensor.stride) == len(tensor.shape) else (0,) * len(tensor.shape)
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    return tensor.offset, tensor.offset + reach + 1


def _walk(root: Symbol, left: _Budget) -> Iterator[tuple[str, Tensor | Array]]:
    pending: list[tuple[str, Symbol, int]] = [("", root, 0)]
    while pending:
        prefix, value, depth = pending.pop()
        if isinstance(value, (Tensor, Array)):
            yield prefix, value
            continue
        if depth < _MAX_DEPTH and left.has(1):
            parts = _parts(value, left)
            join = f"{prefix}." if prefix else ""
            pending += [(f"{join}{clean(key, 200)}"[:1000], inner, depth + 1) for key, inner in reversed(parts)]


def _parts(value: Symbol, left: _Budget) -> list[tuple[str, Symbol]]:
    if is_module(value):
        parts = [part for group in parts_of_module(value) for part in group]
        return parts if left.has(len(parts)) else []
    mapping = as_mapping(value)
    return list(mapping.items()) if mapping is not None and left.has(len(mapping)) else []


def _of(value: Symbol, left: _Budget) -> Mapping[str, Any]:
    """Return the contents of an object that is nothing in particular."""
    mapping = as_mapping(value) or attributes_of(value)
    return {"contents": _contents(mapping, left)} if mapping is not None else {}


def _module_contents(module: Object, left: _Budget) -> dict[str, str]:
    """Return a module's class, those of its children, and what its author gave it: not what every module has."""
    attributes = attributes_of(module) or Dict()
    children = as_mapping(attributes.get("_modules")) or Dict()
    contents = {"class": clean(module.of, 200)}
    for name, child in children.items() if left.has(len(children)) else ():
        if len(contents) >= MAX_CONTENTS:
            break
        contents[clean(name)] = clean(child.of if isinstance(child, Object) else in_words(child), 200)
    own = Dict([(key, value) for key, value in attributes.items() if key not in OF_EVERY_MODULE])
    return {**contents, **_contents(own, left)}


def _contents(mapping: Dict, left: _Budget) -> dict[str, str]:
    contents: dict[str, str] = {}
    for key, value in mapping.items() if left.has(len(mapping)) else ():
        if len(contents) >= MAX_CONTENTS:
            contents["…"] = f"{len(mapping) - MAX_CONTENTS} more"
            break
        contents[clean(key)] = clean(_about(value, left), 200)
    return contents


def _about(value: Symbol, left: _Budget) -> str:
    if is_module(value):
        return f"a whole pickled module of class {value.of}"
    mapping = as_mapping(value)
    if mapping is not None and len(mapping):
        if _is_optimizer(mapping):
            return _optimizer_words(mapping)
        if _is_flat(mapping, left):
            return f"state dict of {plural(sum(_is_tensor(inner) for _, inner in mapping.items()), 'tensor')}"
        keys = mapping.keys()
        return f"{type_words(value)} of {len(mapping)}" + (f": {listed(keys, 8)}" if keys else "")
    if isinstance(value, (list, tuple)) and value and all(map(_is_optimizer_like, value[:100])):
        return f"{plural(len(value), 'optimizer')}: {_optimizer_words(value[0])}"
    if isinstance(value, Set) or (isinstance(value, (list, tuple)) and len(value) > 3):
        return in_words(value)
    if isinstance(value, (list, tuple)) and value:
        return f"{type_words(value)} of {len(value)}: {', '.join(in_words(inner) for inner in value)}"
    return in_words(value)


def _is_tensor(value: Symbol) -> bool:
    return isinstance(value, (Tensor, Array))


def _is_optimizer_like(value: Symbol) -> bool:
    return isinstance(value, Dict) and _is_optimizer(value)


def _is_optimizer(mapping: Dict) -> bool:
    keys = mapping.keys() if len(mapping) < 20 else []
    return {"state", "param_groups"} <= set(keys) and isinstance(mapping.get("param_groups"), (list, tuple))


def _optimizer_words(mapping: Dict) -> str:
    groups = mapping.get("param_groups")
    sizes = [
        len(params)
        for group in (groups if isinstance(groups, (list, tuple)) else ())[:1000]
        if isinstance(group, Dict) and isinstance(params := group.get("params"), (list, tuple))
    ]
    return f"optimizer state of {plural(sum(sizes), 'parameter')} in {plural(len(sizes), 'group')}"


def _is_flat(mapping: Dict, left: _Budget) -> bool:
    """Say whether a mapping is a state dict: mostly tensors, and nothing below it holds further ones."""
    if not left.has(len(mapping)):
        return False
    values = [value for _, value in mapping.items()]
    ntensors = sum(map(_is_tensor, values))
    if ntensors * 2 <= len(values):
        return False
    return not any(True for value in values if not _is_tensor(value) for _ in _walk(value, left))


def _mapping(mapping: Dict, left: _Budget) -> Recognised:
    keys = set(mapping.keys())
    if "pytorch-lightning_version" in keys or (
        {"state_dict", "global_step"} <= keys and keys & {"loops", "callbacks", "lr_schedulers", "optimizer_states"}
    ):
        return _lightning(mapping, left)
    if _is_optimizer(mapping) and len(keys) <= 3:
        words = _optimizer_words(mapping)
        found = Recognised("optimizer-state", f"the state of an optimizer: {words.partition(' of ')[2]}")
        found.contents = {
            "state": _about(mapping.get("state"), left),
            "param_groups": words.partition(" of ")[2],
        }
        return found
    if _is_flat(mapping, left):
        return _state_dict(mapping, left)
    return _with_weights(mapping, left)


def _state_dict(mapping: Dict, left: _Budget) -> Recognised:
    weights = [(name, value) for name, value in mapping.items() if _is_tensor(value)]
    found = Recognised("state-dict", f"a state dict of {plural(len(weights), 'tensor')}", weights)
    others = Dict([(key, value) for key, value in mapping.items() if not _is_tensor(value)])
    found.contents = _contents(others, left)
    if all(isinstance(value, Array) for _, value in weights):
        found.title = f"a dict of {plural(len(weights), 'NumPy array')}"
        found.details["arrays"] = "numpy"
    return found


def _with_weights(mapping: Dict, left: _Budget) -> Recognised:
    candidates = {
        key: value
        for key, value in mapping.items()
        if is_module(value)
        or ((inner := as_mapping(value)) is not None and not _is_optimizer(inner) and key not in _TRAINING_KEYS)
    }
    holding = {key: weights for key, value in candidates.items() if (weights := _tensors(value, left))}
    if not holding:
        found = Recognised("pickle", f"a pickled {type_words(mapping)} of {plural(len(mapping), 'entry')}")
        found.title = found.title.replace("entrys", "entries")
        found.contents = _contents(mapping, left)
        return found
    if len(holding) == len(mapping.keys()) == len(mapping) and not any(key in _WEIGHT_KEYS[:8] for key in holding):
        weights = _tensors(mapping, left)
        nested = Recognised("state-dict", f"a nested state dict of {plural(len(weights), 'tensor')}", weights)
        nested.details.update(is_nested=True, **_modules_in(candidates))
        nested.contents = _contents(mapping, left)
        return nested
    ranked = [key for key in _WEIGHT_KEYS if key in holding] or sorted(holding, key=lambda key: -len(holding[key]))
    key = ranked[0]
    found = Recognised("trainer-checkpoint", "", holding[key], weights_key=key)
    found.contents = _contents(mapping, left)
    found.details.update(_modules_in(candidates))
    found.title = f"a trainer's checkpoint with its weights under {clean(key)!r}"
    if is_module(mapping.get(key)):
        found.title += f", a whole pickled module of class {clean(mapping.get(key).of)}"
        found.details["pickled_module"] = clean(mapping.get(key).of)
    if len(holding) > 1:
        found.details["weights_keys"] = [clean(each) for each in holding]
    for name in ("epoch", "global_step", "step"):
        if type(mapping.get(name)) is int:
            found.details[name] = mapping.get(name)
    return found


def _modules_in(values: Mapping[str, Symbol]) -> dict[str, list[str]]:
    modules = [clean(key) for key, value in values.items() if is_module(value)]
    return {"pickled_modules": modules} if modules else {}


def _lightning(mapping: Dict, left: _Budget) -> Recognised:
    version = mapping.get("pytorch-lightning_version")
    found = Recognised("lightning-checkpoint", "a Lightning checkpoint", weights_key="state_dict")
    if isinstance(version, str):
        found.versions["lightning"] = clean(version, 40)
        found.title += f", written by Lightning {clean(version, 40)}"
    for name in ("epoch", "global_step"):
        if type(mapping.get(name)) is int:
            found.details[name] = mapping.get(name)
    found.contents = _contents(mapping, left)
    hyper = as_mapping(mapping.get("hyper_parameters"))
    if hyper is not None:
        found.details["hyper_parameters"] = {clean(key): clean(in_words(value)) for key, value in _some(hyper)}
    name = mapping.get("hparams_name")
    if isinstance(name, str):
        found.details["hparams_name"] = clean(name)
    found.weights = _tensors(mapping.get("state_dict"), left)
    if not found.weights:
        found.problems.append("it has no weights: 'state_dict' is missing or empty")
    if mapping.get("optimizer_states") is None:
        found.details["is_weights_only"] = True
    return found


def _some(mapping: Dict) -> list[tuple[str, Symbol]]:
    return list(mapping.items())[:MAX_CONTENTS]


def _object(root: Object, left: _Budget) -> Recognised:
    of = clean(root.of)
    state = attributes_of(root)
    found = Recognised("pickle", f"a pickled object of class {of}", **_of(root, left))
    if root.of.startswith("sklearn."):
        found.kind, found.title = "sklearn-pickle", f"a scikit-learn {of.rpartition('.')[2]}, pickled"
        version = state.get("_sklearn_version") if state is not None else None
        if isinstance(version, str):
            found.versions["scikit-learn"] = clean(version, 40)
    return found
