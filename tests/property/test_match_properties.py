"""Whatever two lists of tensors hold: they are compared completely, and what is proposed does what it says."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.difference import Difference, selection_code
from ckptmgr.diagnose.match import match

WORDS = [
    "module",
    "_orig_mod",
    "model",
    "encoder",
    "layers",
    "0",
    "1",
    "2",
    "07",
    "attn",
    "q",
    "k",
    "v",
    "in_proj",
    "qkv",
]
WORDS += ["c_attn", "query_key_value", "embed", "lm_head", "head", "norm1", "", "*", "{i}", "a b", "\\1", "é", '"']
LEAVES = ["weight", "bias", "in_proj_weight", "gamma", "position_ids", "inv_freq", "running_mean", ""]
NAMES = st.builds(
    lambda parts, leaf: ".".join((*parts, leaf)), st.lists(st.sampled_from(WORDS), max_size=5), st.sampled_from(LEAVES)
) | st.text(max_size=12)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 12]), max_size=3).map(tuple)
DTYPES = st.sampled_from(["float32", "float16", "bfloat16", "int64", "float8_e4m3fn", "Q4_K"])
TENSORS = st.builds(TensorFacts, NAMES, DTYPES, SHAPES, st.none() | NAMES)
LISTS = st.lists(TENSORS, max_size=24)


def accounted(difference: Difference, side: str) -> Counter[str]:
    names: Counter[str] = Counter(difference.matched)
    names.update(change.name for change in (*difference.shape, *difference.dtype))
    names.update(it.name for it in (difference.unexpected if side == "saved" else difference.missing))
    return names


@settings(max_examples=400, deadline=None)
@given(LISTS, LISTS)
def test_every_tensor_is_accounted_for_exactly_once(saved: list[TensorFacts], live: list[TensorFacts]) -> None:
    difference = match(saved, live)
    assert accounted(difference, "saved") == Counter({it.name for it in saved})
    assert accounted(difference, "live") == Counter({it.name for it in live})
    assert difference.fits == (
        {it.name: (it.shape, it.dtype) for it in saved} == {it.name: (it.shape, it.dtype) for it in live}
    )
    known = {it.name for it in saved}, {it.name for it in live}
    for proposal in difference.proposals:
        for old, new in proposal.covers:
            assert old is None or old in known[0]
            assert new is None or new in known[1]


class Holder(nn.Module):
    """A module that has whatever names and shapes it is asked for."""

    def __init__(self, tensors: Sequence[TensorFacts]) -> None:
        super().__init__()
        self.tensors = {it.name: torch.full(it.shape, 7.0) for it in tensors}

    def state_dict(self, *arguments: object, **options: object) -> dict[str, torch.Tensor]:
        return dict(self.tensors)

    def load_state_dict(self, state: dict[str, torch.Tensor], strict: bool = True, assign: bool = False) -> None:
        wrong = [it for it in state if it in self.tensors and state[it].shape != self.tensors[it].shape]
        assert not (strict and (state.keys() != self.tensors.keys() or wrong))
        self.loaded = state


FLOATS = st.builds(TensorFacts, NAMES, st.sampled_from(["float32", "bfloat16"]), SHAPES)


@settings(max_examples=300, deadline=None)
@given(st.lists(FLOATS, max_size=24), st.lists(FLOATS, max_size=24))
def test_the_code_that_is_printed_gives_just_what_was_said_to_be_left(
    saved: list[TensorFacts], live: list[TensorFacts]
) -> None:
    difference = match(saved, live)
    model = Holder(live)
    state = {it.name: torch.zeros(it.shape, dtype=getattr(torch, it.dtype)) for it in saved}
    code = difference.code()
    if not code:
        return
    scope = {"model": model, "state": state}
    exec("\n".join(code), scope)
    loaded = model.loaded
    assert set(loaded) - set(model.tensors) == set(difference.unexpected_after)
    assert set(model.tensors) - set(loaded) == set(difference.missing_after)
    differing = {it for it in loaded if it in model.tensors and loaded[it].shape != model.tensors[it].shape}
    assert differing == set(difference.shape_after)
    selection_code(difference.proposals)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(["module", "_orig_mod", "model", "net", "_checkpoint_wrapped_module"]), min_size=1, max_size=4
    ),
    st.booleans(),
)
def test_any_nesting_of_prefixes_is_told_as_one_certain_rule(prefixes: list[str], is_added: bool) -> None:
    plain = [TensorFacts(it, "float32", (4, n + 2)) for n, it in enumerate(("fc1.weight", "fc2.weight", "out.weight"))]
    wrapped = [TensorFacts(".".join((*prefixes, it.name)), it.dtype, it.shape) for it in plain]
    difference = match(plain, wrapped) if is_added else match(wrapped, plain)
    (proposal,) = difference.proposals
    assert (proposal.kind, proposal.certainty) == ("prefix", "certain")
    assert difference.fits_after


def test_five_thousand_names_are_matched_in_seconds() -> None:
    shapes = [(64, 64), (64,), (256, 64)]
    saved = [TensorFacts(f"old.stage{i % 97}.b{i}.m.w{i % 7}.weight", "float32", shapes[i % 3]) for i in range(5000)]
    live = [TensorFacts(f"new.part{i % 89}.c{i}.n.v{i % 5}.weight", "float32", shapes[i % 3]) for i in range(5000)]
    begin = time.process_time()
    difference = match(saved, live)
    assert time.process_time() - begin < 10
    assert len(difference.missing) == len(difference.unexpected) == 5000


def test_hostile_names_cost_no_time() -> None:
    saved = [TensorFacts("." * 100_000 + str(i), "float32", (2,)) for i in range(20)]
    saved += [TensorFacts("a." * 250 + str(i), "float32", (2,)) for i in range(400)]
    live = [TensorFacts("b." * 250 + str(i), "float32", (2,)) for i in range(400)]
    begin = time.process_time()
    difference = match(saved, live)
    assert time.process_time() - begin < 10
    assert len(difference.unexpected) == 420
    assert all(len(line) < 10**7 and re.match(r"\S|    ", line) for line in difference.code())
