"""Where a class or function would be imported from, found without importing anything, not even its package."""

from __future__ import annotations

import ast
import difflib
import importlib.machinery
import importlib.util
import inspect
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

__all__ = ["source_texts", "where_is"]

_MAX_SOURCE_NBYTES = 2 << 20
_MAX_FILES = 300
_MAX_SEARCHED_NBYTES = 8 << 20
_EXTENSIONS: Final = tuple(importlib.machinery.EXTENSION_SUFFIXES)


def where_is(module: str, name: str) -> str | None:
    """Return where a global was looked for, or why it is not importable here; None where it is Python's own.

    Args:
        module: ``my_project.models``.
        name: Its qualified name in it: ``Net``, ``Net.Block``.
    """
    top = module.partition(".")[0]
    if module == "__main__":
        return "it was defined in the script or notebook that saved it, which nobody can import"
    if not all(part.isidentifier() for part in module.split(".")):
        return "this is not a module's name"
    if top in sys.stdlib_module_names:
        return None
    folders, file = _top_level(top)
    if folders is None and file is None:
        here = _in_current_folder(top)
        return f"{top} is not importable here" + (f": {here}" if here else "")
    for part in module.split(".")[1:]:
        found = _inside(folders or (), part)
        if found is None:
            text = f"{module} is not importable here: {_place(folders, file)} has no {part}"
            package = folders[0] if folders else None
            elsewhere = _defined_elsewhere(package, "", name.partition(".")[0]) if package else None
            return f"{text}, but {elsewhere} has a {name}" if elsewhere else text
        folders, file = found
    if file is None:
        return f"found {_place(folders, file)}, a folder without code"
    if not file.endswith(".py"):
        return f"found {_place(None, file)}"
    return _in_source(file, name, package=_package_folder(file, module))


def source_texts(full_name: str) -> list[str]:
    """Return the source of a class, as `inspect.getsource` would; several texts where it is defined several times.

    Looked for on Python's path, and then in the current directory. Empty where it is not found.

    Args:
        full_name: ``my_project.models.Net``, or ``my_project.models.Net.Block``.
    """
    parts = full_name.split(".")
    if not all(part.isidentifier() for part in parts):
        return []
    for depth in range(len(parts) - 1, 0, -1):
        file = _file_of(parts[:depth])
        tree = _parsed(file) if file is not None else None
        if file is None or tree is None:
            continue
        wanted = ".".join(parts[depth:])
        lines = io.StringIO(_source(file), newline=None).readlines()
        return [
            "".join(inspect.getblock(lines[min([node.lineno, *(it.lineno for it in node.decorator_list)]) - 1 :]))
            for node, prefix in _statements(tree.body, "")
            if isinstance(node, ast.ClassDef) and prefix + node.name == wanted
        ]
    return []


def _file_of(module: Sequence[str]) -> str | None:
    """Return the source file of a module."""
    folders, file = _top_level(module[0])
    if folders is None and file is None:
        folders, file = _inside([_here()], module[0]) or (None, None)
    for part in module[1:]:
        folders, file = _inside(folders or (), part) or (None, None)
    return file if file is not None and file.endswith(".py") else None


def _top_level(name: str) -> tuple[Sequence[str] | None, str | None]:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None, None
    if spec is None:
        return None, None
    file = spec.origin if spec.origin not in (None, "built-in", "frozen", "namespace") else None
    return (list(spec.submodule_search_locations) if spec.submodule_search_locations else None), file


def _in_current_folder(top: str) -> str | None:
    try:
        here = Path.cwd()
        exists = (here / top).is_dir() or (here / f"{top}.py").is_file()
    except OSError:
        return None
    return "it lies in the current directory, which is not on Python's path (PYTHONPATH=.)" if exists else None


def _inside(folders: Sequence[str], part: str) -> tuple[Sequence[str] | None, str | None] | None:
    # A name of a file may be longer than any file's.
    with suppress(OSError, ValueError):
        for folder in folders:
            base = Path(folder, part)
            if base.is_dir():
                init = base / "__init__.py"
                return [str(base)], str(init) if init.is_file() else None
            for ending in (".py", *_EXTENSIONS):
                file = base.with_name(base.name + ending)
                if file.is_file():
                    return None, str(file)
    return None


def _place(folders: Sequence[str] | None, file: str | None) -> str:
    """Return a file as it is below the entry of Python's path, or the current directory, that it was found in."""
    path = file or (folders[0] if folders else "it")
    for entry in sorted({*sys.path, _here()}, key=len, reverse=True):
        if entry and path.startswith(entry.rstrip("/") + "/"):
            return path[len(entry.rstrip("/")) + 1 :]
    return path


def _here() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def _package_folder(file: str, module: str) -> str | None:
    """Return the folder of the top-level package that a module's file belongs to."""
    path = Path(file)
    depth = module.count(".") + (1 if path.name == "__init__.py" else 0)
    return str(path.parents[depth - 1]) if depth else None


def _in_source(file: str, name: str, *, package: str | None) -> str:
    place = _place(None, file)
    scope = _names_in(file)
    if scope is None:
        return f"found {place}, which cannot be read"
    defined, imported, is_open = scope
    first = name.partition(".")[0]
    if name in defined:
        return f"found in {place}"
    if first in imported:
        return f"found in {place}, imported there"
    if is_open and first not in defined:
        return f"found {place}, which may take {first} from elsewhere"
    kind = "class" if first[:1].isupper() else "function"
    missing = name if first in defined else first
    text = f"{place} has no {kind} {missing} any more"
    near = difflib.get_close_matches(missing, sorted(other for other in defined if len(other) < 200), 1, 0.6)
    if not near and kind == "class":
        classes = sorted(other for other in defined if other[:1].isupper() and "." not in other)
        near = classes if len(classes) == 1 else []
    elsewhere = _defined_elsewhere(package, file, first) if package and first not in defined else None
    if elsewhere:
        return f"{text}, but {elsewhere} has one"
    return f"{text} (it has {near[0]})" if near else text


@lru_cache(maxsize=64)
def _names_in(file: str) -> tuple[frozenset[str], frozenset[str], bool] | None:
    """Return what a source file defines, what it imports, and whether it may have further names."""
    tree = _parsed(file)
    if tree is None:
        return None
    defined: set[str] = set()
    imported: set[str] = set()
    is_open = False
    for node, prefix in _statements(tree.body, ""):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            defined.add(prefix + node.name)
            is_open = is_open or (not prefix and node.name == "__getattr__")
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and not prefix:
            for alias in node.names:
                imported.add((alias.asname or alias.name).partition(".")[0])
                is_open = is_open or alias.name == "*"
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(defined), frozenset(imported), is_open or "globals()" in _source(file)


def _statements(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[ast.stmt, str]]:
    pending: list[tuple[ast.stmt, str]] = [(node, prefix) for node in reversed(body)]
    while pending:
        node, inside = pending.pop()
        yield node, inside
        if isinstance(node, ast.ClassDef):
            pending += [(inner, f"{inside}{node.name}.") for inner in node.body]
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            blocks = [node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
            blocks += [handler.body for handler in getattr(node, "handlers", [])]
            pending += [(inner, inside) for block in blocks for inner in block]


def _source(file: str) -> str:
    try:
        with Path(file).open("rb") as stream:
            data = stream.read(_MAX_SOURCE_NBYTES + 1)
    except OSError:
        return ""
    return data.decode("utf-8", "replace") if len(data) <= _MAX_SOURCE_NBYTES else ""


def _parsed(file: str) -> ast.Module | None:
    text = _source(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text) if text else ast.Module([], [])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defined_elsewhere(package: str, file: str, name: str) -> str | None:
    """Return another file of the same package that defines the name; None if none does, or the package is large."""
    pattern = re.compile(rf"^(?:class|def) {re.escape(name)}\b", re.MULTILINE)
    budget = _MAX_SEARCHED_NBYTES
    try:
        files = []
        for root, folders, names in os.walk(package):
            folders[:] = sorted(each for each in folders if not each.startswith(".") and each != "__pycache__")
            files += [str(Path(root, each)) for each in sorted(names) if each.endswith(".py")]
            if len(files) > _MAX_FILES:
                return None
    except OSError:
        return None
    for other in files:
        if other != file and budget > 0:
            text = _source(other)
            budget -= len(text)
            if pattern.search(text):
                return _place(None, other)
    return None
