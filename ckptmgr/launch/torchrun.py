"""torchrun's part of a command: how many processes, which recorded options are repeated, and who a process is to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "MAX_PROCESSES",
    "PlaceInJob",
    "end_of_options",
    "place_in_job",
    "torchrun_words",
    "why_not_on_this_machine",
    "why_not_repeated",
]

MAX_PROCESSES = 4096
"""More processes of one machine than this are a slip."""

# Rendezvous state is unpickled, so a record must not say with whom to meet: this machine only.
_HERE = r"(?:localhost|127\.0\.0\.1)(?::\d{1,5})?"
_SAFE = {
    "standalone": "",
    "nproc-per-node": r"\d{1,4}|auto|cpu|gpu|xpu",
    "nnodes": r"1(?::1)?",
    "node-rank": "0",
    "max-restarts": r"\d{1,4}",
    "monitor-interval": r"\d+(?:\.\d*)?",
    "start-method": "spawn|fork|forkserver",
    "rdzv-backend": "c10d|static",
    "rdzv-endpoint": _HERE,
    "rdzv-id": r"[\w.-]+",
    "master-addr": _HERE,
    "master-port": r"\d{1,5}",
    "role": r"[\w-]+",
}
_KEPT = ("max-restarts", "monitor-interval")
# --standalone says all of it: one machine, which meets with itself.
_REPLACED = {"nproc-per-node", "standalone", "nnodes", "node-rank", "master-addr", "master-port"}
_REPLACED |= {"rdzv-backend", "rdzv-endpoint", "rdzv-id"}
# Where one machine alone is to meet is nobody else's business; these say that there were others.
_OF_SEVERAL_MACHINES = ("nnodes", "node-rank")


@dataclass(frozen=True, slots=True)
class PlaceInJob:
    """Which of a job's processes this one is, as its launcher says."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def place_in_job(environ: Mapping[str, str]) -> PlaceInJob | None:
    """Return the place of this process in a job of several; None if it is alone.

    Args:
        environ: Where torchrun says it. A scheduler's ``WORLD_SIZE`` alone does not make a process a rank.
    """
    rank, world_size = (_number(environ.get(name)) for name in ("RANK", "WORLD_SIZE"))
    if rank is None or world_size is None or world_size < 2:
        return None
    local_rank, local_world_size = (_number(environ.get(name)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return PlaceInJob(rank, world_size, rank if local_rank is None else local_rank, local_world_size or world_size)


def torchrun_words(
    nproc: int, recorded: Sequence[str] = (), *, may_restart: bool = True
) -> tuple[tuple[str, ...], list[str]]:
    """Return the arguments of Python that start so many processes of this machine.

    Args:
        nproc: How many.
        recorded: The options of an earlier start: how often and how soon it restarts is kept.
        may_restart: False where each start goes back to the same checkpoint: what came after it would be trained anew.

    Returns:
        What stands before the program, and the options that are neither kept nor replaced.
    """
    kept: list[str] = []
    left_out: list[str] = []
    for name, words, value in _options(recorded):
        if (
            name in _KEPT
            and (may_restart or name != "max-restarts")
            and re.fullmatch(_SAFE[name], value or "", re.ASCII)
        ):
            kept.append(f"--{name}={value}")
        elif name not in _REPLACED:
            left_out += words
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), *kept), left_out


def end_of_options(args: Sequence[str]) -> tuple[str, ...]:
    """Return what stands between torchrun's options and the program, so that it takes none but its own.

    It refuses those that begin as several of its own do, such as ``--n``, wherever they stand.

    Args:
        args: What the program is given.
    """
    return ("--",) if any(word.startswith("-") for word in args) else ()


def why_not_on_this_machine(recorded: Sequence[str]) -> str | None:
    """Return why a start with these options was none of this machine alone; None if it was."""
    for name, words, value in _options(recorded):
        if name in _OF_SEVERAL_MACHINES and not re.fullmatch(_SAFE[name], value or "", re.ASCII):
            return f"torchrun was given {' '.join(words)}: the processes of this machine are not all of that job"
    return None


def why_not_repeated(recorded: Sequence[str]) -> str | None:
    """Return the first recorded word that must not be repeated without being asked; None if all may be."""
    rest = list(recorded)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.partition("=")
        pattern = _SAFE.get(_plain(name)) if name.startswith("--") else None
        if pattern and not has_value:
            value = rest.pop(0) if rest else ""
        if pattern is None or not re.fullmatch(pattern, value, re.ASCII):
            return word
    return None


def _options(recorded: Sequence[str]) -> Iterator[tuple[str, list[str], str | None]]:
    """Yield name, words and value of each option. What follows an unknown one without a dash belongs to it."""
    rest = list(recorded)
    while rest:
        words = [rest.pop(0)]
        name, has_value, value = words[0].partition("=")
        takes_none = _SAFE.get(_plain(name)) == ""
        while not has_value and not takes_none and rest and not rest[0].startswith("-"):
            words.append(rest.pop(0))
            if _plain(name) in _SAFE:
                break
        yield _plain(name), words, value if has_value else words[1] if len(words) > 1 else None


def _plain(name: str) -> str:
    return name.removeprefix("--").replace("_", "-")


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdecimal() else None
