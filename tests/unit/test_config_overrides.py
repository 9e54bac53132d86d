"""Overrides change, add and remove single keys, and a slip is an error that names what may be meant."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from ckptmgr.config.overrides import apply_overrides, override_tree
from ckptmgr.config.tree import join_key, plain, split_key
from ckptmgr.config.yaml_source import parse_config
from ckptmgr.errors import ConfigError

TEXT = """
seed: 1
name: null
optimizer: {_target_: torch.optim.SGD, lr: 0.1, momentum: 0.9, betas: [0.9, 0.99]}
trainer: {max_epochs: 3, devices: [0, 1]}
scheduler: null
data: {path: '???'}
callbacks: [{_target_: pkg.Early, patience: 1}, {_target_: pkg.Other}]
labels: {a.b: 1, 'c[0]': 2}
reference: ${optimizer}
"""


def overridden(*overrides: str) -> Any:
    return plain(apply_overrides(parse_config(TEXT, where="x"), overrides))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 0.001),
        ("optimizer[lr]=1", "optimizer.lr", 1),
        ("optimizer.lr= 5 ", "optimizer.lr", 5),
        ("seed=null", "seed", None),
        ("seed=", "seed", None),
        ("seed='1'", "seed", "1"),
        ("name=a=b", "name", "a=b"),
        ("name=on", "name", True),
        ("name='on'", "name", "on"),
        ("name=http://host:80/x?y=1#z", "name", "http://host:80/x?y=1#z"),
        ("name=${oc.env:HOME}/x", "name", "${oc.env:HOME}/x"),
        ("name='run #3'", "name", "run #3"),
        ("name=10min", "name", "10min"),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", [0.8, 0.9]),
        ("optimizer.betas.1=0.5", "optimizer.betas", [0.9, 0.5]),
        ("trainer.devices=auto", "trainer.devices", "auto"),
        ("trainer.devices=2", "trainer.devices", 2),
        ("callbacks.0.patience=3", "callbacks.0.patience", 3),
        ("callbacks[0][patience]=3", "callbacks.0.patience", 3),
        ("+callbacks.0.mode=min", "callbacks.0.mode", "min"),
        ("+callbacks.2={_target_: pkg.New}", "callbacks.2", {"_target_": "pkg.New"}),
        ("callbacks=[]", "callbacks", []),
        ("callbacks=null", "callbacks", None),
        ("optimizer=null", "optimizer", None),
        ("optimizer=${other}", "optimizer", "${other}"),
        ("optimizer._target_=torch.optim.Adam", "optimizer._target_", "torch.optim.Adam"),
        ("optimizer={lr: 5}", "optimizer.lr", 5),
        ("optimizer={lr: 5}", "optimizer.momentum", 0.9),
        (
            "optimizer={_target_: torch.optim.Adam, lr: 5, eps: 1}",
            "optimizer",
            {"_target_": "torch.optim.Adam", "lr": 5, "eps": 1},
        ),
        ("+new=1", "new", 1),
        ("+a.b.c=1", "a", {"b": {"c": 1}}),
        ("+scheduler._target_=pkg.S", "scheduler", {"_target_": "pkg.S"}),
        ("+scheduler={_target_: pkg.S}", "scheduler", {"_target_": "pkg.S"}),
        ("+data.path=x", "data.path", "x"),
        ("data.path=x", "data.path", "x"),
        (r"labels.a\.b=5", "labels", {"a.b": 5, "c[0]": 2}),
        (r"labels.c\[0\]=5", "labels", {"a.b": 1, "c[0]": 5}),
        (r"+a\=b=5", "a=b", 5),
    ],
)
def test_an_override_changes_or_adds_one_value(override: str, key: str, value: object) -> None:
    result = overridden(override)
    for part in [key] if key == "a=b" else split_key(key):
        result = result[int(part)] if isinstance(result, list) else result[part]
    assert repr(result) == repr(value)


def test_a_removed_key_is_gone() -> None:
    result = overridden("~optimizer.momentum", "~callbacks.0", "~seed")
    assert "momentum" not in result["optimizer"]
    assert "seed" not in result
    assert result["callbacks"] == [{"_target_": "pkg.Other"}]


def test_overrides_apply_from_left_to_right() -> None:
    assert overridden("+x={}", "+x.a=1", "x.a=2", "~x.a", "+x.a=3")["x"] == {"a": 3}


def test_the_given_configuration_stays_as_it_is() -> None:
    config = parse_config(TEXT, where="x")
    before = plain(config)
    new = apply_overrides(config, ["callbacks.0.patience=7", "+callbacks.0.x=[1]", "optimizer={lr: 3}", "~seed"])
    assert plain(config) == before
    assert OmegaConf.is_struct(new)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lrr=1", "the nearest is optimizer.lr"),
        ("optimizer.lrr=1", "write +optimizer.lrr=… to add a key"),
        ("optimiser.lr=1", "the nearest is optimizer"),
        ("optimiser.lr=1", "write optimizer.lr, or write +optimiser.lr=… to add a key"),
        ("lr=1", "the nearest is optimizer.lr"),
        ("optimizer.0=1", "the nearest is optimizer."),
        ("zzz=1", "the top holds seed, name, optimizer"),
        ("~optimizer.lrr", "the nearest is optimizer.lr"),
        ("optimizer={lrr: 1}", "there is no key optimizer.lrr"),
        ("+seed=3", "seed is there already"),
        ("+optimizer.lr=3", "write optimizer.lr=… without the plus"),
        ("+callbacks.0={}", "callbacks.0 is there already"),
        ("callbacks.2.x=1", "callbacks has 2 entries, and none at index 2"),
        ("callbacks.7=1", "it holds 0: pkg.Early, 1: pkg.Other"),
        ("+callbacks.5=1", "the next index is 2"),
        ("+callbacks.2.x=1", "none at index 2"),
        ("callbacks.-1=1", "'-1' is no index"),
        ("callbacks.patience=1", "'patience' is no index"),
        ("callbacks.²=1", "'²' is no index"),
        ("~callbacks.2", "none at index 2"),
        ("optimizer=sgd", "optimizer is a mapping, and this would replace it whole"),
        ("optimizer=[1]", "its keys are _target_, lr, momentum, betas"),
        ("callbacks=3", "callbacks is a list"),
        ("callbacks={a: 1}", "callbacks is a list"),
        ("seed.x=1", "seed has no keys: it is 1"),
        ("+seed.x=1", "seed has no keys: it is 1"),
        ("scheduler.gamma=1", "write +scheduler.…="),
        ("reference.lr=1", "override what it refers to"),
        ("optimizer.lr", "there is no `=` in it"),
        ("", "there is no `=` in it"),
        ("=", "the key cannot be read"),
        ("=1", "the key cannot be read"),
        ("+=1", "the key cannot be read"),
        ("~", "the key cannot be read"),
        ("a..b=1", "has an empty part"),
        (".a=1", "has an empty part"),
        ("a.=1", "has an empty part"),
        ("a[0=1", "a bracket that is not closed"),
        ("a[]=1", "has an empty part"),
        ("a[0]b=1", "goes on right behind a bracket"),
        ("++a=1", "`+key=value` adds a key"),
        ("--lr=1", "overrides have no dashes"),
        ("~seed=1", "a removal has no value"),
        ("includes=[a]", "includes are read before any override"),
        ("+includes.0=a", "includes are read before any override"),
        ("name=[1, 2", "not YAML"),
        ("name={a: 1", "not YAML"),
        ("name='a", "not YAML"),
        ("name=@x", "not YAML"),
        ("name=!!python/name:os.system", "the tag !!python/name:os.system"),
        ("name=!x", "the tag !x"),
        ("name=*x", "`*x` refers to an anchor"),
        ("name=&x", "`&x` sets an anchor"),
        ("name=#3", "YAML takes '#3' for a comment"),
        ("name=run #3", "YAML takes '#3' for a comment"),
        ("name=---", "`---` starts a document"),
        ("name=exp: 1", "this is a mapping in YAML"),
        ("name=- a", "this is a list in YAML"),
        ("name={a: 1, a: 2}", "is there twice"),
        ("name={1: 2}", "keys are text"),
        ("name=\udcff", "not UTF-8"),
        ("name=a\0", "binary"),
        ("name=" + "[" * 1000, "nested more than 50 deep"),
        ("+" + ".".join("a" * 200) + "=1", "nested more than 50 deep"),
        ("name=${x", "'name' is no interpolation"),
    ],
)
def test_a_slip_is_an_error_that_says_what_may_be_meant(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        overridden("seed=1", override)
    assert said in str(caught.value)
    assert caught.value.what.startswith(("override 2, ", "after the overrides: nested"))
    assert "\n" not in caught.value.what


def test_what_is_said_about_an_override_holds_no_secret() -> None:
    config = parse_config("wandb: {api_key: old-secret, url: 's3://me:old-secret@host'}", where="x")
    for override in ("wandb.my_api_key=new-secret", "wandb.api_key.x=1", "+wandb.api_key=new-secret", "+wandb.url=1"):
        with pytest.raises(ConfigError) as caught:
            apply_overrides(config, [override])
        assert "-secret" not in str(caught.value)


@pytest.mark.parametrize("path", [("a",), ("a", 0, "b"), ("a.b", "c[d]"), ("x=y", "\\"), ("a\\.b",)])
def test_a_key_that_is_joined_is_split_into_the_same_parts(path: tuple[str | int, ...]) -> None:
    assert split_key(join_key(path)) == [str(part) for part in path]


def test_every_key_can_be_changed_by_its_joined_name() -> None:
    tree = {"a.b": {"c=d": [1, {"e[0]": 2}]}}
    key = join_key(("a.b", "c=d", 1, "e[0]"))
    assert override_tree(tree, [f"{key}=5"]) == {"a.b": {"c=d": [1, {"e[0]": 5}]}}
