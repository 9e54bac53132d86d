"""Snapshots: what lies in the files, in which order, and what comes back."""

import json
from argparse import Namespace

import numpy as np
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from saved_state import InMemoryReader, bits, file_bytes, reader_of, saved
from torch import nn

from ckptmgr.errors import CorruptCheckpointError, UnsupportedStateError
from ckptmgr.state.capture import capture_state, dry_check
from ckptmgr.state.entry import CapturedEntry
from ckptmgr.state.handlers import HandlerRegistry
from ckptmgr.state.read_entries import load_entries
from ckptmgr.state.shares import Share
from ckptmgr.state.snapshot import SnapshotBuffers
from ckptmgr.state.tensors import STORED_DTYPES, tensor_from_bytes


def entry(tree: object, name: str = "extra") -> CapturedEntry:
    return CapturedEntry(name, "values", 1, tree)


def round_trip(tree: object) -> object:
    dry_check([entry(tree)])
    payloads = SnapshotBuffers().snapshot([entry(tree)])
    return load_entries(InMemoryReader([entry(tree)], payloads))["extra"].tree


def random_bits(dtype: torch.dtype, shape: tuple[int, ...] = (3, 4)) -> torch.Tensor:
    torch.manual_seed(0)
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    count = dtype.itemsize * int(np.prod(shape))
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


ODD = [torch.complex128, torch.complex32, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]


@pytest.mark.parametrize("dtype", [*STORED_DTYPES, *ODD], ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_comes_back_with_its_bits(dtype):
    tree = {"a": random_bits(dtype), "scalar": random_bits(dtype, ()), "empty": random_bits(dtype, (0, 3))}
    tree["transposed"] = random_bits(dtype).t()
    loaded = round_trip(tree)
    assert bits(loaded) == bits(tree)
    assert loaded["transposed"].stride() == tree["transposed"].stride()


def test_other_readers_of_safetensors_see_the_same_tensors():
    module = nn.Sequential(nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(3))
    payloads = SnapshotBuffers().snapshot(capture_state({"model": module}))
    assert [payload.name for payload in payloads] == ["model.safetensors", "state.json"]
    assert bits(safetensors.torch.load(file_bytes(payloads[0]))) == bits(dict(module.state_dict()))


def test_tensors_lie_wide_elements_first_without_gaps_and_aligned():
    tree = {
        name: torch.ones(3, dtype=dtype)
        for name, dtype in zip("dcba", (torch.int8, torch.float32, torch.float64, torch.float16), strict=True)
    }
    buffers = SnapshotBuffers()
    file = buffers.snapshot([entry(tree)])[0]
    assert [tensor.name for tensor in file.tensors] == ["b", "c", "a", "d"]
    whole = np.frombuffer(file.tensors[0].data, dtype=np.uint8).ctypes.data
    assert whole % 4096 == 0
    end = whole
    for tensor in file.tensors:
        start = np.frombuffer(tensor.data, dtype=np.uint8).ctypes.data
        assert start == end
        end = start + tensor.data.nbytes


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        lambda: torch.arange(9.0).reshape(1, 1, 3, 3).to(memory_format=torch.channels_last),
        lambda: torch.arange(120.0).reshape(1, 2, 3, 4, 5).to(memory_format=torch.channels_last_3d),
        lambda: torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    ],
)
def test_the_order_in_memory_comes_back(build):
    live = build()
    loaded = round_trip({"x": live})["x"]
    assert bits(loaded) == bits(live)
    assert loaded.stride() == live.stride()


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.arange(3.0).expand(4, 3),
        lambda: torch.arange(24.0).reshape(4, 6)[::2, 1:5],
        lambda: torch.arange(12.0).as_strided((3, 4), (2, 1)),
        lambda: torch.view_as_complex(torch.randn(4, 2)).conj(),
        lambda: torch.view_as_complex(torch.randn(4, 2)).conj().imag,
    ],
)
def test_views_with_holes_or_overlaps_are_stored_densely(build):
    live = build()
    loaded = round_trip({"x": live})["x"]
    assert torch.equal(loaded, live)
    assert loaded.is_contiguous()


def test_one_tensor_under_several_names_is_stored_once_and_comes_back_as_one():
    shared = torch.randn(3)
    tree = {"a": shared, "b": [shared, shared.detach()], "other view": shared[:2], "equal": shared.clone()}
    payload = SnapshotBuffers().snapshot([entry(tree)])[0]
    assert {(tensor.name, tensor.aliases) for tensor in payload.tensors} == {
        ("a", ("b/0", "b/1")),
        ("other view", ()),
        ("equal", ()),
    }
    loaded = round_trip(tree)
    assert loaded["a"] is loaded["b"][0] is loaded["b"][1]
    assert loaded["equal"] is not loaded["a"]


def test_keys_that_give_the_same_name_are_told_apart():
    tree = {1: torch.zeros(1), "1": torch.ones(1), "a/b": torch.full((1,), 2.0), "a": {"b": torch.full((1,), 3.0)}}
    tree |= {"__metadata__": torch.full((1,), 4.0), "\ud800": torch.full((1,), 5.0)}
    assert bits(round_trip(tree)) == bits(tree)


@pytest.mark.parametrize("layout", ["coo", "uncoalesced", "csr", "csc", "bsr", "bsc", "empty", "complex"])
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
def test_sparse_tensors_come_back_from_their_parts(layout):
    dense = torch.tensor([[0.0, 2.0, 0.0, 1.0], [float("nan"), 0.0, 0.0, 0.0]])
    live = {
        "coo": lambda: dense.to_sparse(),
        "uncoalesced": lambda: torch.sparse_coo_tensor([[0, 0, 1]], [1.0, 2.0, 3.0], (4,), check_invariants=True),
        "csr": lambda: dense.to_sparse_csr(),
        "csc": lambda: dense.to_sparse_csc(),
        "bsr": lambda: dense.to_sparse_bsr((2, 2)),
        "bsc": lambda: dense.to_sparse_bsc((2, 2)),
        "empty": lambda: torch.zeros(2, 3).to_sparse(),
        "complex": lambda: dense.to(torch.complex128).to_sparse(),
    }[layout]()
    loaded = round_trip({"x": live})["x"]
    assert (loaded.layout, loaded.shape, loaded.dtype) == (live.layout, live.shape, live.dtype)
    assert bits(torch.view_as_real(loaded.to_dense()) if layout == "complex" else loaded.to_dense()) == bits(
        torch.view_as_real(live.to_dense()) if layout == "complex" else live.to_dense()
    )
    if live.layout == torch.sparse_coo:
        assert loaded.is_coalesced() == live.is_coalesced()


def test_sparse_indices_outside_of_the_tensor_are_damage_not_a_crash():
    live = torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (4,), check_invariants=True)
    reader = InMemoryReader([entry({"x": live})], SnapshotBuffers().snapshot([entry({"x": live})]))
    name = "state.json"
    reader.files[name] = reader.files[name].replace(b'"shape":[4]', b'"shape":[1]')
    with pytest.raises(CorruptCheckpointError, match=r"\$sparse"):
        load_entries(reader)


class Subclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (lambda: torch.ones(2, device="meta"), "meta device"),
        (lambda: torch.ones(2, 2).to_mkldnn(), "mkldnn"),
        (lambda: torch.Tensor._make_subclass(Subclass, torch.ones(2)), "Subclass is a tensor subclass"),
        (lambda: nn.parameter.UninitializedParameter(), "run one batch"),
    ],
)
def test_tensors_without_a_stored_form_are_refused_at_the_first_capture(build, why):
    with pytest.raises(UnsupportedStateError, match="extra/a/0 is a tensor that cannot be stored") as caught:
        dry_check([entry({"a": [build()]})])
    assert why in str(caught.value)


@pytest.fixture
def mesh(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def test_a_distributed_tensor_is_stored_as_a_shard_with_its_place(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    tree = {"a": distribute_tensor(torch.arange(6.0).reshape(3, 2), mesh, [Shard(0)])}
    ours = Share(1, 2, frozenset({("extra", "a")}))
    (tensor,) = SnapshotBuffers().snapshot([entry(tree)], share=ours)[0].tensors
    assert (tensor.scope, tensor.rank, tensor.global_shape, tensor.global_offset) == ("sharded", 1, (3, 2), (0, 0))
    assert bytes(tensor.data) == torch.arange(6.0).numpy().tobytes()


def test_a_distributed_tensor_of_partial_sums_is_refused(mesh):
    from torch.distributed.tensor import DTensor, Partial

    partial = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(UnsupportedStateError, match="partial sum"):
        dry_check([entry({"a": partial})])


def test_values_of_torch_and_omegaconf_come_back():
    config = OmegaConf.create({"a": 1, "b": "${a}", "c": ["???", None]})
    tree = {
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "config": config,
        "list config": config.c,
        "namespace": Namespace(a=(1, 2), t=torch.ones(2)),
        "large": np.arange(600, dtype=np.uint16).reshape(20, 30)[:, ::-1],
        "small": np.arange(3, dtype=">f4"),
    }
    tree["large"].flags.writeable = False
    loaded = round_trip(tree)
    assert bits(loaded["namespace"].t) == bits(tree["namespace"].t)
    assert (loaded["large"] == tree["large"]).all()
    assert loaded["small"].dtype == tree["small"].dtype
    assert OmegaConf.to_container(loaded["config"], resolve=False) == {"a": 1, "b": "${a}", "c": ["???", None]}
    for name in ("dtype", "size", "device"):
        assert loaded[name] == tree[name]
        assert type(loaded[name]) is type(tree[name])


def test_buffers_are_kept_and_grow_only_when_they_must():
    buffers = SnapshotBuffers()
    live = {"w": torch.zeros(1000)}
    buffers.reserve([entry(live)])
    reserved = buffers.nbytes
    first = buffers.snapshot([entry(live)])[0].tensors[0].data
    assert buffers.nbytes == reserved == 4000
    live["w"].fill_(1.0)
    assert bytes(first) == bytes(4000), "a snapshot does not change with the live tensor"
    second = buffers.snapshot([entry(live)])[0].tensors[0].data
    assert bytes(first) == bytes(second), "the same memory is used again"
    live["m"] = torch.zeros(10)
    buffers.snapshot([entry(live)])
    assert buffers.nbytes == 4040


def test_each_entry_with_tensors_has_a_file_and_any_entry_name_is_possible():
    state = {
        "Model/Ä": nn.Linear(1, 1),
        "plain": {"a": 1},
        "opt": {"t": torch.ones(1)},
        "$odd": [1],
        "state": [torch.ones(1)],
    }
    reader = reader_of(state)
    assert list(reader.files) == [
        "entry-0000.safetensors",
        "opt.safetensors",
        "entry-0004.safetensors",
        "state.json",
    ]
    assert set(saved(state)) == set(state)
    assert json.loads(reader.files["state.json"])["entries"]["plain"] == {"a": 1}


def test_other_ranks_write_files_of_their_own():
    own = CapturedEntry("extra", "values", 1, {"t": torch.ones(1)}, scope="per-rank")
    files = SnapshotBuffers().snapshot([own, entry({"a": 1}, "shared")], share=Share(1, 2))
    assert [file.name for file in files] == ["extra-rank-00001.safetensors", "state-rank-00001.json"]
    assert (files[0].tensors[0].scope, files[0].tensors[0].rank) == ("per-rank", 1)
    assert list(json.loads(files[1].content)["entries"]) == ["extra"]


def test_of_a_replicated_entry_another_rank_writes_its_share_and_no_document():
    tree = {"t": torch.ones(1), "u": torch.ones(2)}
    files = SnapshotBuffers().snapshot([entry(tree)], share=Share(1, 2, frozenset({("extra", "u")})))
    assert [(t.name, t.scope, t.rank) for t in files[0].tensors] == [("u", "replicated", None)]
    assert json.loads(files[1].content) == {"entries": {}}


@pytest.mark.parametrize(
    "damage",
    [
        {"logical_dtype": "float99"},
        {"logical_shape": (5,)},
        {"encoding": "surprise"},
        {"shape": (3, 5)},
    ],
)
def test_a_record_that_contradicts_itself_is_damage(damage):
    import msgspec

    tree = {"x": torch.ones(3, 4, dtype=torch.complex128)}
    (record,) = InMemoryReader([entry(tree)], SnapshotBuffers().snapshot([entry(tree)])).manifest.tensors
    with pytest.raises(CorruptCheckpointError, match="cannot be rebuilt"):
        tensor_from_bytes(msgspec.structs.replace(record, **damage), memoryview(bytearray(record.nbytes)))


def test_a_document_that_refers_to_no_tensor_is_damage():
    tree = {"x": torch.ones(3)}
    reader = InMemoryReader([entry(tree)], SnapshotBuffers().snapshot([entry(tree)]))
    reader.files["state.json"] = reader.files["state.json"].replace(b'"$tensor":"x"', b'"$tensor":"y"')
    with pytest.raises(CorruptCheckpointError):
        load_entries(reader)
    reader.files["state.json"] = b'{"entries":{}}'
    with pytest.raises(CorruptCheckpointError, match="does not hold it"):
        load_entries(reader)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_of_a_gpu_come_through_page_locked_memory():
    live = {"a": torch.randn(1000, device="cuda"), "b": torch.randn(8, 4, device="cuda").t(), "c": torch.randn(3)}
    buffers = SnapshotBuffers()
    payloads = buffers.snapshot([entry(live)])
    assert bits(load_entries(InMemoryReader([entry(live)], payloads))["extra"].tree) == bits(live)
    registry = HandlerRegistry()
    assert capture_state({"extra": live}, registry=registry)[0].tree["a"].is_cuda
