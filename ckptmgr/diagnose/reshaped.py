"""Proposals for tensors that are called alike and differ in shape or dtype: transposed, resized, replaced, cast."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.difference import Candidate, Proposal, SelectionPart
from ckptmgr.diagnose.draft import Draft, is_proposable
from ckptmgr.diagnose.name_words import split_name, words_of
from ckptmgr.diagnose.torch_code import names_in

__all__ = ["propose_casts", "propose_resizes", "propose_transposes"]

_VOCABULARY = {"embedding", "token", "vocab", "vocabulary", "lm"}
_PLACES = {"position", "positional"}
_HEADS = {"classifier", "head", "score", "logits", "qa"}
_FLOATS = ("float", "bfloat", "complex")
_EXACT_BITS = {"float64": 53, "float32": 24, "bfloat16": 8, "float16": 11}
_MOST = 0.5


def propose_transposes(draft: Draft) -> None:
    """Propose to transpose matrices whose shapes are each other's in reverse."""
    turned = [saved for saved, live in draft.differing() if len(saved.shape) == 2 and saved.shape == live.shape[::-1]]
    if not turned:
        return
    kinds = {kind for it in turned for kind in _kinds(draft, it)}
    # A square matrix looks the same either way; where its likes were transposed, so was it.
    square = [
        it for it in draft.current.values() if it.name in draft.live and _is_square(it) and is_proposable(it.name)
    ]
    alike = [it for it in square if kinds & _kinds(draft, it)]
    others = [it for it in square if not kinds & _kinds(draft, it) and _is_beside(it, turned)]
    names = [it.name for it in (*turned, *alike)]
    reason = f"{len(turned)} matrices have the shape of the model's in reverse"
    if alike:
        reason += f"; {len(alike)} square ones have the same last names as these, and no shape to tell by"
    draft.propose(
        Proposal(
            kind="transpose",
            certainty="likely",
            summary=f"transpose {_count(names)}",
            reason=reason + " (a Conv1D against a Linear, or a matrix of another framework)",
            covers=draft.pairs({name: name for name in names}),
            code=_transposing(names, draft),
        )
    )
    for it in turned:
        draft.put(replace(it, shape=it.shape[::-1]), [it.name])
    if others:
        draft.propose(
            Proposal(
                kind="transpose",
                certainty="unknown",
                summary=f"transpose {_count([it.name for it in others])} too, or not",
                reason="they are square, beside matrices that are transposed: no shape tells",
                covers=draft.pairs({it.name: it.name for it in others}),
                candidates=(
                    Candidate("as they are"),
                    Candidate("transposed", _transposing([it.name for it in others], draft)),
                ),
            )
        )


def propose_resizes(draft: Draft) -> None:
    """Propose what to do where sizes differ: slice or grow a vocabulary, leave a head as it was built, or ask."""
    differing = draft.differing()
    if not differing or _propose_other_width(draft, differing):
        return
    rows = [(saved, live) for saved, live in differing if _differs_in_rows(saved, live)]
    by_sizes: dict[tuple[int, int], list[tuple[TensorFacts, TensorFacts]]] = defaultdict(list)
    for pair in rows:
        by_sizes[pair[0].shape[0], pair[1].shape[0]].append(pair)
    for (before, now), pairs in by_sizes.items():
        names = [saved.name for saved, _ in pairs]
        words = [_words(name) for name in names]
        if any(it & _PLACES for it in words):
            _resize(draft, pairs, f"the number of positions was {before} and is {now}")
        elif any(it & _VOCABULARY for it in words):
            _resize(draft, pairs, f"the vocabulary had {before} entries and has {now}")
        elif any(it & _HEADS for it in words) or _is_last(draft, names):
            _skip(draft, pairs, before, now)
        else:
            _ask(draft, pairs, f"the first dimension was {before} and is {now}")
    rest = [pair for pair in differing if pair not in rows]
    by_change: dict[object, list[tuple[TensorFacts, TensorFacts]]] = defaultdict(list)
    for saved, live in rest:
        by_change[saved.shape, live.shape].append((saved, live))
    for pairs in by_change.values():
        saved, live = pairs[0]
        _ask(draft, pairs, f"the shape was {saved.shape} and is {live.shape}", can_resize=False)


def propose_casts(draft: Draft) -> None:
    """Propose to cast where floating-point dtypes differ, and say what that loses."""
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, saved in draft.current.items():
        live = draft.live.get(name)
        if live is not None and saved.dtype != live.dtype and saved.shape == live.shape:
            kinds[saved.dtype, live.dtype].append(name)
    for (before, now), names in kinds.items():
        covers = draft.pairs({name: name for name in names})
        if not (before.startswith(_FLOATS) and now.startswith(_FLOATS)) or "8" in before or "4_" in before:
            draft.propose(
                Proposal(
                    kind="cast",
                    certainty="unknown",
                    summary=f"{_count(names)}: {before} in the file, {now} in the model",
                    reason="that is no matter of precision: quantized weights need their scales, and an integer is no "
                    "rounded number",
                    covers=covers,
                    candidates=(
                        Candidate("dequantize with the library that wrote it"),
                        Candidate(f"build the model in {before}"),
                    ),
                )
            )
            continue
        draft.propose(
            Proposal(
                kind="cast",
                certainty="certain",
                summary=f"cast {_count(names)} from {before} to {now}",
                reason=_loss(before, now),
                covers=covers,
                code=_casting(draft, names, before, now),
                selection=SelectionPart(dtype="live"),
            )
        )
        for name in names:
            draft.put(replace(draft.current[name], dtype=now), [name])


def _casting(draft: Draft, names: Sequence[str], before: str, now: str) -> tuple[str, ...]:
    if all(name in names for name, it in draft.current.items() if it.dtype == before):
        cast = f"tensor.to(torch.{now}) if tensor.dtype == torch.{before} else tensor"
        return (f"state = {{name: {cast} for name, tensor in state.items()}}",)
    return (
        f"for name in {names_in(names, draft.current)}:",
        f"    state[name] = state[name].to(torch.{now})",
    )


def _propose_other_width(draft: Draft, differing: Sequence[tuple[TensorFacts, TensorFacts]]) -> bool:
    """Say so where the model was simply built in another size: then nothing else is worth proposing."""
    both = [it for name, it in draft.current.items() if name in draft.live and len(it.shape) > 1]
    matrices = [pair for pair in differing if len(pair[0].shape) > 1 and len(pair[0].shape) == len(pair[1].shape)]
    changes = Counter(
        change
        for saved, live in matrices
        for change in {(a, b) for a, b in zip(saved.shape, live.shape, strict=True) if a != b}
    )
    if not changes or len(matrices) < 3 or len(matrices) < _MOST * len(both):
        return False
    (before, now), count = changes.most_common(1)[0]
    if count < _MOST * len(matrices):
        return False
    draft.propose(
        Proposal(
            kind="build",
            certainty="unknown",
            summary=f"build the model in the size of the file: {before} and not {now}",
            reason=f"{len(matrices)} of {len(both)} matrices have other sizes, and in {count} of them {now} stands in "
            f"place of {before}: it is another size of the model",
            covers=draft.pairs({saved.name: live.name for saved, live in differing}),
            candidates=(Candidate(f"build it with {before}, as in the file"),),
        )
    )
    return True


def _resize(draft: Draft, pairs: Sequence[tuple[TensorFacts, TensorFacts]], what: str) -> None:
    before, now = pairs[0][0].shape[0], pairs[0][1].shape[0]
    policy, line = _resizing(before, now)
    names = [saved.name for saved, _ in pairs]
    code = (f"for name in {names_in(names, draft.current)}:", line)
    if policy == "slice":
        told = f"the first {now} rows are taken"
    else:
        told = f"{now - before} rows more stay as the model has initialised them"
    draft.propose(
        Proposal(
            kind="resize",
            certainty="likely",
            summary=f"{policy} {_count(names)}",
            reason=f"{what}: {told}; right where old entries have kept their numbers",
            covers=draft.pairs({name: name for name in names}),
            code=code,
            selection=SelectionPart(resize=dict.fromkeys(names, policy)),
        )
    )
    for saved, live in pairs:
        draft.put(replace(saved, shape=live.shape), [saved.name])


def _resizing(before: int, now: int) -> tuple[str, str]:
    if now < before:
        return "slice", f"    state[name] = state[name][:{now}]"
    return "grow", f"    state[name] = torch.cat([state[name], live[name][{before}:].to(state[name])])"


def _skip(draft: Draft, pairs: Sequence[tuple[TensorFacts, TensorFacts]], before: int, now: int) -> None:
    names = [saved.name for saved, _ in pairs]
    draft.propose(
        Proposal(
            kind="skip",
            certainty="likely",
            summary=f"leave {_count(names)} as the model was built",
            reason=f"the last layer gave {before} outputs and gives {now}: another head, which has to be trained",
            covers=draft.pairs({name: name for name in names}),
            code=(f"for name in {names_in(names, draft.current)}:", "    state[name] = live[name]"),
            selection=SelectionPart(exclude=tuple(names)),
        )
    )
    for _, live in pairs:
        draft.put(replace(live, tied_to=None), [live.name])


def _ask(draft: Draft, pairs: Sequence[tuple[TensorFacts, TensorFacts]], what: str, *, can_resize: bool = True) -> None:
    names = [saved.name for saved, _ in pairs]
    saved, live = pairs[0]
    loop = f"for name in {names_in(names, draft.current)}:"
    candidates = [
        Candidate("build the model with the sizes of the file"),
        Candidate(
            "skip: they stay as the model was built",
            (loop, "    state[name] = live[name]"),
            SelectionPart(exclude=tuple(names)),
        ),
    ]
    if can_resize:
        policy, code = _resizing(saved.shape[0], live.shape[0])
        told = "grow: new rows stay as the model was built" if policy == "grow" else "slice: the first rows are taken"
        part = SelectionPart(resize=dict.fromkeys(names, policy))
        candidates.append(Candidate(told, (loop, code), part))
    draft.propose(
        Proposal(
            kind="resize",
            certainty="unknown",
            summary=f"{_count(names)}: another size",
            reason=f"{what}, and nothing tells which part of it means the same",
            covers=draft.pairs({name: name for name in names}),
            candidates=tuple(candidates),
        )
    )


def _differs_in_rows(saved: TensorFacts, live: TensorFacts) -> bool:
    return 0 < len(saved.shape) == len(live.shape) and saved.shape[1:] == live.shape[1:]


def _is_last(draft: Draft, names: Sequence[str]) -> bool:
    """Say whether tensors are those of one module, which the model declares last."""
    modules = {name.rpartition(".")[0] for name in names}
    last = next(reversed(draft.live), "")
    every = {name.rpartition(".")[0] for name in draft.live}
    return len(modules) == 1 and last.rpartition(".")[0] in modules and len(every) > 1


def _transposing(names: Sequence[str], draft: Draft) -> tuple[str, ...]:
    return (f"for name in {names_in(names, draft.current)}:", "    state[name] = state[name].t().contiguous()")


def _kinds(draft: Draft, it: TensorFacts) -> set[tuple[str, ...]]:
    """Return the last parts of a tensor's name in the model, and in the file, without those that say nothing."""
    splits = [split_name(name) for name in (it.name, *draft.origin[it.name])]
    return {(split.skeleton[-1], split.leaf) for split in splits if split.skeleton and split.skeleton[-1] != "*"}


def _is_square(it: TensorFacts) -> bool:
    return len(it.shape) == 2 and it.shape[0] == it.shape[1] > 1


def _is_beside(it: TensorFacts, turned: Sequence[TensorFacts]) -> bool:
    parents = {split_name(other.name).skeleton[:-1] for other in turned}
    return split_name(it.name).skeleton[:-1] in parents


def _words(name: str) -> set[str]:
    return {word for part in name.split(".") for word in words_of(part)}


def _loss(before: str, now: str) -> str:
    bits = _EXACT_BITS.get(before), _EXACT_BITS.get(now)
    if bits[0] is None or bits[1] is None:
        return "load_state_dict casts without a word"
    if now == "float16":
        return "load_state_dict casts without a word; what is above 65504 becomes infinite"
    if bits[1] >= bits[0] and before != "float16":
        return "nothing is lost"
    if bits[1] >= bits[0]:
        return "nothing is lost"
    return f"load_state_dict casts without a word; of {bits[0]} bits of each number {bits[1]} are kept"


def _count(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
