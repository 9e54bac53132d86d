"""What a name stands for: imported from where it is allowed, and nothing that other packages own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from target_samples import install_package, of, refusal
from torch import nn

from ckptmgr.errors import (
    CkptmgrError,
    NotAllowedError,
)
from ckptmgr.format.layout import RUN_MARKER
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.instantiate.build import build, load_target
from ckptmgr.instantiate.targets import Target


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from install_package(tmp_path, monkeypatch)


@pytest.fixture
def allow(package: Path) -> AllowList:
    return AllowList.gather(cwd=package.parent)


@pytest.mark.parametrize(
    "name",
    ["my_pkg.Net", "my_pkg.models.Net", "my_pkg.Hidden", "my_pkg.net", "my_pkg.net.Other", "my_pkg.models.Net.Block"],
)
def test_a_class_is_found_under_each_of_its_names(allow: AllowList, name: str) -> None:
    assert isinstance(load_target(Target("model", name), allow), type)


def test_a_module_that_is_held_under_another_name_of_the_package_leads_on(package: Path) -> None:
    (package / "__init__.py").write_text("from my_pkg import models as zoo\nfrom torch import nn\n")
    allow = AllowList.gather(cwd=package.parent)
    assert load_target(Target("model", "my_pkg.zoo.Net"), allow).__name__ == "Net"
    assert load_target(Target("model", "my_pkg.nn.Linear"), allow) is nn.Linear


def test_what_another_allowed_package_gave_is_allowed(package: Path) -> None:
    (package / "__init__.py").write_text("from torch.utils.data import DataLoader\nfrom ckptmgr import KeepLast\n")
    allow = AllowList.gather(cwd=package.parent)
    assert load_target(Target("x", "my_pkg.DataLoader"), allow) is torch.utils.data.DataLoader
    assert build({"_target_": "my_pkg.KeepLast", "_args_": [3]}, key="x", allow=allow).k == 3


def test_what_a_package_took_from_elsewhere_is_not_its_own(package: Path) -> None:
    (package / "__init__.py").write_text("from subprocess import Popen\nfrom torch.nn.init import constant_\n")
    allow = AllowList.gather(cwd=package.parent)
    with pytest.raises(NotAllowedError, match=r"it is subprocess\.Popen, defined elsewhere"):
        load_target(Target("x", "my_pkg.Popen"), allow)
    with pytest.raises(NotAllowedError, match=r"'my_pkg.constant_' is not allowed"):
        load_target(Target("x", "my_pkg.constant_"), allow)


def test_a_class_from_elsewhere_is_not_allowed_by_what_it_inherits(package: Path) -> None:
    elsewhere = package.parent / "their_pkg.py"
    elsewhere.write_text("from my_pkg.models import Net\nclass Heir(Net): pass\n")
    (package / "zoo.py").write_text("import their_pkg\nfrom their_pkg import Heir\n")
    allow = AllowList.gather(cwd=package.parent)
    with pytest.raises(NotAllowedError, match=r"'my_pkg.zoo.Heir.large' is not allowed"):
        load_target(Target("x", "my_pkg.zoo.Heir.large"), allow)
    del sys.modules["their_pkg"]


def test_a_name_is_checked_however_it_is_loaded(allow: AllowList) -> None:
    with pytest.raises(NotAllowedError, match=r"nothing was imported"):
        load_target(Target("x", "not_there.Net"), allow)


def test_declared_functions_may_be_called_and_others_not(allow: AllowList) -> None:
    assert build(of("make", hidden=4), key="model", allow=allow).named["hidden"] == 4
    assert build(of("Net.large"), key="model", allow=allow).named["hidden"] == 100
    assert build(of("cached"), key="model", allow=allow).named["hidden"] == 5
    for name in ("undeclared", "Net.small"):
        with pytest.raises(NotAllowedError, match=r"not declared") as caught:
            build(of(name), key="model", allow=allow)
        assert "@ckptmgr.factory" in (caught.value.next or "")


def test_an_exact_name_allows_a_function(package: Path) -> None:
    allow = AllowList.gather(cwd=package.parent, extra=["my_pkg.models.undeclared", "my_pkg.models.Net.small"])
    assert build(of("undeclared"), key="model", allow=allow).named["hidden"] == 1
    assert build(of("Net.small"), key="model", allow=allow).named["hidden"] == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_pkg.models", "is a module"),
        ("my_pkg.models.made", "an object of type list"),
        ("my_pkg.models.prepared", "is a functools.partial"),
        ("my_pkg.models.made.append", "of type list, and a name leads"),
        ("my_pkg.models.sys.path", "which nobody has allowed"),
        ("my_pkg.models.Open", "is abstract"),
    ],
)
def test_what_cannot_be_built_with_says_what_it_is(allow: AllowList, name: str, says: str) -> None:
    with pytest.raises(CkptmgrError) as caught:
        build({"_target_": name}, key="model", allow=allow)
    assert says in str(caught.value)
    assert caught.value.what.startswith("model: ")


def test_a_module_that_is_not_there_says_where_it_was_sought(allow: AllowList) -> None:
    error = refusal({"_target_": "my_pkg.modles.Net"}, allow)
    assert error.what == "model: there is no 'modles' in the module my_pkg"
    assert error.next == "did you mean my_pkg.models?"
    error = refusal({"_target_": "my_pkg.models.Nett"}, allow)
    assert (error.why or "").startswith("its classes are Base, First, Forwards, Heir, ")
    assert error.next == "did you mean my_pkg.models.Net?"


def test_a_package_that_is_not_there_says_so(package: Path) -> None:
    allow = AllowList.gather(cwd=package.parent, extra=["my_pgk.*"])
    error = refusal({"_target_": "my_pgk.models.Net"}, allow)
    assert error.what == "model: 'my_pgk.models.Net' is not importable"
    assert str(package.parent) in (error.why or "")
    assert "did you mean my_pkg?" in (error.next or "")


@pytest.mark.parametrize(
    ("text", "why", "advice"),
    [
        (
            "import not_there\n",
            "ModuleNotFoundError: No module named 'not_there' (my_pkg/broken.py, line 1)",
            "install",
        ),
        ("from my_pkg.models import Nett\n", "ImportError: cannot import name 'Nett'", "correct it"),
        ("x = 1\nclass (\n", "SyntaxError: invalid syntax (my_pkg/broken.py, line 2)", "correct the file"),
        ("x = 1\ny = z\n", "NameError: name 'z' is not defined (my_pkg/broken.py, line 2)", "correct it"),
        ("import sys\nsys.exit(4)\n", "ends the process when it is imported (exit code 4)", "__main__"),
        ("x = '\\ud800'.encode()\n", "UnicodeEncodeError", "correct it"),
    ],
)
def test_a_module_that_fails_says_what_failed_and_where(
    package: Path, allow: AllowList, text: str, why: str, advice: str
) -> None:
    (package / "broken.py").write_text(text)
    error = refusal({"_target_": "my_pkg.broken.Net"}, allow)
    assert error.what == "model: importing my_pkg.broken failed"
    assert why in (error.why or "")
    assert advice in (error.next or "")
    assert error.__cause__ is not None


def test_an_interrupt_while_importing_is_an_interrupt(package: Path, allow: AllowList) -> None:
    (package / "broken.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        build({"_target_": "my_pkg.broken.Net"}, key="model", allow=allow)


def test_an_error_of_ckptmgr_while_importing_stays_what_it_is(package: Path, allow: AllowList) -> None:
    (package / "broken.py").write_text("import ckptmgr\nckptmgr.allow_targets('*')\n")
    with pytest.raises(CkptmgrError, match=r"^allow_targets"):
        build({"_target_": "my_pkg.broken.Net"}, key="model", allow=allow)


def test_code_in_a_run_directory_is_not_imported(package: Path, allow: AllowList, tmp_path: Path) -> None:
    (tmp_path / RUN_MARKER).write_text("{}")
    with pytest.raises(NotAllowedError, match=r"lies in the run directory"):
        build(of("Net", 1), key="model", allow=allow)
    assert "my_pkg" not in sys.modules


def test_a_package_that_is_put_together_from_a_run_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "one"
    (run / "spread_pkg").mkdir(parents=True)
    (run / RUN_MARKER).write_text("{}")
    (run / "spread_pkg" / "net.py").write_text("class Net: pass\n")
    monkeypatch.syspath_prepend(run)
    allow = AllowList.gather(cwd=tmp_path, extra=["spread_pkg.*"])
    with pytest.raises(NotAllowedError, match=r"lies in the run directory"):
        build({"_target_": "spread_pkg.net.Net"}, key="model", allow=allow)
    assert "spread_pkg" not in sys.modules
