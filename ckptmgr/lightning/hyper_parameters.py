"""What a checkpoint keeps of the hyper-parameters that Lightning puts into it: plain values, and no secret."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckptmgr.launch.redact import is_secret_name, secret_values

__all__ = ["arguments_from", "keep_plain_hyper_parameters"]

_log = logging.getLogger("ckptmgr")
_warned: set[str] = set()

_TYPES = ("hparams_type", "datamodule_hparams_type")
_VALUES = ("hyper_parameters", "datamodule_hyper_parameters")


def keep_plain_hyper_parameters(checkpoint: dict[str, Any], is_plain: Callable[[Any], bool]) -> None:
    """Take out of Lightning's dictionary what cannot be stored or must not be. Named in a warning, once.

    ``model: {api_key: ${oc.env:KEY}}`` gives the module a secret, and ``save_hyperparameters()`` would put it into a
    directory that is copied and published. Nothing of this is needed to resume.

    Args:
        checkpoint: Lightning's; changed.
        is_plain: Whether a value can be stored.
    """
    for key in _TYPES:
        checkpoint.pop(key, None)
    secrets = secret_values(os.environ)
    for key in _VALUES:
        if key not in checkpoint:
            continue
        given = dict(checkpoint[key])
        secret = [name for name, value in given.items() if _holds_secret(str(name), value, secrets)]
        if not secret and is_plain(checkpoint[key]):
            continue
        odd = [name for name, value in given.items() if name not in secret and not is_plain(value)]
        checkpoint[key] = {name: value for name, value in given.items() if name not in (*secret, *odd)}
        _tell("that are secrets", [str(name) for name in secret])
        _tell("that are no plain values", [f"{name} ({type(given[name]).__qualname__})" for name in odd])


def arguments_from(module_class: Any, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a LightningModule's class is called with, as its own ``load_from_checkpoint`` would call it.

    Args:
        module_class: The class.
        checkpoint: Lightning's dictionary.
    """
    saved = {str(name): value for name, value in dict(checkpoint.get("hyper_parameters", {})).items()}
    parameters = inspect.signature(module_class).parameters
    whole = checkpoint.get("hparams_name")
    if whole in parameters:
        # The type is not kept; this one is read by key and by attribute.
        return {str(whole): _Values(saved)}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return saved
    return {name: value for name, value in saved.items() if name in parameters}


class _Values(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _holds_secret(name: str, value: Any, secrets: Sequence[str]) -> bool:
    if isinstance(value, str):
        return bool(value) and (is_secret_name(name) or any(secret in value for secret in secrets))
    if isinstance(value, Mapping):
        return any(_holds_secret(str(inner), item, secrets) for inner, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_holds_secret(name, item, secrets) for item in value)
    return False


def _tell(what: str, names: Sequence[str]) -> None:
    text = ", ".join(names)
    if not names or (message := f"{what}: {text}") in _warned:
        return
    _warned.add(message)
    _log.warning(
        "hyper-parameters %s are not saved: %s. They are not needed to resume; load_from_checkpoint wants them as"
        " arguments",
        what,
        text,
    )
