"""Trees from damaged and hostile checkpoints: refused with one of our errors, and nothing in them is imported."""

import contextlib
import copy
import io
import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from preprocess_functions import Clip, Running, Table, Window, Words, halved
from preprocess_samples import bert_tokenizer, fast_tokenizer, nobody, only, sentence_pieces, tokenizer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import nn

from ckptmgr.errors import CkptmgrError, CorruptCheckpointError, NotAllowedError
from ckptmgr.preprocess.kinds import build_preprocessor, capture_preprocessor
from ckptmgr.preprocess.skops_file import canonical_skops, check_skops, readable_skops
from ckptmgr.preprocess.stored_files import checked_file, write_files
from ckptmgr.state.stored_file import StoredFile

ROWS = np.random.default_rng(0).normal(size=(9, 2))
NAMES = ["../x", "/etc/passwd", "a/b", "a\\b", "", ".", "..", ".hidden", "x\0", "a\n", "ü", "a" * 129, "-rf"]


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that notes its import."""
    (tmp_path / "trapped.py").write_text("class Evil:\n    pass\ndef evil(*a): raise SystemExit('caught')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "trapped"
    assert "trapped" not in sys.modules


@pytest.mark.parametrize("name", NAMES)
def test_a_file_whose_name_leaves_the_directory_is_refused(name, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(CorruptCheckpointError, match="a file of the name"):
        write_files([StoredFile(name, b"x")], inside)
    assert list(inside.iterdir()) == []
    assert list(tmp_path.iterdir()) == [inside]


def test_what_is_no_file_and_a_file_that_comes_twice_are_refused(tmp_path):
    for item in (b"x", {"name": "a", "content": b""}, StoredFile("a", "text"), None):
        with pytest.raises(CorruptCheckpointError):
            checked_file(item)
    with pytest.raises(CorruptCheckpointError, match="twice"):
        write_files([StoredFile("a", b"1"), StoredFile("a", b"2")], tmp_path)
    assert (tmp_path / "a").read_bytes() == b"1"


def test_files_of_a_tokenizer_with_other_names_are_refused(tmp_path):
    tree = capture_preprocessor(fast_tokenizer())
    tree["state"]["files"]["../../evil.json"] = StoredFile("../../evil.json", b"{}")
    with pytest.raises(CorruptCheckpointError):
        build_preprocessor(tree, nobody)


@pytest.mark.parametrize(
    "config",
    [
        {"vocab_file": "/etc/passwd"},
        {"tokenizer_file": "../../secret.json"},
        {"fast_tokenizer_files": ["../../tokenizer.4.0.json"]},
        {"init_inputs": ["/etc/passwd"]},
        [],
    ],
)
def test_a_tokenizer_that_names_other_files_is_refused(config, tmp_path):
    tree = capture_preprocessor(bert_tokenizer(tmp_path))
    content = json.dumps({"model_max_length": 10, **config} if isinstance(config, dict) else config).encode()
    tree["state"]["files"]["tokenizer_config.json"] = StoredFile("tokenizer_config.json", content)
    with pytest.raises(CorruptCheckpointError):
        build_preprocessor(tree, nobody)


@pytest.mark.parametrize("where", ["at the top", "inside"])
def test_code_that_comes_with_a_tokenizer_is_refused(where, tmp_path, trap):
    tree = capture_preprocessor(bert_tokenizer(tmp_path))
    code = {"auto_map": {"AutoTokenizer": ["trapped.Evil", None]}}
    config = {"tokenizer_class": "Evil", **(code if where == "at the top" else {"image_processor": [code]})}
    files = tree["state"]["files"]
    files["tokenizer_config.json"] = StoredFile("tokenizer_config.json", json.dumps(config).encode())
    files["trapped.py"] = StoredFile("trapped.py", b"raise SystemExit('caught')\n")
    with pytest.raises(CorruptCheckpointError, match="auto_map"):
        build_preprocessor(tree, nobody)


@pytest.mark.parametrize(
    "name",
    [
        "transformers.Trainer",
        "transformers.AutoTokenizer",
        "transformers.pipeline",
        "transformers.utils.logging",
        "os.system",
    ],
)
def test_a_class_that_is_no_tokenizer_is_refused(name):
    tree = capture_preprocessor(fast_tokenizer())
    tree["state"]["class"] = name
    with pytest.raises((CorruptCheckpointError, NotAllowedError)):
        build_preprocessor(tree, nobody)


@pytest.mark.parametrize("make", [tokenizer, sentence_pieces, lambda: StandardScaler().fit(ROWS)])
def test_a_truncated_file_is_refused(make):
    tree = capture_preprocessor(make())
    file = tree["state"]["file"]
    for size in (1, len(file.content) // 2, len(file.content) - 1):
        tree["state"]["file"] = StoredFile(file.name, file.content[:size])
        with pytest.raises(CorruptCheckpointError):
            build_preprocessor(tree, nobody)


def with_schema(change):
    """Return a captured scaler whose schema was changed."""
    tree = capture_preprocessor(Pipeline([("s", StandardScaler()), ("f", FunctionTransformer(halved))]).fit(ROWS))
    members = check_skops(tree["state"]["file"].content)
    schema = json.loads(members.pop("schema.json"))
    change(schema)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("schema.json", json.dumps(schema))
    tree["state"]["file"] = StoredFile("preprocessor.skops", stream.getvalue())
    return tree


def nodes_of(node):
    if isinstance(node, dict):
        if isinstance(node.get("__loader__"), str):
            yield node
        for item in node.values():
            yield from nodes_of(item)
    elif isinstance(node, list):
        for item in node:
            yield from nodes_of(item)


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_a_class_that_skops_does_not_trust_needs_leave_whatever_the_protocol(trap, protocol):
    def change(schema):
        schema["protocol"] = protocol
        for node in nodes_of(schema):
            if node["__loader__"] == "FunctionNode":
                node.update({"__module__": trap, "__class__": "evil"})
                # As the first protocol had it.
                node["content"] = {"module_path": trap, "function": "evil"}

    with pytest.raises(NotAllowedError, match="trapped"):
        build_preprocessor(with_schema(change), nobody)


@pytest.mark.parametrize("name", ["numpy.dtype", "numpy.mean", "builtins.frozenset"])
def test_what_is_harmless_for_one_loader_is_not_for_another(name):
    def change(schema):
        node = next(node for node in nodes_of(schema) if node.get("__class__") == "StandardScaler")
        node["__module__"], node["__class__"] = name.split(".")

    with pytest.raises(NotAllowedError, match=name):
        build_preprocessor(with_schema(change), only(halved))


def test_every_node_of_a_skops_file_that_is_turned_into_foreign_code_is_refused(trap):
    count = len(
        list(nodes_of(json.loads(check_skops(with_schema(lambda _: None)["state"]["file"].content)["schema.json"])))
    )
    assert count > 50
    for place in range(count):

        def change(schema, place=place):
            node = list(nodes_of(schema))[place]
            if node["__loader__"] != "JsonNode":
                node.update({"__module__": trap, "__class__": "Evil"})

        with contextlib.suppress(CkptmgrError):
            build_preprocessor(with_schema(change), only(halved))


def test_a_skops_file_that_unpacks_to_more_than_it_is_is_refused():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("schema.json", b"{}" + b" " * 50_000_000)
    with pytest.raises(ValueError, match="compressed"):
        check_skops(stream.getvalue())


def array_file(shape, dtype="<f8"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize(
    "content", [array_file((10**12,)), array_file((2**62, 4)), array_file((1,), "|O"), b"no array"]
)
def test_an_array_that_pretends_to_be_large_or_holds_objects_is_refused(content):
    for name in ("1.npy", "1.npz"):
        inner = content
        if name == "1.npz":
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w") as archive:
                archive.writestr("data.npy", content)
            inner = stream.getvalue()
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr(name, inner)
            archive.writestr("schema.json", b"{}")
        with pytest.raises(ValueError):
            check_skops(stream.getvalue())


def test_a_skops_file_with_a_deep_schema_is_refused():
    tree = with_schema(lambda _: None)
    deep = b'{"content":' * 5000 + b"1" + b"}" * 5000
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("schema.json", deep)
    with pytest.raises((ValueError, RecursionError)):
        readable_skops(stream.getvalue())
    tree["state"]["file"] = StoredFile("preprocessor.skops", stream.getvalue())
    with pytest.raises(CorruptCheckpointError):
        build_preprocessor(tree, nobody)


def test_a_recorded_class_that_is_not_the_one_in_the_file_is_refused():
    tree = capture_preprocessor(StandardScaler().fit(ROWS))
    tree["state"]["class"] = "sklearn.preprocessing._data.MinMaxScaler"
    with pytest.raises(CorruptCheckpointError, match="recorded as"):
        build_preprocessor(tree, nobody)


def test_a_rewritten_skops_file_is_one_that_skops_reads_and_rewriting_again_changes_nothing():
    content = capture_preprocessor(StandardScaler().fit(ROWS))["state"]["file"].content
    assert canonical_skops(content) == content


@pytest.mark.parametrize(
    "state",
    [
        {"class": "trapped.Evil", "settings": {}},
        {"class": "trapped.Evil", "state": {}},
        {"class": "trapped.Evil", "fields": {}},
        {"function": "trapped.evil", "source": None},
        {"modules": {"": {"class": "trapped.Evil", "settings": {}}}, "state": {}},
        {"class": "trapped.Evil", "files": {}, "settings": {}},
        {"class": "trapped.Evil", "file": StoredFile("sentencepiece.model", b""), "options": {}},
        {"ckptmgr:type": "trapped.Evil"},
        [{"ckptmgr:enum": ["trapped.Evil", "A"]}],
        [
            {
                "ckptmgr:part": {
                    "kind": "function",
                    "kind_version": 1,
                    "state": {"function": "trapped.evil", "source": None},
                }
            }
        ],
    ],
)
@pytest.mark.parametrize(
    "kind",
    ["transforms", "stateful", "dataclass", "function", "module", "transformers", "sentencepiece", "values", "to-json"],
)
def test_a_name_in_a_tree_is_not_imported_without_leave(kind, state, trap):
    tree = {"kind": kind, "kind_version": 1, "class": "trapped.Evil", "source": None, "state": copy.deepcopy(state)}
    try:
        build_preprocessor(tree, nobody)
    except CkptmgrError:
        return
    assert kind == "values"


def test_attributes_that_are_part_of_the_machinery_of_modules_are_refused():
    for name in ("_forward_hooks", "_modules", "__class__", "training"):
        tree = capture_preprocessor(nn.Linear(2, 2))
        tree["state"]["modules"][""]["settings"][name] = {}
        with pytest.raises(CorruptCheckpointError):
            build_preprocessor(tree, nobody)


def test_a_module_class_that_is_no_module_is_refused():
    tree = capture_preprocessor(nn.Linear(2, 2))
    for name in ("builtins.object", "torch.nn.modules.linear.system", "torch.nn.modules.Parameter"):
        tree["state"]["modules"][""]["class"] = name
        with pytest.raises(CkptmgrError):
            build_preprocessor(tree, nobody)


JUNK = [
    None,
    True,
    -1,
    10**30,
    1.5,
    "",
    "x",
    b"x",
    [],
    [[]],
    {},
    {"a": {}},
    (),
    np.zeros(3),
    torch.zeros(2),
    {"ckptmgr:type": 1},
]


def places_of(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, item in items:
        yield from places_of(item, (*path, key))


def replaced(tree, path, junk):
    if not path:
        return junk
    key, *rest = path
    if isinstance(tree, tuple):
        return tuple(replaced(item, rest, junk) if index == key else item for index, item in enumerate(tree))
    changed = copy.copy(tree)
    changed[key] = replaced(tree[key], rest, junk)
    return changed


@pytest.mark.parametrize(
    "make",
    [
        tokenizer,
        sentence_pieces,
        lambda: StandardScaler().fit(ROWS),
        lambda: Pipeline([("clip", Clip())]),
        lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
        lambda: halved,
        lambda: Window(3),
        Words,
        lambda: Table(1.0),
        Running,
        lambda: {"a": 0, "f": halved, "k": [1, (2, {3})]},
        lambda: __import__("pandas").DataFrame({"x": [1.5], "c": ["a"], "i": [1]}).astype({"c": "category"}),
    ],
)
def test_a_tree_with_junk_at_any_place_is_built_or_refused_with_one_of_our_errors(make):
    tree = capture_preprocessor(make())
    allow = only(halved, Clip, Window, Words, Table, Running)
    refused = 0
    for path in places_of(tree):
        for junk in JUNK:
            try:
                build_preprocessor(replaced(tree, path, junk), allow)
            except CkptmgrError:
                refused += 1
    assert refused > 50


def test_the_json_of_a_tokenizer_with_junk_at_any_place_is_built_or_refused():
    tree = capture_preprocessor(tokenizer(vocab_size=40))
    document = json.loads(tree["state"]["file"].content)
    for path in places_of({key: item for key, item in document.items() if key != "model"}):
        for junk in (None, True, -1, 10**30, "", "x", [], [[]], {}):
            content = json.dumps(replaced(document, path, junk)).encode()
            tree["state"]["file"] = StoredFile("tokenizer.json", content)
            try:
                build_preprocessor(tree, nobody)
            except CkptmgrError:
                continue
