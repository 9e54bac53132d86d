"""Export to safetensors and to a plain state dict: what other tools read is what was saved."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from interop_samples import Tied, same_tensors, saved_run
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from ckptmgr.cli.main import run
from ckptmgr.errors import CorruptCheckpointError, UnsupportedStateError, UsageError
from ckptmgr.interop.export import export_checkpoint
from ckptmgr.interop.safetensors_files import parse_size
from ckptmgr.loading import load_checkpoint


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(1)
    return Tied()


@pytest.fixture
def run_dir(tmp_path: Path, model: Tied) -> Path:
    return saved_run(tmp_path / "run", {"model": model})


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".tmp"))


def test_a_module_with_tied_weights_is_loaded_back_by_safetensors(tmp_path: Path, model: Tied, run_dir: Path) -> None:
    exported = export_checkpoint(str(run_dir), str(tmp_path / "model.safetensors"), format="safetensors")
    assert exported.tied == {"head.weight": "embed.weight"}
    other = Tied()
    missing, unexpected = load_model(other, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    assert same_tensors(other.state_dict(), model.state_dict())
    assert other.head.weight is other.embed.weight


def test_the_header_says_what_transformers_looks_for_and_each_tensor_is_there_once(
    tmp_path: Path, model: Tied, run_dir: Path
) -> None:
    export_checkpoint(str(run_dir), str(tmp_path / "one.safetensors"), format="safetensors")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
        assert sorted(file.keys()) == sorted(name for name in model.state_dict() if name != "head.weight")


def test_shards_hold_at_most_the_size_and_their_index_names_every_tensor(
    tmp_path: Path, model: Tied, run_dir: Path
) -> None:
    target = tmp_path / "sharded"
    export_checkpoint(str(run_dir), str(target), format="safetensors", max_shard_size="120B")
    index = json.loads((target / "model.safetensors.index.json").read_text())
    found: dict[str, torch.Tensor] = {}
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(set(index["weight_map"].values())) == files
    for name in files:
        tensors = load_file(target / name)
        assert sum(t.nbytes for t in tensors.values()) <= 120
        assert all(index["weight_map"][key] == name for key in tensors)
        found |= tensors
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert same_tensors(found | {"head.weight": found["embed.weight"]}, dict(model.state_dict()))


def test_without_a_size_a_directory_gets_one_file_and_no_index(tmp_path: Path, run_dir: Path) -> None:
    export_checkpoint(str(run_dir), str(tmp_path / "out"), format="safetensors")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("prefix", ["model.", "model"])
def test_a_prefix_is_taken_off_and_what_lacks_it_is_said_to_be_left_out(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(1)
    outer = nn.ModuleDict({"model": Tied(), "metric": nn.Linear(1, 1)})
    run_dir = saved_run(tmp_path / "run", {"model": outer})
    exported = export_checkpoint(
        str(run_dir), str(tmp_path / "m.safetensors"), format="safetensors", strip_prefix=prefix
    )
    assert set(exported.left_out) == {"metric.weight", "metric.bias"}
    other = Tied()
    load_model(other, tmp_path / "m.safetensors")
    assert same_tensors(other.state_dict(), outer["model"].state_dict())


def test_a_prefix_that_no_name_has_is_refused(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"begins with 'net\.'"):
        export_checkpoint(str(run_dir), str(tmp_path / "m.safetensors"), format="safetensors", strip_prefix="net.")


def test_what_safetensors_cannot_hold_is_named_and_the_state_dict_holds_it(tmp_path: Path) -> None:
    module = nn.Module()
    module.register_buffer("wave", torch.ones(2, dtype=torch.complex128))
    module.register_buffer("graph", torch.eye(2).to_sparse())
    run_dir = saved_run(tmp_path / "run", {"model": module})
    with pytest.raises(UnsupportedStateError, match="2 of the tensors") as caught:
        export_checkpoint(str(run_dir), str(tmp_path / "out"), format="safetensors")
    assert "'wave' is complex128" in str(caught.value)
    assert "'graph' is sparse" in str(caught.value)
    assert not (tmp_path / "out").exists()
    export_checkpoint(str(run_dir), str(tmp_path / "out.pt"), format="state-dict")
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(state["wave"], module.wave)
    assert torch.equal(state["graph"].to_dense(), torch.eye(2))


def test_a_state_dict_loads_restricted_with_its_ties_and_versions(tmp_path: Path, model: Tied, run_dir: Path) -> None:
    export_checkpoint(str(run_dir), str(tmp_path / "model.pt"), format="state-dict")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    # BatchNorm adds a counter to the state dicts of its first version.
    assert state._metadata["norm"]["version"] == 2
    other = Tied()
    other.load_state_dict(state)
    assert same_tensors(other.state_dict(), model.state_dict())


def test_the_entry_must_be_named_where_there_are_several_modules(tmp_path: Path) -> None:
    run_dir = saved_run(tmp_path / "run", {"student": nn.Linear(1, 1), "teacher": nn.Linear(2, 1)})
    with pytest.raises(UsageError, match="2 modules"):
        export_checkpoint(str(run_dir), str(tmp_path / "m.safetensors"), format="safetensors")
    export_checkpoint(str(run_dir), str(tmp_path / "m.safetensors"), format="safetensors", entry="teacher")
    assert load_file(tmp_path / "m.safetensors")["weight"].shape == (1, 2)
    with pytest.raises(UsageError, match="no module 'ckptmgr_rng'"):
        export_checkpoint(str(run_dir), str(tmp_path / "n.safetensors"), format="safetensors", entry="ckptmgr_rng")


def test_an_existing_target_is_left_alone_unless_force_is_given(tmp_path: Path, run_dir: Path) -> None:
    for target in ("m.safetensors", "m.pt"):
        (tmp_path / target).write_text("precious")
        with pytest.raises(UsageError, match="exists already"):
            export_checkpoint(
                str(run_dir), str(tmp_path / target), format="state-dict" if target == "m.pt" else "safetensors"
            )
        assert (tmp_path / target).read_text() == "precious"
    export_checkpoint(str(run_dir), str(tmp_path / "m.safetensors"), format="safetensors", force=True)
    assert load_file(tmp_path / "m.safetensors")
    assert leftovers(tmp_path) == []


def test_force_removes_the_weights_of_an_earlier_export_and_keeps_other_files(tmp_path: Path, run_dir: Path) -> None:
    target = tmp_path / "out"
    export_checkpoint(str(run_dir), str(target), format="safetensors", max_shard_size="120B")
    (target / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        export_checkpoint(str(run_dir), str(target), format="safetensors")
    export_checkpoint(str(run_dir), str(target), format="safetensors", force=True)
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "model.safetensors"]
    assert leftovers(tmp_path) == []


def test_a_damaged_checkpoint_is_not_exported_and_leaves_nothing(tmp_path: Path, run_dir: Path) -> None:
    path = next(run_dir.glob("checkpoints/*/model.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        export_checkpoint(str(run_dir), str(tmp_path / "new" / "out"), format="safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(("format", "target"), [("safetensors", "out"), ("state-dict", "out.pt")])
def test_a_target_without_space_is_an_error_that_leaves_nothing(tmp_path: Path, format: str, target: str) -> None:
    run_dir = saved_run(tmp_path / "run", {"model": nn.Linear(300, 300)})
    code = (
        "import resource, sys\n"
        "from ckptmgr.cli.main import run\n"
        "import ckptmgr.interop.export\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"sys.exit(run(['export', {str(run_dir)!r}, {str(tmp_path / target)!r}, '--format', {format!r}]))"
    )
    assert resource.RLIMIT_FSIZE
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "StorageError [storage]: cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_export_goes_to_an_object_store(tmp_path: Path, model: Tied, run_dir: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    target = f"memory://{tmp_path.name}/out"
    export_checkpoint(str(run_dir), target, format="safetensors", max_shard_size="120B")
    files = fsspec.filesystem("memory").ls(f"/{tmp_path.name}/out", detail=False)
    assert any(name.endswith("index.json") for name in files)
    with pytest.raises(UsageError, match="exists already"):
        export_checkpoint(str(run_dir), target, format="safetensors")
    export_checkpoint(str(run_dir), target, format="safetensors", force=True)
    assert [name.rpartition("/")[2] for name in fsspec.filesystem("memory").ls(f"/{tmp_path.name}/out", False)] == [
        "model.safetensors"
    ]


GOLDEN_RANKS = Path(__file__).parent.parent / "golden" / "v2"


@pytest.mark.parametrize("size", [None, "50B"])
def test_what_two_ranks_have_saved_in_shards_is_exported_whole(tmp_path: Path, size: str | None) -> None:
    expected = load_checkpoint(str(GOLDEN_RANKS), names=["model"]).entries["model"].tree["tensors"]
    assert expected["last.weight"].shape == (4, 4)
    export_checkpoint(str(GOLDEN_RANKS), str(tmp_path / "out"), format="safetensors", max_shard_size=size)
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "pt") as file:
        assert file.metadata()["format"] == "pt"
    tied = {"tied.weight": found["last.weight"]} if "tied.weight" not in found else {}
    assert same_tensors(found | tied, dict(expected))
    export_checkpoint(str(GOLDEN_RANKS), str(tmp_path / "out.pt"), format="state-dict")
    assert same_tensors(dict(torch.load(tmp_path / "out.pt", weights_only=True)), dict(expected))


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    module = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(16))
    run_dir = saved_run(tmp_path / "run", {"model": module})
    tracemalloc.start()
    export_checkpoint(str(run_dir), str(tmp_path / "m.safetensors"), format="safetensors")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Sixteen tensors of 1 MiB; one that is read, and one that is about to be.
    assert (tmp_path / "m.safetensors").stat().st_size > 16 << 20
    assert peak < 4 << 20


@pytest.mark.parametrize(
    ("text", "nbytes"), [("2GB", 2 * 10**9), ("2GiB", 2 * 2**30), ("1.5 kB", 1500), ("100B", 100), ("5mb", 5 * 10**6)]
)
def test_sizes_mean_what_they_mean_to_hugging_face(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0GB", "2", "-1GB", "2 giga"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no size"):
        parse_size(text)


def test_the_command_chooses_the_format_by_the_target_and_prints_json(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(run_dir), str(tmp_path / "m.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["m.pt"]
    assert torch.load(tmp_path / "m.pt", weights_only=True)
    assert run(["export", f"{run_dir}@1", str(tmp_path / "m.safetensors")]) == 0
    captured = capsys.readouterr()
    assert "head.weight is embed.weight" in captured.err
    assert captured.out.startswith("exported ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["m.pt", "--max-shard-size", "1GB"],
        ["m.safetensors", "--max-shard-size", "1GB"],
        ["m.ckpt", "--entry", "model"],
        ["m.ckpt"],
        ["out", "--format", "huggingface"],
    ],
)
def test_options_that_make_no_sense_together_are_wrong_usage(
    tmp_path: Path, run_dir: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    target, *options = arguments
    assert run(["export", str(run_dir), str(tmp_path / target), *options]) == 2
    assert "next:" in capsys.readouterr().err
    assert not (tmp_path / target).exists()
