"""Secrets stay out of what is stored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.launch.redact import REDACTED, is_secret_name, redact_argv, redact_text, redact_url

ENVIRON = {
    "WANDB_API_KEY": "0123456789abcdef0123",
    "HOME": "/home/ada-lovelace",
    "DB_PASSWORD": "short",
    "PWD": "/home/ada",
}


@pytest.mark.parametrize(
    "argv",
    [
        ["--api-key=SECRET-1"],
        ["--token", "SECRET-1"],
        ["--hf_token", "SECRET-1"],
        ["-token", "SECRET-1"],
        ["password=SECRET-1"],
        ["+trainer.logger.apiKey=SECRET-1"],
        ["++db.password='SECRET-1 with spaces'"],
        ["AWS_SECRET_ACCESS_KEY=SECRET-1"],
        ["--set", "model.secret: SECRET-1"],
        ['{"lr": 0.1, "api_key": "SECRET-1"}'],
        ["--header", "Authorization: Bearer SECRET-1abc"],
        ["s3://user:SECRET-1@bucket/data"],
        ["https://SECRET-1@example.org/model"],
        ["--data=https://example.org/x?token=SECRET-1&epoch=3"],
        ["https://example.org/x#access_token=SECRET-1"],
        ["https://a.blob.core.windows.net/c?sv=2024&sig=SECRET-1%3D"],
        ["-----BEGIN RSA PRIVATE KEY-----\nSECRET-1\n-----END RSA PRIVATE KEY-----"],
    ],
)
def test_a_secret_by_name_or_place_does_not_survive(argv: list[str]) -> None:
    redacted = redact_argv(["train.py", *argv, "--lr", "0.1"], {})
    assert redacted.is_redacted
    assert "SECRET-1" not in " ".join(redacted.argv)
    assert redacted.argv[0] == "train.py"
    assert redacted.argv[-2:] == ("--lr", "0.1")


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "aBcDeFgHiJ" * 3,
        "ghp_" + "aBcDeFgHiJ" * 3,
        "github_pat_" + "aBcDeFgHiJ" * 3,
        "AKIA" + "ABCDEFGH" * 2,
        "sk-" + "proj-a1B2c3D4e5F6g7H8",
        "xoxb-" + "123456789012-abcdef",
        "AIza" + "a1B2c3D4e5" * 4,
        "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    ],
)
def test_a_token_of_a_known_shape_does_not_survive_anywhere(token: str) -> None:
    for argument in (token, f"--x={token}", f"model/{token}/y", f"a={token},b=2"):
        redacted = redact_argv([argument], {})
        assert redacted.is_redacted
        assert token not in redacted.argv[0]


def test_a_value_equal_to_a_secret_variable_does_not_survive() -> None:
    redacted = redact_argv(["--login", "0123456789abcdef0123", "--x=a0123456789abcdef0123b"], ENVIRON)
    assert redacted.argv == ("--login", REDACTED, f"--x=a{REDACTED}b")


def test_short_and_innocent_variables_take_nothing_away() -> None:
    argv = ["--note", "a short story", "--root", "/home/ada-lovelace", "/home/ada/data"]
    redacted = redact_argv(argv, ENVIRON)
    assert list(redacted.argv) == argv
    assert not redacted.is_redacted


@pytest.mark.parametrize(
    "argv",
    [
        ["--max-tokens", "512", "--num_tokens=7", "--tokenizer", "bert-base-uncased"],
        ["--pad-token", "<pad>", "--eos_token=</s>", "model.mask_token=[MASK]"],
        ["--sort-key", "length", "--key-dim=64", "keys=3", "--monkey", "1"],
        ["--password-file", "/run/secrets/db"],
        ["--pass-through", "x", "--bypass=1", "--compass", "north"],
        ["s3://bucket/path?region=eu", "ssh://git@example.org/repo", "memory://x", "user@example.org"],
        ["trainer.max_epochs=3", "db@pkg=postgres", "--lr=1e-3", "C:\\data", "~/x", "-", "--", ""],
        ["task-specific-head-with-4-layers", "risk-1234567890123456789"],
        ["--commit", "6ec57f84c680d3a3778b6ec57f84c680d3a3778b"],
        ["--secret"],
    ],
)
def test_what_is_no_secret_stays_as_it_was_typed(argv: list[str]) -> None:
    redacted = redact_argv(argv, {})
    assert list(redacted.argv) == argv
    assert not redacted.is_redacted


def test_a_secret_flag_without_a_value_does_not_swallow_the_next_option() -> None:
    assert redact_argv(["--token", "--epochs", "3"], {}).argv == ("--token", "--epochs", "3")


def test_a_secret_that_starts_with_a_dash_does_not_survive() -> None:
    assert redact_argv(["--token", "-8!x"], {}).argv == ("--token", REDACTED)


@pytest.mark.parametrize(
    "name", ["FOO_TOKEN", "secret", "MY_PASSPHRASE", "storage_options.key", "AZURE_STORAGE_ACCOUNT_KEY"]
)
def test_names_of_secrets_are_recognised(name: str) -> None:
    assert is_secret_name(name)


def test_a_url_keeps_what_locates_the_data() -> None:
    assert redact_url("s3://bucket/run?versionId=3") == "s3://bucket/run?versionId=3"
    assert (
        redact_url("https://u:p@h:8080/a/b?x=1&api_key=s#f")
        == f"https://{REDACTED}@h:8080/a/b?x=1&api_key={REDACTED}#f"
    )
    assert redact_url("sftp://ada@host/x") == "sftp://ada@host/x"
    assert redact_url("sftp://ada:pw@host/x") == f"sftp://{REDACTED}@host/x"
    assert redact_url("http://u:p@ss@host/x") == f"http://{REDACTED}@host/x"


def test_redacting_twice_changes_nothing_more() -> None:
    once = redact_text("see https://u:p@h/x?token=abc, password: hunter2 and api_key='x y'")
    assert "hunter2" not in once
    assert redact_text(once) == once


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "piece", ["x", "?", "a ", "sk-", "-eyJ", "a=", "https://", "u:p@", "token=", ".a", "AKIA", "-"]
)
def test_endless_arguments_do_not_take_endless_time(piece: str) -> None:
    redact_argv([piece * (100_000 // len(piece))], ENVIRON)


@given(st.lists(st.text(max_size=60), max_size=6))
def test_any_arguments_can_be_redacted_and_keep_their_places(argv: list[str]) -> None:
    redacted = redact_argv(argv, ENVIRON)
    assert len(redacted.argv) == len(argv)
    assert redacted.is_redacted == (list(redacted.argv) != argv)
    assert redact_argv(redacted.argv, ENVIRON).argv == redacted.argv
