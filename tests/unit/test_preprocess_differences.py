"""Differences in words: what it was and what it is now; and the first sample that is encoded otherwise."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from preprocess_functions import Window, halved, scaled
from preprocess_samples import bert_tokenizer, sentence_pieces, tokenizer, word_tokenizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import normalizers
from torch import nn

from ckptmgr.preprocess.differences import first_differences
from ckptmgr.preprocess.differing_token import DifferingToken, first_differing_token
from ckptmgr.preprocess.kinds import capture_preprocessor
from ckptmgr.state.stored_file import StoredFile

ROWS = np.random.default_rng(0).normal(size=(30, 4))


def told(saved, live, **options):
    return first_differences(capture_preprocessor(saved), capture_preprocessor(live), **options)


def test_equal_preprocessors_have_no_differences():
    assert told(tokenizer(), tokenizer()) == []


def test_a_setting_of_a_tokenizer_is_told_before_its_vocabulary():
    lines = told(tokenizer(), tokenizer(lowercase=False))
    assert lines[0] == "normalizer.lowercase is true in the checkpoint, false now"
    assert "tokens of the checkpoint are missing now: 'be'" in lines[1]
    assert len(lines) > 1


def test_a_token_with_another_id_is_named_with_both():
    words = [f"w{number}" for number in range(20)]
    lines = told(word_tokenizer([*words, "Berlin"]), word_tokenizer([*words[:3], "Berlin", *words[3:]]))
    assert "token 'Berlin' has id 21 in the checkpoint, 4 now" in told(
        word_tokenizer([*words, "Berlin"]), word_tokenizer([*words[:3], "Berlin", *words[3:]]), limit=99
    )
    assert lines[0] == "token 'w3' has id 4 in the checkpoint, 5 now"
    assert len(lines) == 5


def test_missing_and_new_tokens_are_counted_and_named():
    lines = told(word_tokenizer(["x", "a", "b", "c"]), word_tokenizer(["x"]))
    assert lines == ["3 tokens of the checkpoint are missing now: 'a', 'b', 'c'"]
    assert told(word_tokenizer(["x"]), word_tokenizer(["x", "y"])) == [
        "1 token is new, and not in the checkpoint: 'y'",
    ]
    many = [f"w{number}" for number in range(30)]
    (line,) = told(word_tokenizer(["x", *many]), word_tokenizer(["x"]))
    assert line.startswith("30 tokens of the checkpoint are missing now: 'w0', ")
    assert line.endswith("…")


def test_padding_truncation_and_added_tokens_of_a_tokenizer_are_told():
    saved, live = tokenizer(), tokenizer()
    saved.enable_truncation(7)
    live.add_special_tokens(["<cls>"])
    lines = told(saved, live)
    assert any(line.startswith("truncation is") for line in lines)
    assert "1 added token is new, and not in the checkpoint: '<cls>'" in lines


def test_the_merges_of_a_tokenizer_are_compared_in_order():
    lines = told(tokenizer(), tokenizer(sentences=["berlin berlin tokens", "hello"]), limit=99)
    assert any(line.startswith("merge ") for line in lines)


def test_a_vocabulary_file_is_compared_token_by_token():
    saved = {"files": {"vocab.txt": StoredFile("vocab.txt", "\n".join([*"abcdefghij", "Berlin"]).encode())}}
    live = {"files": {"vocab.txt": StoredFile("vocab.txt", "\n".join(["Berlin", *"abcdefghij"]).encode())}}
    assert "token 'Berlin' has id 10 in the checkpoint, 0 now" in first_differences(saved, live, limit=99)


def test_settings_of_a_tokenizer_of_transformers_are_told(tmp_path):
    saved, live = bert_tokenizer(tmp_path), bert_tokenizer(tmp_path, do_lower_case=False)
    live.padding_side = "left"
    lines = told(saved, live)
    assert lines[0] == "normalizer.lowercase is true in the checkpoint, false now"
    assert "padding_side is 'right' in the checkpoint, 'left' now" in lines


def test_options_and_pieces_of_sentencepiece_are_told():
    assert told(sentence_pieces(), sentence_pieces(add_eos=True)) == [
        "_add_eos is false in the checkpoint, true now",
    ]


def test_statistics_are_told_by_name_and_index():
    saved = {"mean": np.array([0.4, 0.45, 0.485]), "std": [1.0, 2.0]}
    live = {"mean": np.array([0.4, 0.45, 0.5]), "std": [1.0, 2.0]}
    assert told(saved, live) == ["mean[2] is 0.485 in the checkpoint, 0.5 now"]
    assert told({"mean": np.float32([0.1, 0.2])}, {"mean": np.float32([0.3, 0.4])}) == [
        "mean[0] is 0.1 in the checkpoint, 0.3 now (and 1 more of 2 elements)"
    ]
    assert told({"mean": torch.zeros(2, 3)}, {"mean": torch.zeros(3)}) == [
        "mean is float32 (2, 3) in the checkpoint, float32 (3,) now"
    ]
    grid = torch.zeros(2, 3, dtype=torch.complex64)
    other = grid.clone()
    other[1, 2] = 2j
    assert told({"m": grid}, {"m": other})[0].startswith("m[1, 2] is 0.0 in the checkpoint, 2.0 now")


@pytest.mark.parametrize(
    ("saved", "live", "line"),
    [
        ({"n": 1}, {"n": 1.0}, "n is 1 in the checkpoint, 1.0 now"),
        ({"x": 0.0, "y": 1}, {"x": -0.0, "y": 1}, "x is 0.0 in the checkpoint, -0.0 now"),
        ({"crop": 224, "resize": 256}, {"crop": 224, "resize": 232}, "resize is 256 in the checkpoint, 232 now"),
        ({"a": None}, {"a": [1]}, "a is none in the checkpoint, [1] now"),
        ({"a": [1, 2]}, {"a": [1]}, "a has 2 items in the checkpoint, 1 now"),
        ({"a": (1,)}, {"a": [1]}, "a is (1,) in the checkpoint, [1] now"),
        ({"a": 1, "b": "x"}, {"b": "x"}, "1 entry of the checkpoint is missing now: 'a'"),
        ({"s": {"a"}}, {"s": {"b"}}, "1 entry of s of the checkpoint is missing now: 'a'"),
        ({1: "a"}, {1: "b"}, "[1] is 'a' in the checkpoint, 'b' now"),
        (
            OrderedDict(a=1, b="x"),
            OrderedDict(b="x", a=1),
            "the order of the entries is a, b in the checkpoint, b, a now",
        ),
    ],
)
def test_plain_values_are_told_as_they_are(saved, live, line):
    assert first_differences(saved, live)[0] == line


def test_an_estimator_is_told_by_step_and_parameter():
    def fitted(rows, **options):
        return Pipeline([("scaler", StandardScaler(**options)), ("half", StandardScaler())]).fit(rows)

    lines = told(fitted(ROWS), fitted(ROWS + np.array([0, 0, 0, 1.0])))
    assert lines[0].startswith("scaler.mean_[3] is ")
    assert told(fitted(ROWS), fitted(ROWS, with_std=False))[0] == (
        "scaler.with_std is true in the checkpoint, false now"
    )
    texts = ["brown fox", "lazy dog"]
    lines = told(TfidfVectorizer().fit(texts), TfidfVectorizer(lowercase=False).fit(texts))
    assert lines == ["lowercase is true in the checkpoint, false now"]


def test_a_module_is_told_by_settings_and_then_tensors():
    saved, live = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3))
    live[0].load_state_dict(saved[0].state_dict())
    with torch.no_grad():
        live[0].bias[1] += 1
    lines = told(saved, live)
    assert lines[0] == "1.p is 0.1 in the checkpoint, 0.3 now"
    assert lines[1].startswith("0.bias[1] is ")


def test_deep_parts_of_a_module_are_told_by_their_path():
    def deep(p):
        return nn.Sequential(nn.Sequential(nn.Sequential(nn.Dropout(p))))

    assert told(deep(0.1), deep(0.2)) == ["0.0.0.p is 0.1 in the checkpoint, 0.2 now"]
    saved, live = ({"a": {"b": {"c": [tokenizer(lowercase=lowercase)]}}} for lowercase in (True, False))
    assert told(saved, live)[0] == "normalizer.lowercase is true in the checkpoint, false now"
    assert told({"x": [Window(2)]}, {"x": [Window(3)]}) == ["x[0].size is 2 in the checkpoint, 3 now"]


def test_functions_dataclasses_and_kinds_are_told():
    assert told(halved, scaled)[0] == "function is 'preprocess_functions.halved' in the checkpoint, " + (
        "'preprocess_functions.scaled' now"
    )
    tree = capture_preprocessor(halved)
    tree["state"] = {**tree["state"], "source": "0" * 32}
    assert first_differences(tree, capture_preprocessor(halved)) == [
        "the source of the function or class has changed since the checkpoint"
    ]
    assert told(Window(2), Window(3)) == ["size is 2 in the checkpoint, 3 now"]
    assert told(Window(2), {"a": 1})[0] == (
        "the preprocessor is a preprocess_functions.Window in the checkpoint, a builtins.dict now"
    )


def test_the_first_sample_that_is_encoded_otherwise_is_found_with_both_tokens():
    live = tokenizer()
    live.normalizer = normalizers.BertNormalizer(lowercase=False)
    found = first_differing_token(tokenizer(), live, ["hello world", "Hello Berlin"])
    assert isinstance(found, DifferingToken)
    assert (found.sample_index, found.position) == (1, 0)
    assert found.saved[0] == "hello"
    assert found.live[0] == "<unk>"
    assert str(found).startswith("sample 1, 'Hello Berlin': token 0 is 'hello' (id ")
    assert first_differing_token(tokenizer(), tokenizer(), ["hello", "Hello"]) is None


def test_a_sample_that_gives_fewer_tokens_is_found(tmp_path):
    longer, shorter = sentence_pieces(add_eos=True), sentence_pieces()
    found = first_differing_token(longer, shorter, ["hello"])
    assert found is not None
    assert found.live == (None, None)
    assert found.saved == ("</s>", longer.eos_id())
    assert "missing now" in str(found)
    bert = bert_tokenizer(tmp_path), bert_tokenizer(tmp_path, do_lower_case=False)
    found = first_differing_token(*bert, ["hello", "HELLO"])
    assert found is not None
    assert (found.saved[0], found.live[0]) == ("hello", "[UNK]")


def test_numbers_that_differ_are_found_without_texts():
    one, other = StandardScaler().fit(ROWS), StandardScaler(with_mean=False).fit(ROWS)
    found = first_differing_token(one, other, [ROWS[0]])
    assert found is not None
    assert (found.position, found.saved[0]) == (0, None)
    assert first_differing_token(["a", "b"], {"a": 0, "b": 7}, [["a"], ["a", "b"]]).live == ("b", 7)
