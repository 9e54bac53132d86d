"""Strategies of Lightning's, and the ranks that they run on: which can be saved, and finding one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ckptmgr.errors import TopologyError
from ckptmgr.ranks.group import Ranks
from ckptmgr.topology.join import join_ranks

__all__ = ["join_trainer", "keeps_shards", "load_through", "not_gathering", "refuse_strategy"]

_XLA = "its processes talk through XLA, and its tensors live there; they are not seen through torch.distributed"
_REFUSED = {
    "DeepSpeedStrategy": (
        "DeepSpeed keeps parameters and moments in flat buffers of its own, without names",
        "use strategy='ddp', or ModelParallelStrategy with fully_shard(); or save with DeepSpeed itself",
    ),
    "FSDPStrategy": (
        "FSDP of the first kind keeps parameters in flat buffers, and what a rank holds is no range of a parameter",
        "use ModelParallelStrategy, and call torch.distributed.fsdp.fully_shard in configure_model",
    ),
    "XLAStrategy": (_XLA, "use Lightning's ModelCheckpoint there"),
    "XLAFSDPStrategy": (_XLA, "use Lightning's ModelCheckpoint there"),
    "SingleDeviceXLAStrategy": (_XLA, "use Lightning's ModelCheckpoint there"),
}


def refuse_strategy(trainer: Any) -> None:
    """Refuse a strategy whose state cannot be told.

    Raises:
        TopologyError: It is one of those.
    """
    for base in type(trainer.strategy).__mro__:
        if base.__name__ in _REFUSED:
            why, remedy = _REFUSED[base.__name__]
            raise TopologyError(f"CheckpointManager cannot save a {base.__name__}", why=why, next=remedy)


def keeps_shards(trainer: Any) -> bool:
    """Say whether the strategy restores a model after it was sharded, by a way of its own."""
    return any(base.__name__ == "ModelParallelStrategy" for base in type(trainer.strategy).__mro__)


def join_trainer(trainer: Any, *, timeout_s: float) -> Ranks:
    """Connect this process with the other ranks of a Trainer, once its strategy has connected them.

    Args:
        trainer: In its setup.
        timeout_s: How long a rank may be waited for.

    Raises:
        TopologyError: They are not connected by torch.distributed, or one of them did not come.
    """
    count = os.environ.get("WORLD_SIZE", "")
    if trainer.world_size == 1 and "RANK" in os.environ and count.isdecimal() and int(count) > 1:
        raise TopologyError(
            f"the Trainer has 1 rank, and this job has {count}",
            why="a launcher has started several processes, and each of them would take the run over from the others",
            next=f"give it Trainer(strategy='ddp', devices={os.environ.get('LOCAL_WORLD_SIZE', count)})",
        )
    ranks = join_ranks(timeout_s=timeout_s)
    if ranks.world_size != trainer.world_size:
        ranks.close()
        raise TopologyError(
            f"the Trainer has {trainer.world_size} ranks, and torch.distributed has {ranks.world_size}",
            why=f"{type(trainer.strategy).__name__} runs its processes in another way",
            next="use strategy='ddp', or ModelParallelStrategy; and initialise no process group yourself",
        )
    return ranks


@contextmanager
def not_gathering(trainer: Any) -> Iterator[None]:
    """Keep Lightning from collecting whole models and optimizers for a checkpoint: each rank saves what it holds."""
    strategy = trainer.strategy
    replaced: dict[str, Any] = {"optimizer_state": lambda optimizer: {}}
    if keeps_shards(trainer):
        replaced["lightning_module_state_dict"] = trainer.lightning_module.state_dict
    before = {name: vars(strategy)[name] for name in replaced if name in vars(strategy)}
    vars(strategy).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del vars(strategy)[name]
        vars(strategy).update(before)


def load_through(trainer: Any, load: Callable[[Any], Any], is_ours: Callable[[Any], bool]) -> None:
    """Let a strategy that reads checkpoints by itself take those of runs from elsewhere.

    Args:
        trainer: In its setup.
        load: Returns a checkpoint as Lightning expects it.
        is_ours: Says whether a path names a checkpoint of a run.
    """
    if not keeps_shards(trainer):
        return
    strategy = trainer.strategy
    original = type(strategy).load_checkpoint

    def load_checkpoint(path: Any, weights_only: bool | None = None) -> Any:
        if not is_ours(path):
            return original(strategy, path, weights_only)
        checkpoint = load(path)
        module = strategy.lightning_module
        # Lightning leaves this to the strategy, whose own reading would have done it.
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
        return checkpoint

    strategy.load_checkpoint = load_checkpoint
