"""Which kind a preprocessor is of, and the kinds of a program's own objects: values, functions, classes, modules."""

import importlib
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from functools import partial

import numpy as np
import pytest
import torch
from preprocess_functions import Mutable, Running, Standardize, Table, Window, Words, halved, scaled
from preprocess_samples import nobody, only, same_outputs, stored_and_built, tokenizer
from torch import nn

from ckptmgr.errors import (
    CorruptCheckpointError,
    FormatVersionError,
    NotAllowedError,
    StateMismatchError,
    UnsupportedStateError,
    UsageError,
)
from ckptmgr.preprocess import kinds
from ckptmgr.preprocess.class_names import source_digest
from ckptmgr.preprocess.fingerprint import fingerprint
from ckptmgr.preprocess.kinds import capture_preprocessor, find_kind, kind_of_name, register_kind
from ckptmgr.preprocess.values_kind import ValuesKind
from ckptmgr.state.capture import dry_check
from ckptmgr.state.entry import CapturedEntry


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(kinds, "_registered", [])


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (nn.Linear(1, 1), "module"),
        ({"a": 1}, "values"),
        (np.zeros(2), "values"),
        (halved, "function"),
        (partial(scaled, factor=2.0), "function"),
        (Running(), "stateful"),
        (Words(), "to-json"),
        (Table(1.0), "to-dict"),
        (Window(3), "dataclass"),
        (torch.optim.SGD([torch.zeros(1)]), "stateful"),
    ],
)
def test_a_preprocessor_is_found_by_its_type_and_then_by_its_methods(value, name):
    kind = find_kind(value)
    assert kind.name == name
    assert kind_of_name(name, kind.version) is kind


class Opaque:
    pass


@pytest.mark.parametrize("value", [Opaque(), Opaque, None, 3, "text", Words])
def test_what_has_no_kind_is_refused_with_the_ways_to_go_on(value):
    with pytest.raises(UnsupportedStateError) as error:
        find_kind(value)
    assert all(way in (error.value.next or "") for way in ("state_dict", "to_json", "register_kind"))


class OpaqueKind:
    name = "opaque"
    version = 2
    changes_in_training = False

    def handles(self, value):
        return isinstance(value, (Opaque, dict))

    def capture(self, value):
        return {}

    def build(self, tree, allow):
        return Opaque()

    def is_restorable(self, value):
        return False

    def restore(self, value, tree):
        raise NotImplementedError

    def encode(self, value, raw):
        return raw


def test_a_registered_kind_comes_before_the_built_in_ones():
    register_kind(OpaqueKind())
    assert find_kind({"a": 1}).name == "opaque"
    assert isinstance(stored_and_built(Opaque()), Opaque)
    assert find_kind([1]).name == "values"


def test_a_name_is_registered_once_and_a_kind_must_be_one():
    kind = OpaqueKind()
    register_kind(kind)
    register_kind(kind)
    with pytest.raises(UsageError, match="taken"):
        register_kind(OpaqueKind())
    with pytest.raises(UsageError, match="no kind"):
        register_kind(Opaque())


def test_a_kind_of_another_version_or_name_is_not_guessed():
    for version in (2, 0, True, "1", None):
        with pytest.raises(FormatVersionError):
            kind_of_name("values", version)
    for name in ("pickle", None, ["values"]):
        with pytest.raises(CorruptCheckpointError):
            kind_of_name(name, 1)


VALUES = {
    "vocabulary": {"<pad>": 0, "hello": 2, "world": 1},
    "list": ["b", "a"],
    "tuple": ("b", "a"),
    "counter": Counter({"b": 3, "a": 3}),
    "ordered": OrderedDict([("b", 1), ("a", 0)]),
    "default": defaultdict(list, {"a": [1]}),
    "set": {"a", "b", 3},
    "deque": deque([1, 2], maxlen=2),
    "numbers as keys": {0: "a", 1: "b", (1, 2): None},
    "statistics": {"mean": np.array([0.485, 0.456]), "std": 0.25, "nan": float("nan"), "t": torch.arange(3)},
    "large": {"mean": np.random.default_rng(0).normal(size=400)},
    "dollar": {"$tensor": "a", "": 1},
    "array": np.arange(6, dtype=np.float32).reshape(2, 3),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_with_types_and_order(name):
    value = VALUES[name]
    built = stored_and_built(value)
    assert type(built) is type(value)
    assert fingerprint(built) == fingerprint(value)
    if isinstance(value, (dict, list, tuple)):
        assert list(built) == list(value)


@pytest.mark.parametrize(
    "value", [*VALUES.values(), halved, partial(scaled, factor=2.0), Window(3), Running(), Words(["a"]), Table(1.0)]
)
def test_the_proof_of_the_first_capture_accepts_it(value):
    dry_check([CapturedEntry("preprocessor", "preprocessor", 1, capture_preprocessor(value))])


def test_what_is_built_shares_nothing_with_the_tree():
    value = {"mean": np.zeros(2), "names": ["a"]}
    tree = capture_preprocessor(value)
    built = kinds.build_preprocessor(tree, nobody)
    built["mean"][0] = 1.0
    built["names"].append("b")
    assert value["mean"][0] == 0.0
    assert value["names"] == ["a"]


def test_a_vocabulary_encodes_tokens_and_never_replaces_one_silently():
    vocabulary = VALUES["vocabulary"]
    kind = find_kind(vocabulary)
    assert kind.encode(vocabulary, ["world", "hello"]).tolist() == [[1, 2]]
    assert kind.encode(["b", "a"], ("a", "b")).tolist() == [[1, 0]]
    with pytest.raises(UsageError, match="'World'"):
        kind.encode(vocabulary, ["hello", "World"])
    with pytest.raises(UsageError, match="not yet split"):
        kind.encode(vocabulary, "hello world")
    for value in (VALUES["statistics"], VALUES["counter"]):
        with pytest.raises(UsageError, match="encode="):
            kind.encode(value, ["a"])


def test_an_entry_for_unknown_tokens_counts_where_the_caller_names_it():
    kind = ValuesKind(kinds.PARTS, unknown="<pad>")
    register_kind(kind)
    assert find_kind(VALUES["vocabulary"]) is kind
    assert find_kind(VALUES["vocabulary"]).encode(VALUES["vocabulary"], ["world", "World"]).tolist() == [[1, 0]]
    assert find_kind({"a": 0}).name == "values"


def test_several_preprocessors_in_a_dict_are_one():
    value = {"text": tokenizer(), "number": {"mean": 1.5}, "clean": halved}
    built = stored_and_built(value, only(halved))
    assert built["text"].to_str() == value["text"].to_str()
    assert built["number"] == value["number"]
    assert built["clean"] is halved
    with pytest.raises(NotAllowedError):
        stored_and_built(value)


def test_what_cannot_be_stored_inside_of_values_is_named_with_its_place():
    with pytest.raises(UnsupportedStateError, match=r"preprocessor\.steps\[1\]"):
        capture_preprocessor({"steps": [1, Opaque()]})
    endless = []
    endless.append(endless)
    with pytest.raises(UnsupportedStateError, match="32 levels"):
        capture_preprocessor(endless)


def test_a_container_takes_a_saved_state_in_place():
    for live, saved in (({"a": 1}, {"b": 2}), ([1], [2, 3]), ({1}, {2}), (Counter("a"), Counter("bb"))):
        find_kind(live).restore(live, saved)
        assert live == saved
    with pytest.raises(StateMismatchError):
        find_kind((1,)).restore((1,), (2,))


def test_functions_come_back_by_name_and_partials_with_their_arguments():
    assert stored_and_built(halved, only(halved)) is halved
    made = partial(scaled, factor=3.0, shift=np.float64(1.0))
    built = stored_and_built(made, only(scaled))
    assert built(2) == made(2) == 7.0
    assert find_kind(halved).encode(halved, [2.0, 4.0]).tolist() == [1.0, 2.0]
    with pytest.raises(NotAllowedError):
        stored_and_built(halved)


def test_a_function_that_has_changed_since_is_not_built():
    tree = capture_preprocessor(halved)
    with pytest.raises(StateMismatchError, match="source has changed"):
        kinds.build_preprocessor(tree, lambda name: scaled)


SOURCES = {
    "as it was": "def f(x):\n    return x + 1\n",
    "with comments": "def f(x):  # adds\n\n    # one\n    return x + 1  # yes\n",
    "another number": "def f(x):\n    return x + 2\n",
    "a text": 'def f(x):\n    return """a\n\n# b"""\n',
    "another text": 'def f(x):\n    return """a\n\n# c"""\n',
    "a text without a blank line": 'def f(x):\n    return """a\n# b"""\n',
}


def test_comments_and_blank_lines_do_not_change_a_function_and_all_else_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    digests = {}
    for number, (name, source) in enumerate(SOURCES.items()):
        (tmp_path / f"source_{number}.py").write_text(source)
        module = importlib.import_module(f"source_{number}")
        digests[name] = source_digest(module.f)
        monkeypatch.delitem(sys.modules, module.__name__)
    assert digests["as it was"] == digests["with comments"]
    assert len(set(digests.values())) == len(SOURCES) - 1
    assert source_digest(len) is None


def test_functions_that_nobody_could_import_are_refused_with_a_hint():
    def local(row):
        return row

    for function in (local, lambda row: row, partial(local, 1), [].append, Words().encode):
        with pytest.raises(UnsupportedStateError) as error:
            capture_preprocessor(function)
        assert "module" in (error.value.next or "")


def test_a_dataclass_comes_back_with_all_fields_and_without_its_constructor():
    made = Window(2, names={"a": 1})
    object.__setattr__(made, "made", 9)
    built = stored_and_built(made, only(Window))
    assert built == made
    assert built.made == 9
    assert find_kind(made).encode(made, [1.0, 2.0, 3.0]).tolist() == [0.5, 1.5]
    with pytest.raises(NotAllowedError):
        stored_and_built(made)


def test_a_dataclass_is_restored_in_place_unless_it_is_frozen():
    live = Mutable(1)
    find_kind(live).restore(live, find_kind(live).capture(Mutable(5)))
    assert live.size == 5
    with pytest.raises(StateMismatchError, match="frozen"):
        find_kind(Window(1)).restore(Window(1), find_kind(Window(1)).capture(Window(2)))


def test_a_dataclass_whose_fields_have_changed_since_names_them():
    tree = capture_preprocessor(Mutable(1))
    tree["state"]["fields"] = {"height": 1}
    with pytest.raises(StateMismatchError, match="Mutable") as error:
        kinds.build_preprocessor(tree, only(Mutable))
    assert "height" in (error.value.why or "")
    assert "size" in (error.value.why or "")


@pytest.mark.parametrize("made", [Words(["b", "a"]), Table(0.25), Running()])
def test_objects_with_methods_of_their_own_come_back_and_are_restored(made):
    if isinstance(made, Running):
        made.mean = 4.0
    built = stored_and_built(made, only(type(made)))
    assert type(built) is type(made)
    assert vars(built) == vars(made)
    live = type(made)(1.0) if isinstance(made, Table) else type(made)()
    kind = find_kind(live)
    kind.restore(live, kind.capture(made))
    assert vars(live) == vars(made)
    with pytest.raises(NotAllowedError):
        stored_and_built(made)


def test_an_object_that_neither_can_be_called_nor_encodes_needs_encode():
    assert find_kind(Words()).encode(Words(["a", "b"]), ["b"]).tolist() == [[1]]
    assert find_kind(Running()).encode(Running(), 2.0) == torch.tensor(2.0)
    with pytest.raises(UsageError, match="encode="):
        find_kind(Table(1.0)).encode(Table(1.0), 2.0)


class NeedsArguments(Running):
    def __init__(self, size):
        super().__init__()


def test_a_class_that_cannot_be_built_from_its_state_alone_says_so():
    with pytest.raises(StateMismatchError, match="from the checkpoint alone"):
        stored_and_built(NeedsArguments(3), only(NeedsArguments))


def test_a_module_comes_back_with_attributes_ties_and_temporary_buffers():
    made = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Standardize([1.0, 2.0, 3.0], eps=0.5), nn.Dropout(0.25))
    made.append(made[0])
    made.add_module("tied", nn.Linear(3, 3, bias=False))
    made.tied.weight = made[0].weight
    made[0].bias.requires_grad_(False)
    made[1](torch.randn(8, 3))
    made[2].scratch.fill_(7.0)
    built = stored_and_built(made, only(Standardize))
    assert [type(part) for part in built] == [type(part) for part in made]
    assert built[4] is built[0]
    assert built.tied.weight is built[0].weight
    assert [p.requires_grad for p in built.parameters()] == [p.requires_grad for p in made.parameters()]
    assert built[2].eps == 0.5
    assert "2.scratch" not in built.state_dict()
    x = torch.randn(4, 3)
    assert same_outputs(find_kind(built).encode(built, x), made.eval()(x).detach())
    with pytest.raises(NotAllowedError):
        stored_and_built(made)


def test_the_mode_of_a_module_is_no_part_of_it_and_what_is_built_predicts():
    made = nn.Dropout(0.5)
    assert fingerprint(capture_preprocessor(made.train())) == fingerprint(capture_preprocessor(made.eval()))
    assert not stored_and_built(made.train()).training


class WithOpaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.helper = Opaque()


def test_a_module_with_an_attribute_without_stored_form_is_restored_and_not_built():
    made, live = WithOpaque(), WithOpaque()
    nn.init.ones_(made.weight)
    find_kind(live).restore(live, find_kind(made).capture(made))
    assert live.weight.tolist() == [1.0, 1.0]
    with pytest.raises(UnsupportedStateError, match="from the checkpoint alone") as error:
        stored_and_built(made, only(WithOpaque))
    assert "'helper'" in (error.value.why or "")
