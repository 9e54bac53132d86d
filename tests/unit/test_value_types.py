"""Values of a configuration against annotations: refused only where the annotation is definite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from ckptmgr.errors import ConfigError
from ckptmgr.instantiate.targets import Target
from ckptmgr.instantiate.value_types import check_types


class Thing:
    def __init__(
        self,
        count: int = 1,
        rate: float = 0.1,
        name: str = "a",
        flag: bool = False,
        limit: Optional[int] = None,  # noqa: UP045
        mode: Literal["min", "max"] | None = None,
        steps: int | float | None = None,
        path: str | Path = "",
        rich: Sequence[int] | int = 1,
        anything: Any = None,
        bare=None,
        sloppy: [int] = 1,
    ) -> None: ...


class Unknown:
    def __init__(self, count: NotImported) -> None: ...  # noqa: F821


@pytest.mark.parametrize(
    "given",
    [
        {"count": 3},
        {"rate": 3},
        {"rate": 1e-3},
        {"limit": None},
        {"mode": "max"},
        {"steps": 0.5},
        {"path": "x"},
        {"rich": "looked at by nobody"},
        {"anything": "x"},
        {"bare": "x"},
        {"sloppy": "x"},
        {"unknown": "x"},
        {"count": {"_target_": "built.Later"}},
        {"count": [1]},
    ],
)
def test_what_may_fit_is_let_through(given: dict[str, object]) -> None:
    check_types(Thing, Target("thing", "pkg.Thing"), given)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"count": "many"}, "an int"),
        ({"count": 1.5}, "an int"),
        ({"count": True}, "an int"),
        ({"rate": "fast"}, "a float"),
        ({"name": 3}, "a str"),
        ({"flag": 1}, "a bool"),
        ({"limit": "all"}, "an int or null"),
        ({"mode": "median"}, "'min' or 'max' or null"),
        ({"steps": "all"}, "an int or a float or null"),
    ],
)
def test_what_cannot_fit_is_refused_by_its_key(given: dict[str, object], wanted: str) -> None:
    (name,) = given
    with pytest.raises(ConfigError) as caught:
        check_types(Thing, Target("model.thing", "pkg.Thing"), given)
    assert f"model.thing.{name}" in str(caught.value)
    assert wanted in str(caught.value)


def test_annotations_that_cannot_be_read_refuse_nothing() -> None:
    check_types(Unknown, Target("", "pkg.Unknown"), {"count": "x"})
    check_types(int, Target("", "builtins.int"), {"x": "x"})
