"""scikit-learn's estimators: stored by skops, the same bytes in every process, and no code without leave."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from preprocess_functions import Clip, halved
from preprocess_samples import nobody, only, same_outputs, stored_and_built
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomTreesEmbedding
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import FunctionTransformer, KBinsDiscretizer, OneHotEncoder, StandardScaler
from sklearn.tree._tree import Tree

from ckptmgr.errors import NotAllowedError, StateMismatchError, UnsupportedStateError, UsageError
from ckptmgr.preprocess.fingerprint import fingerprint
from ckptmgr.preprocess.kinds import capture_preprocessor, find_kind

ROWS = np.random.default_rng(0).normal(size=(30, 4))
TEXTS = ["the brown fox", "jumps over the lazy dog", "hello world", "Brown dog and brown fox"]
FRAME = pd.DataFrame({"n": [1.0, 2.0, 4.0], "c": ["x", "y", "x"], "d": ["p", "p", "q"]})


def columns() -> ColumnTransformer:
    steps = [("numbers", StandardScaler(), ["n"]), ("letters", OneHotEncoder(), ["c", "d"])]
    return ColumnTransformer(steps).fit(FRAME)


ESTIMATORS = {
    "pipeline": (lambda: Pipeline([("scaler", StandardScaler()), ("pca", PCA(2))]).fit(ROWS), ROWS[3]),
    "tfidf": (lambda: TfidfVectorizer(stop_words=["the"], ngram_range=(1, 2)).fit(TEXTS), "the brown dog"),
    "counts": (lambda: CountVectorizer(vocabulary={"fox", "dog", "brown"}).fit(TEXTS), "brown brown fox"),
    "one-hot": (lambda: OneHotEncoder(handle_unknown="ignore").fit([["a", 1], ["b", 2]]), ["a", 2]),
    "columns": (columns, {"n": 2.5, "c": "y", "d": "q"}),
    "dicts": (lambda: DictVectorizer().fit([{"a": 1, "b": "x"}, {"b": "y"}]), {"a": 3, "b": "y"}),
    "union": (lambda: FeatureUnion([("a", PCA(1)), ("b", StandardScaler())]).fit(ROWS), ROWS[0]),
    "imputer": (lambda: SimpleImputer(strategy="median").fit(ROWS), [np.nan, 1.0, np.nan, 0.0]),
    "bins": (lambda: KBinsDiscretizer(3, quantile_method="averaged_inverted_cdf").fit(ROWS), ROWS[1]),
    "best": (lambda: SelectKBest(f_classif, k=2).fit(ROWS, ROWS[:, 0] > 0), ROWS[1]),
    "function": (lambda: FunctionTransformer(np.log1p).fit(ROWS), [1.0, 2.0]),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_comes_back_and_transforms_bit_by_bit_as_before(name):
    make, sample = ESTIMATORS[name]
    made = make()
    built = stored_and_built(made)
    kind = find_kind(made)
    assert type(built) is type(made)
    encoded = kind.encode(built, sample)
    assert encoded.dtype == torch.float32
    assert encoded.shape[0] == 1
    assert same_outputs(encoded, kind.encode(made, sample))
    assert capture_preprocessor(built) == capture_preprocessor(made)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_saves_of_an_estimator_are_the_same_bytes(name):
    make, sample = ESTIMATORS[name]
    made = make()
    before = capture_preprocessor(made)
    find_kind(made).encode(made, sample)
    assert capture_preprocessor(made) == before
    assert capture_preprocessor(make()) == before


def test_every_process_saves_the_same_bytes():
    code = (
        "import hashlib\n"
        "from test_preprocess_sklearn import ESTIMATORS\n"
        "from ckptmgr.preprocess.kinds import capture_preprocessor\n"
        "from sklearn.feature_extraction.text import CountVectorizer\n"
        "sets = [(lambda: CountVectorizer(vocabulary=frozenset({'a', 'b', 'c'})), 0)]\n"
        "for make, _ in [*ESTIMATORS.values(), *sets]:\n"
        "    print(hashlib.sha256(capture_preprocessor(make())['state']['file'].content).hexdigest())\n"
    )
    printed = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, check=True
        )
        printed.add(run.stdout)
    assert len(printed) == 1
    assert len(printed.pop().splitlines()) == len(ESTIMATORS) + 1


def test_the_order_of_the_texts_does_not_change_the_fingerprint_of_a_vocabulary():
    one, other = CountVectorizer().fit(TEXTS), CountVectorizer().fit(TEXTS[::-1])
    assert list(one.vocabulary_) != list(other.vocabulary_)
    assert fingerprint(capture_preprocessor(one)) == fingerprint(capture_preprocessor(other))


def test_a_frozen_set_comes_back():
    words = frozenset({"fox", "dog"})
    assert stored_and_built(CountVectorizer(vocabulary=words)).vocabulary == words


def test_the_order_of_steps_is_part_of_the_fingerprint():
    steps = [("a", StandardScaler()), ("b", PCA(2))]
    one, other = Pipeline(steps), Pipeline(steps[::-1])
    assert fingerprint(capture_preprocessor(one)) != fingerprint(capture_preprocessor(other))


def test_shared_arrays_and_estimators_stay_shared():
    scaler = StandardScaler().fit(ROWS)
    built = stored_and_built(Pipeline([("a", scaler), ("b", scaler)]))
    assert built.steps[0][1] is built.steps[1][1]


def test_an_estimator_of_the_programs_own_is_built_only_with_leave():
    made = Pipeline([("clip", Clip(-1.0)), ("half", FunctionTransformer(halved))]).fit(ROWS)
    with pytest.raises(NotAllowedError):
        stored_and_built(made)
    with pytest.raises(NotAllowedError):
        stored_and_built(made, only(Clip))
    built = stored_and_built(made, only(Clip, halved))
    assert np.array_equal(built.transform(ROWS), made.transform(ROWS))


def test_trees_of_raw_indices_need_leave():
    made = RandomTreesEmbedding(n_estimators=2, max_depth=2, random_state=0).fit(ROWS)
    with pytest.raises(NotAllowedError, match=r"Tree"):
        stored_and_built(made)
    built = stored_and_built(made, lambda name: Tree if name == "sklearn.tree._tree.Tree" else nobody(name))
    assert same_outputs(find_kind(made).encode(built, ROWS[0]), find_kind(made).encode(made, ROWS[0]))


def test_a_live_estimator_takes_a_saved_state_in_place_with_functions_that_it_has_itself():
    def make():
        return Pipeline([("scaler", StandardScaler()), ("half", FunctionTransformer(halved))])

    saved, live = make().fit(ROWS), make()
    kind = find_kind(live)
    kind.restore(live, kind.capture(saved))
    assert np.array_equal(live.transform(ROWS), saved.transform(ROWS))


def test_a_live_estimator_does_not_take_code_that_it_has_not():
    saved, live = Pipeline([("a", Clip())]), Pipeline([("a", StandardScaler())])
    kind = find_kind(live)
    with pytest.raises(StateMismatchError, match="Clip"):
        kind.restore(live, kind.capture(saved))
    assert isinstance(live.steps[0][1], StandardScaler)
    with pytest.raises(StateMismatchError, match="Pipeline"):
        kind.restore(StandardScaler(), kind.capture(saved))


def test_what_nobody_could_import_again_is_refused_when_it_is_captured():
    def local(rows):
        return rows

    for function in (local, lambda rows: rows):
        with pytest.raises(UnsupportedStateError, match="FunctionTransformer"):
            capture_preprocessor(FunctionTransformer(function))


def test_an_estimator_that_does_not_transform_says_that_it_needs_encode():
    model = LogisticRegression().fit(ROWS, ROWS[:, 0] > 0)
    with pytest.raises(UsageError, match="encode="):
        find_kind(model).encode(model, ROWS[0])


def test_a_sample_of_the_wrong_form_is_an_error_of_usage():
    made = StandardScaler().fit(ROWS)
    with pytest.raises(UsageError, match="cannot transform"):
        find_kind(made).encode(made, [1.0])


def test_without_skops_the_error_names_the_way_to_install_it(monkeypatch):
    made = StandardScaler().fit(ROWS)
    tree = capture_preprocessor(made)
    monkeypatch.setitem(sys.modules, "skops.io", None)
    with pytest.raises(UsageError, match="skops") as error:
        find_kind(made).build(tree["state"], nobody)
    assert "ckptmgr[sklearn]" in (error.value.next or "")
    with pytest.raises(UsageError, match="skops"):
        capture_preprocessor(made)
