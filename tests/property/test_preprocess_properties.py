"""Any two trees: differences are told if and only if the fingerprints differ; and a tree survives storage."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preprocess_samples import nobody, through_codec

from ckptmgr.preprocess.differences import first_differences
from ckptmgr.preprocess.fingerprint import fingerprint
from ckptmgr.preprocess.kinds import build_preprocessor, capture_preprocessor
from ckptmgr.preprocess.readable import is_contained, readable
from ckptmgr.state.stored_file import StoredFile

TEXTS = st.text(max_size=4)
NUMBERS = st.integers(-3, 3) | st.floats(width=16) | st.sampled_from([0.0, -0.0, 2**60])
ARRAYS = st.lists(st.floats(width=16), max_size=3).map(np.array) | st.lists(st.integers(0, 3), max_size=3).map(
    lambda items: np.array(items, np.int16)
)
TENSORS = st.lists(st.floats(width=16), max_size=3).map(torch.tensor)
FILES = st.builds(StoredFile, st.sampled_from(["a.json", "a.bin", "v.txt"]), st.binary(max_size=3))
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS | st.binary(max_size=3) | ARRAYS | TENSORS
VOCABULARIES = st.lists(TEXTS, unique=True, max_size=5).map(lambda words: {w: n for n, w in enumerate(words)})


def trees(leaves):
    return st.recursive(
        leaves | VOCABULARIES,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(TEXTS, inner, max_size=3)
            | st.dictionaries(st.integers(0, 3), inner, max_size=2)
            | st.sets(TEXTS, max_size=3)
        ),
        max_leaves=8,
    )


@settings(max_examples=150, deadline=None)
@given(trees(LEAVES | FILES), trees(LEAVES | FILES))
def test_differences_are_told_if_and_only_if_fingerprints_differ(one, other):
    assert bool(first_differences(one, other)) == (fingerprint(one) != fingerprint(other))
    assert first_differences(one, one) == []


@settings(max_examples=150, deadline=None)
@given(trees(LEAVES), st.data())
def test_one_changed_leaf_is_found(tree, data):
    lines = first_differences({"x": tree, "k": 1}, {"x": tree, "k": data.draw(st.sampled_from([2, 1.0, "1", True]))})
    assert len(lines) == 1
    assert "checkpoint" in lines[0]


@settings(max_examples=150, deadline=None)
@given(trees(LEAVES))
def test_a_tree_survives_its_way_to_storage_with_its_fingerprint(tree):
    captured = capture_preprocessor([tree])
    stored = through_codec(captured)
    assert fingerprint(stored) == fingerprint(captured)
    assert fingerprint(build_preprocessor(stored, nobody)) == fingerprint([tree])


@settings(max_examples=100, deadline=None)
@given(trees(LEAVES), trees(LEAVES))
def test_a_tree_is_contained_in_itself_and_in_one_with_more(tree, more):
    assert is_contained(readable(tree), readable(tree))
    assert is_contained({"a": tree}, {"a": tree, "b": more})
    assert not is_contained({"a": tree, "b": more}, {"a": tree})
