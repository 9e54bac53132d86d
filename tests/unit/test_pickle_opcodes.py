"""A pickle is followed to its end: every global that it would import is named, and nothing of it runs."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import pickletools
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from torch._weights_only_unpickler import _get_allowed_globals

from ckptmgr.diagnose.known_globals import PLAIN, verdict_of
from ckptmgr.diagnose.pickle_facts import PickleLimits
from ckptmgr.diagnose.pickle_machine import describe_pickle
from ckptmgr.diagnose.pickle_values import Array, Dict, Object, Tensor
from ckptmgr.diagnose.sniff import sniff


def dangerous(data: bytes) -> list[str]:
    return [".".join(name) for name in describe_pickle(data).globals if verdict_of(*name) == "dangerous"]


class Runs:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def test_the_plain_globals_are_those_of_torchs_restricted_loading() -> None:
    assert set(_get_allowed_globals()) == PLAIN
    assert {verdict_of(*name.rsplit(".", 1)) for name in PLAIN if not name.startswith("torch.nn.")} == {"plain"}


@pytest.mark.parametrize("protocol", range(6))
def test_values_of_every_protocol_are_what_they_were(protocol: int) -> None:
    value = {
        "none": None,
        "flags": [True, False],
        "numbers": (0, 1, -1, 255, 65535, 2**31, -(2**40), 2**100, 0.5),
        "text": "ä€😀 'quoted' \\ \n",
        "empty": ((), [], {}),
        "nested": {"a": {"b": [1, (2, {"c": 3})]}},
        "ordered": collections.OrderedDict(x=1, y=2),
    }
    facts = describe_pickle(pickle.dumps(value, protocol))
    assert facts.is_complete
    assert facts.problems == []
    root = facts.root
    assert root.keys() == list(value)
    assert root.get("flags") == [True, False]
    assert root.get("numbers") == value["numbers"]
    assert root.get("text") == value["text"]
    assert root.get("nested").get("a").get("b")[1][1].get("c") == 3
    assert root.get("ordered").keys() == ["x", "y"]


@pytest.mark.parametrize("protocol", range(6))
def test_every_instruction_is_followed_to_the_same_end_as_pythons_own_reader(protocol: int) -> None:
    value = [argparse.Namespace(a=1), {1, 2}, b"x" * 300, "y" * 300, random.Random(0).getstate(), frozenset("ab"), 1j]
    data = pickle.dumps(value, protocol)
    facts = describe_pickle(data + b"trailing")
    assert facts.end == len(data)
    assert facts.ninstructions == len(list(pickletools.genops(data)))
    assert facts.root[0].of == "argparse.Namespace"


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_of_the_system_is_found_in_every_protocol(protocol: int) -> None:
    assert dangerous(pickle.dumps(Runs(os.system, "true"), protocol)) == ["posix.system"]


HIDDEN = {
    "a name out of the memo": b"\x80\x04"
    + text("os")
    + b"\x94"
    + text("system")
    + b"\x940h\x00h\x01\x93"
    + text("true")
    + b"\x85R.",
    "memo entries in another order": b"\x80\x04"
    + text("system")
    + b"q\x05"
    + text("os")
    + b"q\x070"
    + b"0h\x07h\x05\x93"
    + text("true")
    + b"\x85R.",
    "escaped characters": b"S'\\x6f\\x73'\nS'syst\\145m'\n\x93(S'true'\ntR.",
    "unicode escapes": b"V\\u006fs\nVsystem\n\x93(S'true'\ntR.",
    "an instance": b"(S'true'\nios\nsystem\n.",
    "an object": b"(cos\nsystem\nS'true'\no.",
    "a new object": b"\x80\x02cos\nsystem\nU\x04true\x85\x81.",
    "duplicated": b"cos\nsystem\n2(S'true'\ntR0.",
    "taken off the stack again": b"cos\nsystem\n(S'true'\ntR0N.",
    "behind a number that is written oddly": b"I0x10\n0cos\nsystem\n(S'true'\ntR.",
    "in a frame": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n(S'true'\ntR.",
    "cut off behind the call": b"cos\nsystem\n(S'true'\ntR",
    "an attribute of a harmless module": b"\x80\x04"
    + text("pathlib")
    + text("os.system")
    + b"\x93"
    + text("true")
    + b"\x85R.",
    "a module within another one": b"ctorch.nn.functional\nwarnings\n.",
    "an old name": b"c__builtin__\neval\n(S'1'\ntR.",
    "an old module": b"ccommands\ngetoutput\n(S'true'\ntR.",
    "a method that deletes files": b"\x80\x04" + text("pathlib") + text("Path.unlink") + b"\x93.",
    "changed attributes": b"ctorch.nn.modules.linear\nLinear\n}S'forward'\nNsb.",
}


@pytest.mark.parametrize("how", HIDDEN)
def test_a_dangerous_global_is_found_however_it_is_hidden(how: str) -> None:
    facts = describe_pickle(HIDDEN[how])
    assert facts.globals
    found = [name for name, words in facts.globals.items() if verdict_of(*name) == "dangerous" or "replaced" in words]
    assert found, facts.globals


@pytest.mark.parametrize(
    "data",
    [
        # The unpickler in C takes this for `os.system`, that in Python refuses it, `pickletools` reads another name.
        b"\x80\x04\x95" + struct.pack("<Q", 5) + b"cxxxxos\nsystem\n\x8c\x04true\x85R.",
        b"\x80\x04\x95" + struct.pack("<Q", 4) + b"\x8c\x06ab" + text("os")[2:] + b"abcdef.",
        b"\x80\x04\x95" + struct.pack("<Q", 20) + b"N0\x95" + struct.pack("<Q", 4) + b"N0N0N0N0N.",
    ],
)
def test_what_pythons_own_readers_take_for_different_instructions_is_told(data: bytes, tmp_path: Path) -> None:
    assert describe_pickle(data).is_ambiguous
    (tmp_path / "x.pkl").write_bytes(data)
    artifact = sniff(tmp_path / "x.pkl")
    assert "cannot be told what unpickling it would run" in artifact.problems[0]
    assert artifact.advice[0].startswith("do not load it")


def test_names_that_are_reached_through_getattr_are_followed() -> None:
    chain = (
        b"\x80\x04"
        + text("builtins")
        + text("getattr")
        + b"\x93"
        + text("builtins")
        + text("__import__")
        + b"\x93"
        + text("os")
        + b"\x85R"
        + text("popen")
        + b"\x86R"
        + text("true")
        + b"\x85R."
    )
    facts = describe_pickle(chain)
    assert ("os", "popen") in facts.globals
    assert facts.globals["builtins", "getattr"] == "here of 'os' and 'popen'"
    assert facts.globals["builtins", "__import__"] == "here of 'os'"


def test_names_that_are_reached_through_attrgetter_are_followed() -> None:
    data = b"coperator\nattrgetter\n(S'system'\ntR(cposix\n__name__\ntR."
    assert ("posix.__name__", "system") in describe_pickle(data).globals


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "posix.popen",
        "nt.system",
        "subprocess.Popen",
        "builtins.eval",
        "builtins.exec",
        "builtins.getattr",
        "builtins.__import__",
        "builtins.open",
        "builtins.something_new",
        "runpy.run_path",
        "sys.modules",
        "socket.create_connection",
        "shutil.rmtree",
        "ctypes.CDLL",
        "torch.hub.load",
        "importlib.import_module",
        "operator.attrgetter",
        "numpy.testing._private.utils.runstring",
        "pty.spawn",
        "webbrowser.open",
        "pip.main",
        "code.interact",
        "pickle.loads",
        "marshal.loads",
        "types.FunctionType",
        "functools.reduce",
        "linecache.getline",
        "zipfile.ZipFile",
        "torch.load",
        "torch.fx.graph_module.reduce_graph_module",
        "torch.utils.collect_env.run",
        "bdb.Bdb",
        "my_project.eval",
    ],
)
def test_what_runs_commands_or_reads_files_is_dangerous(name: str) -> None:
    assert verdict_of(*name.rsplit(".", 1)) == "dangerous"


@pytest.mark.parametrize(
    "name",
    [
        "my_project.Net",
        "argparse.Namespace",
        "pathlib.PosixPath",
        "numpy.ndarray",
        "numpy.core.multiarray._reconstruct",
        "collections.defaultdict",
        "functools.partial",
        "torch.nn.modules.linear.Linear",
        "datetime.datetime",
        "sklearn.ensemble._forest.RandomForestClassifier",
        "builtins.object",
        "copyreg._reconstructor",
        "__main__.Net",
        "omegaconf.dictconfig.DictConfig",
        "transformers.trainer_utils.IntervalStrategy",
        "logging.getLogger",
    ],
)
def test_what_only_makes_an_object_is_code(name: str) -> None:
    assert verdict_of(*name.rsplit(".", 1)) == "code"


def test_extension_numbers_are_named_as_what_nobody_can_tell() -> None:
    assert describe_pickle(b"\x80\x02\x82\x07)R.").globals == {
        ("copyreg", "extension[7]"): "by its number in a registry"
    }


def test_nothing_of_a_pickle_runs_or_is_imported(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    hostile = tmp_path / "hostile_module.py"
    hostile.write_text(f"open({str(marker)!r}, 'w')\nclass Net: pass\n")
    command = f"touch {marker}"
    for number, data in enumerate(
        [
            pickle.dumps(Runs(os.system, command)),
            pickle.dumps(Runs(eval, f"open({str(marker)!r}, 'w')")),
            b"chostile_module\nNet\n)\x81.",
            b"\x80\x04" + text("os") + b"\x94" + text("system") + b"\x940h\x00h\x01\x93" + text(command) + b"\x85R.",
        ]
    ):
        (tmp_path / f"{number}.pkl").write_bytes(data)
    torch.save({"weights": torch.ones(2), "extra": Runs(os.system, command)}, tmp_path / "4.pt")
    program = """
import sys
from pathlib import Path
from ckptmgr.diagnose.sniff import sniff
watched = ("os.system", "subprocess.Popen", "exec", "pickle.find_class", "os.exec", "os.posix_spawn", "os.fork")
def audit(event, arguments):
    if event in watched and not (event == "exec" and "importlib" in str(sys._getframe(1).f_globals.get("__name__"))):
        raise SystemExit(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise SystemExit(f"{event} {arguments}")
sys.path.insert(0, sys.argv[1])
sniff(str(Path(sys.argv[1], "0.pkl")))
sys.addaudithook(audit)
kinds = [sniff(str(file)).globals[0].verdict for file in sorted(Path(sys.argv[1]).glob("?.p*"))]
assert kinds == ["dangerous", "dangerous", "code", "dangerous", "dangerous"], kinds
assert "hostile_module" not in sys.modules and "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert not marker.exists()


def test_tensors_in_a_plain_pickle_are_listed_and_their_storages_examined() -> None:
    module = torch.nn.Linear(2, 3)
    facts = describe_pickle(pickle.dumps(module))
    weight = facts.root.state.get("_parameters").get("weight")
    assert (weight.dtype, weight.shape) == ("float32", (3, 2))
    assert facts.globals["torch.storage", "_load_from_bytes"] == ""


@pytest.mark.parametrize(
    "inside", [b"PK\x03\x04 no pickle\n.", pickle.dumps(Runs(os.system, "true"), 2), b"", b"\x80\x02K\x01."]
)
def test_bytes_that_torch_would_unpickle_and_that_cannot_be_examined_are_told(inside: bytes) -> None:
    data = b"\x80\x04ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(inside)) + inside + b"\x85R."
    words = describe_pickle(data).globals["torch.storage", "_load_from_bytes"]
    assert words == "it unpickles bytes that could not be examined"


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_are_listed_without_their_elements(protocol: int) -> None:
    value = {"a": np.zeros((3, 4), np.float32), "b": np.arange(5), "c": np.array([True])}
    root = describe_pickle(pickle.dumps(value, protocol)).root
    assert [(v.dtype, v.shape) for _, v in root.items()] == [("float32", (3, 4)), ("int64", (5,)), ("bool", (1,))]


def test_arrays_of_joblib_between_the_instructions_are_passed(tmp_path: Path) -> None:
    value = {"a": np.ones((3, 4)), "o": np.array([{}, None], dtype=object), "v": np.zeros(3, "f4,i8"), "after": 7}
    joblib.dump(value, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    facts = describe_pickle(data)
    assert facts.is_complete
    assert facts.end == len(data)
    assert facts.has_joblib_arrays
    assert facts.root.get("a").shape == (3, 4)
    assert facts.root.get("o").dtype == "object"
    assert facts.root.get("after") == 7


def test_what_joblib_would_skip_is_read_as_instructions_too(tmp_path: Path) -> None:
    joblib.dump({"a": np.zeros(64, np.uint8)}, tmp_path / "x")
    data = bytearray((tmp_path / "x").read_bytes())
    wrapper = data.index(b"numpy_array_alignment_bytes")
    build = data.index(b"ub", wrapper) + 2
    data[build:] = b"cos\nsystem\n(S'true'\ntR.".ljust(len(data) - build, b".")
    assert dangerous(bytes(data)) == ["os.system"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cut off"),
        (b"\x80\x04", "cut off"),
        (b"\x80\x02X\xff\xff\xff\x7fabc", "cut off"),
        (b"\x80\x04\x8d" + b"\xff" * 8, "cut off"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 10**15), "cut off"),
        (b"\x80\x02h\x07.", "memo"),
        (b"\x80\x02t.", "mark is missing"),
        (b"\x80\x02R.", "stack"),
        (b"\x80\x02(R.", "stack"),
        (b"\x80\x02.", "stack"),
        (b"\x80\x02\xff.", "no instruction"),
        (b"g" + b"9" * 5000 + b"\n.", "digits"),
        (b"gx\n.", "no number"),
        (b"(o.", "without a class"),
    ],
)
def test_what_is_no_pickle_is_told_and_never_raised(data: bytes, words: str) -> None:
    facts = describe_pickle(data)
    assert not facts.is_complete
    assert any(words in problem for problem in facts.problems), facts.problems


@pytest.mark.parametrize(
    ("data", "limits", "words"),
    [
        (b"N0" * 100 + b"N.", PickleLimits(max_instructions=50), "50 instructions"),
        (b"]" * 100 + b".", PickleLimits(max_objects=50), "50 objects"),
        (b"\x80\x04N" + b"\x94" * 100 + b".", PickleLimits(max_memo=50), "50 entries"),
        (b"V0123456789\n" * 100 + b".", PickleLimits(max_text_nbytes=50), "50 bytes"),
        (b"".join(b"ca\nb%d\n" % n for n in range(100)) + b".", PickleLimits(max_globals=50), "50 names"),
    ],
)
def test_more_than_is_followed_is_told(data: bytes, limits: PickleLimits, words: str) -> None:
    facts = describe_pickle(data, limits=limits)
    assert not facts.is_complete
    assert words in facts.problems[0]


def test_a_shape_that_no_memory_holds_is_only_a_number() -> None:
    buffer = io.BytesIO()
    torch.save(torch.ones(1), buffer, _use_new_zipfile_serialization=False)
    big = b"\x8a\x07" + (10**15).to_bytes(7, "little")
    data = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
        b"X\x03\x00\x00\x00cpu" + big + b"tQK\x00(" + big + b"t(K\x01t\x89}tR."
    )
    root = describe_pickle(data).root
    assert isinstance(root, Tensor)
    assert root.shape == (10**15,)


def test_a_tuple_that_is_nested_a_million_times_costs_no_stack() -> None:
    facts = describe_pickle(b"\x80\x02)" + b"\x85" * 300_000 + b".")
    assert facts.is_complete
    assert isinstance(facts.root, tuple)


def test_objects_of_unknown_classes_keep_their_state() -> None:
    root = describe_pickle(pickle.dumps(argparse.Namespace(lr=0.1, name="x"))).root
    assert isinstance(root, Object)
    assert isinstance(root.state, Dict)
    assert root.state.get("lr") == 0.1
    assert isinstance(describe_pickle(pickle.dumps(np.ones(2))).root, Array)
