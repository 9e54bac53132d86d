"""Interpolations are resolved all at once, and what cannot be is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ckptmgr.config.references import unused_keys
from ckptmgr.config.resolving import resolve
from ckptmgr.config.yaml_source import parse_config
from ckptmgr.errors import ConfigError


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("A_NUMBER", "5")
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    OmegaConf.register_resolver("twice", lambda value: 2 * value)
    OmegaConf.register_resolver("a_path", lambda: Path("x"))
    OmegaConf.register_resolver("a_dict", lambda: {"k": [1, 6]})
    OmegaConf.register_resolver("broken", lambda: 1 / 0)
    yield
    for name in ("twice", "a_path", "a_dict", "broken"):
        OmegaConf.clear_resolver(name)


def resolved(text: str) -> dict[str, Any]:
    return resolve(parse_config(text, where="x"), where="x")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("a: ${b}\nb: 1e-3", "a", 0.001),
        ("a: ${b.c}\nb: {c: ${d}}\nd: [1, 2]".replace("{c: ${d}}", "{c: '${d}'}"), "a", [1, 2]),
        ("a: ${b}\nb: {c: '${.d}', d: 1}", "a", {"c": 1, "d": 1}),
        ("a: {c: '${..b}'}\nb: 1", "a", {"c": 1}),
        ("a: x-${b}-${b}\nb: 1", "a", "x-1-1"),
        ("a: ${oc.env:A_NUMBER}", "a", "5"),
        ("a: ${oc.decode:${oc.env:A_NUMBER}}", "a", 5),
        ("a: ${oc.env:NOT_SET_ANYWHERE,7}", "a", "7"),
        ("a: ${oc.env:NOT_SET_ANYWHERE,null}", "a", None),
        ("a: ${b.${c}}\nb: {x: 1}\nc: x", "a", 1),
        ("a: ${l.1}\nl: [1, 2]", "a", 2),
        ("a: ${l[1]}\nl: [1, 2]", "a", 2),
        ("a: ['${b}', {c: '${b}'}]\nb: 1", "a", [1, {"c": 1}]),
        ("a: ${twice:3}", "a", 6),
        ("a: ${a_dict:}", "a", {"k": [1, 6]}),
        ("a: ${a_path:}", "a", Path("x")),
        ("a: ${oc.dict.values:b}\nb: {x: 1, y: '${c}'}\nc: 2", "a", [1, 2]),
        ("a: ${oc.create:${b}}\nb: {x: '${c}'}\nc: 2", "a", {"x": 2}),
        ("a: \\${b}", "a", "${b}"),
        ("a: ${b}\nb: null", "a", None),
        ("a: .nan", "a", float("nan")),
    ],
)
def test_an_interpolation_becomes_what_it_refers_to(text: str, key: str, value: object) -> None:
    result = resolved(text)[key]
    assert repr(result) == repr(value)
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "what", "said"),
    [
        ("a: {b: '???'}\nc: ???", "no value is given for a.b, c", "a.b=…"),
        ("model: {_target_: '???'}", "no value is given for model._target_", "which class to build"),
        ("a: ${oc.env:NOT_SET_ANYWHERE}", "a cannot", "the environment variable NOT_SET_ANYWHERE is not set"),
        ("a: ${b}\nb: ${c.0}\nc: ['x${oc.env:NOT_SET_ANYWHERE}']", "c.0 cannot", "NOT_SET_ANYWHERE is not set"),
        ("a: ${optimzer.lr}\noptimizer: {lr: 1}", "a cannot", "refer to optimizer.lr"),
        ("a: ${x.y}\nx: 1", "a cannot", "`x` is not a container"),
        ("a: ${nothing.like.it}", "a cannot", "keys are written from the top"),
        ("a: ${foo:1}", "a cannot", "nobody has registered a resolver 'foo'"),
        ("a: ${b}\nb: ${hydra:runtime.cwd}", "b cannot", "nobody has registered a resolver 'hydra'"),
        ("a: ${b}\nb: ${a}", "a cannot", "it refers to itself: a -> b -> a"),
        ("a: ${a}", "a cannot", "it refers to itself: a -> a"),
        ("a: ${b}\nb: {c: '${a}'}", "a cannot", "it refers to itself: a -> b.c -> a"),
        ("b: {c: '${b}'}", "b.c cannot", "it refers to itself: b.c -> b.c"),
        ("a: ${.b}\nb: ${.a}", "a cannot", "it refers to itself"),
        ("a: ${b.${a}}\nb: {}", "a cannot", "it refers to itself"),
        ("a: ${...b}\nb: 1", "a cannot", "correct the reference"),
        ("a: ${broken:}", "a cannot", "ZeroDivisionError"),
        ("a: ${oc.env:A,b,c}", "a cannot", "positional arguments"),
        ("a: ${oc.decode:'[1,'}", "a cannot", "GrammarParseError"),
    ],
)
def test_what_cannot_be_resolved_is_named_with_the_reason(text: str, what: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(text)
    assert what in caught.value.what
    assert said in str(caught.value)
    assert "\n" not in caught.value.what
    assert caught.value.next


@pytest.mark.parametrize(
    "text",
    [
        "k0: x\n" + "".join(f"k{i}: ${{k{i - 1}}}${{k{i - 1}}}\n" for i in range(1, 40)),
        "k0: [1, 2]\n" + "".join(f"k{i}: ['${{k{i - 1}}}', '${{k{i - 1}}}']\n" for i in range(1, 40)),
        "k0: x\n" + "".join(f"k{i}: ${{k{i - 1}}}\n" for i in range(1, 3000)),
    ],
    ids=["text", "lists", "chain"],
)
def test_interpolations_that_expand_without_end_are_refused_early(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be resolved"):
        resolved(text)


def test_the_configuration_stays_as_it_is() -> None:
    config = parse_config("a: ${b}\nb: 1", where="x")
    resolve(config, where="x")
    assert OmegaConf.to_container(config) == {"a": "${b}", "b": 1}


@pytest.mark.parametrize(
    ("text", "unused"),
    [
        ("model: {w: 1}", []),
        ("model: {w: 1}\nwidth: 1", ["width"]),
        ("model: {w: '${width}'}\nwidth: 1", []),
        ("model: {w: '${sizes.0}'}\nsizes: [1]", []),
        ("model: {w: '${sizes[0]}'}\nsizes: [1]", []),
        ("model: {w: '${[sizes][0]}'}\nsizes: [1]", []),
        ("model: {w: 'x ${..width} y'}\nwidth: 1", []),
        ("model: {w: '${.width}'}\nwidth: 1", ["width"]),
        ("model: ['${.1}', '${..width}']\nwidth: 1", []),
        ("model: {w: '${sizes.${size}}'}\nsizes: {s: 1}\nsize: s\nother: 1", ["other"]),
        ("model: {w: '${${which}.w}'}\nwhich: big\nbig: {w: 1}", []),
        ("model: {w: '${oc.select:width,3}'}\nwidth: 1\nother: 1", ["other"]),
        ("model: {w: '${oc.env:width}'}\nwidth: 1", ["width"]),
        ('model: {w: \'${f:"${width}","}"}\'}\nwidth: 1', []),
        ("model: {w: '\\${width}'}\nwidth: 1", ["width"]),
        ("width: {a: 1, b: '${width.a}', c: '${.a}'}", ["width"]),
        ("optimzer: {lr: '${lr}'}\nlr: 1", ["optimzer"]),
    ],
)
def test_a_key_that_nobody_reads_is_found(text: str, unused: list[str]) -> None:
    assert unused_keys(parse_config(text, where="x"), ["model"]) == unused
