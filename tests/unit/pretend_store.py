"""An object store in memory that misbehaves on request."""

from __future__ import annotations

from typing import Any, ClassVar

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

__all__ = ["PretendStore", "UploadedFile"]


class UploadedFile(AbstractBufferedFile):
    """Collects parts and publishes them when it is closed, as object stores do."""

    fs: PretendStore

    def _initiate_upload(self) -> None:
        self.parts: list[bytes] = []
        self.fs.uploads.append(self)

    def _upload_chunk(self, final: bool = False) -> bool:
        self.fs.happen("part", self.path)
        self.parts.append(self.buffer.getvalue())
        if final:
            self.fs.happen("complete", self.path)
            self.fs.objects[self.path] = b"".join(self.parts)
            self.fs.uploads.remove(self)
        return True

    def discard(self) -> None:
        if self in self.fs.uploads:
            self.fs.uploads.remove(self)


class PretendStore(AbstractFileSystem):
    """An object store. Each test gets its own, because state hangs on the class."""

    protocol = "pretend"
    cachable = False
    objects: ClassVar[dict[str, bytes]]
    uploads: ClassVar[list[UploadedFile]]
    #: Errors to raise, by operation; taken from the front, None for no error.
    errors: ClassVar[dict[str, list[Exception | None]]]
    #: Errors to raise after the operation has taken effect.
    lost_replies: ClassVar[dict[str, list[Exception | None]]]
    calls: ClassVar[list[str]]
    options: ClassVar[list[dict[str, Any]]]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.options.append(options)

    def happen(self, operation: str, path: str, *, after: bool = False) -> None:
        if not after:
            self.calls.append(operation)
        pending = (self.lost_replies if after else self.errors).get(operation)
        error = pending.pop(0) if pending else None
        if error is not None:
            raise error

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self.happen("ls", path)
        base = f"{path.rstrip('/')}/"
        found: dict[str, dict[str, Any]] = {}
        for name, content in self.objects.items():
            if name.startswith(base):
                first, separator, _rest = name.removeprefix(base).partition("/")
                kind = "directory" if separator else "file"
                found[base + first] = {"name": base + first, "size": len(content), "type": kind}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self.happen("info", path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.objects[path]), "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self.happen("cat_file", path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self.happen("pipe_file", path)
        if mode == "create" and path in self.objects:
            raise self.conflict(path)
        self.objects[path] = value
        self.happen("pipe_file", path, after=True)

    def conflict(self, path: str) -> Exception:
        return FileExistsError(path)

    def rm_file(self, path: str) -> None:
        self.happen("rm_file", path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        del self.objects[path]

    def _open(self, path: str, mode: str = "rb", block_size: int = 0, **options: Any) -> UploadedFile:
        self.happen("open", path)
        return UploadedFile(self, path, mode, block_size=block_size)
