"""The matrix: which ingredients, kill points and options stand together in one case."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from faults import Fault
from ingredients import Setup
from pairwise import pairwise

__all__ = [
    "CADENCES",
    "KILLS",
    "LIGHTNING_KILLS",
    "PLAIN_LOADERS",
    "Case",
    "lightning_cases",
    "options_of",
    "plain_cases",
]

# Batch 7 is the last of an epoch. A save is counted by its step; 1 is the first save of that process.
KILLS = {
    "before-first-save": (Fault("forward", 1), Fault("forward", 5), Fault("turn-end", 7)),
    "last-batch": (Fault("stepped", 7), Fault("manifest", 1), Fault("committed", 1)),
    "validation": (Fault("validating", 7), Fault("fetched", 8), Fault("forward", 10)),
    "epoch-end": (Fault("manifest", 1), Fault("turn-end", 7), Fault("stepped", 9)),
}

LIGHTNING_KILLS = {
    **KILLS,
    "epoch-end": (Fault("manifest", 1), Fault("turn-end", 7), Fault("epoch-hooks", 8)),
}

PLAIN_LOADERS = (
    ("shuffle", 0),
    ("shuffle", 2),
    ("generator", 0),
    ("stateful", 0),
    ("stateful", 2),
    ("augmented", 0),
    ("augmented", 2),
    ("stateful-augmented", 2),
    ("sample-seed", 0),
    ("sample-seed", 2),
    ("kept-workers", 2),
    ("stream", 0),
    ("stream", 2),
    ("countless", 0),
)

CADENCES: dict[str, dict[str, Any]] = {
    "each-step": {"every_n_steps": 1},
    "3-steps": {"every_n_steps": 3},
    "epochs": {"every_n_epochs": 1},
    "foreground": {"every_n_steps": 2, "background": False, "save_on_exception": True},
}


@dataclass(frozen=True)
class Case:
    """One chain of processes."""

    face: str
    setup: Setup
    kills: str
    cadence: str
    reseed: bool
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        """Name the case for pytest."""
        return f"{self.kills}:{self.cadence}{':reseed' if self.reseed else ''}:{self.setup}"


def plain_cases() -> list[Case]:
    """Return the cases of `Checkpointer`: every pair of two factors."""
    rows = pairwise(
        {
            "loader": PLAIN_LOADERS,
            "kills": list(KILLS),
            "cadence": list(CADENCES),
            "optimizer": ("adamw", "adamw-fused", "sgd", "two"),
            "scheduler": ("none", "onecycle", "plateau"),
            "accumulate": (1, 2),
            "precision": ("float32", "bf16"),
            "ema": (False, True),
            "ends": ("epochs", "max-steps"),
            "reseed": (False, True),
        }
    )
    cases: list[Case] = []
    for row in rows:
        loader, workers = row.pop("loader")
        kills, cadence, reseed, ends = (row.pop(name) for name in ("kills", "cadence", "reseed", "ends"))
        max_steps = 12 // row["accumulate"] if ends == "max-steps" else None
        setup = Setup(loader=loader, workers=workers, max_steps=max_steps, **row)
        cases.append(Case("plain", setup, kills, cadence, reseed, CADENCES[cadence]))
    return cases


def options_of(face: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options under the names that the face has for them."""
    if face == "plain":
        return options
    return {key.replace("n_steps", "n_train_steps"): value for key, value in options.items()}


def lightning_cases() -> list[Case]:
    """Return the cases of `CheckpointManager`: every pair of two factors."""
    rows = pairwise(
        {
            "loader": PLAIN_LOADERS,
            "kills": list(LIGHTNING_KILLS),
            "cadence": list(CADENCES),
            "optimizer": ("adamw", "adamw-fused", "sgd", "two"),
            "scheduler": ("none", "onecycle", "plateau"),
            "accumulate": (1, 2),
            "precision": ("float32", "bf16"),
            "ema": (False, True),
            "ends": ("epochs", "max-steps"),
            "reseed": (False, True),
            "validate_every": (0, 3),
        },
        # Without a length there is no fraction of an epoch, nor a check at every third batch before its end is known.
        is_possible=lambda row: not (row["loader"][0] in ("stream", "countless") and row["validate_every"]),
    )
    cases: list[Case] = []
    for row in rows:
        loader, workers = row.pop("loader")
        kills, cadence, reseed, ends = (row.pop(name) for name in ("kills", "cadence", "reseed", "ends"))
        # In manual optimization, Lightning counts the step of each optimizer.
        max_steps = 12 // row["accumulate"] * (2 if row["optimizer"] == "two" else 1) if ends == "max-steps" else None
        setup = Setup(loader=loader, workers=workers, max_steps=max_steps, **row)
        cases.append(Case("lightning", setup, kills, cadence, reseed, options_of("lightning", CADENCES[cadence])))
    return cases
