"""What is proposed for real models: the printed code is run, and the model computes what the old one did."""

from __future__ import annotations

import pytest
import torch
from matched_models import Bert, Nano, Separate, Short, compare, facts, load, told
from torch import nn

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.difference import Difference, selection_code
from ckptmgr.diagnose.match import match


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


X = torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8)
WORDS = torch.arange(10).reshape(2, 5)


def same(old: nn.Module, new: nn.Module, x: torch.Tensor = X) -> bool:
    with torch.no_grad():
        return torch.allclose(old.eval()(x), new.eval()(x), atol=1e-5)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "module.model._orig_mod.", "_checkpoint_wrapped_module.module.", "my.own.net."],
)
def test_any_prefix_is_one_certain_rule(prefix: str) -> None:
    old, new = Short(), Short()
    difference = load(old, new, prefix=prefix)
    assert told(difference) == [("prefix", "certain")]
    assert same(old, new)


def test_wrappers_in_the_middle_of_names_are_left_out() -> None:
    old, new = Short(), Short()
    for layer in old.layers:
        layer["attn"] = nn.ModuleDict({"_checkpoint_wrapped_module": layer["attn"]})
    difference = load(nn.ModuleDict({"model": nn.ModuleDict({"_orig_mod": old})}), new)
    assert told(difference) == [("prefix", "certain")]
    assert len(difference.code()) == 3
    assert all(
        torch.equal(one, other) for one, other in zip(old.state_dict().values(), new.state_dict().values(), strict=True)
    )


def test_a_subtree_that_was_renamed_is_one_rule_with_a_wildcard() -> None:
    old, new = Bert(), Short()
    difference = load(old, new)
    rules = {it.summary for it in difference.proposals}
    assert "rename encoder.layer.*.attention.self.query.* -> layers.*.attn.q.* (6 tensors)" in rules
    assert "rename encoder.layer.*.attention.output.LayerNorm.* -> layers.*.norm1.* (6 tensors)" in rules
    assert len(rules) == 8
    assert difference.fits_after
    assert same(old, new)


def test_what_has_only_another_name_in_front_is_one_rule_and_certain() -> None:
    old, new = nn.ModuleDict({"encoder": Short(), "head": nn.Linear(8, 2)}), nn.ModuleDict({"backbone": Short()})
    new["head"] = nn.Linear(8, 2)
    difference = load(old, new)
    assert [(it.summary, it.certainty) for it in difference.proposals] == [
        ("rename encoder.* -> backbone.* (48 tensors)", "certain")
    ]
    assert selection_code(difference.proposals) == "Selection(rename={'model/encoder.*': 'model/backbone.*'})"


def test_query_key_and_value_are_laid_together_and_the_rest_renamed() -> None:
    old, new = Bert(), Short(is_fused=True)
    difference = load(old, new)
    assert difference.fits_after
    assert [it.kind for it in difference.proposals].count("fuse") == 2
    assert same(old, new)
    assert selection_code(difference.proposals) is None


def test_a_fused_matrix_is_taken_apart() -> None:
    old, new = Short(is_fused=True), Short()
    difference = load(old, new)
    assert told(difference) == [("split", "likely"), ("split", "likely")]
    assert same(old, new)


@pytest.mark.parametrize("is_split", [False, True])
def test_multihead_attention_and_its_parts_become_each_other(is_split: bool) -> None:
    mha, parts = nn.MultiheadAttention(8, 2, batch_first=True), Separate()
    nn.init.normal_(mha.in_proj_bias)
    difference = load(mha, parts) if is_split else load(parts, mha)
    assert told(difference) == [("split" if is_split else "fuse", "likely")] * 2
    with torch.no_grad():
        assert torch.allclose(mha(X, X, X)[0], parts(X), atol=1e-5)


def test_parts_that_a_model_may_mix_head_by_head_are_not_laid_together_silently() -> None:
    new = nn.ModuleDict({"query_key_value": nn.Linear(8, 24)})
    old = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value")})
    difference = compare(old, new)
    assert {it.certainty for it in difference.proposals} == {"unknown"}
    assert difference.code() == ()
    assert any("mixed" in it.reason or "mix" in it.reason for it in difference.proposals)


def gpt2(nwords: int = 50) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=nwords, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(WORDS)
    return found if isinstance(found, torch.Tensor) else found.logits


def test_gpt2_is_transposed_into_linears_square_matrices_too() -> None:
    old, new = gpt2(), Nano()
    for name, parameter in old.named_parameters():
        nn.init.normal_(parameter, std=0.3 if "weight" in name else 0.1)
    difference = load(old, new)
    assert told(difference) == [("transpose", "likely")]
    assert torch.allclose(logits(old), logits(new), atol=1e-4)


def test_a_grown_vocabulary_keeps_the_new_rows_of_the_model_and_says_it_once_for_tied_names() -> None:
    old, new = Nano(), Nano(nwords=64)
    built = new.lm_head.weight.detach().clone()
    difference = load(old, new)
    assert told(difference) == [("resize", "likely")]
    assert torch.equal(new.lm_head.weight[:50], old.lm_head.weight)
    assert torch.equal(new.lm_head.weight[50:], built[50:])
    assert new.lm_head.weight is new.transformer["wte"].weight
    assert selection_code(difference.proposals) == (
        "Selection(resize={'model/transformer.wte.weight': 'grow', 'model/lm_head.weight': 'grow'})"
    )


def test_a_smaller_vocabulary_takes_the_first_rows() -> None:
    old, new = Nano(nwords=64), Nano()
    load(old, new)
    assert torch.equal(new.lm_head.weight, old.lm_head.weight[:50])


def test_a_name_that_is_missing_is_filled_from_the_tensor_that_it_is_tied_to() -> None:
    old, new = Nano(), Nano()
    saved = [it for it in facts(old) if it.name != "lm_head.weight"]
    difference = match(saved, facts(new))
    assert told(difference) == [("tied", "certain")]
    state = {it.name: old.state_dict()[it.name] for it in saved}
    exec("\n".join(difference.code()), {"state": state, "model": new})
    assert torch.equal(logits(old), logits(new))


def test_another_head_stays_as_the_model_was_built() -> None:
    old = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    new = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
    built = new[2].weight.detach().clone()
    difference = load(old, new)
    assert told(difference) == [("skip", "likely")]
    assert torch.equal(new[0].weight, old[0].weight)
    assert torch.equal(new[2].weight, built)


def test_a_size_that_nobody_can_explain_is_asked_about_with_every_policy() -> None:
    difference = compare(nn.Linear(10, 5), nn.Linear(10, 10))
    (proposal,) = difference.proposals
    assert proposal.certainty == "unknown"
    assert [it.summary.partition(":")[0] for it in proposal.candidates] == [
        "build the model with the sizes of the file",
        "skip",
        "grow",
    ]
    new, old = nn.Linear(10, 10), nn.Linear(10, 5)
    built = new.weight.detach().clone()
    for candidate in proposal.candidates[1:]:
        scope = {"state": dict(old.state_dict()), "model": new, "live": new.state_dict(), "torch": torch}
        exec("\n".join(candidate.code), scope)
        new.load_state_dict(scope["state"])
    assert torch.equal(new.weight[:5], old.weight)
    assert torch.equal(new.weight[5:], built[5:])


def test_another_width_is_told_once_and_not_tensor_by_tensor() -> None:
    difference = compare(Short(width=8), Short(width=16))
    (proposal,) = difference.proposals
    assert (proposal.kind, proposal.certainty) == ("build", "unknown")
    assert "8 and not 16" in proposal.summary
    assert len(difference.shape) == 48


def test_layers_that_moved_in_a_sequential_are_renumbered() -> None:
    old = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    new = nn.Sequential(old[0], nn.ReLU(), nn.Dropout(), nn.Linear(6, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2))
    difference = load(old, new)
    assert told(difference) == [("rename", "likely")]
    assert same(old, new)


def test_layers_whose_order_changed_are_renumbered_by_their_shapes() -> None:
    old = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    new = nn.Sequential(nn.Linear(6, 4), nn.Linear(8, 6))
    difference = load(old, new)
    assert told(difference) == [("rename", "likely")]
    assert torch.equal(new[1].weight, old[0].weight)
    assert torch.equal(new[0].bias, old[1].bias)


def test_equal_layers_that_begin_at_another_number_are_not_taken_silently() -> None:
    old = nn.ModuleDict({"layers": nn.ModuleDict({str(n): nn.Linear(4, 4) for n in (1, 2, 3)})})
    new = nn.ModuleDict({"layers": nn.ModuleDict({str(n): nn.Linear(4, 4) for n in (0, 1, 2)})})
    difference = compare(old, new)
    unknown = [it for it in difference.proposals if "shifted" in it.reason]
    assert [it.certainty for it in unknown] == ["unknown"]
    scope = {"state": dict(old.state_dict())}
    exec("\n".join(unknown[0].candidates[0].code), scope)
    new.load_state_dict(scope["state"])
    assert torch.equal(new["layers"]["0"].weight, old["layers"]["1"].weight)


def test_a_cast_says_what_it_loses() -> None:
    old, new = Short(), Short().to(torch.bfloat16)
    difference = load(old, new)
    assert told(difference) == [("cast", "certain")]
    assert "of 24 bits of each number 8 are kept" in difference.proposals[0].reason
    assert selection_code(difference.proposals) == "Selection(dtype='live')"


def test_gamma_and_beta_are_weight_and_bias() -> None:
    class OldNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma, self.beta = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    old, new = nn.ModuleDict({"ln": OldNorm(), "fc": nn.Linear(8, 2)}), nn.ModuleDict()
    new["ln"], new["fc"] = nn.LayerNorm(8), nn.Linear(8, 2)
    load(old, new)
    assert torch.equal(new["ln"].weight, old["ln"].gamma)
    assert torch.equal(new["ln"].bias, old["ln"].beta)


def test_what_a_model_computes_itself_is_harmless_on_either_side() -> None:
    class WithIds(nn.Module):
        def __init__(self, *, has_ids: bool) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            if has_ids:
                self.register_buffer("position_ids", torch.arange(4))

    for has_ids in (False, True):
        difference = load(WithIds(has_ids=not has_ids), WithIds(has_ids=has_ids))
        assert told(difference) == [("harmless", "certain")]
        assert difference.fits_after


NEW_WORDS = {
    "attention": "attn", "query": "q", "key": "k", "value": "v", "output": "out", "intermediate": "ffn1",
    "dense": "fc", "LayerNorm": "norm", "layer": "blocks", "layers": "blocks", "encoder": "enc",
    "self_attn": "attention", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "mlp": "ffn",
    "down_proj": "down", "bert": "backbone", "model": "net",
    "embeddings": "embed", "word_embeddings": "tok", "position_embeddings": "pos",
}  # fmt: skip


def architectures() -> list[nn.Module]:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "vocab_size": 50,
    }
    with torch.device("meta"):
        return [
            transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)),
            transformers.MixtralForCausalLM(
                transformers.MixtralConfig(num_local_experts=3, num_key_value_heads=1, **sizes)
            ),
        ]


def renamed(difference: Difference) -> dict[str, str]:
    found = (pair for it in difference.proposals if it.is_applied and it.kind == "rename" for pair in it.covers)
    return {old: new for old, new in found if old is not None and new is not None}


@pytest.mark.parametrize("is_sorted", [False, True])
def test_the_words_that_people_use_for_a_layer_are_known_in_both_directions(is_sorted: bool) -> None:
    for model in architectures():
        old = facts(model)
        truth = {it.name: ".".join(NEW_WORDS.get(part, part) for part in it.name.split(".")) for it in old}
        new = [TensorFacts(truth[it.name], it.dtype, it.shape) for it in old]
        saved = sorted(old, key=lambda it: it.name) if is_sorted else old
        changed = {a: b for a, b in truth.items() if a != b}
        assert renamed(match(saved, new)) == changed
        assert renamed(match(new, saved)) == {b: a for a, b in changed.items()}


def test_names_that_mean_nothing_lead_to_nothing_wrong() -> None:
    words: dict[str, str] = {}
    for model in architectures():
        old = facts(model)
        truth = {}
        for it in old:
            parts = it.name.split(".")
            kept = [part if part.isdecimal() else words.setdefault(part, f"z{len(words)}z") for part in parts[:-1]]
            truth[it.name] = ".".join([*kept, parts[-1]])
        new = [TensorFacts(truth[it.name], it.dtype, it.shape) for it in old]
        for pairs in (renamed(match(old, new)), {b: a for a, b in renamed(match(new, old)).items()}):
            assert pairs.items() <= truth.items()


def test_two_towers_that_nothing_tells_apart_are_listed_and_not_guessed() -> None:
    old = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    new = nn.ModuleDict({"left": nn.Linear(4, 4), "right": nn.Linear(4, 4)})
    difference = compare(old, new)
    assert {it.certainty for it in difference.proposals} == {"unknown"}
    assert difference.code() == ()
    assert len(difference.missing_after) == len(difference.unexpected_after) == 4
    first = difference.proposals[0]
    assert {it.summary for it in first.candidates} == {"left.weight and 1 more", "right.weight and 1 more"}


def test_a_prefix_that_could_be_either_of_two_is_not_guessed() -> None:
    old = nn.ModuleDict({"student": nn.Linear(4, 4), "teacher": nn.Linear(4, 4)})
    difference = compare(old, nn.Linear(4, 4))
    prefixes = [it for it in difference.proposals if it.kind == "prefix"]
    assert [it.certainty for it in prefixes] == ["unknown"]
    assert {it.summary for it in prefixes[0].candidates} == {
        "leave out 'student.' in front",
        "leave out 'teacher.' in front",
    }
    new = nn.Linear(4, 4)
    scope = {"state": dict(old.state_dict())}
    exec("\n".join(prefixes[0].candidates[1].code), scope)
    assert "weight" in scope["state"]
    assert new.weight.shape == scope["state"]["weight"].shape
