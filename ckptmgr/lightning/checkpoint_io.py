"""Lightning's CheckpointIO: serves checkpoints of runs, and hands every other path on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from ckptmgr.errors import UsageError
from ckptmgr.lightning.assemble import INFERENCE_ENTRIES, assemble
from ckptmgr.lightning.compat import module_of
from ckptmgr.lightning.filesystem import own_reference
from ckptmgr.loading import LoadedCheckpoint, load_checkpoint

__all__ = ["install_checkpoint_io"]


class _Serving:
    """The behaviour, for either class tree."""

    def __init__(self, inner: Any, trainer: Any) -> None:
        super().__init__()
        self.inner = inner
        self.trainer = trainer
        self.preloaded: dict[str, LoadedCheckpoint] = {}
        self.storage_options: Any = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if own_reference(path) is not None:
            raise UsageError(
                f"Trainer.save_checkpoint({str(path)!r}) points into a run",
                why="only a CheckpointManager writes there",
                next="save to a path of its own, such as model.ckpt",
            )
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None, **more: Any
    ) -> Any:
        loaded = self.preloaded.pop(str(path), None)
        if loaded is None:
            reference = own_reference(path)
            if reference is None:
                if map_location is not None:
                    more["map_location"] = map_location
                return _call_inner(self.inner.load_checkpoint, path, weights_only, more)
            loaded = load_checkpoint(reference, names=INFERENCE_ENTRIES, storage_options=self.storage_options)
        return assemble(loaded, self.trainer.lightning_module)

    def remove_checkpoint(self, path: Any) -> None:
        if own_reference(path) is None:
            self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        self.inner.teardown()


def _call_inner(load: Callable[..., Any], path: Any, weights_only: bool | None, more: dict[str, Any]) -> Any:
    # Plugins written for Lightning 2.5 do not know weights_only.
    return load(path, **more) if weights_only is None else load(path, weights_only=weights_only, **more)


@cache
def _class_for(tree: str) -> type[Any]:
    base = module_of(tree, "plugins").CheckpointIO
    return type("RunCheckpointIO", (_Serving, base), {"__module__": __name__})


def install_checkpoint_io(trainer: Any, tree: str, storage_options: Any = None) -> Any:
    """Put ours in front of the strategy's CheckpointIO, once; returns it."""
    current = trainer.strategy.checkpoint_io
    if not isinstance(current, _Serving):
        current = _class_for(tree)(current, trainer)
        trainer.strategy.checkpoint_io = current
    current.trainer = trainer
    current.storage_options = storage_options
    return current
