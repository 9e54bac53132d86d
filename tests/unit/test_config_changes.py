"""Configurations are compared leaf by leaf."""

from __future__ import annotations

import pytest

from ckptmgr.config.changes import ABSENT, Change, changes_between
from ckptmgr.config.yaml_source import parse_config


def changes(old: str, new: str) -> list[tuple[str, object, object]]:
    found = changes_between(parse_config(old, where="old"), parse_config(new, where="new"))
    return [(change.key, change.old, change.new) for change in found]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("a: 1", "a: 1", []),
        ("a: .nan", "a: .nan", []),
        ("a: {b: 1, c: 2}", "a: {c: 2, b: 1}", []),
        ("a: 1", "a: 1.0", [("a", 1, 1.0)]),
        ("a: 1", "a: true", [("a", 1, True)]),
        ("a: '1'", "a: 1", [("a", "1", 1)]),
        ("a: null", "{}", [("a", None, ABSENT)]),
        ("a: {b: {c: 1}}", "a: {b: {c: 2}}", [("a.b.c", 1, 2)]),
        ("a: {b: {c: 1}}", "a: {}", [("a.b", {"c": 1}, ABSENT)]),
        ("{}", "a: {b: {c: 1}}", [("a", ABSENT, {"b": {"c": 1}})]),
        ("{}", "a: {}", [("a", ABSENT, {})]),
        ("a: [1, 2, 3]", "a: [1, 5]", [("a.1", 2, 5), ("a.2", 3, ABSENT)]),
        ("a: [1]", "a: [1, {b: 2}]", [("a.1", ABSENT, {"b": 2})]),
        ("a: [1]", "a: {b: 1}", [("a", [1], {"b": 1})]),
        ("a: {b: 1}", "a: null", [("a", {"b": 1}, None)]),
        ("a: ${b}\nb: 1", "a: ${c}\nb: 1", [("a", "${b}", "${c}")]),
        ("a: ???", "a: 1", [("a", "???", 1)]),
        ("a.b: 1", "a.b: 2", [("a\\.b", 1, 2)]),
        ("a: 1\nb: 2", "c: 3\nb: 4", [("a", 1, ABSENT), ("b", 2, 4), ("c", ABSENT, 3)]),
    ],
)
def test_each_leaf_that_differs_is_named(old: str, new: str, expected: list[tuple[str, object, object]]) -> None:
    assert repr(changes(old, new)) == repr(expected)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (Change("optimizer.lr", 0.1, 0.01), "optimizer.lr: 0.1 -> 0.01"),
        (Change("a", None, "null"), "a: null -> 'null'"),
        (Change("a", "a...", ["b", {"c": 1}]), "a: a... -> [b, {c: 1}]"),
        (Change("a", ABSENT, {"b": 1}), "a: added, {b: 1}"),
        (Change("a", 1e-05, ABSENT), "a: removed, was 1.0e-05"),
        (Change("wandb.api_key", "[redacted]", "abcdefgh"), "wandb.api_key: [redacted] -> [redacted]"),
        (Change("wandb.api_key", "${oc.env:A}", "${oc.env:B}"), "wandb.api_key: ${oc.env:A} -> ${oc.env:B}"),
        (Change("url", "s3://a:b@c/d", "s3://c/d"), "url: s3://[redacted]@c/d -> s3://c/d"),
        (Change("wandb", ABSENT, {"api_key": "abcdefgh"}), "wandb: added, {api_key: [redacted]}"),
    ],
)
def test_a_change_is_one_line_without_secrets(change: Change, text: str) -> None:
    assert str(change) == text


def test_both_values_are_told_apart_and_without_secrets() -> None:
    assert Change("a", ABSENT, None).texts == (None, "null")
    assert Change("a", 0.1, ABSENT).texts == ("0.1", None)
    assert Change("wandb.api_key", "abcdefgh", "hgfedcba").texts == ("[redacted]", "[redacted]")


def test_a_long_value_is_cut() -> None:
    assert len(str(Change("a", "x" * 1000, list(range(1000))))) < 140
