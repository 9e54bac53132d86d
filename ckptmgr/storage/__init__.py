"""Where checkpoints are kept: four verbs over local directories, memory and object stores."""

from __future__ import annotations

from ckptmgr.storage.open import open_storage
from ckptmgr.storage.protocol import Buffer, Entry, Storage

__all__ = ["Buffer", "Entry", "Storage", "open_storage"]
