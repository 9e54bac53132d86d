"""Every error that ckptmgr raises: one class for each thing that a caller would do about it.

A message says what and where on its first line, then why, then what to do next. The same facts are attributes.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CheckpointNotFoundError",
    "CkptmgrError",
    "ConfigError",
    "CorruptCheckpointError",
    "EnvironmentDriftError",
    "Fenced",
    "FormatVersionError",
    "GoldenMismatchError",
    "GoldenSampleError",
    "IncompatibleLightningError",
    "NotAllowedError",
    "Preempted",
    "ResumeRefusedError",
    "RunInUseError",
    "RunNotFoundError",
    "SaveFailedError",
    "StateMismatchError",
    "StorageError",
    "TopologyError",
    "UnsupportedStateError",
    "UsageError",
]


class CkptmgrError(Exception):
    """Base of all errors of this package.

    Args:
        what: What happened, and where: the first line.
        why: The reason, as far as it is known.
        next: What the reader can do about it.

    Attributes:
        code: Stable short name of the error, for programs.
        exit_code: What the command line exits with.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, why: str | None = None, next: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next = next

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why:  {self.why}")
        if self.next:
            lines.append(f"  next: {self.next}")
        return "\n".join(lines)

    def report(self) -> str:
        """Return the message as the command line prints it: name, code, then what, why and next."""
        return f"{type(self).__name__} [{self.code}]: {self}"

    def __reduce__(self) -> tuple[object, ...]:
        # The default would lose the keyword arguments when an error crosses a process boundary.
        return _rebuild, (type(self), self.what, self.why, self.next)


def _rebuild(cls: type[CkptmgrError], what: str, why: str | None, next: str | None) -> CkptmgrError:
    return cls(what, why=why, next=next)


class UsageError(CkptmgrError, ValueError):
    """An argument, option or reference that cannot be meant as it was typed."""

    code = "usage"
    exit_code = 2


class ConfigError(UsageError):
    """A configuration that cannot be meant as it was written. Names the key, and the file where there is one."""

    code = "config"


class NotAllowedError(CkptmgrError):
    """A configuration names code that nobody has allowed. Nothing was imported."""

    code = "not-allowed"
    exit_code = 2


class CheckpointNotFoundError(CkptmgrError, FileNotFoundError):
    """No committed checkpoint answers to the reference."""

    code = "not-found"
    exit_code = 10


class RunNotFoundError(CheckpointNotFoundError):
    """The location holds no run at all."""

    code = "no-run"


class Fenced(CkptmgrError):
    """A newer attempt has taken this run over; nothing of this process is acknowledged any more."""

    code = "fenced"
    exit_code = 11


class RunInUseError(CkptmgrError):
    """Somebody trains in this run, or may be doing so; a command that would take it over does not."""

    code = "in-use"
    exit_code = 11


class CorruptCheckpointError(CkptmgrError):
    """Stored bytes are not those that were written. Names the damaged file and tensor."""

    code = "corrupt"
    exit_code = 12


class FormatVersionError(CkptmgrError):
    """A record was written by a newer format than this version reads."""

    code = "format-version"


class StorageError(CkptmgrError, OSError):
    """The storage refused or failed; the cause is chained."""

    code = "storage"


class StateMismatchError(CkptmgrError):
    """The checkpoint does not fit the live objects. Nothing was changed."""

    code = "state-mismatch"


class GoldenSampleError(UsageError):
    """A golden sample cannot be preprocessed, or not be predicted from. Names it by its index."""

    code = "golden-sample"


class GoldenMismatchError(CkptmgrError):
    """A golden sample no longer gives what it gave at the save. Names the stage, the place and both values."""

    code = "golden-mismatch"


class EnvironmentDriftError(CkptmgrError):
    """The environment is not that of the run, in a way that may matter, and it was asked to be strict about it."""

    code = "drift"


class UnsupportedStateError(CkptmgrError, TypeError):
    """A value in the state that no handler can store. Names its path and type."""

    code = "unsupported-state"


class TopologyError(CkptmgrError):
    """The ranks that run are not the ranks that this operation needs."""

    code = "topology"


class SaveFailedError(CkptmgrError):
    """A save in the background failed. The checkpoint before it is untouched."""

    code = "save-failed"


class ResumeRefusedError(CkptmgrError):
    """What came with the run directory is not to be trusted that far: its command, or a link in it."""

    code = "resume-refused"


class IncompatibleLightningError(CkptmgrError):
    """Lightning is outside the tested range, or one of its internals that we rely on has changed."""

    code = "lightning"


class Preempted(SystemExit):
    """The job was told to stop and its state is saved: exits with code 75, so that a scheduler starts it again."""

    def __init__(self) -> None:
        super().__init__(75)
