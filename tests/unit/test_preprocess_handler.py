"""A preprocessor in the state: restored where that decides nothing anew, else refused with the difference."""

import logging
from collections import OrderedDict

import numpy as np
import pytest
import torch
from preprocess_functions import Running, Standardize, Window, halved, scaled
from preprocess_samples import bert_tokenizer, fast_tokenizer, sentence_pieces, through_codec, tokenizer, word_tokenizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer, models
from torch import nn

from ckptmgr.errors import StateMismatchError
from ckptmgr.preprocess.handler import PreprocessorHandler
from ckptmgr.preprocess.kinds import find_kind
from ckptmgr.state.capture import capture_state, restore_state
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.handlers import HandlerRegistry, StateHandler
from ckptmgr.state.names import ParameterNames

NAMES = ParameterNames.of_state({})
HANDLER = PreprocessorHandler()
ROWS = np.random.default_rng(0).normal(size=(30, 4))


def captured(value):
    return through_codec(HANDLER.capture(value, NAMES))


def resumed(live, saved):
    tree = captured(saved)
    HANDLER.check(live, tree, NAMES)
    HANDLER.restore(live, tree, NAMES)
    return live


def refused(live, saved):
    before = captured(live)
    with pytest.raises(StateMismatchError, match="the preprocessor of the checkpoint is not the live one") as error:
        HANDLER.check(live, captured(saved), NAMES)
    assert str(captured(live)) == str(before)
    assert "load_inference" in (error.value.next or "")
    assert 'Selection.without("preprocessor")' in (error.value.next or "")
    return error.value.why


def test_it_is_a_handler_and_knows_what_no_other_handler_knows():
    assert isinstance(HANDLER, StateHandler)
    assert (HANDLER.name, HANDLER.version, HANDLER.entries) == ("preprocessor", 1, {"preprocessor"})
    for value in (tokenizer(), fast_tokenizer(), sentence_pieces(), StandardScaler()):
        assert HANDLER.handles(value)
    for value in (nn.Linear(1, 1), {}, [], np.zeros(1), Running(), halved, torch.zeros(1)):
        assert not HANDLER.handles(value)


@pytest.mark.parametrize(
    "make",
    [
        tokenizer,
        fast_tokenizer,
        sentence_pieces,
        lambda: StandardScaler().fit(ROWS),
        lambda: {"a": 0, "b": 1},
        lambda: ("a", "b"),
        lambda: halved,
        lambda: Window(3),
        lambda: Standardize([1.0, 2.0]),
    ],
)
def test_the_same_preprocessor_is_accepted(make):
    resumed(make(), make())


def test_an_unfitted_estimator_is_filled():
    saved = Pipeline([("s", StandardScaler()), ("t", StandardScaler())]).fit(ROWS)
    live = resumed(Pipeline([("s", StandardScaler()), ("t", StandardScaler())]), saved)
    assert np.array_equal(live.transform(ROWS), saved.transform(ROWS))


def test_an_empty_tokenizer_and_a_part_of_a_vocabulary_are_filled():
    saved = tokenizer()
    assert resumed(Tokenizer(models.BPE()), saved).to_str() == saved.to_str()
    vocabulary = {"a": 0, "b": 1, "c": 2}
    assert resumed({"a": 0, "b": 1}, vocabulary) == vocabulary
    assert resumed({}, vocabulary) == vocabulary
    assert resumed(["a"], ["a", "b"]) == ["a", "b"]
    import sentencepiece

    pieces = sentence_pieces()
    assert resumed(sentencepiece.SentencePieceProcessor(), pieces).encode("hello") == pieces.encode("hello")


def test_a_contradiction_is_refused_with_the_first_differences(tmp_path):
    assert "normalizer.lowercase is true in the checkpoint, false now" in refused(
        tokenizer(lowercase=False), tokenizer()
    )
    assert "token 'a' has id 1 in the checkpoint, 2 now" in refused(
        word_tokenizer(["b", "a"]), word_tokenizer(["a", "b"])
    )
    assert "do_lower_case" in refused(bert_tokenizer(tmp_path, do_lower_case=False), bert_tokenizer(tmp_path))
    assert "with_std" in refused(StandardScaler(with_std=False), StandardScaler().fit(ROWS))
    assert "mean_[0]" in refused(StandardScaler().fit(ROWS + 1), StandardScaler().fit(ROWS))
    assert "size is 3" in refused(Window(2), Window(3))
    assert "function" in refused(scaled, halved)
    assert "'a' has id 0" in refused({"a": 1, "b": 0, "c": 2}, {"a": 0, "b": 1, "c": 2})


def test_a_live_preprocessor_with_more_than_the_checkpoint_is_refused():
    assert "1 token is new" in refused({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1})
    assert "missing" not in refused(word_tokenizer(["a", "b"]), word_tokenizer(["a"]))
    assert refused(StandardScaler().fit(ROWS), StandardScaler())


def test_a_part_of_what_cannot_change_is_refused():
    assert refused(("a",), ("a", "b"))


def test_several_preprocessors_in_a_dict_are_compared_and_not_filled():
    resumed({"t": tokenizer(), "f": halved}, {"t": tokenizer(), "f": halved})
    assert "tokens of the checkpoint are missing now" in refused({"t": Tokenizer(models.BPE())}, {"t": tokenizer()})
    assert refused({"t": tokenizer()}, {"t": tokenizer(), "f": halved}) == (
        "1 entry of the checkpoint is missing now: 'f'"
    )


def test_another_class_is_refused():
    why = refused(TfidfVectorizer(), StandardScaler())
    assert "StandardScaler in the checkpoint" in why
    assert "TfidfVectorizer now" in why
    assert "OrderedDict" in refused(OrderedDict(a=0), {"a": 0})


def test_a_token_called_class_is_a_token():
    assert "class is 0 in the checkpoint, 1 now" in refused({"class": 1, "b": 0}, {"class": 0, "b": 1})


def test_a_class_whose_source_has_changed_is_told_and_not_refused(caplog):
    tree = captured(Window(3))
    tree["source"] = "0" * 32
    with caplog.at_level(logging.WARNING, logger="ckptmgr"):
        HANDLER.check(Window(3), tree, NAMES)
    assert "preprocess_functions.Window has changed" in caplog.text


def test_a_module_is_restored_like_a_model():
    saved, live = nn.Linear(2, 2), nn.Linear(2, 2)
    resumed(live, saved)
    assert torch.equal(live.weight, saved.weight)
    with pytest.raises(StateMismatchError, match="the module"):
        HANDLER.check(nn.Linear(3, 2), captured(saved), NAMES)


def test_attributes_of_a_module_that_is_not_trained_are_compared():
    live = Standardize([0.0, 0.0])
    resumed(live, Standardize([1.0, 2.0]))
    assert live.mean.tolist() == [1.0, 2.0]
    assert "eps is 1e-06 in the checkpoint, 0.5 now" in refused(Standardize([0.0], eps=0.5), Standardize([0.0]))


def test_attributes_of_a_module_that_is_trained_are_told_and_not_refused(caplog):
    saved, live = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1)), nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.2))
    with caplog.at_level(logging.WARNING, logger="ckptmgr"):
        resumed(live, saved)
    assert "1.p is 0.1 in the checkpoint, 0.2 now" in caplog.text


def test_an_object_with_a_state_dict_takes_its_state():
    saved = Running()
    saved.mean = 3.0
    assert resumed(Running(), saved).mean == 3.0


def test_what_was_restored_can_be_put_back():
    live = StandardScaler()
    undo = HANDLER.backup(live, NAMES)
    assert undo is not None
    resumed(live, StandardScaler().fit(ROWS))
    assert hasattr(live, "mean_")
    undo()
    assert not hasattr(live, "mean_")
    assert HANDLER.backup(halved, NAMES) is None


class Failing(Running):
    def load_state_dict(self, state):
        raise RuntimeError("no")


def test_a_restore_that_fails_leaves_the_tokenizer_as_it_was():
    registry = HandlerRegistry()
    registry.register(HANDLER)
    saved = {"tokenizer": tokenizer(), "other": Failing()}
    entries = [
        CapturedEntry(e.name, e.handler, e.version, through_codec(e.tree))
        for e in capture_state(saved, registry=registry)
    ]
    assert [entry.handler for entry in entries] == ["preprocessor", "stateful"]
    live = {"tokenizer": Tokenizer(models.BPE()), "other": Failing()}
    before = live["tokenizer"].to_str()
    with pytest.raises(StateMismatchError, match="refused its state"):
        restore_state(live, entries, registry=registry)
    assert live["tokenizer"].to_str() == before
    assert find_kind(live["tokenizer"]).name == "tokenizers"
