"""How to go on from a run that was imported: no program has started it, so that none can be started again."""

from __future__ import annotations

from ckptmgr.format.manifest import Manifest

__all__ = ["source_of", "ways_on"]

_SOURCE = "source.name"
_STATE = {"module": "model", "optimizer": "optimizer", "scheduler": "scheduler"}


def source_of(manifest: Manifest) -> str | None:
    """Return the name of the file that a checkpoint was imported from; None if it was saved by a program."""
    return manifest.environment.get(_SOURCE)


def ways_on(manifest: Manifest, run_dir: str) -> tuple[str, ...]:
    """Return what goes on from an imported checkpoint, one line of code or words each, the likeliest first.

    Args:
        manifest: Of the checkpoint.
        run_dir: The run that it is in.
    """
    handlers = {entry.name: entry.handler for entry in manifest.entries}
    infer = f"to predict: ckptmgr.load_inference({run_dir!r}, model=...)"
    if "lightning-data" in handlers.values():
        return (f"to train on: Trainer(callbacks=[CheckpointManager({run_dir!r})]).fit(model)", infer)
    state = ", ".join(f"{name!r}: {_STATE[of]}" for name, of in handlers.items() if of in _STATE)
    # A bare name would be looked for among the tags of the new run.
    train = f"to train on: Checkpointer(NEW_RUN_DIR, state={{{state}}}).restore({f'{run_dir}@latest'!r})"
    return (infer,) if "lightning" in handlers.values() else (train, infer)
