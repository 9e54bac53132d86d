"""Frames, series and indexes of pandas, as columns of plain arrays: no pickle, and no other file format."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptmgr.errors import StateMismatchError, UnsupportedStateError
from ckptmgr.preprocess.class_names import is_a
from ckptmgr.preprocess.encoded import cannot_encode
from ckptmgr.preprocess.kind import Allow
from ckptmgr.preprocess.reading import library, reading_state

__all__ = ["PandasKind"]

_PLAIN = (bool, int, float, str, bytes, type(None))


class PandasKind:
    """Statistics in tables, such as means by category.

    A column is ``{"dtype": name, "values": array or list}``, with ``"missing"``, an array of truth values, or with
    ``"categories"``, a column, and ``"ordered"``.
    The tree is ``{"type": "Index", "name", "column"}``, ``{"type": "Series", "name", "column", "index"}`` or
    ``{"type": "DataFrame", "columns": index, "data": [column, ...], "index": index}``; an index of several levels has
    ``"levels"``, a list of indexes, in place of a column, and a range has ``"range": [start, stop, step]``.
    """

    name = "pandas"
    version = 1
    changes_in_training = False

    def handles(self, value: object) -> bool:
        """Say whether it is a frame, a series or an index."""
        return not isinstance(value, type) and is_a(value, "pandas", "DataFrame", "Series", "Index")

    def capture(self, value: Any) -> dict[str, Any]:
        """Return the table as columns."""
        if is_a(value, "pandas", "DataFrame"):
            data = [_column(value.iloc[:, place].array, str(name)) for place, name in enumerate(value.columns)]
            return {"type": "DataFrame", "columns": _index(value.columns), "data": data, "index": _index(value.index)}
        if is_a(value, "pandas", "Series"):
            column = _column(value.array, str(value.name))
            return {"type": "Series", "name": _name(value.name), "column": column, "index": _index(value.index)}
        return _index(value)

    def build(self, tree: Any, allow: Allow) -> Any:
        """Make the table of its columns."""
        with reading_state(self.name):
            pandas = library("pandas")
            if tree["type"] == "Series":
                column, index = _array(pandas, tree["column"]), _built_index(pandas, tree["index"])
                return pandas.Series(column, index=index, name=tree["name"])
            if tree["type"] != "DataFrame":
                return _built_index(pandas, tree)
            index = _built_index(pandas, tree["index"])
            columns = _built_index(pandas, tree["columns"])
            arrays = {place: _array(pandas, column) for place, column in enumerate(tree["data"])}
            frame = pandas.DataFrame(arrays, index=index)
            if len(arrays) != len(columns) or any(len(array) != len(index) for array in arrays.values()):
                raise ValueError("the lengths of columns and index differ")
            frame.columns = columns
            return frame

    def is_restorable(self, value: Any) -> bool:
        """Say no: tables are replaced, not changed."""
        return False

    def restore(self, value: Any, tree: Any) -> None:
        """Refuse."""
        raise StateMismatchError(
            "a table of pandas cannot become another in place",
            next="use the preprocessor of the checkpoint: ckptmgr.load_inference(...).preprocessor",
        )

    def encode(self, value: Any, raw: Any) -> Any:
        """Refuse: a table does not say how it is used."""
        raise cannot_encode("a table of pandas", "it holds statistics, and no rule how they are applied")


def _name(name: Any) -> Any:
    if isinstance(name, np.generic):
        return name.item()
    if type(name) in _PLAIN:
        return name
    if type(name) is tuple:
        return tuple(_name(part) for part in name)
    raise _unstorable(f"the name {name!r}", f"it is a {type(name).__name__}")


def _index(index: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {"type": "Index", "name": _name(index.name)}
    if is_a(index, "pandas", "MultiIndex"):
        levels = [index.get_level_values(level) for level in range(index.nlevels)]
        # As columns, also where one is a range: the length of a range is not that of any data.
        tree["levels"] = [_named_column(level) for level in levels]
    elif is_a(index, "pandas", "RangeIndex"):
        tree["range"] = [index.start, index.stop, index.step]
    else:
        return _named_column(index)
    return tree


def _named_column(index: Any) -> dict[str, Any]:
    return {"type": "Index", "name": _name(index.name), "column": _column(index.array, f"index {index.name}")}


def _built_index(pandas: Any, tree: Any) -> Any:
    if tree["type"] != "Index":
        raise ValueError(f"{tree['type']!r} is no index")
    if "levels" in tree:
        levels = [pandas.Index(_array(pandas, level["column"]), name=level["name"]) for level in tree["levels"]]
        return pandas.MultiIndex.from_arrays(levels, names=[level.name for level in levels])
    if "range" in tree:
        return pandas.RangeIndex(*tree["range"], name=tree["name"])
    return pandas.Index(_array(pandas, tree["column"]), name=tree["name"])


def _column(array: Any, where: str) -> dict[str, Any]:
    dtype = array.dtype
    if is_a(dtype, "pandas", "NumpyEADtype"):
        dtype = dtype.numpy_dtype
    tree: dict[str, Any] = {"dtype": _dtype_name(dtype)}
    if is_a(dtype, "pandas", "CategoricalDtype"):
        tree["values"] = np.array(array.codes)
        tree["categories"] = _column(array.categories.array, where)
        tree["ordered"] = bool(array.ordered)
    elif is_a(dtype, "pandas", "DatetimeTZDtype") or dtype.kind in "mM":
        tree["values"] = np.array(array.asi8)
    elif is_a(dtype, "pandas", "BaseMaskedDtype"):
        missing = np.array(array.isna(), dtype=bool)
        tree["values"] = array.to_numpy(dtype=dtype.numpy_dtype, na_value=dtype.numpy_dtype.type(0))
        tree["missing"] = missing
    elif is_a(dtype, "pandas", "StringDtype"):
        tree["values"] = [
            None if is_missing else str(text) for text, is_missing in zip(array, array.isna(), strict=True)
        ]
    elif isinstance(dtype, np.dtype) and dtype.kind in "biufc":
        tree["values"] = array.to_numpy(copy=True)
    elif isinstance(dtype, np.dtype) and dtype.hasobject:
        tree["values"] = [_plain(item, where) for item in array]
    else:
        raise _unstorable(f"the column {where!r}", f"its dtype is {dtype}")
    return tree


def _dtype_name(dtype: Any) -> str:
    if is_a(dtype, "pandas", "CategoricalDtype"):
        return "category"
    if is_a(dtype, "pandas", "StringDtype"):
        # What the texts are held in is a matter of what is installed.
        return "str" if str(dtype) == "str" else "string"
    return str(dtype)


def _array(pandas: Any, tree: Any) -> Any:
    name, values = tree["dtype"], tree["values"]
    if not isinstance(name, str) or not isinstance(values, (list, np.ndarray)):
        raise ValueError("a column has no dtype or no values")
    if name == "category":
        categories = pandas.Index(_array(pandas, tree["categories"]))
        return pandas.Categorical.from_codes(values, categories=categories, ordered=bool(tree["ordered"]))
    if name == "object":
        array = np.empty(len(values), dtype=object)
        array[:] = [_plain(item, "object") for item in values]
        return array
    if name.startswith(("datetime64[", "timedelta64[")):
        unit = name[name.index("[") + 1 :].rstrip("]").partition(",")[0]
        kind = "M8" if name.startswith("datetime") else "m8"
        moments = pandas.array(np.asarray(values, dtype=np.int64).view(f"{kind}[{unit}]"))
        _, _, zone = name.rstrip("]").partition(", ")
        return moments.tz_localize("UTC").tz_convert(zone) if zone else moments
    if "missing" in tree:
        array = pandas.array(np.asarray(values), dtype=name)
        array[np.asarray(tree["missing"], dtype=bool)] = pandas.NA
        return array
    return pandas.array(values, dtype=name) if isinstance(values, list) else np.array(values, dtype=np.dtype(name))


def _plain(item: Any, where: str) -> Any:
    if isinstance(item, np.generic):
        item = item.item()
    if type(item) not in _PLAIN:
        raise _unstorable(f"the column {where!r}", f"it holds a {type(item).__name__}")
    return item


def _unstorable(what: str, why: str) -> UnsupportedStateError:
    return UnsupportedStateError(
        f"{what} of the table cannot be stored",
        why=why,
        next="convert it to numbers, texts or categories first",
    )
