"""Put values in the place of interpolations: all of them or an error, or as many as can be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from ckptmgr.config.interpolations import all_interpolations
from ckptmgr.config.references import CircleError, GrowthError, ReferenceWalk, referred_paths, value_at
from ckptmgr.config.tree import MISSING, Path, Tree, join_key, leaves, plain
from ckptmgr.errors import ConfigError
from ckptmgr.launch.redact import redact_text

__all__ = ["resolve", "resolve_what_can_be"]

_MAX_VALUES = 20_000
_MAX_DEPTH = 100
_ENVIRONMENT = re.compile(r"Environment variable '(.*?)' not found")
_UNKNOWN_KEY = re.compile(r"Interpolation key '(.*?)' not found")


def resolve(config: DictConfig, *, where: str) -> Tree:
    """Return the configuration as plain dictionaries, lists and scalars, without any interpolation.

    Args:
        config: It stays as it is.
        where: What is resolved, for messages.

    Raises:
        ConfigError: A value is missing (``???``) or an interpolation cannot be resolved. Names its key and what it
            refers to; for an environment variable, the variable.
    """
    tree = plain(config)
    missing = [join_key(path) for path, value in leaves(tree) if value == MISSING]
    if missing:
        raise ConfigError(
            f"{where}: no value is given for {', '.join(missing[:8])}{', …' if len(missing) > 8 else ''}",
            why=(
                "nothing says which class to build"
                if missing[0].endswith("_target_")
                else f"{missing[0]} is ???, which stands for a value to be given"
            ),
            next=f"write it in the file, or as an override: {missing[0]}=…",
        )

    def fail(path: Path, text: str, error: Exception) -> Any:
        raise _explained(config, tree, path, text, error, where) from error

    return _Resolver(config, fail).run()


def resolve_what_can_be(config: DictConfig) -> Tree:
    """Return the configuration as a plain tree; an interpolation that cannot be resolved stays as text."""
    return _Resolver(config, lambda path, text, error: text).run()


class _Resolver:
    def __init__(self, config: DictConfig, on_error: Callable[[Path, str, Exception], Any]) -> None:
        self._config = config
        self._tree = plain(config)
        self._on_error = on_error
        self._references = ReferenceWalk(self._tree)
        self._nvalues = 0

    def run(self) -> Tree:
        result = self._walk(self._tree, self._config, ())
        assert isinstance(result, dict)
        return result

    def _walk(self, tree: Any, config: Any, path: Path) -> Any:
        """Go through a plain tree and its configuration side by side."""
        if isinstance(tree, dict):
            return {key: self._value(value, config, key, (*path, key)) for key, value in tree.items()}
        return [self._value(value, config, index, (*path, index)) for index, value in enumerate(tree)]

    def _value(self, value: Any, container: Any, key: Any, path: Path) -> Any:
        self._nvalues += 1
        if isinstance(value, (dict, list)):
            return self._walk(value, container[key], path)
        if not isinstance(value, str) or "${" not in value:
            return value
        try:
            if self._nvalues > _MAX_VALUES or len(path) > _MAX_DEPTH:
                raise GrowthError
            self._references.check(path, value)
            found = container[key]
        # A resolver is anybody's code.
        except Exception as error:
            return self._on_error(path, value, error)
        content = OmegaConf.to_container(found, resolve=False) if OmegaConf.is_config(found) else found
        if content is not found and isinstance(content, (dict, list, tuple)):
            return self._walk(content, found, path)
        return str(content) if isinstance(content, str) else content


def _explained(config: DictConfig, tree: Tree, path: Path, text: str, error: Exception, where: str) -> ConfigError:
    path, text, error = _origin(config, tree, path, text, error)
    what = f"{where}: {join_key(path)} cannot be resolved: {redact_text(text)}"
    message = redact_text(str(error).partition("\n")[0])
    if isinstance(error, CircleError):
        return ConfigError(what, why=f"it refers to itself: {message}", next="give one of them a value")
    if isinstance(error, (GrowthError, RecursionError)):
        return ConfigError(what, why="it expands to more than can be meant", next="refer to fewer values")
    if variable := _ENVIRONMENT.search(str(error)):
        name = variable[1]
        return ConfigError(
            what,
            why=f"the environment variable {name} is not set",
            next=f"export {name}=…, or write a default: ${{oc.env:{name},default}}",
        )
    unknown = [found.resolver for found in all_interpolations(text) if found.resolver is not None]
    unknown = [name for name in unknown if not OmegaConf.has_resolver(name)]
    if unknown:
        return ConfigError(
            what,
            why=f"nobody has registered a resolver {unknown[0]!r}",
            next="use oc.env, oc.decode or oc.select, or register one with OmegaConf in your program",
        )
    if isinstance(error, InterpolationKeyError):
        key = _UNKNOWN_KEY.search(str(error))
        near = difflib.get_close_matches(key[1], _all_keys(tree), n=3) if key else []
        return ConfigError(
            what,
            why=f"there is no key {key[1]}" if key else message,
            next=f"refer to {' or '.join(near)}" if near else "correct the reference; keys are written from the top",
        )
    return ConfigError(what, why=message, next="correct the value, or override it")


def _origin(config: DictConfig, tree: Tree, path: Path, text: str, error: Exception) -> tuple[Path, str, Exception]:
    """Follow references to the value that fails by itself: that one is to be corrected."""
    for _ in range(_MAX_DEPTH):
        if isinstance(error, (CircleError, GrowthError)):
            break
        for wanted in referred_paths(text, path):
            found = value_at(tree, wanted)
            if found is None or not isinstance(found[1], str) or "${" not in found[1]:
                continue
            try:
                container: Any = config
                for part in found[0]:
                    container = container[part]
            except Exception as inner:
                path, text, error = found[0], found[1], inner
                break
        else:
            break
    return path, text, error


def _all_keys(tree: Any, path: Path = ()) -> list[str]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [each for key, value in pairs for each in (join_key((*path, key)), *_all_keys(value, (*path, key)))]
