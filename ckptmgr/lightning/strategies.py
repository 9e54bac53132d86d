"""What Lightning's strategies do with state by themselves, and which of them can be saved here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ckptmgr.errors import TopologyError

__all__ = ["load_through", "not_gathering", "refuse_unsupported"]

_OWN_SHARDS = {
    "FSDPStrategy": "it shards by flat parameters, which have no names of their own: use ModelParallelStrategy and "
    "fully_shard(…) in configure_model",
    "DeepSpeedStrategy": "DeepSpeed keeps optimizer and parameters in a form of its own",
    "XLAFSDPStrategy": "XLA's shards are in a form of their own",
}


def refuse_unsupported(strategy: Any) -> None:
    """Refuse a strategy whose state cannot be captured by name.

    Raises:
        TopologyError: It cannot. Says why, and what to use instead.
    """
    for cls in type(strategy).__mro__:
        if why := _OWN_SHARDS.get(cls.__name__):
            raise TopologyError(
                f"CheckpointManager cannot save under {type(strategy).__name__}",
                why=why,
                next="use DDP, or ModelParallelStrategy; or Lightning's own ModelCheckpoint",
            )


def _is_model_parallel(strategy: Any) -> bool:
    return any(cls.__name__ == "ModelParallelStrategy" for cls in type(strategy).__mro__)


@contextmanager
def not_gathering(strategy: Any) -> Iterator[None]:
    """Keep a model parallel strategy from collecting state that is captured from the live objects anyway.

    It would copy all of it, and take an optimizer step to make an optimizer state that is not there yet.
    """
    if not _is_model_parallel(strategy):
        yield
        return
    strategy.lightning_module_state_dict = lambda: {}
    strategy.optimizer_state = lambda optimizer: {}
    try:
        yield
    finally:
        del strategy.lightning_module_state_dict, strategy.optimizer_state


def load_through(strategy: Any, load: Callable[..., Any], is_ours: Callable[[Any], bool]) -> None:
    """Let a model parallel strategy take checkpoints of ours from ``load``. It reads files by itself otherwise."""
    if not _is_model_parallel(strategy):
        return
    original = type(strategy).load_checkpoint

    def load_checkpoint(path: Any, weights_only: bool | None = None) -> Any:
        if not is_ours(path):
            return original(strategy, path, weights_only)
        checkpoint = load(path)
        module = strategy.lightning_module
        # Lightning leaves this to the strategy, since its own reading has done it.
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
        return checkpoint

    strategy.load_checkpoint = load_checkpoint
