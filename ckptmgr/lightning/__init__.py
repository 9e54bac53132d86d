"""The Lightning face: the `CheckpointManager` callback, and the protocol ``ckptmgr://`` for everything that loads."""

from __future__ import annotations

from ckptmgr.lightning.callback import CheckpointManager
from ckptmgr.lightning.filesystem import register

__all__ = ["CheckpointManager"]

register()
