"""YAML is read strictly, and scalars mean what they mean to OmegaConf."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from ckptmgr.config.tree import plain
from ckptmgr.config.yaml_source import MAX_NBYTES, dump_flow, dump_tree, parse_config, parse_tree, parse_value
from ckptmgr.errors import ConfigError

SCALARS = [
    "1e-3",
    "1e5",
    "-1e-5",
    ".5",
    "1.",
    "1.e3",
    "1_000",
    "010",
    "0x1F",
    "+1",
    "1:30",
    "12:30:45",
    "0:30:00",
    "on",
    "off",
    "yes",
    "no",
    "y",
    "n",
    "Yes",
    "ON",
    "true",
    "True",
    "~",
    "null",
    "Null",
    "nan",
    ".nan",
    ".inf",
    "-.inf",
    "inf",
    "2020-01-01",
    "2020-01-01T10:00:00",
    "1e",
    "1e+",
    "e5",
    "'1'",
    '"on"',
    "10min",
    "1.2.3",
    "../a",
    "a=b",
    "${b}",
    "x${b}",
]


@pytest.mark.parametrize("text", SCALARS)
def test_a_scalar_means_what_it_means_to_omegaconf(text: str) -> None:
    theirs = OmegaConf.to_container(OmegaConf.create(f"a: {text}\nb: 1"), resolve=False)
    assert isinstance(theirs, dict)
    ours = parse_tree(f"a: {text}\nb: 1", where="x")
    assert repr(ours) == repr(theirs)
    if not text.startswith("'"):
        assert repr(parse_value(text, where="x")) == repr(theirs["a"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "line 2, column 1: the key 'a' is there twice"),
        ("a: {b: 1, 'b': 2}", "the key 'b' is there twice"),
        ("a: !!python/object/apply:os.system [ls]", "the tag !!python/object/apply:os.system"),
        ("a: !!python/name:os.system", "the tag !!python/name:os.system"),
        ("a: !!binary aGVsbG8=", "the tag !!binary"),
        ("a: !!set {b, c}", "the tag !!set"),
        ("a: !!omap [b: 1]", "the tag !!omap"),
        ("a: !mine 1", "the tag !mine"),
        ("a: 1\n---\nb: 2", "several documents"),
        ("- 1\n- 2", "this is a list"),
        ("just text", "this is text"),
        ("3", "this is a number"),
        ("on: 1", "`on` is a boolean to YAML, and keys are text"),
        ("a: {1: x}", "`1` is a number to YAML"),
        ("null: 1", "`null` is null to YAML"),
        ("? [a, b]\n: 1", "this key is a list"),
        ("'': 1", "a key is empty"),
        ("a:\n\tb: 1", "not YAML"),
        ("a: [1, 2", "not YAML"),
        ("a: b: c", "not YAML"),
        ("a: @x", "not YAML"),
        ("a: *nowhere", "not YAML"),
        ("a: !!int x", "'x' cannot be read"),
        ("a: " + "1" * 5000, "cannot be read"),
        ("a: ${b", "'a' is no interpolation"),
        ("a: {b: ['${}']}", "'a.b[0]' is no interpolation"),
        ("a: \\???", "cannot be in a configuration"),
        ("a: '" + "${b}" * 300 + "'", "too many interpolations"),
        ("a: '" + "${" * 5_000 + "'", "too many interpolations"),
        ("<<: 3", "`<<` merges mappings"),
        ("<!DOCTYPE html><html>not found</html>", "this is HTML"),
        (b"PK\x03\x04\x00\x00\x80\x02", "this is binary data"),
        (b"a: 1\0", "this is binary data"),
        ("a: caf\xe9".encode("latin-1"), "not UTF-8"),
        ("a: 1".encode("utf-16"), "UTF-16"),
        ("a: \x07", "not YAML"),
        ("a: \udcff", "not UTF-8"),
        ("a: " + "x" * MAX_NBYTES, "a configuration has at most 1,048,576"),
        ("a: " + "[" * 100_000, "nested more than 50 deep"),
        ("a: " + "{b: " * 60 + "1" + "}" * 60, "nested more than 50 deep"),
        ("a: &a [*a]", "an alias that holds itself"),
        ("a: &a {<<: *a}", "an alias that holds itself"),
        ("x: [" + "1, " * 20_000 + "]", "more than 10,000 values"),
    ],
)
def test_what_is_no_configuration_is_refused_in_one_line(text: str | bytes, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, where="x.yaml")
    assert said in caught.value.what
    assert caught.value.what.startswith("x.yaml")
    assert "\n" not in caught.value.what
    assert caught.value.next


def test_an_alias_bomb_stops_early() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    with pytest.raises(ConfigError, match="once every alias is expanded"):
        parse_config(bomb, where="x")
    text = "t: &t " + "x" * 500_000 + "\nall: [" + ", ".join(["*t"] * 50) + "]"
    with pytest.raises(ConfigError, match="once every alias is expanded"):
        parse_config(text, where="x")


def test_nesting_that_overflows_the_stack_of_a_parser_in_c_is_refused() -> None:
    code = """if True:
        from ckptmgr.config.yaml_source import parse_config
        from ckptmgr.errors import ConfigError
        for text in ("[" * 1_000_000, "{a: " * 200_000, "- " * 500_000, "? " * 500_000):
            try:
                parse_config(text, where="x")
            except ConfigError:
                continue
            raise SystemExit("read")
        """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_aliases_and_merged_mappings_are_expanded() -> None:
    text = "base: &b {lr: 1, x: 2}\nmore: &m {y: 3, lr: 9}\na: {<<: [*b, *m], x: 5}\nc: *b"
    assert parse_tree(text, where="x") == {
        "base": {"lr": 1, "x": 2},
        "more": {"y": 3, "lr": 9},
        "a": {"lr": 1, "x": 5, "y": 3},
        "c": {"lr": 1, "x": 2},
    }


@pytest.mark.parametrize("text", ["", "# nothing\n", b"\xef\xbb\xbf", "---\n", "null"])
def test_nothing_is_an_empty_configuration(text: str | bytes) -> None:
    assert plain(parse_config(text, where="x")) == {}


def test_a_byte_order_mark_of_utf8_is_no_part_of_the_first_key() -> None:
    assert parse_tree(b"\xef\xbb\xbfa: \xc3\xa9", where="x") == {"a": "é"}


def test_a_configuration_is_in_struct_mode_and_unresolved() -> None:
    config = parse_config("a: ${oc.env:NOT_SET_ANYWHERE}\nb: ???", where="x")
    assert OmegaConf.is_struct(config)
    assert plain(config) == {"a": "${oc.env:NOT_SET_ANYWHERE}", "b": "???"}


@pytest.mark.parametrize(
    "value",
    [
        "1e-3",
        "on",
        "1",
        "null",
        "~",
        "",
        " x ",
        "a: b",
        "#x",
        "x #y",
        "[a]",
        "${a.b}",
        "2020-01-01",
        "=",
        "<<",
        "...",
        "a...",
        "-",
        "- a",
        "&a",
        "*a",
        "!a",
        "@a",
        "\x85",
        "\u2028x",
        "a\nb\n",
        "\ttab",
        "é😀",
        "\x00\x07",
        1e-5,
        1e22,
        math.inf,
        0.1,
        -0.0,
        10**30,
        True,
        None,
        [],
        {},
        [[]],
        [{}],
        {"a": []},
    ],
)
def test_what_is_written_is_read_as_the_same(value: object) -> None:
    assert repr(parse_tree(dump_tree({"a": value}), where="x")) == repr({"a": value})
    assert repr(parse_tree(f"a: {dump_flow(value)}", where="x")) == repr({"a": value})
    assert "\n" not in dump_flow(value)


@pytest.mark.parametrize("text", ["key: 1e-3\nother: '1e-3'\nthird: 1:30\nfourth: '1:30'\n"])
def test_what_is_written_is_read_by_omegaconf_as_the_same(text: str) -> None:
    tree = parse_tree(text, where="x")
    assert OmegaConf.to_container(OmegaConf.create(dump_tree(tree))) == tree


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("trainer:\n\tmax_epochs: 1\n", "indent with spaces"),
        ("model: {lr: ${optimizer.lr}}\n", "put ${…} in quotes"),
        ("model: {lr: 1\nseed: [\n", "in quotes if it is meant as text"),
    ],
)
def test_what_is_not_yaml_gets_a_hint_that_helps(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tree(text, where="a.yaml")
    assert hint in str(caught.value.next)
