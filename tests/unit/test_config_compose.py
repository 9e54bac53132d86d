"""A file, what it includes, and the overrides make one configuration."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptmgr.config.compose import compose
from ckptmgr.config.tree import plain
from ckptmgr.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


def test_later_includes_override_earlier_ones_and_the_file_overrides_all(folder: Path) -> None:
    write("a.yaml", "x: a\ny: a\nz: a\nonly_a: {k: 1}\nlist: [1, 2, 3]")
    write("b.yaml", "y: b\nz: b\nonly_a: {m: 2}\nlist: [4]")
    write("main.yaml", "includes: [a.yaml, b.yaml]\nz: main")
    composition = compose("main.yaml")
    tree = plain(composition.config)
    assert tree == {"x": "a", "y": "b", "z": "main", "only_a": {"k": 1, "m": 2}, "list": [4]}
    assert composition.files == ("a.yaml", "b.yaml", "main.yaml")
    assert composition.notes == ()


def test_includes_are_relative_to_the_file_that_names_them(folder: Path) -> None:
    write("top/main.yaml", "includes: [../shared/one.yaml]")
    write("shared/one.yaml", "includes: [deeper/two.yaml]\na: 1")
    write("shared/deeper/two.yaml", "b: 2")
    assert plain(compose(Path("top/main.yaml")).config) == {"a": 1, "b": 2}


def test_a_single_include_needs_no_list_and_the_same_file_may_come_by_two_ways(folder: Path) -> None:
    write("base.yaml", "a: 1\nb: 1")
    write("left.yaml", "includes: base.yaml\na: 2")
    write("right.yaml", "includes: base.yaml\nc: 3")
    write("main.yaml", "includes: [left.yaml, right.yaml]")
    assert plain(compose("main.yaml").config) == {"a": 1, "b": 1, "c": 3}


@pytest.mark.parametrize(
    ("above", "expected"),
    [
        ("{_target_: Adam, lr: 2}", {"_target_": "Adam", "lr": 2}),
        ("{_target_: SGD, lr: 2}", {"_target_": "SGD", "lr": 2, "momentum": 0.9}),
        ("{lr: 2}", {"_target_": "SGD", "lr": 2, "momentum": 0.9}),
        ("null", None),
    ],
)
def test_another_class_replaces_the_object_whole(folder: Path, above: str, expected: object) -> None:
    write("base.yaml", "optimizer: {_target_: SGD, lr: 1, momentum: 0.9}")
    write("main.yaml", f"includes: [base.yaml]\noptimizer: {above}")
    assert plain(compose("main.yaml").config) == {"optimizer": expected}


def test_interpolations_stay_as_text_and_may_refer_across_files(folder: Path) -> None:
    write("base.yaml", "lr: 1")
    write("main.yaml", "includes: [base.yaml]\nopt: {lr: '${lr}', home: '${oc.env:NOT_SET_ANYWHERE}'}")
    assert plain(compose("main.yaml").config)["opt"] == {"lr": "${lr}", "home": "${oc.env:NOT_SET_ANYWHERE}"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"main.yaml": "includes: [main.yaml]"}, "includes go in a circle: main.yaml -> main.yaml"),
        (
            {"main.yaml": "includes: [a.yaml]", "a.yaml": "includes: [b.yaml]", "b.yaml": "includes: [./a.yaml]"},
            "includes go in a circle: a.yaml -> b.yaml -> a.yaml",
        ),
        (
            {"main.yaml": "includes: [a.yaml]", "a.yaml": "includes: [nope.yaml]"},
            "nope.yaml (included by a.yaml <- main.yaml): there is no such file",
        ),
        ({"main.yaml": "includes: [a.yaml]", "a.yaml": "- 1"}, "a.yaml (included by main.yaml): a configuration is a"),
        ({"main.yaml": "includes: [a.yaml]", "a.yaml": "x: [1"}, "a.yaml (included by main.yaml), line 2"),
        ({"main.yaml": "includes: {a: 1}"}, "includes is no list of paths"),
        ({"main.yaml": "includes: [1]"}, "includes is no list of paths"),
        ({"main.yaml": "includes: [[a]]"}, "includes is no list of paths"),
        ({"main.yaml": "includes: ['']"}, "includes is no list of paths"),
        ({"main.yaml": "includes: ['${oc.env:HOME}/a.yaml']"}, "has an interpolation"),
        ({"main.yaml": "includes: ['.']"}, "this is a directory"),
        ({"main.yaml": 'includes: ["a\\0b"]'}, "the path cannot be read"),
        ({"main.yaml": f"includes: [{'x' * 5000}]"}, "cannot be read"),
        ({"main.yaml": "a: ${b"}, "'a' is no interpolation"),
        ({"main.yaml": "defaults: [_self_, model: net]\nmodel: {}"}, "a source of Hydra"),
    ],
)
def test_an_include_that_cannot_be_read_names_the_chain(folder: Path, files: dict[str, str], said: str) -> None:
    for name, text in files.items():
        write(name, text)
    with pytest.raises(ConfigError) as caught:
        compose("main.yaml")
    assert said in caught.value.what
    assert "\n" not in caught.value.what
    assert caught.value.next


def test_a_circle_through_a_symbolic_link_is_found(folder: Path) -> None:
    write("main.yaml", "includes: [other.yaml]")
    Path("other.yaml").symlink_to("main.yaml")
    with pytest.raises(ConfigError, match="includes go in a circle"):
        compose("main.yaml")
    Path("loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(ConfigError):
        compose("loop.yaml")


def test_files_that_include_each_other_twofold_end_early(folder: Path) -> None:
    for number in range(30):
        write(f"{number}.yaml", f"includes: [{number + 1}.yaml, {number + 1}.yaml]")
    write("30.yaml", "a: 1")
    with pytest.raises(ConfigError, match="more than 100 includes"):
        compose("0.yaml")


def test_a_long_chain_of_includes_ends_early(folder: Path) -> None:
    for number in range(300):
        write(f"{number}.yaml", f"includes: [{number + 1}.yaml]")
    with pytest.raises(ConfigError, match="more than 100 includes"):
        compose("0.yaml")


@pytest.mark.parametrize("name", ["nope.yaml", ".", "", "a\0b", "x" * 5000, "\udcff"])
def test_a_path_that_is_no_file_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(name)
    assert caught.value.next


def test_what_is_no_regular_file_is_refused_without_reading_it(folder: Path) -> None:
    os.mkfifo("pipe.yaml")
    for name in ("pipe.yaml", "/dev/zero"):
        with pytest.raises(ConfigError, match="no regular file"):
            compose(name)


def test_a_directory_with_a_configuration_in_it_is_told_apart(folder: Path) -> None:
    write("lightning_logs/version_0/config.yaml", "seed_everything: 1")
    with pytest.raises(ConfigError) as caught:
        compose("lightning_logs/version_0")
    assert caught.value.next == "give the file: lightning_logs/version_0/config.yaml"


def test_includes_that_grow_too_large_together_are_refused(folder: Path) -> None:
    for name in "abc":
        write(f"{name}.yaml", f"{name}: [{', '.join('1' * 4000)}]")
    write("main.yaml", "includes: [a.yaml, b.yaml, c.yaml]")
    with pytest.raises(ConfigError, match="more than 10,000 values"):
        compose("main.yaml")
