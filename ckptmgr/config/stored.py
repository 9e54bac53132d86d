"""What a run directory keeps of a configuration: no secret, and enough to build the same experiment again."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from ckptmgr.config.interpolations import Interpolation, all_interpolations, interpolations, split_arguments
from ckptmgr.config.resolving import resolve_what_can_be
from ckptmgr.config.tree import MISSING, Path, freeze, join_key, leaves, plain
from ckptmgr.config.yaml_source import dump_tree
from ckptmgr.errors import ConfigError
from ckptmgr.launch.redact import REDACTED, is_secret_name, redact_text, secret_values

__all__ = ["StoredConfig", "config_to_store", "refuse_redacted"]

# Stands for an interpolation: patterns of secrets end at a brace, and what comes from elsewhere is no literal secret.
_HOLE = "}"
_USERINFO_FROM_ELSEWHERE = re.compile(r"(?<=://)[^/@\s]*}[^/@\s]*@")
_SMALLEST_SECRET_NUMBER = 1000


@dataclass(frozen=True, slots=True)
class StoredConfig:
    """A configuration as it may be stored.

    Attributes:
        config: YAML. Interpolations stand as text; literal secrets are ``[redacted]``.
        resolved: YAML. What interpolations gave, where they gave something; secrets from anywhere are ``[redacted]``.
        redacted: Keys that were taken out of ``config``. Whoever builds from it must give them again.
    """

    config: str
    resolved: str
    redacted: tuple[str, ...]


def config_to_store(config: DictConfig, environ: Mapping[str, str] | None = None) -> StoredConfig:
    """Take the secrets out of a configuration, and return the texts to store.

    A secret is a literal value under a secret name (``api_key``), of a known shape or with credentials in a URL, or
    equal to a secret of the environment. A reference such as ``${oc.env:WANDB_API_KEY}`` is none, but what it resolves
    to is.

    Args:
        config: It stays as it is.
        environ: Environment that is searched for secrets; the process's by default.
    """
    secrets = secret_values(os.environ if environ is None else environ)
    redaction = _Redaction(secrets)
    tree = redaction.redacted(plain(config), ())
    without_variables = freeze(_without_secret_variables(tree), where="stored configuration")
    resolved = _Redaction(secrets).redacted(resolve_what_can_be(without_variables), ())
    return StoredConfig(config=dump_tree(tree), resolved=dump_tree(resolved), redacted=tuple(redaction.keys))


def refuse_redacted(config: DictConfig, *, where: str) -> None:
    """Refuse a configuration that has lost its secrets.

    Raises:
        ConfigError: Names the keys that must be given again.
    """
    keys = [
        join_key(path)
        for path, value in leaves(plain(config))
        if (isinstance(value, str) and REDACTED in value) or REDACTED in path
    ]
    if keys:
        raise ConfigError(
            f"{where}: secrets are not stored, and {', '.join(keys)} must be given again",
            next=f"add {keys[0]}=… to the command, or write ${{oc.env:NAME}} in the configuration to read it each time",
        )


class _Redaction:
    def __init__(self, secrets: Sequence[str]) -> None:
        self._secrets = secrets
        self.keys: list[str] = []

    def redacted(self, value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {(key := self._safe_key(name)): self.redacted(item, (*path, key)) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.redacted(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, (str, int, float, type(None))):
            # A resolver may return any object.
            value = str(value)
        if isinstance(value, str):
            value = _encodable(value)
            is_secret = REDACTED in path or REDACTED in value or self._is_secret(value, path)
        elif isinstance(value, bool) or not isinstance(value, int):
            is_secret = False
        else:
            is_secret = abs(value) >= _SMALLEST_SECRET_NUMBER and is_secret_name(_name(path))
        if is_secret:
            self.keys.append(join_key(path))
        return REDACTED if is_secret else value

    def _safe_key(self, key: object) -> str:
        text = _encodable(str(key))
        return REDACTED if redact_text(text, self._secrets) != text else text

    def _is_secret(self, text: str, path: Path) -> bool:
        if text in ("", MISSING):
            return False
        found = interpolations(text)
        literal = _USERINFO_FROM_ELSEWHERE.sub("", _with_holes(text, found))
        if redact_text(literal, self._secrets) != literal:
            return True
        nested = list(all_interpolations(text))
        arguments = [each for one in nested for each in split_arguments(one.arguments) if "${" not in each]
        if any(redact_text(each, self._secrets) != each for each in arguments):
            return True
        if any(_is_secret_variable(one) and one.has_default() for one in nested):
            return True
        if any(isinstance(part, str) and is_secret_name(part) for part in path) and not _name(path).startswith("_"):
            return bool(literal.replace(_HOLE, "").strip()) or any(one.has_default() for one in nested)
        return False


def _encodable(text: str) -> str:
    # The environment's bytes need not be UTF-8.
    return str(text.encode("utf-8", "backslashreplace").decode())


def _name(path: Path) -> str:
    return next((part for part in reversed(path) if isinstance(part, str)), "")


def _with_holes(text: str, found: Sequence[Interpolation]) -> str:
    for one in reversed(found):
        text = text[: one.start] + _HOLE + text[one.end :]
    return text


def _is_secret_variable(found: Interpolation) -> bool:
    # A computed name may be any variable's.
    return found.resolver == "oc.env" and ("${" in found.first_argument() or is_secret_name(found.first_argument()))


def _without_secret_variables(value: Any) -> Any:
    """Redact before resolving, so that whatever refers to a secret variable gets the redacted text as well."""
    if isinstance(value, dict):
        return {key: _without_secret_variables(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secret_variables(item) for item in value]
    for one in reversed(interpolations(value)):
        if any(_is_secret_variable(each) for each in all_interpolations(value[one.start : one.end])):
            value = value[: one.start] + REDACTED + value[one.end :]
    return value
