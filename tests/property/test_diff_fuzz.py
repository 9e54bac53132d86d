"""A comparison with a checkpoint that somebody has forged, digests and all, ends in a result or in an error of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptmgr.cli.main import run
from ckptmgr.format.digest import block_digests, combined_digest

GOLDEN = Path(__file__).parent.parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.glob("v*"))
OURS = {0, 2, 10, 12}

WORDS = [
    "plain",
    "bits",
    "complex",
    "complex128",
    "float8_e5m2",
    "sparse_coo.values",
    "replicated",
    "sharded",
    "per-rank",
]
WORDS += ["F32", "U8", "I64", "module", "optimizer", "first.weight", "", "..", "\x1b[2J", "00" * 16]
TAGGED = [
    {"$tensor": "first.weight"},
    {"$dict": [[1, 2]]},
    {"$dict": 5},
    {"$tuple": {}},
    {"$deque": [1]},
    {"$sparse": 3},
]
TAGGED += [{"$numpy_array": ["<i4", [2], "x"]}, {"$config": {"$config": 1}}, {"$x": "\ud800"}, {"$enum": ["os", "x"]}]
odd = st.sampled_from([*WORDS, *TAGGED, None, True, -1, 0, 1, 2, 10**15, 1.5, [], {}, [0], [10**15] * 3, [1] * 80])


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(document, dict | list):
        items = document.items() if isinstance(document, dict) else enumerate(document)
        return [path, *(place for key, item in items for place in places(item, (*path, key)))]
    return [path]


def change(data: st.DataObject, document: Any) -> None:
    """Replace, remove or repeat something somewhere in a document."""
    found = places(document)[1:]
    if not found:
        return
    *outer, last = data.draw(st.sampled_from(found))
    parent = document
    for key in outer:
        parent = parent[key]
    kind = data.draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
    if kind == "remove":
        del parent[last]
    elif kind == "repeat" and isinstance(parent, list):
        parent.append(parent[last])
    else:
        parent[last] = json.loads(json.dumps(data.draw(odd)))


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(VERSIONS), st.sampled_from(VERSIONS), st.data())
def test_a_forged_checkpoint_is_compared_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str, other: str, data: st.DataObject
) -> None:
    root = tmp_path / "forged"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(GOLDEN / version, root)
    (path,) = root.glob("checkpoints/0000000007-*/manifest.json")
    manifest = json.loads(path.read_bytes())["record"]
    for file in manifest["files"]:
        if file["path"].endswith(".json") and data.draw(st.booleans()):
            document = json.loads((root / file["path"]).read_bytes())
            change(data, document)
            content = json.dumps(document).encode()
            (root / file["path"]).write_bytes(content)
            blocks = block_digests(content)
            file.update(nbytes=len(content), digest=combined_digest(blocks), blocks=blocks.hex())
    if data.draw(st.booleans()):
        record = data.draw(st.sampled_from(manifest["tensors"]))
        field = data.draw(st.sampled_from(["encoding", "scope", "rank", "logical_dtype", "aliases", "dtype", "name"]))
        record[field] = data.draw(odd)
    if data.draw(st.integers(0, 3)) == 0:
        change(data, manifest)
    body = json.dumps(manifest).encode()
    digest = combined_digest(block_digests(body)).encode()
    path.write_bytes(b'{"digest":"xxh3-128:' + digest + b'","record":' + body + b"}\n")

    pair = data.draw(st.permutations([f"{root}@7", f"{GOLDEN / other}@7"]))
    options = data.draw(st.sampled_from([[], ["--read"], ["--no-weights"], ["--json"], ["--only", "model"]]))
    status = run(["diff", *pair, *options])
    output = capsys.readouterr()
    # A version from the future is no damage.
    assert status in OURS or "FormatVersionError" in output.err, output.err
    assert "\x1b" not in output.out + output.err
