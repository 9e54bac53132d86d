"""Real preprocessors for the tests of preprocessing, and a tree's way through the codec of the state."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ckptmgr.errors import NotAllowedError
from ckptmgr.preprocess.kinds import build_preprocessor, capture_preprocessor
from ckptmgr.state.codec import EntryEncoder, decode_entry
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.stored_file import StoredFile
from ckptmgr.state.trees import mapped_tree

SENTENCES = ["hello world from Berlin", "the world of tokens", "the quick brown fox jumps over the lazy dog"]
_FILE = "a stored file"


def nobody(name: str) -> Any:
    """Allow nothing."""
    raise NotAllowedError(f"{name} is not allowed")


def only(*allowed: Any) -> Callable[[str], Any]:
    """Allow some classes and functions, which exist already."""
    by_name = {f"{item.__module__}.{item.__qualname__}": item for item in allowed}

    def allow(name: str) -> Any:
        if name not in by_name:
            raise NotAllowedError(f"{name} is not allowed")
        return by_name[name]

    return allow


def through_codec(tree: Any) -> Any:
    """Return what comes back of a captured tree from a checkpoint's files."""

    def without_files(item: Any) -> Any:
        return {_FILE: [item.name, item.content]} if isinstance(item, StoredFile) else item

    encoder = EntryEncoder(CapturedEntry("preprocessor", "preprocessor", 1, mapped_tree(tree, without_files)))
    tensors: dict[str, torch.Tensor] = {}
    for stored in encoder.tensors:
        tensor = torch.as_tensor(stored.source).detach().clone()
        tensors.update(dict.fromkeys((stored.name, *stored.aliases), tensor))
    document = json.loads(json.dumps(encoder.tree, allow_nan=False))
    return _with_files(decode_entry(document, tensors.__getitem__))


def _with_files(tree: Any) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {_FILE}:
            return StoredFile(*tree[_FILE])
        for key, item in tree.items():
            tree[key] = _with_files(item)
        return tree
    return type(tree)(map(_with_files, tree)) if type(tree) in (list, tuple) else tree


def stored_and_built(value: Any, allow: Callable[[str], Any] = nobody) -> Any:
    """Capture a preprocessor, send it through the codec, and build a new one."""
    return build_preprocessor(through_codec(capture_preprocessor(value)), allow)


def tokenizer(*, lowercase: bool = True, sentences: list[str] = SENTENCES, vocab_size: int = 80) -> Any:
    """Return a small BPE tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", "<pad>"], show_progress=False)
    made.train_from_iterator(sentences * 3, trainer)
    return made


def word_tokenizer(words: list[str]) -> Any:
    """Return a tokenizer of whole words, whose ids are their places in the list."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def fast_tokenizer(**options: Any) -> Any:
    """Return a tokenizer of transformers around `tokenizer`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer(), unk_token="<unk>", pad_token="<pad>", **options)


def bert_tokenizer(directory: Path, **options: Any) -> Any:
    """Return a BertTokenizer of a vocabulary file."""
    from transformers import BertTokenizer

    file = directory / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "ber", "##lin"]))
    return BertTokenizer(str(file), **options)


def sentence_pieces(**options: Any) -> Any:
    """Return a sentencepiece processor, trained on a few sentences."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 10), model_writer=model, vocab_size=45, model_type="bpe", minloglevel=2
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue(), **options)


def same_outputs(one: Any, other: Any) -> bool:
    """Say whether two encoded inputs are the same, bit by bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_outputs(one[key], other[key]) for key in one)
    return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
