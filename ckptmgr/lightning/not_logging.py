"""A LightningModule that logs nothing for a while: what it predicts for golden samples is no metric of the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

__all__ = ["not_logging"]

_METHODS = ("log", "log_dict")


@contextmanager
def not_logging(module: Any) -> Iterator[None]:
    """Let ``self.log`` and ``self.log_dict`` do nothing, in the module and in the LightningModules inside of it.

    Args:
        module: Attached to a Trainer, or not.
    """
    with ExitStack() as stack:
        for part in module.modules():
            if not hasattr(type(part), "on_load_checkpoint"):
                continue
            own = vars(part)
            for name in _METHODS:
                if name in own:
                    stack.callback(own.__setitem__, name, own[name])
                else:
                    stack.callback(own.pop, name, None)
                own[name] = _nothing
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""
