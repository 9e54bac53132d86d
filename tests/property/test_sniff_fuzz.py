"""Whatever is in a file: it is described in bounded time and memory, nothing is raised and nothing runs."""

from __future__ import annotations

import functools
import io
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from sniff_samples import FOREIGN, Runs, net

from ckptmgr.diagnose.pickle_machine import describe_pickle
from ckptmgr.diagnose.sniff import KINDS, sniff

unhurried = settings(deadline=None, max_examples=60)
PEAK_MIB = 200
LIMIT_S = 20
_watched = {"on": False}


@functools.cache
def _audit_hook() -> None:
    # An audit hook cannot be removed again: it is set once, and sleeps between the tests.
    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if _watched["on"] and event in (
            "os.system",
            "subprocess.Popen",
            "pickle.find_class",
            "os.posix_spawn",
            "os.exec",
        ):
            raise SystemError(f"{event} {arguments}")

    sys.addaudithook(audit)


@contextmanager
def nothing_runs() -> Iterator[None]:
    _audit_hook()
    _watched["on"] = True
    try:
        yield
    finally:
        _watched["on"] = False


def torch_bytes(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@functools.cache
def samples() -> dict[str, bytes]:
    state = net().state_dict()
    array = io.BytesIO()
    joblib.dump({"a": np.ones(3), "b": [1, 2]}, array)
    found = {
        "torch-zip": torch_bytes(state),
        "torch-legacy": torch_bytes(state, _use_new_zipfile_serialization=False),
        "module": torch_bytes(net()),
        "pickle": pickle.dumps({"a": 1, "m": net()}),
        "old-pickle": pickle.dumps([1, {"a": (2, 3)}, Runs()], 0),
        "hostile": pickle.dumps(Runs()),
        "joblib": array.getvalue(),
        "safetensors": save(state),
    }
    for name in ("model.gguf", "model.h5", "model.onnx", "model.keras", "flax.msgpack"):
        found[name] = (FOREIGN / name).read_bytes()
    for name in ("tf_saved_model/saved_model.pb", "tf_checkpoint/ckpt-1.index"):
        found[name] = (FOREIGN / name).read_bytes()
    return found


def described(data: bytes) -> str:
    """Have a file recognised, and check that it costs little."""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        file.write(data)
        file.flush()
        began = time.process_time()
        with nothing_runs():
            artifact = sniff(file.name)
        assert time.process_time() - began < LIMIT_S
    assert artifact.kind in KINDS
    assert all(text.isprintable() for text in (artifact.title, *artifact.problems, *artifact.advice))
    return artifact.kind


def peak_of(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@unhurried
@given(st.binary(max_size=300))
def test_random_bytes_are_described(data: bytes) -> None:
    described(data)


MAGICS = [
    b"PK\x03\x04",
    b"GGUF",
    b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08\0",
    b"\x93NUMPY\x01\0",
    b"\x80\x04",
    b"\x80\x02",
    b"(",
]
MAGICS += [
    b"\x1f\x8b\x08",
    b"BZh9",
    b"\xfd7zXZ\0",
    b"\x78\x9c",
    b"\x40\0\0\0\0\0\0\0{",
    b"\x82\xa1a",
    b"\x08\x08",
    b"PK\x05\x06",
]


@unhurried
@given(st.sampled_from(MAGICS), st.binary(max_size=300))
def test_random_bytes_behind_the_first_ones_of_a_format_are_described(magic: bytes, data: bytes) -> None:
    described(magic + data)


@unhurried
@given(st.data())
def test_real_files_with_changed_bytes_are_described(data: st.DataObject) -> None:
    content = bytearray(samples()[data.draw(st.sampled_from(sorted(samples())))])
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, content[at] ^ 1, content[at] ^ 0x80]))
    described(bytes(content))


@unhurried
@given(st.data())
def test_real_files_with_a_piece_moved_are_described(data: st.DataObject) -> None:
    content = samples()[data.draw(st.sampled_from(sorted(samples())))]
    start, stop, to = sorted(data.draw(st.lists(st.integers(0, len(content)), min_size=3, max_size=3)))
    described(content[:start] + content[stop:to] + content[start:stop] + content[to:])


@pytest.mark.parametrize("name", sorted(samples()))
def test_a_file_that_is_cut_off_anywhere_is_described(name: str) -> None:
    whole = samples()[name]
    step = max(1, len(whole) // 60)
    kinds = {described(whole[:stop]) for stop in range(0, len(whole), step)}
    assert kinds - {"empty"}
    assert described(whole) not in ("unknown", "text", "empty")


INSTRUCTIONS = [bytes([code]) for code in b"()0.12NQR]abdelostu}\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"]
INSTRUCTIONS += [
    b"cos\nsystem\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"q\x00",
    b"h\x00",
]
INSTRUCTIONS += [
    b"\x8c\x02os",
    b"\x8c\x06system",
    b"K\x05",
    b"I1\n",
    b"S'x'\n",
    b"cbuiltins\ngetattr\n",
    b"\x80\x04",
    b"P1\n",
]
INSTRUCTIONS += [
    b"ctorch\nFloatStorage\n",
    b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n",
    b"ctorch.storage\n_load_from_bytes\n",
]
INSTRUCTIONS += [b"C\x02\x80\x02", b"X\x07\x00\x00\x00storage", b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"\x82\x01"]


@unhurried
@given(st.lists(st.sampled_from(INSTRUCTIONS), max_size=60))
def test_any_order_of_instructions_is_followed(parts: list[bytes]) -> None:
    data = b"\x80\x04" + b"".join(parts) + b"."
    facts = describe_pickle(data)
    assert facts.is_complete or facts.problems
    described(data)


BOMBS = {
    "lists of lists": b"\x80\x04]" + b"\x94]\x94h\x00h\x00\x86" * 200_000 + b".",
    "empty dicts": b"\x80\x04(" + b"}" * 3_000_000 + b"l.",
    "memo": b"\x80\x04N" + b"\x94" * 3_000_000 + b".",
    "marks": b"\x80\x04" + b"(" * 3_000_000 + b".",
    "numbers": b"\x80\x04(" + b"G\x3f\xf0\0\0\0\0\0\0" * 1_000_000 + b"l.",
    "wide emoji": b"\x80\x04(" + (b"X\x00\x00\x01\x00" + "😀".encode() + b"a" * 65532) * 500 + b"l.",
    "one text again and again": b"\x80\x04c_codecs\nencode\nq\x00X\x00\x00\x01\x00"
    + b"a" * 65536
    + b"\x8c\x06latin1\x86q\x01"
    + b"h\x00h\x01R" * 300_000
    + b".",
    "one list again and again": b"\x80\x04ccollections\nOrderedDict\nq\x00("
    + b"]" * 50_000
    + b"l\x85q\x01"
    + b"h\x00h\x01R" * 300_000
    + b".",
    "names": b"\x80\x04" + b"".join(b"cm%d\nx%d\n" % (n, n) for n in range(100_000)) + b".",
    "json lists": (12_000_000).to_bytes(8, "little") + b'{"a":' + b"[]," * 4_000_000,
}


def _diamond() -> bytes:
    # Each dict holds the one before twice: 2**60 ways lead to the innermost.
    levels = b"".join(b"}(\x8c\x01xh%c\x8c\x01yh%cuq%c" % (n, n, n + 1) for n in range(60))
    return b"\x80\x04\x8c\x01vq\x00" + levels + b"."


def _zip_bomb() -> bytes:
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x/data.pkl", "w") as file:
        for _ in range(300):
            file.write(b"\x80\x04" + b"0" * ((1 << 20) - 2))
    return buffer.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_what_would_grow_without_bound_is_given_up(tmp_path: Path) -> None:
    for name, content in {**BOMBS, "a diamond": _diamond(), "zip of zeros": _zip_bomb()}.items():
        (tmp_path / name).write_bytes(content)
    program = (
        "import sys, time; from pathlib import Path; from ckptmgr.diagnose.sniff import sniff\n"
        "for file in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    began = time.process_time(); artifact = sniff(file); spent = time.process_time() - began\n"
        "    peak = int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) >> 10\n"
        "    print(f'{peak} {spent:.1f} {artifact.kind} {file.name}')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    assert {line[3] for line in lines} == {*BOMBS, "a diamond", "zip of zeros"}
    # The interpreter and what it has imported are in it.
    assert max(int(line[0]) for line in lines) < PEAK_MIB, done.stdout
    assert max(float(line[1]) for line in lines) < LIMIT_S, done.stdout


def test_a_thousand_changes_of_a_pickle_never_hide_what_it_runs() -> None:
    generator = random.Random(0)
    whole = pickle.dumps({"a": [1, 2, {"b": net().state_dict()}], "z": Runs()}, 4)
    for _ in range(1000):
        content = bytearray(whole)
        content[generator.randrange(len(content))] = generator.randrange(256)
        imported: list[str] = []

        class Watching(pickle.Unpickler):
            found = imported

            def find_class(self, module: str, name: str) -> Any:
                self.found.append(f"{module}.{name}")
                return lambda *arguments, **options: None

        with suppress(Exception):
            Watching(io.BytesIO(bytes(content))).load()
        told = {".".join(name) for name in describe_pickle(bytes(content)).globals}
        assert set(imported) <= told


@pytest.mark.skipif(shutil.disk_usage(tempfile.gettempdir()).free < 1 << 30, reason="needs a sparse file")
def test_a_large_file_is_not_read_as_a_whole(tmp_path: Path) -> None:
    with (tmp_path / "x.safetensors").open("wb") as file:
        header = b'{"a":{"dtype":"U8","shape":[8589934592],"data_offsets":[0,8589934592]}}'
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (8 << 30))
    assert (tmp_path / "x.safetensors").stat().st_size > 8 << 30
    began = time.process_time()
    assert peak_of(lambda: sniff(tmp_path / "x.safetensors")) < 8 << 20
    assert time.process_time() - began < LIMIT_S
