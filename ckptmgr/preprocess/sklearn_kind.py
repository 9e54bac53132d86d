"""scikit-learn's estimators and pipelines: stored by skops, never by pickle."""

from __future__ import annotations

import sys
from typing import Any

from ckptmgr.errors import CorruptCheckpointError, StateMismatchError, UnsupportedStateError, UsageError
from ckptmgr.preprocess.class_names import class_name, is_a, root_packages
from ckptmgr.preprocess.encoded import batch_of_one, cannot_encode
from ckptmgr.preprocess.kind import Allow
from ckptmgr.preprocess.reading import library, reading_state
from ckptmgr.preprocess.reviewed import is_same_class
from ckptmgr.preprocess.skops_file import canonical_skops, check_skops, loaders_of
from ckptmgr.preprocess.stored_files import checked_file
from ckptmgr.state.stored_file import StoredFile

__all__ = ["SklearnKind"]

_FILE = "preprocessor.skops"
_EXTRA = "ckptmgr[sklearn]"
_SCORES = "sklearn.feature_selection._univariate_selection"
# What skops does not trust by itself and was reviewed here, with the loader in which it is harmless: plain values, and
# functions of numbers, which a loader of functions only looks up.
_REVIEWED = {
    "builtins.frozenset": "ConstructorFromReduceNode",
    "numpy.dtype": "DTypeNode",
    **{f"numpy.{name}": "FunctionNode" for name in ("max", "mean", "median", "min", "sum")},
    **{
        f"{_SCORES}.{name}": "FunctionNode"
        for name in ("chi2", "f_classif", "f_oneway", "f_regression", "r_regression")
    },
    "sklearn.feature_selection._mutual_info.mutual_info_classif": "FunctionNode",
    "sklearn.feature_selection._mutual_info.mutual_info_regression": "FunctionNode",
}


class SklearnKind:
    """Estimators, fitted or not.

    The tree is ``{"class": name, "file": StoredFile("preprocessor.skops")}``. skops knows which classes it can trust;
    every other class or function in the file needs the caller's leave.
    """

    name = "sklearn"
    version = 1
    changes_in_training = False

    def handles(self, value: object) -> bool:
        """Say whether it is an estimator, of scikit-learn or derived from one."""
        return not isinstance(value, type) and is_a(value, "sklearn", "BaseEstimator")

    def capture(self, value: Any) -> dict[str, Any]:
        """Return the estimator as a skops file that is the same in every process.

        Raises:
            UnsupportedStateError: skops does not know a part, or nobody could find a function in it again.
        """
        dumped = _dumped(value)
        for name in library("skops.io", extra=_EXTRA).get_untrusted_types(data=dumped):
            if not _is_found(name):
                raise UnsupportedStateError(
                    f"the {class_name(value)} cannot be stored",
                    why=f"it holds {name}, which nobody could import again: a lambda, or local to a function",
                    next="write it at the top of a module",
                )
        return {"class": class_name(value), "file": StoredFile(_FILE, canonical_skops(dumped))}

    def build(self, tree: Any, allow: Allow) -> Any:
        """Load the file, with classes that skops trusts or the caller allows."""
        with reading_state(self.name):
            content = checked_file(tree["file"], name=_FILE).content
            check_skops(content)
            skops = library("skops.io", extra=_EXTRA)
            untrusted, loaders = skops.get_untrusted_types(data=content), loaders_of(content)
            for name in untrusted:
                if loaders.get(name) != {_REVIEWED.get(name)}:
                    allow(name)
            value = skops.loads(content, trusted=untrusted)
            if class_name(value) != tree["class"]:
                raise CorruptCheckpointError(
                    f"the preprocessor of the checkpoint is a {class_name(value)}, recorded as a {tree['class']}",
                    next="the checkpoint was altered; do not load it",
                )
            return value

    def is_restorable(self, value: Any) -> bool:
        """Say yes: an estimator is its attributes."""
        return True

    def restore(self, value: Any, tree: Any) -> None:
        """Give the live estimator the attributes of the saved one.

        Raises:
            StateMismatchError: The saved one is of another class, or has classes in it that the live one has not.
        """
        if not is_same_class(value, tree["class"]):
            raise StateMismatchError(
                f"the preprocessor of the checkpoint is a {tree['class']}, the live one a {class_name(value)}",
                next="build the estimator as in the run that saved",
            )
        # What the live estimator holds, the program itself has imported.
        own = set(library("skops.io", extra=_EXTRA).get_untrusted_types(data=_dumped(value)))

        def allow(name: str) -> None:
            if name not in own:
                raise StateMismatchError(
                    f"the preprocessor of the checkpoint holds a {name}, the live one does not",
                    why="nothing is imported because a checkpoint names it",
                    next="build the estimator as in the run that saved",
                )

        saved = self.build(tree, allow)
        vars(value).clear()
        vars(value).update(vars(saved))

    def encode(self, value: Any, raw: Any) -> Any:
        """Transform one sample; returns a float32 tensor of one row. A dict is a row by column name."""
        transform = getattr(value, "transform", None)
        if transform is None:
            raise cannot_encode(f"a {type(value).__name__}", "it has no transform()")
        if isinstance(raw, dict) and hasattr(value, "feature_names_in_"):
            raw = library("pandas").DataFrame([raw])
        is_table = "pandas" in root_packages(raw) and hasattr(raw, "columns")
        try:
            return batch_of_one(transform(raw if is_table else [raw]))
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"the {type(value).__name__} cannot transform the sample",
                why=f"{type(error).__name__}: {error}",
                next="pass one sample as it was in training: a row of numbers, a text, or a dict by column name",
            ) from error


def _is_found(name: str) -> bool:
    """Say whether a name leads somewhere in the modules that are imported; skops keeps no qualified names."""
    parts = name.split(".")
    for place in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:place]))
        if found is not None:
            for part in parts[place:]:
                found = getattr(found, part, None)
            return found is not None
    return False


def _dumped(value: Any) -> bytes:
    skops = library("skops.io", extra=_EXTRA)
    try:
        return bytes(skops.dumps(value))
    except Exception as error:
        raise UnsupportedStateError(
            f"the {class_name(value)} cannot be stored",
            why=f"skops: {str(error)[:300]}; a checkpoint holds no pickled objects",
            next="leave out what skops does not know (a lambda, an open file), or write a module-level function",
        ) from error
