"""A moment that Lightning has no hook for: before its loggers begin.

A Trainer makes the experiments of all loggers first thing in its setup, and asks callbacks only then. By then a new
version folder exists, W&B and MLflow have begun a new run, and a CSVLogger with a given version has deleted the file
that a resume is to go on with. So the function that does it is wrapped, once for each class tree. For a Trainer without
a listener among its callbacks the wrapper does nothing.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from ckptmgr.lightning.compat import module_of

__all__ = ["SetupListener", "announce_setup"]

_NAME = "_call_setup_hook"
_MARK = "_announces_setup"


@runtime_checkable
class SetupListener(Protocol):
    """A callback that wants to know."""

    def before_loggers_begin(self, trainer: Any) -> None:
        """Called before loggers begin and before any callback's ``setup``."""


def announce_setup(tree: str) -> None:
    """Tell listeners of all Trainers of a class tree before their setup. Idempotent."""
    module = module_of(tree, "trainer.call")
    original = getattr(module, _NAME, None)
    if original is None or hasattr(original, _MARK):
        # Without it loggers are still taken up, later and with less.
        return

    def call_setup_hook(trainer: Any) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, SetupListener):
                callback.before_loggers_begin(trainer)
        original(trainer)

    setattr(call_setup_hook, _MARK, True)
    setattr(module, _NAME, call_setup_hook)
