"""A stored configuration builds the same experiment, and holds no secret."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from omegaconf import OmegaConf

from ckptmgr.config.overrides import apply_overrides
from ckptmgr.config.stored import config_to_store, refuse_redacted
from ckptmgr.config.tree import plain
from ckptmgr.config.yaml_source import parse_config, parse_tree
from ckptmgr.errors import ConfigError

SECRET = "s3cr3t-s3cr3t"
GITHUB = "ghp_" + "a1B2" * 9


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("DB_PASSWORD", "1234")
    monkeypatch.setenv("INNOCENT", "innocent")
    monkeypatch.setenv("NOT_UTF8", "a\udcff")
    OmegaConf.register_resolver("vault", lambda name: SECRET)
    OmegaConf.register_resolver("thing", lambda: object)
    yield
    OmegaConf.clear_resolver("vault")
    OmegaConf.clear_resolver("thing")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("api_key: abc", "api_key"),
        ("wandb: {api_key: abc}", "wandb.api_key"),
        ("password: 123456", "password"),
        ("password: [a, b]", "password.0"),
        ("credentials: {user: me}", "credentials.user"),
        (f"x: {GITHUB}", "x"),
        (f"x: [1, clone https://{GITHUB}@github.com/a]", "x.1"),
        ("x: s3://id:pass@bucket/a", "x"),
        ("x: https://h/a?X-Amz-Signature=abc", "x"),
        (f"x: a {SECRET} b", "x"),
        ("x: --password=hunter2", "x"),
        ("x: ${oc.env:NO_SUCH_API_KEY,abc}", "x"),
        (f"x: ${{oc.env:NOPE,{GITHUB}}}", "x"),
        ("password: abc${oc.env:INNOCENT}", "password"),
        ("password: ${oc.env:INNOCENT,abc}", "password"),
        ("password: ${oc.select:nothing,abc}", "password"),
        ("'a.b': {api_key: x}", r"a\.b.api_key"),
        (f"{GITHUB}: 1\nx: 2", "[redacted]"),
    ],
)
def test_a_literal_secret_is_taken_out_and_named(text: str, key: str) -> None:
    stored = config_to_store(parse_config(text, where="x"))
    if key == "[redacted]":
        assert GITHUB not in stored.config + stored.resolved
    else:
        assert key in stored.redacted
    for secret in ("abc", "123456", "hunter2", GITHUB, SECRET, "id:pass", "user: me"):
        assert secret not in stored.config + stored.resolved
    with pytest.raises(ConfigError) as caught:
        refuse_redacted(parse_config(stored.config, where="x"), where="run 7")
    assert "run 7" in caught.value.what


@pytest.mark.parametrize(
    "text",
    [
        "x: ${oc.env:WANDB_API_KEY}",
        "api_key: ${oc.env:WANDB_API_KEY}",
        "api_key: ${oc.env:WANDB_API_KEY,null}",
        "api_key: ${keys.wandb}\nkeys: {wandb: '${oc.env:WANDB_API_KEY}'}",
        "url: https://me:${oc.env:DB_PASSWORD}@host/",
        "args: --password=${oc.env:DB_PASSWORD}",
        "password: null",
        "password: ''",
        "password: ???",
        "password: true",
        "use_secret: {_target_: pkg.Secret}",
        "pad_token: <pad>",
        "max_tokens: 5000",
        "sort_key: lr",
        "password_file: /etc/x",
        "tokenizer: {name: gpt2}",
        "forward_pass: 2",
        "url: https://host/a?b=c",
        "lr: 1e-3\nseed: 123456789",
    ],
)
def test_what_is_no_literal_secret_stays(text: str) -> None:
    config = parse_config(text, where="x")
    stored = config_to_store(config)
    assert stored.redacted == ()
    assert parse_tree(stored.config, where="x") == plain(config)
    refuse_redacted(parse_config(stored.config, where="x"), where="x")


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:WANDB_API_KEY}",
        "${oc.env:DB_PASSWORD}",
        "${oc.env:'DB_PASSWORD'}",
        "${ oc.env : DB_PASSWORD }",
        "${oc.env:DB_PASSWORD,null}",
        "${oc.decode:${oc.env:DB_PASSWORD}}",
        "${oc.env:NOPE,${oc.env:DB_PASSWORD}}",
        "${oc.env:DB_${kind}}",
        "pre ${key} post",
        "${key}",
        "${vault:x}",
        "https://me:${oc.env:DB_PASSWORD}@host/",
    ],
)
def test_what_comes_out_of_secret_variables_is_not_in_the_resolved_text(value: str) -> None:
    text = f'kind: PASSWORD\nkey: ${{oc.env:DB_PASSWORD}}\nother: "{value}"\nlist: ["{value}"]\nlr: ${{num}}\nnum: 0.5'
    stored = config_to_store(parse_config(text, where="x"))
    assert "1234" not in stored.resolved
    assert SECRET not in stored.resolved
    assert "lr: 0.5" in stored.resolved
    assert stored.redacted == ()


def test_an_innocent_variable_is_in_the_resolved_text_unless_its_key_is_secret() -> None:
    stored = config_to_store(parse_config("a: ${oc.env:INNOCENT}\napi_key: ${oc.env:INNOCENT}", where="x"))
    assert parse_tree(stored.resolved, where="x") == {"a": "innocent", "api_key": "[redacted]"}
    assert "${oc.env:INNOCENT}" in stored.config


def test_the_environment_to_search_can_be_given() -> None:
    config = parse_config("a: other-secret", where="x")
    assert config_to_store(config).redacted == ()
    assert config_to_store(config, {"SOME_TOKEN": "other-secret"}).redacted == ("a",)


def test_what_cannot_be_resolved_stays_as_text() -> None:
    text = "a: ${nope}\nb: ${oc.env:NOPE}\nc: ${d}\nd: ${c}\ne: ???\nf: ${foo:1}\ng: 1\nh: ${g}\ni: ${e}"
    stored = config_to_store(parse_config(text, where="x"))
    expected = parse_tree(text, where="x") | {"h": 1}
    assert parse_tree(stored.resolved, where="x") == expected
    assert parse_tree(stored.config, where="x") == parse_tree(text, where="x")


def test_whatever_a_resolver_returns_can_be_stored() -> None:
    stored = config_to_store(parse_config("a: ${thing:}\nb: ${oc.env:NOT_UTF8}", where="x"))
    assert parse_tree(stored.resolved, where="x") == {"a": "<class 'object'>", "b": "a\\udcff"}


def test_a_secret_that_is_given_again_lets_the_configuration_pass() -> None:
    stored = config_to_store(parse_config("wandb: {api_key: abc}\nlist: [{token: abc}]", where="x"))
    config = parse_config(stored.config, where="x")
    with pytest.raises(ConfigError, match=r"wandb\.api_key, list\.0\.token must be given again") as caught:
        refuse_redacted(config, where="x")
    assert "wandb.api_key=…" in str(caught.value.next)
    refuse_redacted(apply_overrides(config, ["wandb.api_key=a", "list.0.token=b"]), where="x")


def test_storing_twice_changes_nothing_and_still_names_the_keys() -> None:
    once = config_to_store(parse_config("api_key: abc\nx: ${oc.env:INNOCENT}", where="x"))
    twice = config_to_store(parse_config(once.config, where="x"))
    assert twice == once
