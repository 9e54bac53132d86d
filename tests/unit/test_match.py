"""The difference between two lists of tensors is complete, and says what it is sure of."""

from __future__ import annotations

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.difference import selection_code
from ckptmgr.diagnose.match import match


def tensor(name: str, *shape: int, dtype: str = "float32", tied_to: str | None = None) -> TensorFacts:
    return TensorFacts(name, dtype, shape, tied_to)


def test_equal_lists_fit_and_nothing_is_proposed() -> None:
    tensors = [tensor("a.weight", 2, 3), tensor("a.bias", 2)]
    difference = match(tensors, list(reversed(tensors)))
    assert difference.fits
    assert difference.matched == ("a.weight", "a.bias")
    assert (difference.proposals, difference.code()) == ((), ())


def test_nothing_is_compared_with_nothing() -> None:
    assert match([], []).fits
    assert [it.name for it in match([], [tensor("a", 2)]).missing] == ["a"]
    assert [it.name for it in match([tensor("a", 2)], []).unexpected] == ["a"]


def test_each_kind_of_difference_is_told_of_every_tensor() -> None:
    difference = match(
        [tensor("same", 2), tensor("shape", 2, 3), tensor("dtype", 4, dtype="float16"), tensor("old", 9, 9)],
        [tensor("same", 2), tensor("shape", 2, 5), tensor("dtype", 4), tensor("brand_new", 7, 7, 7)],
    )
    assert difference.matched == ("same",)
    assert [it.name for it in difference.shape] == ["shape"]
    assert [(it.saved.dtype, it.live.dtype) for it in difference.dtype] == [("float16", "float32")]
    assert [it.name for it in difference.missing] == ["brand_new"]
    assert [it.name for it in difference.unexpected] == ["old"]
    assert difference.missing_after == ("brand_new",)
    assert difference.unexpected_after == ("old",)
    assert not difference.fits_after


def test_what_stays_open_is_said_in_the_code_and_not_hidden_by_strict_false() -> None:
    difference = match(
        [tensor("module.a.weight", 2, 3), tensor("old", 9)], [tensor("a.weight", 2, 3), tensor("new", 7, 7)]
    )
    assert (
        difference.code()[-1]
        == "model.load_state_dict(state, strict=False)  # 2 names are left: look at what is returned"
    )


def test_rules_are_no_wider_than_what_they_are_for() -> None:
    # The old `enc.extra` has no place in the model, and a rule for all of `enc.` would rename it too.
    saved = [tensor("enc.a.weight", 2, 3), tensor("enc.b.weight", 3, 4), tensor("enc.extra.table", 5, 5, 5)]
    live = [tensor("body.a.weight", 2, 3), tensor("body.b.weight", 3, 4), tensor("bias", 1, 1, 1)]
    difference = match(saved, live)
    state = {it.name: it for it in saved}
    scope = {"state": state, "model": _Takes()}
    exec("\n".join(difference.code()), scope)
    assert set(scope["model"].loaded) == {"body.a.weight", "body.b.weight", "enc.extra.table"}


class _Takes:
    def load_state_dict(self, state: dict[str, object], strict: bool = True) -> None:
        self.loaded = state


def test_names_that_swap_are_renamed_at_once() -> None:
    saved = [tensor("0.weight", 2, 3), tensor("1.weight", 4, 5)]
    live = [tensor("0.weight", 4, 5), tensor("1.weight", 2, 3)]
    difference = match(saved, live)
    scope = {"state": {it.name: it for it in saved}, "model": _Takes()}
    exec("\n".join(difference.code()), scope)
    assert {name: it.shape for name, it in scope["model"].loaded.items()} == {"0.weight": (4, 5), "1.weight": (2, 3)}


def test_order_is_no_argument_where_a_file_sorts_its_names() -> None:
    # Two norms that only their places tell apart: a safetensors file lists names in alphabetical order.
    live = [tensor("x.norm1.weight", 4), tensor("x.fc.weight", 4, 8), tensor("x.norm2.weight", 4)]
    saved = [tensor("y.pre_norm.weight", 4), tensor("y.fc.weight", 4, 8), tensor("y.a_norm.weight", 4)]
    by_place = match(saved, live)
    by_name = match(sorted(saved, key=lambda it: it.name), live)
    assert by_place.missing_after == ()
    assert set(by_name.missing_after) == {"x.norm1.weight", "x.norm2.weight"}
    assert {it.certainty for it in by_name.proposals if it.candidates} == {"unknown"}


def test_a_quantized_dtype_is_no_matter_of_casting() -> None:
    difference = match([tensor("w", 4, 4, dtype="int8")], [tensor("w", 4, 4, dtype="float32")])
    assert [(it.kind, it.certainty) for it in difference.proposals] == [("cast", "unknown")]
    assert difference.code() == ()


def test_float16_cannot_hold_large_numbers_and_that_is_told() -> None:
    difference = match([tensor("w", 4, dtype="bfloat16")], [tensor("w", 4, dtype="float16")])
    assert "65504" in difference.proposals[0].reason


def test_names_with_quotes_braces_and_newlines_give_code_that_runs() -> None:
    odd = 'a"b\\{c}\n'
    saved = [tensor(f"module.{odd}.{n}.weight", n + 1, 2) for n in range(4)]
    live = [tensor(f"{odd}.{n}.weight", n + 1, 2) for n in range(4)]
    difference = match(saved, live)
    scope = {"state": {it.name: it for it in saved}, "model": _Takes()}
    exec("\n".join(difference.code()), scope)
    assert set(scope["model"].loaded) == {it.name for it in live}


def test_a_selection_says_the_same_for_a_checkpoint_of_ours() -> None:
    difference = match(
        [tensor("old.a.weight", 2, 3, dtype="float16"), tensor("old.b.weight", 3, 4), tensor("position_ids", 9)],
        [tensor("new.a.weight", 2, 3), tensor("new.b.weight", 3, 4)],
    )
    assert selection_code(difference.proposals, entry="net") == (
        "Selection(exclude=['net/position_ids'], rename={'net/old.*': 'net/new.*'}, dtype='live')"
    )


def test_an_unknown_difference_has_no_part_in_a_selection() -> None:
    difference = match([tensor("w", 5, 3), tensor("v", 2)], [tensor("w", 7, 3), tensor("v", 2)])
    assert {it.certainty for it in difference.proposals} == {"unknown"}
    assert selection_code(difference.proposals) is None
