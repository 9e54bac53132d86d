"""Proposals for names that one side has and the other need not have: tied ones, and buffers that are computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.difference import Proposal, SelectionPart
from ckptmgr.diagnose.draft import Draft
from ckptmgr.diagnose.name_words import split_name
from ckptmgr.diagnose.torch_code import names_in

__all__ = ["propose_harmless", "propose_tied"]

_COMPUTED = {
    "position_ids": "the model counts positions itself",
    "token_type_ids": "the model makes them itself",
    "num_batches_tracked": "it counts batches, and only matters for momentum=None",
    "inv_freq": "rotary frequencies are computed from the configuration",
    "original_inv_freq": "rotary frequencies are computed from the configuration",
    "cos_cached": "a table that is computed when it is needed",
    "sin_cached": "a table that is computed when it is needed",
    "masked_bias": "a constant of the attention mask",
    "relative_position_index": "it is computed from the window's size",
    "attn_mask": "it is computed from the window's size",
    "total_ops": "a counter of a profiler",
    "total_params": "a counter of a profiler",
}
_OUTPUTS = ("lm_head", "decoder", "output", "head", "embed_out", "out_proj", "generator")
_INPUTS = (
    "wte",
    "embed_tokens",
    "word_embeddings",
    "shared",
    "embed_in",
    "tok_embeddings",
    "embedding",
    "embed",
    "emb",
)


def propose_tied(draft: Draft) -> None:
    """Propose to fill a missing name from the tensor that it is another name of."""
    ties: dict[str, list[str]] = defaultdict(list)
    for name, live in draft.live.items():
        if live.tied_to is not None:
            ties[live.tied_to].append(name)
    by_source: list[tuple[str, str]] = []
    guesses: list[tuple[str, str]] = []
    for it in draft.missing():
        source = _source(draft, it, ties)
        if source is not None:
            by_source.append((it.name, source))
        elif (guess := _guess(draft, it)) is not None:
            guesses.append((it.name, guess))
    for name, source in by_source:
        _fill(draft, name, source, "in the model both names are of one tensor", is_certain=True)
    for name, source in guesses:
        why = "it has the shape of the input embedding, and models that leave it out of a file have mostly tied the two"
        _fill(draft, name, source, why, is_certain=False)
    # What the file itself calls another name of something that is there.
    reached = _reached(draft)
    again = [it for it in draft.unexpected() if it.tied_to is not None and it.tied_to in reached]
    if again:
        _drop(draft, again, "in the file they are other names of tensors that are taken")


def propose_harmless(draft: Draft) -> None:
    """Propose to leave out, or leave as it is, what a model computes by itself."""
    for words, tensors in _by_reason(draft, draft.unexpected()).items():
        _drop(draft, tensors, words)
    for words, tensors in _by_reason(draft, draft.missing()).items():
        names = [it.name for it in tensors]
        draft.propose(
            Proposal(
                kind="harmless",
                certainty="certain",
                summary=f"leave {_count(names)} as the model has made it",
                reason=words,
                covers=tuple((None, name) for name in names),
                code=(f"for name in {names_in(names, draft.live, of='live')}:", "    state[name] = live[name]"),
                selection=SelectionPart(exclude=tuple(names)),
            )
        )
        for it in tensors:
            draft.copy_from(replace(it, tied_to=None), None)


def _source(draft: Draft, missing: TensorFacts, ties: Mapping[str, Sequence[str]]) -> str | None:
    first = missing.tied_to or missing.name
    return next(
        (
            name
            for name in (first, *ties.get(first, ()))
            if name != missing.name and name in draft.current and draft.current[name].shape == missing.shape
        ),
        None,
    )


def _guess(draft: Draft, missing: TensorFacts) -> str | None:
    """Return the embedding that an output layer without one of its own may be tied to, if it can only be one."""
    split = split_name(missing.name)
    if split.leaf != "weight" or not split.skeleton or split.skeleton[-1] not in _OUTPUTS or len(missing.shape) != 2:
        return None
    found = []
    for name, it in draft.current.items():
        parts = split_name(name).skeleton
        if it.shape == missing.shape and name in draft.live and parts and parts[-1] in _INPUTS:
            found.append(name)
    return found[0] if len(found) == 1 else None


def _fill(draft: Draft, name: str, source: str, reason: str, *, is_certain: bool) -> None:
    draft.propose(
        Proposal(
            kind="tied",
            certainty="certain" if is_certain else "likely",
            summary=f"take {name} from {source}",
            reason=reason,
            covers=tuple((old, name) for old in draft.origin.get(source, (source,))),
            code=(f"state[{name!r}] = state[{source!r}]",),
        )
    )
    draft.copy_from(replace(draft.current[source], name=name, tied_to=source), source)


def _drop(draft: Draft, tensors: Sequence[TensorFacts], reason: str) -> None:
    names = [it.name for it in tensors]
    draft.propose(
        Proposal(
            kind="harmless",
            certainty="certain",
            summary=f"leave out {_count(names)}",
            reason=reason,
            covers=draft.pairs(dict.fromkeys(names)),
            code=(f"for name in {names_in(names, draft.current)}:", "    del state[name]"),
            selection=SelectionPart(exclude=tuple(names)),
        )
    )
    for name in names:
        draft.drop(name)


def _reached(draft: Draft) -> set[str]:
    return {old for name, olds in draft.origin.items() if name in draft.live for old in olds}


def _by_reason(draft: Draft, tensors: Sequence[TensorFacts]) -> dict[str, list[TensorFacts]]:
    found: dict[str, list[TensorFacts]] = {}
    for it in tensors:
        last = it.name.rpartition(".")[2]
        reason = _COMPUTED.get(last)
        if reason is None and it.name.endswith(("attn.bias", "attention.bias")) and len(it.shape) == 4:
            reason = "it is a causal mask, which the model makes itself"
        if reason is None and last == "_extra_state":
            reason = "extra state of a module is no tensor of its weights"
        if reason is not None:
            found.setdefault(reason, []).append(it)
    return found


def _count(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
