"""What an import that was killed has left: no checkpoint, so that the next import into the same place removes it."""

from __future__ import annotations

import logging
import shlex

from ckptmgr.errors import CkptmgrError, RunInUseError, UsageError
from ckptmgr.format.layout import RUN_MARKER, parse_attempt_key, parse_checkpoint_key
from ckptmgr.format.manifest import AttemptClaim
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.life import this_host
from ckptmgr.run.lineage import read_attempt_record
from ckptmgr.storage.local import LocalStorage
from ckptmgr.words import printable_place

__all__ = ["clear_cut_off_import", "removal_command"]

_log = logging.getLogger("ckptmgr")


def clear_cut_off_import(catalog: Catalog, run_dir: str) -> bool:
    """Remove the files of an import whose process is gone, and say whether there were any.

    Nothing is removed of a run that has a checkpoint, of one that a program has started, or beside other files.

    Args:
        catalog: Of the place that is to be imported into.
        run_dir: As it was named, for messages.

    Raises:
        RunInUseError: The import still runs.
        UsageError: It ran on another host, so that nobody here knows whether it does. Says how to remove it.
        StorageError: The files cannot be removed.
    """
    if not _is_of_an_import(catalog):
        return False
    place = printable_place(run_dir)
    try:
        claim = read_attempt_record(catalog.storage, 1, "claim", AttemptClaim)
        who, lives = f"process {claim.pid} on {claim.host}", this_host().runs(claim)
    except (CkptmgrError, FileNotFoundError):
        who, lives = "a process whose claim cannot be read", None
    if lives:
        raise RunInUseError(f"{place} is in use", why=f"{who} is importing into it", next="wait until it has ended")
    if lives is None:
        raise UsageError(
            f"cannot import into {place}",
            why=f"{who} began to import into it, and has committed no checkpoint",
            next=f"if it does not run any more: {removal_command(place, is_local=_is_local(catalog))}",
        )
    for key in sorted(catalog.sizes, reverse=True):
        catalog.storage.delete(key)
    if isinstance(catalog.storage, LocalStorage):
        for entry in catalog.storage.list_temporary():
            catalog.storage.delete_temporary(entry.key)
    _log.warning("removed from %s what an import that was cut off had left there: it held no checkpoint", place)
    return True


def removal_command(place: str, *, is_local: bool) -> str:
    """Return the line that removes a directory, or what lies below a URL."""
    if is_local:
        return f"rm -r {shlex.quote(place)}"
    code = f"import fsspec; fs, path = fsspec.url_to_fs({place!r}); fs.rm(path, recursive=True)"
    return f"python -c {shlex.quote(code)}"


def _is_of_an_import(catalog: Catalog) -> bool:
    others = [
        key
        for key in catalog.sizes
        if key != RUN_MARKER and parse_attempt_key(key) is None and parse_checkpoint_key(key) is None
    ]
    # A program records its start; an import has none.
    is_import = set(catalog.attempts) == {1} and catalog.attempts[1] <= {"claim", "line"}
    return is_import and not catalog.committed and not others


def _is_local(catalog: Catalog) -> bool:
    return isinstance(catalog.storage, LocalStorage)
