"""Files of logs: where they end, and cutting them back to where they ended.

What was logged after a checkpoint is logged again by the run that goes on from it. So the log is put back to where it
was at the save, whatever its axis counts. What is cut off is kept beside it.
"""

from __future__ import annotations

import csv
import io
import os
import posixpath
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "csv_header",
    "csv_position",
    "cut_csv",
    "cut_events",
    "event_files",
    "event_folders",
    "has_only_version",
    "mend_csv",
]

_EVENTS = "tfevents"
_FRAME_NBYTES = 16
"""Of a TFRecord: length, its checksum, and the checksum of the data."""


def csv_header(fs: Any, path: str) -> list[str]:
    """Return the columns of a CSV file; none if there is no file."""
    return _columns(_first_line(fs, path))


def csv_position(fs: Any, path: str) -> dict[str, Any]:
    """Return where a CSV file ends: its size, which means something only together with its header."""
    header = _first_line(fs, path)
    return {"header": header, "nbytes": int(fs.size(path)) if header else 0}


def mend_csv(fs: Any, path: str) -> None:
    """Take half a row off the end of a file, whose writer was killed: the next row would be added to it."""
    if not fs.exists(path):
        return
    size = int(fs.size(path))
    if size and fs.cat_file(path, start=size - 1) != b"\n":
        data = fs.cat_file(path)
        _replace(fs, path, data[: data.rfind(b"\n") + 1])


def cut_csv(fs: Any, path: str, end: Mapping[str, Any], since: Mapping[str, Any], dropped: str) -> str | None:
    """Cut rows out of a CSV file: what came after a checkpoint, before this process began to write.

    A new column rewrites all rows, so a size is turned into a number of rows by its own header.

    Args:
        fs: File system.
        path: The file.
        end: `csv_position` at the checkpoint.
        since: `csv_position` when this process took over.
        dropped: Path of the file for what is cut out.

    Returns:
        What is missing, for people; None if nothing is.
    """
    if not since["nbytes"]:
        return "everything that was logged before the checkpoint is gone" if end["nbytes"] else None
    reader = csv.DictReader(io.StringIO(_text(fs.cat_file(path)), newline=""))
    rows, columns = list(reader), list(reader.fieldnames or [])
    first, nbytes = _rows_within(rows, end)
    last, _ = _rows_within(rows, since)
    if first < last:
        kept = rows[:first] + rows[last:]
        _replace(fs, dropped, _as_csv(columns, rows[first:last]))
        before = _columns(end["header"])
        later = {name for row in kept for name, value in row.items() if value and name not in before}
        if kept:
            _replace(fs, path, _as_csv(sorted({*before, *later}) if later else before, kept))
        else:
            fs.rm_file(path)
    return "rows that were logged before the checkpoint are gone" if nbytes < end["nbytes"] else None


def event_files(fs: Any, folders: Iterable[str], root: str) -> dict[str, int]:
    """Return the size of every TensorBoard file in some folders, by its path below a root."""
    found = {}
    for folder in folders:
        try:
            listed = fs.ls(folder, detail=True, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            continue
        below = posixpath.relpath(str(folder), root) if str(folder) != root else ""
        for info in listed:
            name = posixpath.basename(str(info["name"]).rstrip("/"))
            if info["type"] == "file" and _is_event_file(name):
                found[posixpath.join(below, name)] = int(info["size"])
    return found


def event_folders(fs: Any, root: str) -> list[str]:
    """Return the folders of one TensorBoard log: its own, and those that ``add_scalars`` makes for each line.

    They hold nothing but files of the processes that wrote the log.
    """
    writers = {_writer_of(name) for name in event_files(fs, [root], root)}
    folders = [root]
    for info in fs.ls(root, detail=True, refresh=True):
        if info["type"] == "directory":
            folder = posixpath.join(root, posixpath.basename(str(info["name"]).rstrip("/")))
            names = [posixpath.basename(str(name)) for name in fs.ls(folder, detail=False, refresh=True)]
            if all(_is_cut(name) or _writer_of(name) in writers for name in names):
                folders.append(folder)
    return folders


def cut_events(
    fs: Any, root: str, end: Mapping[str, int], present: Collection[str], mark: str
) -> tuple[list[str], list[str]]:
    """Cut TensorBoard files back to their sizes at a checkpoint.

    A file is a sequence of records, and a writer only appends. The mark takes the place of what makes TensorBoard read
    a file.

    Args:
        fs: File system.
        root: Folder of the log.
        end: `event_files` at the checkpoint.
        present: Files that were there when this process took over.
        mark: Names the files that keep what is cut off.

    Returns:
        Paths of those files, and of files that are gone or shorter than they were.
    """
    dropped, missing = [], []
    for name in sorted(name for name in {*end, *present} if _is_event_file(name)):
        path = posixpath.join(root, name)
        beside = posixpath.join(root, posixpath.dirname(name), posixpath.basename(name).replace(_EVENTS, mark))
        if not fs.exists(path):
            missing.append(path)
            continue
        size = int(fs.size(path))
        if name not in end:
            if not has_only_version(fs, path):
                fs.mv(path, beside)
                dropped.append(beside)
        elif size < end[name]:
            missing.append(path)
        elif size > end[name]:
            data = fs.cat_file(path)
            # With the version before it, the rest can be read once its name is changed back.
            _replace(fs, beside, data[: _first_record_nbytes(data)] + data[end[name] :])
            _replace(fs, path, data[: end[name]])
            dropped.append(beside)
    return dropped, missing


def has_only_version(fs: Any, path: str) -> bool:
    """Say whether nothing was logged into a TensorBoard file yet."""
    data = fs.cat_file(path, start=0, end=4096)
    return len(data) < 4096 and len(data) == _first_record_nbytes(data)


def _is_event_file(name: str) -> bool:
    # Names come out of the run directory, and these files are cut.
    return _EVENTS in posixpath.basename(name) and ".." not in name.split("/") and not posixpath.isabs(name)


def _writer_of(name: str) -> str | None:
    """Return host and process out of ``events.out.tfevents.<time>.<host>.<process>.<number>``."""
    _, found, rest = name.partition(f".{_EVENTS}.")
    return rest.partition(".")[2].rpartition(".")[0] if found else None


def _is_cut(name: str) -> bool:
    return name.startswith("events.") and ".dropped-attempt-" in name


def _first_record_nbytes(data: bytes) -> int:
    return int.from_bytes(data[:8], "little") + _FRAME_NBYTES


def _first_line(fs: Any, path: str) -> str:
    try:
        with fs.open(path, "rb") as file:
            return _text(file.readline()).rstrip("\r\n")
    except FileNotFoundError:
        return ""


def _columns(header: str) -> list[str]:
    return next(csv.reader([header]), [])


def _rows_within(rows: Sequence[Mapping[str, str]], position: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many rows a position comes after, and the bytes that they take."""
    names = _columns(position["header"])
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=names, extrasaction="ignore")
    nbytes, number = len(_as_csv(names, [])), 0
    while nbytes < position["nbytes"] and number < len(rows):
        file.seek(0)
        file.truncate()
        writer.writerow(rows[number])
        nbytes += len(_raw(file.getvalue()))
        number += 1
    return number, nbytes


def _as_csv(names: Sequence[str], rows: Sequence[Mapping[str, str]]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return _raw(file.getvalue())


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _replace(fs: Any, path: str, data: bytes) -> None:
    if "file" not in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        # An object appears as a whole, or not at all.
        fs.pipe_file(path, data)
        return
    path = fs._strip_protocol(path)
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    with open(temporary, "wb") as file:  # noqa: PTH123
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)  # noqa: PTH105
