"""Tokenizers, transformers, sentencepiece and pandas: stored, built again, and the same on every input."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from preprocess_samples import (
    SENTENCES,
    bert_tokenizer,
    fast_tokenizer,
    nobody,
    same_outputs,
    sentence_pieces,
    stored_and_built,
    tokenizer,
)
from tokenizers import Tokenizer, models, pre_tokenizers

from ckptmgr.errors import StateMismatchError, UnsupportedStateError, UsageError
from ckptmgr.preprocess.fingerprint import fingerprint
from ckptmgr.preprocess.kinds import build_preprocessor, capture_preprocessor, find_kind

SAMPLES = [*SENTENCES, "Unseen WORDS, and berlin.", "", "ünïcödé 你好 🙂"]


def encoded(value, raw):
    return find_kind(value).encode(value, raw)


def test_a_tokenizer_comes_back_with_normalizer_vocabulary_truncation_and_padding():
    made = tokenizer()
    made.enable_truncation(max_length=6)
    made.enable_padding(length=6, pad_id=1, pad_token="<pad>")
    made.encode_special_tokens = True
    built = stored_and_built(made)
    assert type(built) is Tokenizer
    assert built is not made
    assert built.to_str() == made.to_str()
    assert built.encode_special_tokens is True
    for sample in SAMPLES:
        assert same_outputs(encoded(built, sample), encoded(made, sample))


def test_a_tokenizer_encodes_a_text_as_a_batch_of_one_and_a_pair_as_one_sequence():
    made = tokenizer()
    ids = encoded(made, "hello world")
    assert ids.dtype == torch.int64
    assert ids.tolist() == [made.encode("hello world").ids]
    assert encoded(made, ("hello", "world")).tolist() == [made.encode("hello", "world").ids]
    with pytest.raises(UsageError, match="takes a text"):
        encoded(made, ["a", "b", "c"])


def test_a_live_tokenizer_takes_another_state_in_place():
    live, saved = Tokenizer(models.BPE()), tokenizer()
    kind = find_kind(live)
    assert kind.is_restorable(live)
    kind.restore(live, kind.capture(saved))
    assert live.to_str() == saved.to_str()


class Shouting:
    def pre_tokenize(self, text):
        text.normalize(lambda part: part.uppercase())


def test_a_tokenizer_with_a_part_written_in_python_is_refused_when_it_is_captured():
    made = tokenizer()
    made.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Shouting())
    with pytest.raises(UnsupportedStateError, match="cannot be stored"):
        capture_preprocessor(made)


@pytest.mark.parametrize("make", ["fast", "bert"])
def test_a_tokenizer_of_transformers_comes_back_and_captures_to_the_same_state(make, tmp_path):
    made = fast_tokenizer(padding_side="left") if make == "fast" else bert_tokenizer(tmp_path, do_lower_case=False)
    built = stored_and_built(made)
    assert type(built) is type(made)
    assert built.padding_side == made.padding_side
    assert fingerprint(capture_preprocessor(built)) == fingerprint(capture_preprocessor(made))
    for sample in [*SAMPLES[:-2], SAMPLES[-1], ("hello", "Berlin")]:
        assert same_outputs(encoded(built, sample), encoded(made, sample))
    assert encoded(made, "hello Berlin")["input_ids"].shape[0] == 1


def test_using_a_tokenizer_of_transformers_does_not_change_its_fingerprint():
    made = fast_tokenizer()
    before = fingerprint(capture_preprocessor(made))
    made(["hello", "the world of tokens"], padding=True, truncation=True, max_length=3, return_tensors="pt")
    assert fingerprint(capture_preprocessor(made)) == before


def test_where_a_tokenizer_was_loaded_from_is_no_part_of_it(tmp_path):
    made = fast_tokenizer()
    made.save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path, local_files_only=True)
    assert fingerprint(capture_preprocessor(loaded)) == fingerprint(capture_preprocessor(made))
    captured = capture_preprocessor(loaded)["state"]["files"]
    assert not any(str(tmp_path).encode() in file.content for file in captured.values())


def test_a_chat_template_comes_back():
    made = fast_tokenizer()
    made.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    built = stored_and_built(made)
    messages = [{"role": "user", "content": "hi"}]
    assert built.apply_chat_template(messages, tokenize=False) == "<hi>"


def test_a_live_tokenizer_of_transformers_takes_another_state_in_place(tmp_path):
    saved = bert_tokenizer(tmp_path, do_lower_case=False)
    live = bert_tokenizer(tmp_path)
    kind = find_kind(live)
    kind.restore(live, kind.capture(saved))
    assert live("hello BERLIN") == saved("hello BERLIN")
    with pytest.raises(StateMismatchError, match="BertTokenizer"):
        kind.restore(fast_tokenizer(), kind.capture(saved))


@pytest.mark.parametrize("name", ["CanineTokenizer", "ByT5Tokenizer", "SiglipTokenizer"])
def test_a_slow_tokenizer_of_transformers_comes_back(name, tmp_path):
    import transformers

    cls = getattr(transformers, name)
    if name == "SiglipTokenizer":
        (tmp_path / "spiece.model").write_bytes(sentence_pieces().serialized_model_proto())
        made = cls(str(tmp_path / "spiece.model"))
    else:
        made = cls()
    built = stored_and_built(made)
    assert same_outputs(encoded(built, "hello Berlin"), encoded(made, "hello Berlin"))
    assert fingerprint(capture_preprocessor(built)) == fingerprint(capture_preprocessor(made))


def test_a_fast_tokenizer_that_was_made_from_a_sentencepiece_model_comes_back(tmp_path):
    from transformers import T5Tokenizer

    (tmp_path / "spiece.model").write_bytes(sentence_pieces().serialized_model_proto())
    made = T5Tokenizer.from_pretrained(tmp_path, local_files_only=True)
    built = stored_and_built(made)
    assert same_outputs(encoded(built, "hello Berlin"), encoded(made, "hello Berlin"))
    assert fingerprint(capture_preprocessor(built)) == fingerprint(capture_preprocessor(made))


def test_an_image_processor_of_transformers_comes_back():
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    made = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.25, 0.5, 0.75])
    built = stored_and_built(made)
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    assert same_outputs(encoded(built, image), encoded(made, image))
    assert encoded(made, image)["pixel_values"].shape == (1, 3, 8, 8)


def test_a_feature_extractor_of_transformers_comes_back():
    from transformers import Wav2Vec2FeatureExtractor

    made = Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=8000, do_normalize=True)
    built = stored_and_built(made)
    assert built.to_dict() == made.to_dict()
    wave = np.sin(np.arange(100, dtype=np.float32))
    values = encoded(built, wave)["input_values"]
    assert values.shape == (1, 100)
    assert values.mean().abs() < 1e-6


def test_a_processor_of_texts_and_images_comes_back_as_one():
    from transformers import CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    made = CLIPProcessor(images, fast_tokenizer())
    built = stored_and_built(made)
    raw = {"text": "hello Berlin", "images": np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)}
    assert same_outputs(encoded(built, raw), encoded(made, raw))
    assert encoded(made, raw).keys() >= {"input_ids", "pixel_values"}
    assert fingerprint(capture_preprocessor(built)) == fingerprint(capture_preprocessor(made))


def test_a_sentencepiece_processor_comes_back_with_its_options():
    made = sentence_pieces(add_bos=True, reverse=True)
    built = stored_and_built(made)
    assert built.serialized_model_proto() == made.serialized_model_proto()
    for sample in SAMPLES:
        assert same_outputs(encoded(built, sample), encoded(made, sample))
    assert encoded(built, "hello").tolist()[0][0] == made.bos_id()


def test_an_empty_sentencepiece_processor_takes_a_model_in_place():
    import sentencepiece

    live, saved = sentencepiece.SentencePieceProcessor(), sentence_pieces()
    kind = find_kind(live)
    kind.restore(live, kind.capture(saved))
    assert live.encode("hello") == saved.encode("hello")


TABLES = {
    "statistics": pd.DataFrame({"mean": [0.5, -0.0, np.nan], "std": np.float32([1, 2, 3])}, index=["a", "b", "c"]),
    "categories": pd.DataFrame({"size": pd.Categorical(["s", None, "l"], categories=["s", "m", "l"], ordered=True)}),
    "texts": pd.DataFrame({"new": ["a", "b", None], "old": pd.array(["x", None, "z"], dtype="string")}),
    "times": pd.DataFrame(
        {
            "t": pd.to_datetime(["2020-01-01", None]),
            "zoned": pd.to_datetime(["2020-07-01", "2020-01-01"]).tz_localize("Europe/Berlin"),
            "span": pd.to_timedelta([1, 2], unit="s"),
        }
    ),
    "nullable": pd.DataFrame({"i": pd.array([1, None], dtype="Int64"), "b": pd.array([None, True], dtype="boolean")}),
    "objects": pd.DataFrame({"o": [1, "a"], 7: [True, False]}),
    "levels": pd.DataFrame({"x": [1, 2]}, index=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["k", "n"])),
    "a range as a level": pd.DataFrame({"x": [1, 2]}, index=pd.MultiIndex.from_arrays([pd.RangeIndex(2), ["a", "b"]])),
    "twice": pd.DataFrame([[1, 2.5]], columns=["x", "x"]),
    "empty": pd.DataFrame({"x": np.empty(0, np.int64)}),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_pandas_comes_back_with_dtypes_categories_and_index(name):
    table = TABLES[name]
    pd.testing.assert_frame_equal(stored_and_built(table), table, check_exact=True)


def test_a_series_and_an_index_come_back():
    series = pd.Series([1.5, 2.5], index=pd.Index(["a", "b"], name="k"), name=("mean", 1))
    pd.testing.assert_series_equal(stored_and_built(series), series)
    index = pd.RangeIndex(1, 9, 2, name="n")
    assert stored_and_built(index).equals(index)


def test_a_table_with_objects_is_refused_by_the_name_of_its_column():
    with pytest.raises(UnsupportedStateError, match="'things'"):
        capture_preprocessor(pd.DataFrame({"things": [object(), object()]}))


def test_a_table_does_not_say_how_it_is_used():
    with pytest.raises(UsageError, match="encode="):
        encoded(TABLES["statistics"], [1.0])


@pytest.mark.parametrize(
    ("library", "make"),
    [("tokenizers", tokenizer), ("sentencepiece", sentence_pieces), ("pandas", lambda: TABLES["statistics"])],
)
def test_a_library_that_is_not_installed_is_named_with_the_way_to_install_it(library, make, monkeypatch):
    tree = capture_preprocessor(make())
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=library) as error:
        build_preprocessor(tree, nobody)
    assert "pip install" in (error.value.next or "")


def test_asking_about_a_value_imports_no_library():
    code = (
        "import sys\n"
        "from ckptmgr.preprocess.kinds import find_kind, capture_preprocessor\n"
        "from ckptmgr.preprocess.fingerprint import fingerprint\n"
        "fingerprint(capture_preprocessor({'a': 1, 'b': [1.0]}))\n"
        "found = {'tokenizers', 'transformers', 'sentencepiece', 'sklearn', 'skops', 'pandas', 'torchvision'}\n"
        "sys.exit(', '.join(found & sys.modules.keys()) or 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
