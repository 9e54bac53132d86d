"""The fingerprint: the same for the same meaning in every process, another for every other meaning."""

import itertools
import os
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from preprocess_samples import sentence_pieces, tokenizer

from ckptmgr.errors import UnsupportedStateError
from ckptmgr.preprocess.fingerprint import fingerprint
from ckptmgr.preprocess.kinds import capture_preprocessor
from ckptmgr.state.stored_file import StoredFile

# Each differs from all others.
MEANINGS = {
    "none": None,
    "true": True,
    "one": 1,
    "one as a float": 1.0,
    "one as a text": "1",
    "one as bytes": b"1",
    "zero": 0.0,
    "minus zero": -0.0,
    "large": 2**70,
    "minus large": -(2**70),
    "nan": float("nan"),
    "infinity": float("inf"),
    "list": [1],
    "tuple": (1,),
    "nested": [[1]],
    "two": [1, 1],
    "set": {1},
    "dict": {"a": 1},
    "dict by number": {1: "a"},
    "ordered": OrderedDict(a=1, b=2),
    "ordered otherwise": OrderedDict(b=2, a=1),
    "plain": {"a": 1, "b": 2},
    "counter": Counter(a=1, b=2),
    "array": np.array([1.0]),
    "array of another type": np.array([1.0], np.float32),
    "array of another shape": np.array([[1.0]]),
    "array of minus zero": np.array([-0.0]),
    "array of zero": np.array([0.0]),
    "scalar": np.float64(1.0),
    "array of texts": np.array(["a"]),
    "array of bytes": np.array([b"a"]),
    "array of records": np.zeros(1, dtype="i4,f4"),
    "array of other records": np.zeros(1, dtype=[("f0", "i4"), ("f2", "f4")]),
    "array of moments": np.array(["2020"], "M8[s]"),
    "tensor": torch.tensor([1.0], dtype=torch.float64),
    "brain float": torch.tensor([1.0], dtype=torch.bfloat16),
    "half": torch.tensor([1.0], dtype=torch.float16),
    "complex": torch.tensor([1j]),
    "sparse": torch.tensor([[0.0, 1.0]]).to_sparse(),
    "dense": torch.tensor([[0.0, 1.0]]),
    "dtype": torch.float32,
    "size": torch.Size([1]),
    "path": Path("a"),
    "lone surrogate": "\ud800",
    "file": StoredFile("a.bin", b"{}"),
    "file of another name": StoredFile("b.bin", b"{}"),
    "json": StoredFile("a.json", b"{}"),
    "json list": StoredFile("a.json", b"[1, 2]"),
    "json list otherwise": StoredFile("a.json", b"[2, 1]"),
    "json float": StoredFile("a.json", b"[1.0, 2]"),
    "json twice": StoredFile("a.json", b'{"a": 1, "a": 1}'),
    "broken json": StoredFile("a.json", b"{"),
    "deep json": StoredFile("a.json", b"[" * 100_000),
    "no skops": StoredFile("a.skops", b"PK"),
    "a list in another": ["a", ["b"]],
    "two lists": [["a"], "b"],
    "joined": ["ab"],
    "apart": ["a", "b"],
}


def test_every_meaning_has_a_fingerprint_of_its_own():
    found = {name: fingerprint(value) for name, value in MEANINGS.items()}
    for (one, first), (other, second) in itertools.combinations(found.items(), 2):
        assert first != second, (one, other)
    assert all(len(digits) == 32 and int(digits, 16) >= 0 for digits in found.values())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": [2]}, {"b": [2], "a": 1}),
        ({"x", "y", "z"}, {"z", "y", "x"}),
        (np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3))),
        (np.arange(3, dtype=">i4"), np.arange(3, dtype="<i4")),
        (np.array(["a"], ">U1"), np.array(["a"], "<U1")),
        (torch.ones(3, 2).t(), torch.ones(2, 3)),
        (torch.nn.Parameter(torch.ones(2)), torch.ones(2)),
        (torch.tensor([1j]).conj(), torch.tensor([1j]).conj().resolve_conj()),
        (float("nan"), -float("nan")),
        (StoredFile("a.json", b'{"a": 1, "b": [1, 2]}'), StoredFile("a.json", b'{ "b" : [1,2],\n "a" : 1 }\n')),
    ],
)
def test_what_means_the_same_has_one_fingerprint(one, other):
    assert fingerprint(one) == fingerprint(other)


def test_the_bits_of_a_nan_in_a_tensor_count():
    quiet = torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)
    other = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert fingerprint(quiet) != fingerprint(other)


# Written down once: a fingerprint is stored in checkpoints, and compared with those of later versions.
KNOWN = {
    "plain": "557b6cbd02a051c897c7d2e4f6c31bfc",
    "array": "88a499bf48911982b1f4b1b0614340a8",
    "json": "182a976511235f79ce71dd2fccbc1ad9",
}


@pytest.mark.parametrize("name", KNOWN)
def test_fingerprints_stay_what_they_are(name):
    assert fingerprint(MEANINGS[name]) == KNOWN[name]


def test_every_process_finds_the_same_fingerprints():
    code = (
        "from test_preprocess_fingerprint import MEANINGS\n"
        "from preprocess_samples import tokenizer, sentence_pieces\n"
        "from ckptmgr.preprocess.fingerprint import fingerprint\n"
        "from ckptmgr.preprocess.kinds import capture_preprocessor\n"
        "print([fingerprint(value) for value in MEANINGS.values()])\n"
        "print(fingerprint(capture_preprocessor({'v': {'a', 'b', 'c'}, 's': sentence_pieces()})))\n"
    )
    printed = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, check=True
        )
        printed.add(run.stdout.decode())
    (text,) = printed
    assert text.splitlines()[0] == str([fingerprint(value) for value in MEANINGS.values()])
    assert text.splitlines()[1] == fingerprint(capture_preprocessor({"v": {"a", "b", "c"}, "s": sentence_pieces()}))


def test_a_tokenizer_keeps_its_fingerprint_and_a_setting_changes_it():
    made = tokenizer()
    before = fingerprint(capture_preprocessor(made))
    made.encode("hello world")
    assert fingerprint(capture_preprocessor(made)) == before
    made.enable_truncation(5)
    assert fingerprint(capture_preprocessor(made)) != before
    made.no_truncation()
    assert fingerprint(capture_preprocessor(made)) == before


@pytest.mark.parametrize("value", [object(), np.array([object()]), [lambda: 0], np.zeros(1, dtype="V4")])
def test_what_has_no_fixed_bytes_is_refused(value):
    with pytest.raises(UnsupportedStateError):
        fingerprint(value)


def test_a_tree_that_holds_itself_is_refused():
    endless = {}
    endless["self"] = endless
    with pytest.raises(UnsupportedStateError, match="nested deeper"):
        fingerprint(endless)
