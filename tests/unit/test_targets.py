"""Every ``_target_`` of a configuration is found and checked, wherever it hides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptmgr.errors import ConfigError, NotAllowedError
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.instantiate.targets import Target, check_targets, find_targets


@pytest.fixture
def allow(tmp_path: Path) -> AllowList:
    (tmp_path / "pyproject.toml").write_text("")
    return AllowList.gather(cwd=tmp_path, extra=["my_pkg.*"])


def test_targets_are_found_in_order_and_at_every_depth() -> None:
    tree = {
        "model": {"_target_": "a.A", "inner": {"_target_": "a.B", "_args_": [1, {"_target_": "a.C"}]}},
        "callbacks": [{"_target_": "a.D", "options": {"deep": [[{"_target_": "a.E"}]]}}, None],
        "lr": 0.1,
        "name": "_target_",
    }
    assert find_targets(tree) == [
        Target("model", "a.A"),
        Target("model.inner", "a.B"),
        Target("model.inner._args_.1", "a.C"),
        Target("callbacks.0", "a.D"),
        Target("callbacks.0.options.deep.0.0", "a.E"),
    ]


def test_keys_start_where_the_caller_says() -> None:
    assert find_targets({"_target_": "a.A"}) == [Target("", "a.A")]
    assert find_targets([{"_target_": "a.A"}], "callbacks") == [Target("callbacks.0", "a.A")]


def test_a_part_that_is_shared_is_found_at_each_place() -> None:
    shared = {"_target_": "a.A"}
    assert [target.key for target in find_targets({"x": shared, "y": [shared]})] == ["x", "y.0"]


@pytest.mark.parametrize("name", [None, 3, True, ["a.A"], {"a": 1}, b"a.A", type("Text", (str,), {})("a.A")])
def test_a_target_that_is_no_text_is_an_error(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.inner: _target_ is not a name"):
        find_targets({"inner": {"_target_": name}}, "optimizer")


def test_a_tree_that_contains_itself_is_too_deep() -> None:
    tree: dict[str, Any] = {}
    tree["again"] = tree
    with pytest.raises(ConfigError, match=r"too deep") as caught:
        find_targets(tree)
    assert "aliases" in str(caught.value)
    assert len(caught.value.what) < 300


def test_aliases_of_aliases_are_too_large() -> None:
    tree: list[Any] = ["x"]
    for _ in range(20):
        tree = [tree] * 10
    with pytest.raises(ConfigError, match=r"too large"):
        find_targets(tree)


def test_what_is_allowed_passes(allow: AllowList) -> None:
    check_targets([Target("model", "my_pkg.Net"), Target("optimizer", "torch.optim.SGD")], allow)


def test_a_denied_name_says_where_it_stands_and_what_would_allow_it(allow: AllowList, tmp_path: Path) -> None:
    with pytest.raises(NotAllowedError) as caught:
        check_targets([Target("model", "my_pkg.Net"), Target("data.train", "their_pkg.data.Set")], allow)
    assert caught.value.what == "data.train: 'their_pkg.data.Set' is not allowed"
    assert "nothing was imported" in (caught.value.why or "")
    for way in (
        f'allow = ["their_pkg.*"] under [tool.ckptmgr] in {tmp_path / "pyproject.toml"}',
        "--allow 'their_pkg.*'",
        'ckptmgr.allow_targets("their_pkg.*")',
    ):
        assert way in (caught.value.next or "")
    assert caught.value.exit_code == 2


def test_all_denied_names_are_told_at_once(allow: AllowList) -> None:
    targets = [Target(f"callbacks.{number}", f"pkg{number}.Thing") for number in range(9)]
    with pytest.raises(NotAllowedError) as caught:
        check_targets(targets, allow)
    assert "'pkg0.Thing'" in caught.value.what
    assert "'pkg5.Thing' at callbacks.5, and 3 more" in (caught.value.why or "")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("os.system", "Python's own"),
        ("os.system", "write a class of your own"),
        ("torch.utils.data.dataloader.DataLoader", "did you mean torch.utils.data.DataLoader?"),
        ("lightning.pytorch.callbacks.EarlyStoping", "did you mean lightning.pytorch.callbacks.EarlyStopping?"),
        (
            "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
            "did you mean lightning.pytorch.callbacks.EarlySt",
        ),
        ("lightning.pytorch.loggers.WandbLogger", "with your credentials"),
        ("lightning.pytorch.loggers.WandbLogger", "--allow 'lightning.pytorch.loggers.WandbLogger'"),
        ("torch.load", "--allow 'torch.load'"),
        ("my_pkg._private.Net", "private names"),
        ("my_pkg._private.Net", "--allow 'my_pkg._private.Net'"),
        ("Net", "package.module.Class"),
        ("EarlyStopping", "did you mean lightning.pytorch.callbacks.EarlyStopping?"),
        ("my_pkg.models:Net", "did you mean my_pkg.models.Net?"),
        ("my_pkg.models.Net() ", "did you mean my_pkg.models.Net?"),
        ("my_pkg.\u200bNet", "\\u200b"),
        ("my_pkg.Net\n", "no Python name"),
    ],
)
def test_a_denied_name_gets_advice_of_its_own(allow: AllowList, name: str, says: str) -> None:
    with pytest.raises(NotAllowedError) as caught:
        check_targets([Target("model", name)], allow)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3
