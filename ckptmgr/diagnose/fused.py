"""Proposals for matrices that one side keeps apart and the other as one: query, key and value; gate and up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ckptmgr.diagnose.artifact import Certainty, TensorFacts
from ckptmgr.diagnose.difference import Candidate, Proposal
from ckptmgr.diagnose.draft import Draft
from ckptmgr.diagnose.name_words import likeness, split_name
from ckptmgr.diagnose.torch_code import template

__all__ = ["propose_fused"]

_PARTS = {
    "q": "q", "query": "q", "q_proj": "q", "to_q": "q", "wq": "q", "q_lin": "q", "query_proj": "q", "q_linear": "q",
    "k": "k", "key": "k", "k_proj": "k", "to_k": "k", "wk": "k", "k_lin": "k", "key_proj": "k", "k_linear": "k",
    "v": "v", "value": "v", "v_proj": "v", "to_v": "v", "wv": "v", "v_lin": "v", "value_proj": "v", "v_linear": "v",
    "gate": "gate", "gate_proj": "gate", "w1": "gate", "up": "up", "up_proj": "up", "w3": "up",
}  # fmt: skip
_WHOLES = {
    "qkv": "qkv", "qkv_proj": "qkv", "wqkv": "qkv", "to_qkv": "qkv", "in_proj": "qkv", "c_attn": "qkv",
    "qkv_linear": "qkv", "attn_qkv": "qkv", "query_key_value": "mixed", "kv": "kv", "kv_proj": "kv", "to_kv": "kv",
    "gate_up_proj": "gate_up", "gate_up": "gate_up", "w13": "gate_up", "wi": "gate_up",
}  # fmt: skip
_MADE_OF = {"qkv": ("q", "k", "v"), "mixed": ("q", "k", "v"), "kv": ("k", "v"), "gate_up": ("gate", "up")}
_MARGIN = 0.05
_MAX_GROUPS = 200

Numbers: TypeAlias = tuple[str, ...]
Key: TypeAlias = tuple[tuple[str, ...], str]
Layout: TypeAlias = tuple[int, bool]
"""Along which dimension of the whole the parts lie, and whether each is transposed first."""

_LAYOUTS: tuple[Layout, ...] = ((0, False), (1, True), (1, False), (0, True))
# An output feature is a row of a Linear and a column of a Conv1D: parts beside each other in columns are Linears that
# became a Conv1D, or the other way round, unless their shapes say otherwise.


@dataclass(slots=True)
class _Group:
    """Parts of one kind below one name, or wholes of one kind, in all layers.

    Attributes:
        parent: The name that they lie below, with ``*`` for numbers.
        leaf: ``weight`` or ``bias``.
        kind: What the whole is.
        layers: Numbers → the tensors in their order; of a whole one.
    """

    parent: tuple[str, ...]
    leaf: str
    kind: str
    layers: dict[Numbers, list[TensorFacts]] = field(default_factory=dict)


def propose_fused(draft: Draft) -> None:
    """Propose to lay together what the file has apart, and to take apart what it has as one."""
    for is_split in (False, True):
        apart, one = (draft.missing(), draft.unexpected()) if is_split else (draft.unexpected(), draft.missing())
        wholes = list(_wholes(one))[:_MAX_GROUPS]
        parts = [group for kind in dict.fromkeys(whole.kind for whole in wholes) for group in _parts(apart, kind)]
        for whole, group, layout in _matched(wholes, parts[:_MAX_GROUPS]):
            _propose(draft, whole, group, layout, is_split=is_split)


def _wholes(tensors: Sequence[TensorFacts]) -> Iterator[_Group]:
    groups: dict[object, _Group] = {}
    for tensor in tensors:
        split = split_name(tensor.name)
        kind = _WHOLES.get(split.skeleton[-1].lower()) if split.skeleton else None
        if kind is not None and split.leaf in ("weight", "bias"):
            group = groups.setdefault((split.skeleton, split.leaf), _Group(split.skeleton[:-1], split.leaf, kind))
            group.layers.setdefault(split.numbers, [tensor])
    yield from groups.values()


def _parts(tensors: Sequence[TensorFacts], kind: str) -> Iterator[_Group]:
    wanted = _MADE_OF[kind]
    found: dict[Key, dict[Numbers, dict[str, TensorFacts]]] = defaultdict(lambda: defaultdict(dict))
    for tensor in tensors:
        split = split_name(tensor.name)
        part = _PARTS.get(split.skeleton[-1].lower()) if split.skeleton else None
        if part in wanted and split.leaf in ("weight", "bias"):
            found[split.skeleton[:-1], split.leaf][split.numbers].setdefault(part, tensor)
    for (parent, leaf), layers in found.items():
        whole = {n: [parts[it] for it in wanted] for n, parts in layers.items() if len(parts) == len(wanted)}
        if whole:
            yield _Group(parent, leaf, kind, whole)


def _matched(wholes: Sequence[_Group], parts: Sequence[_Group]) -> Iterator[tuple[_Group, _Group, Layout]]:
    """Yield what belongs together: of equal layers and shapes, and the likest above them where there are several."""
    fitting: dict[int, list[tuple[float, int, Layout]]] = defaultdict(list)
    for i, whole in enumerate(wholes):
        for j, group in enumerate(parts):
            if (whole.kind, whole.leaf) == (group.kind, group.leaf):
                layout = _layout(whole, group)
                if layout is not None:
                    fitting[i].append((likeness(whole.parent, group.parent), j, layout))
    taken: set[int] = set()
    for i, found in fitting.items():
        found.sort(key=lambda it: -it[0])
        if len(found) > 1 and found[0][0] - found[1][0] < _MARGIN:
            continue
        _, j, layout = found[0]
        rivals = [score for other, them in fitting.items() if other != i for score, k, _ in them if k == j]
        if j not in taken and all(found[0][0] - score >= _MARGIN for score in rivals):
            taken.add(j)
            yield wholes[i], parts[j], layout


def _layout(whole: _Group, group: _Group) -> Layout | None:
    """Return how the parts make the whole, in all layers the same; None if they do not."""
    if whole.layers.keys() != group.layers.keys():
        return None
    possible = list(_LAYOUTS)
    for numbers, (one,) in whole.layers.items():
        shapes = [part.shape for part in group.layers[numbers]]
        possible = [layout for layout in possible if _makes(one.shape, shapes, layout)]
    return possible[0] if possible else None


def _makes(one: tuple[int, ...], shapes: Sequence[tuple[int, ...]], layout: Layout) -> bool:
    dim, is_turned = layout
    if len(one) <= dim or (is_turned and len(one) != 2) or any(len(shape) != len(one) for shape in shapes):
        return False
    shapes = [shape[::-1] if is_turned else shape for shape in shapes]
    rest = one[:dim] + one[dim + 1 :]
    return all(shape[:dim] + shape[dim + 1 :] == rest for shape in shapes) and (
        sum(shape[dim] for shape in shapes) == one[dim]
    )


def _propose(draft: Draft, whole: _Group, group: _Group, layout: Layout, *, is_split: bool) -> None:
    ones = [one for (one,) in whole.layers.values()]
    layers = list(group.layers.values())
    certainty: Certainty = "likely"
    reason = f"along dimension {layout[0]} the parts have together just the shape of the whole"
    if layout[1]:
        reason += ", each of them transposed (one side is a Linear, the other a Conv1D)"
    if whole.kind == "mixed":
        certainty = "unknown"
        reason += ", but models that call it query_key_value mostly mix the rows of the three head by head"
    names = " + ".join(_starred(part.name) for part in layers[0])
    target = _starred(ones[0].name)
    pairs = [(one.name, part.name) for one, parts in zip(ones, layers, strict=True) for part in parts]
    covers = draft.pairs(pairs) if is_split else draft.pairs([(part, one) for one, part in pairs])
    code = tuple(_code(whole, ones, layers, layout, is_split=is_split))
    proposal = Proposal(
        kind="split" if is_split else "fuse",
        certainty=certainty,
        summary=f"take {target} apart into {names}" if is_split else f"lay {names} together as {target}",
        reason=reason,
        covers=covers,
        code=() if certainty == "unknown" else code,
        candidates=()
        if certainty != "unknown"
        else (
            Candidate("one after the other", code),
            Candidate("head by head, as the model's own conversion script knows"),
        ),
    )
    draft.propose(proposal)
    if certainty == "unknown":
        return
    for one, parts in zip(ones, layers, strict=True):
        if is_split:
            dtype = draft.current[one.name].dtype
            for part in parts:
                draft.copy_from(replace(part, dtype=dtype, tied_to=None), one.name)
            draft.drop(one.name)
        else:
            dtype = draft.current[parts[0].name].dtype
            draft.put(replace(one, dtype=dtype, tied_to=None), [part.name for part in parts])


def _code(
    whole: _Group,
    ones: Sequence[TensorFacts],
    layers: Sequence[Sequence[TensorFacts]],
    layout: Layout,
    *,
    is_split: bool,
) -> Iterator[str]:
    numbers = list(whole.layers)
    sizes = [[part.shape[layout[0] ^ layout[1]] for part in parts] for parts in layers]
    variables = tuple("ijklmn"[: len(numbers[0])])
    one = template((it.name for it in ones), variables) if len(variables) == len(numbers[0]) else None
    parts = [template((layer[n].name for layer in layers), variables) for n in range(len(layers[0]))]
    if len(ones) > 1 and variables and one is not None and None not in parts and all(it == sizes[0] for it in sizes):
        values = [it[0] if len(it) == 1 else it for it in numbers]
        yield f"for {', '.join(variables)} in {tuple(values)!r}:"
        yield "    " + _line(one, [it for it in parts if it is not None], sizes[0], layout, is_split=is_split)
        return
    for one_tensor, layer, layer_sizes in zip(ones, layers, sizes, strict=True):
        yield _line(repr(one_tensor.name), [repr(it.name) for it in layer], layer_sizes, layout, is_split=is_split)


def _line(one: str, parts: Sequence[str], sizes: Sequence[int], layout: Layout, *, is_split: bool) -> str:
    dim, is_turned = layout
    turn = ".t()" if is_turned else ""
    if is_split:
        targets = ", ".join(f"state[{part}]" for part in parts)
        pieces = f"state.pop({one}).split({list(sizes)!r}, dim={dim})"
        return f"{targets} = (part.t() for part in {pieces})" if is_turned else f"{targets} = {pieces}"
    popped = ", ".join(f"state.pop({part}){turn}" for part in parts)
    return f"state[{one}] = torch.cat([{popped}], dim={dim})"


def _starred(name: str) -> str:
    return ".".join("*" if part.isascii() and part.isdecimal() else part for part in name.split("."))
