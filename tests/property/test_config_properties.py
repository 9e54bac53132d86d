"""What holds for every configuration and every override."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptmgr.config.changes import ABSENT, changes_between
from ckptmgr.config.compose import compose
from ckptmgr.config.overrides import apply_overrides
from ckptmgr.config.references import unused_keys
from ckptmgr.config.resolving import resolve
from ckptmgr.config.stored import config_to_store
from ckptmgr.config.tree import Path as Place
from ckptmgr.config.tree import freeze, is_same, join_key, leaves, plain, split_key
from ckptmgr.config.yaml_source import dump_flow, dump_tree, parse_config
from ckptmgr.errors import ConfigError

# OmegaConf loads its grammar with the first example, and machines are busy.
unhurried = settings(deadline=None, max_examples=50)
letters = st.characters(blacklist_categories=("Cs",))
# Neither an interpolation nor a value that is missing: those are the unit tests'.
texts = st.text(letters, max_size=12).filter(lambda text: "$" not in text and not text.endswith("???"))
keys = st.one_of(st.text("ab.[]=\\ 1é", min_size=1, max_size=4), texts.filter(bool)).filter(
    lambda key: key != "includes"
)
scalars = st.one_of(
    texts,
    st.sampled_from(
        ["1e-3", "on", "null", "1:30", "0x1F", "2020-01-01", "{a: 1}", "#", "- a", "*a", "&a", "!a", "..."]
    ),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.booleans(),
    st.none(),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
trees = st.dictionaries(keys, values, max_size=4)
interpolated = st.recursive(
    st.sampled_from(
        ["${a}", "${b.c}", "${.c}", "${..a}", "${oc.env:HOME}", "${oc.env:NOPE,x}", "${a.${b}}", "x${l.0}y"]
    )
    | st.sampled_from(["\\${a}", "???", 1, "t", "${nope:1}", "${oc.select:a}", "${oc.dict.keys:b}", "${l}", "${b}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcl"), inner, max_size=3),
    max_leaves=8,
)


def is_equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(is_equal(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(is_equal(*pair) for pair in zip(left, right, strict=True))
    return is_same(left, right)


@unhurried
@given(trees)
def test_what_is_written_and_read_again_is_the_same(tree: dict[str, Any]) -> None:
    config = freeze(tree, where="x")
    assert is_equal(plain(config), tree)
    again = parse_config(dump_tree(tree), where="x")
    assert is_equal(plain(again), tree)
    assert changes_between(config, again) == []


@unhurried
@given(trees)
def test_a_file_that_is_composed_and_stored_is_the_same(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.yaml")
        file.write_bytes(dump_tree(tree).encode())
        composition = compose(file)
    if composition.notes:
        return
    stored = config_to_store(composition.config, {})
    if not stored.redacted:
        assert is_equal(plain(parse_config(stored.config, where="x")), tree)
        assert stored.resolved == stored.config


@unhurried
@given(values)
def test_a_value_that_is_typed_as_it_is_shown_is_the_same(value: Any) -> None:
    new = apply_overrides(freeze({"a": None}, where="x"), [f"a={dump_flow(value)}"])
    assert is_equal(plain(new)["a"], value)


@unhurried
@given(st.lists(keys, min_size=1, max_size=4))
def test_a_joined_key_is_split_into_its_parts(parts: list[str]) -> None:
    assert split_key(join_key(tuple(parts))) == parts


@unhurried
@given(trees, st.data())
def test_exactly_the_leaves_that_are_overridden_have_changed(tree: dict[str, Any], data: st.DataObject) -> None:
    config = freeze(tree, where="x")
    places = [(place, value) for place, value in leaves(tree) if not isinstance(value, (dict, list))]
    chosen = data.draw(
        st.lists(st.sampled_from(places), unique_by=lambda each: each[0], max_size=3) if places else st.just([])
    )
    overrides, expected = [], {}
    for place, old in chosen:
        new = data.draw(scalars)
        overrides.append(f"{join_key(place)}={dump_flow(new)}")
        if not is_same(old, new):
            expected[join_key(place)] = (old, new)
    changes = changes_between(config, apply_overrides(config, overrides))
    assert {change.key for change in changes} == set(expected)
    for change in changes:
        old, new = expected[change.key]
        assert is_same(change.old, old)
        assert is_same(change.new, new)
    assert is_equal(plain(config), tree)


@unhurried
@given(trees, keys, values)
def test_what_is_added_and_removed_again_leaves_nothing_behind(tree: dict[str, Any], key: str, value: Any) -> None:
    if key in tree or (isinstance(value, str) and "$" in value):
        return
    config, name = freeze(tree, where="x"), join_key((key,))
    added = apply_overrides(config, [f"+{name}={dump_flow(value)}"])
    [change] = changes_between(config, added)
    assert (change.key, change.old) == (name, ABSENT)
    assert changes_between(config, apply_overrides(added, [f"~{name}"])) == []


@unhurried
@given(trees, trees)
def test_there_are_changes_exactly_between_what_differs(old: dict[str, Any], new: dict[str, Any]) -> None:
    there = changes_between(freeze(old, where="x"), freeze(new, where="x"))
    back = changes_between(freeze(new, where="x"), freeze(old, where="x"))
    assert {change.key for change in there} == {change.key for change in back}
    assert all("\n" not in str(change) for change in there)


@unhurried
@given(st.dictionaries(st.sampled_from("abcl"), interpolated, max_size=4))
@example({"a": "${b}", "b": {"c": "${a}"}})
@example({"a": "${b}", "b": ["${a}"]})
@example({"l": ["${l}"]})
def test_interpolations_are_resolved_or_refused_and_can_always_be_stored(tree: dict[str, Any]) -> None:
    config = freeze(tree, where="x")
    stored = config_to_store(config)
    assert is_equal(plain(parse_config(stored.config, where="x")), tree)
    parse_config(stored.resolved, where="x")
    assert set(unused_keys(config, [])) <= set(tree)
    try:
        resolved = resolve(config, where="x")
    except ConfigError:
        pass
    else:
        assert not [
            place for place, value in leaves(resolved) if isinstance(value, str) and _is_open(tree, place, value)
        ]


def _is_open(tree: dict[str, Any], place: Place, value: str) -> bool:
    # An escaped interpolation is text, also where it is referred to.
    return "${" in value and "\\${" not in str(tree)


@unhurried
@given(st.binary(max_size=200) | st.text("{}[]:,-?&*!|>'\"%@`#<= \n\tab1~.$\\", max_size=60).map(str.encode))
@example(b"? ")
@example(b"- - - -")
@example(b"&a *a")
@example(b"a: !<tag:yaml.org,2002:merge> 1")
def test_whatever_is_in_a_file_is_read_or_refused(content: bytes) -> None:
    try:
        config = parse_config(content, where="x")
    except ConfigError:
        return
    stored = config_to_store(config, {})
    if not stored.redacted:
        assert is_equal(plain(parse_config(stored.config, where="x")), plain(config))


@unhurried
@given(st.lists(st.text("+~=.[]\\{}:'\"-&*!#$ ab01", max_size=20), max_size=3))
def test_whatever_is_typed_as_an_override_is_applied_or_refused(overrides: list[str]) -> None:
    config = parse_config("a: {a: 1, b: [0, {a: 1}]}\nb: [1, 2]\n'0': x", where="x")
    try:
        new = apply_overrides(config, overrides)
    except ConfigError:
        return
    assert is_equal(plain(parse_config(dump_tree(plain(new)), where="x")), plain(new))
