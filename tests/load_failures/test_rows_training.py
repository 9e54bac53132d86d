"""Rows 6 to 11: training goes on elsewhere, in another precision, with other versions or another optimizer."""

from __future__ import annotations

import copy
import itertools
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from row_samples import Net, doctor, restored, same, saved, train_one
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptmgr import Checkpointer, Selection, StateMismatchError, load_inference, training_run
from ckptmgr.errors import FormatVersionError
from ckptmgr.format.digest import block_digests, combined_digest
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.environment import recorded_versions
from ckptmgr.storage.open import open_storage

Log = pytest.LogCaptureFixture
Output = pytest.CaptureFixture[str]

# Row 6


def test_row_06_a_file_that_names_a_gpu_is_read_without_one(tmp_path: Path, capsys: Output) -> None:
    # What torch.save writes on a GPU, made without one: the tag of each storage says where it was.
    net = Net()
    torch.serialization.register_package(0, lambda _: "cuda:3", lambda *_: None)
    try:
        torch.save(net.state_dict(), tmp_path / "gpu.pt")
    finally:
        torch.serialization._package_registry.pop(0)
    with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
        torch.load(tmp_path / "gpu.pt", weights_only=True)
    status, found = doctor(capsys, tmp_path / "gpu.pt")
    assert status == 0
    assert found["details"]["devices"] == ["cuda:3"]
    (line,) = (line for line in found["advice"] if "load_state_dict" in line)
    live = Net()
    exec(line, {"model": live, "torch": torch})
    assert same(live.state_dict(), net.state_dict())
    from ckptmgr.interop.import_run import import_run

    import_run(str(tmp_path / "gpu.pt"), str(tmp_path / "run"))
    assert same(restored(tmp_path / "run", Net()).state_dict(), net.state_dict())


def test_row_06_nothing_that_we_store_names_a_device(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    train_one(net, optimizer)
    run_dir = saved(tmp_path / "run", {"model": net, "optimizer": optimizer})
    (folder,) = run_dir.glob("checkpoints/*")
    for path in folder.iterdir():
        assert b'"device"' not in path.read_bytes().replace(b'"device":null', b"")
    assert load_file(folder / "model.safetensors").keys() == net.state_dict().keys()


def test_row_06_values_are_put_into_the_live_tensors_wherever_those_are(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    train_one(net, optimizer)
    run_dir = saved(tmp_path / "run", {"model": net, "optimizer": optimizer})
    live = Net()
    before = {name: (id(it), it.data_ptr()) for name, it in live.named_parameters()}
    other = torch.optim.AdamW(live.parameters())
    Checkpointer(tmp_path / "next", {"model": live, "optimizer": other}).restore(str(run_dir))
    assert {name: (id(it), it.data_ptr()) for name, it in live.named_parameters()} == before
    for parameter, slots in other.state.items():
        assert slots["exp_avg"].device == parameter.device
    # The meta device holds no values: said, and not silently so.
    with pytest.raises(StateMismatchError, match="materialise it first"):
        restored(run_dir, Net().to("meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("before", "now"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_row_06_between_cpu_and_gpu_values_stay(before: str, now: str, tmp_path: Path) -> None:
    net, live = Net().to(before), Net().to(now)
    optimizer, other = (torch.optim.AdamW(it.parameters(), fused=it is net) for it in (net, live))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    run_dir = saved(tmp_path / "run", {"model": net, "optimizer": optimizer})
    Checkpointer(tmp_path / "next", {"model": live, "optimizer": other}).restore(str(run_dir))
    found = moments(live, other)
    assert {it.device.type for it in (*live.state_dict().values(), *found.values())} == {now}
    assert same(
        {name: it.cpu() for name, it in found.items()}, {n: it.cpu() for n, it in moments(net, optimizer).items()}
    )
    assert same(live.cpu().state_dict(), net.cpu().state_dict())


# Row 7


@pytest.mark.parametrize(
    ("before", "now"), list(itertools.permutations([torch.float32, torch.bfloat16, torch.float16], 2))
)
def test_row_07_another_dtype_is_named_and_never_cast_unasked(
    before: torch.dtype, now: torch.dtype, tmp_path: Path
) -> None:
    run_dir = saved(tmp_path / "run", {"model": Net().to(before)})
    live = Net().to(now)
    built = copy.deepcopy(live.state_dict())
    with pytest.raises(StateMismatchError) as refusal:
        restored(run_dir, live)
    one, other = (str(dtype).removeprefix("torch.") for dtype in (before, now))
    assert f"'head.weight' is {one} (5, 6) in the checkpoint, {other} (5, 6) now" in str(refusal.value)
    assert same(live.state_dict(), built)
    with pytest.raises(StateMismatchError):
        load_inference(str(run_dir), model=live)


def test_row_07_a_cast_is_made_on_request_and_its_loss_is_told(tmp_path: Path, caplog: Log) -> None:
    net = Net()
    with torch.no_grad():
        net.head.weight.fill_(1.0)
        net.head.weight[0, :3] = torch.tensor([1.00390625, 1e6, -1e6])
        net.head.weight[1, :2] = torch.tensor([1e-12, 2e-12])
        net.body[0].weight.fill_(1 / 3)
    run_dir = saved(tmp_path / "run", {"model": net})
    live = restored(run_dir, Net().half(), selection=Selection(dtype="live"))
    assert torch.equal(live.get_parameter("head.weight"), net.head.weight.half())
    (told,) = (message for message in caplog.messages if " cast from " in message)
    assert "from float32 to float16" in told
    assert "2 values became infinite or no number (most in model/head.weight)" in told
    assert "2 values became zero (most in model/head.weight)" in told
    worst = max(
        ((one.half().double() - one.double()) / one.double()).abs().max().item()
        for one in (net.body[0].weight, net.body[0].bias, net.head.bias)
    )
    assert f"rounded by up to {worst:.2g} of themselves" in told


def test_row_07_a_cast_that_loses_nothing_is_said_to(tmp_path: Path, caplog: Log) -> None:
    net = Net().bfloat16()
    run_dir = saved(tmp_path / "run", {"model": net})
    live = restored(run_dir, Net(), selection=Selection(dtype="live"))
    assert same(live.bfloat16().state_dict(), net.state_dict())
    (told,) = (message for message in caplog.messages if " cast from " in message)
    assert told.endswith("; no value has changed")


def test_row_07_moments_that_vanish_in_the_cast_are_told(tmp_path: Path, caplog: Log) -> None:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    train_one(net, optimizer)
    optimizer.state[net.head.bias]["exp_avg_sq"].fill_(1e-10)
    run_dir = saved(tmp_path / "run", {"model": net, "optimizer": optimizer})
    live = Net().half()
    other = torch.optim.Adam(live.parameters())
    Checkpointer(tmp_path / "next", {"model": live, "optimizer": other}).restore(
        str(run_dir), selection=Selection(dtype="live")
    )
    (told,) = (message for message in caplog.messages if " cast from " in message)
    assert " values became zero (most in optimizer/state/model/" in told


def test_row_07_the_model_can_take_the_dtype_of_the_checkpoint_instead(tmp_path: Path) -> None:
    net = Net().bfloat16()
    run_dir = saved(tmp_path / "run", {"model": net})
    live = restored(run_dir, Net(), selection=Selection(dtype="saved"))
    assert same(live.state_dict(), net.state_dict())


def test_row_07_the_doctor_lists_dtypes_that_differ(tmp_path: Path, monkeypatch: Any, capsys: Output) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Linear(3, 2).bfloat16().state_dict(), "half.pt")
    arguments = ("--model-arg", "in_features=3", "--model-arg", "out_features=2")
    status, found = doctor(capsys, "half.pt", "--model", "torch.nn:Linear", *arguments)
    assert status == 1
    assert "weight: bfloat16 in the file, float32 in torch.nn:Linear" in found["text"]


# Row 8


@pytest.fixture
def other_versions(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Save as a process with other versions would; undone, the versions are the real ones."""
    versions = {**recorded_versions(), "torch": "9.1.0", "numpy": "1.24.0", "lightning": "1.9.0", "python": "3.10.4"}
    with monkeypatch.context() as patched:
        patched.setattr(training_run, "recorded_versions", lambda: versions)
        yield patched


def test_row_08_versions_are_in_the_manifest(tmp_path: Path) -> None:
    run_dir = saved(tmp_path / "run", {"model": Net()})
    environment = Catalog(open_storage(run_dir)).latest().environment
    assert environment["torch"] == torch.__version__
    assert environment["numpy"] == np.__version__
    assert {"python", "lightning", "ckptmgr", "safetensors", "machine"} <= environment.keys()


def test_row_08_drift_is_graded_and_stands_beside_the_failure(
    tmp_path: Path, caplog: Log, other_versions: Any, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "run", {"model": Net()})
    other_versions.undo()
    with pytest.raises(StateMismatchError) as refusal:
        load_inference("run", model=lambda: Net(9))
    assert "head.weight" in str(refusal.value)
    assert f"not as it was then: torch 9.1.0 -> {torch.__version__}" in str(refusal.value)
    with pytest.raises(StateMismatchError), Checkpointer("run", {"model": Net(9)}) as ckpt:
        ckpt.resume()
    (told,) = (message for message in caplog.messages if message.startswith("not as it was when"))
    graded = [line.split(": ")[0].strip() for line in told.splitlines()[1:]]
    assert graded == sorted(graded, key=["breaking", "warning", "info"].index)
    assert "warning: torch 9.1.0" in told
    assert any(line.strip().startswith("info: ") for line in told.splitlines())
    text = doctor(capsys, "run")[1]["text"]
    assert "not as it was when it was written, the likeliest cause of a failure first" in text
    assert "warning: torch 9.1.0" in text


def test_row_08_a_newer_format_is_refused_and_says_so(tmp_path: Path) -> None:
    from ckptmgr.diagnose.drift import grade

    run_dir = saved(tmp_path / "run", {"model": Net()})
    (manifest,) = run_dir.glob("checkpoints/*/manifest.json")
    body = manifest.read_bytes().partition(b'"record":')[2].removesuffix(b"}\n")
    newer = body.replace(b'{"version":1,', b'{"version":99,', 1)
    assert newer != body
    digest = combined_digest(block_digests(newer))
    manifest.write_bytes(b'{"digest":"xxh3-128:%s","record":%s}\n' % (digest.encode(), newer))
    with pytest.raises(FormatVersionError, match="upgrade"):
        restored(run_dir, Net())
    (drift,) = grade({"format": "99"}, {"format": "3"})
    assert drift.grade == "breaking"


# Row 9


class Pair(nn.Module):
    """Two layers of one shape: moments that are swapped would go unnoticed."""

    def __init__(self, names: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x).tanh()
        return x


def trained_pair(run: Path, optimizer: Any = torch.optim.Adam, **options: Any) -> tuple[Pair, Any]:
    torch.manual_seed(0)
    net = Pair()
    made = optimizer(net.parameters(), lr=0.1, **options)
    for seed in range(3):
        train_one(net, made, seed=seed)
    saved(run, {"model": net, "optimizer": made})
    return net, made


def moments(net: nn.Module, optimizer: Any, slot: str = "exp_avg") -> dict[str, torch.Tensor]:
    return {
        name: optimizer.state[parameter][slot]
        for name, parameter in net.named_parameters()
        if slot in optimizer.state.get(parameter, {})
    }


def restore_pair(run: Path, net: nn.Module, optimizer: Any, selection: Selection | None = None) -> None:
    state = {"model": net, "optimizer": optimizer}
    Checkpointer(run.parent / "next", state).restore(str(run), selection=selection)


def in_groups(net: Pair) -> list[dict[str, Any]]:
    return [{"params": net.a.parameters()}, {"params": net.b.parameters()}]


OTHERWISE: dict[str, Any] = {
    "same": lambda net: torch.optim.Adam(net.parameters(), lr=0.1),
    "reordered": lambda net: torch.optim.Adam(list(net.parameters())[::-1], lr=0.1),
    "other groups": lambda net: torch.optim.Adam(in_groups(net), lr=0.1),
    "other groups, reordered": lambda net: torch.optim.Adam(in_groups(net)[::-1], lr=0.1),
    "another class": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0),
    "foreach": lambda net: torch.optim.Adam(net.parameters(), lr=0.1, foreach=True),
    "fused": lambda net: torch.optim.Adam(net.parameters(), lr=0.1, fused=True),
    "other hyper-parameters": lambda net: torch.optim.Adam(net.parameters(), lr=0.7, betas=(0.5, 0.6), eps=1e-3),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_row_09_each_parameter_gets_its_own_moments_back(case: str, tmp_path: Path) -> None:
    before = trained_pair(tmp_path / "run")
    live = Pair()
    optimizer = OTHERWISE[case](live)
    restore_pair(tmp_path / "run", live, optimizer)
    for slot in ("exp_avg", "exp_avg_sq"):
        assert same(moments(live, optimizer, slot), moments(*before, slot))
    (steps,) = {float(slots["step"]) for slots in optimizer.state.values()}
    assert steps == 3
    for key, flag in (("foreach", True), ("fused", True)):
        assert bool(optimizer.param_groups[0][key]) == (case == key and flag)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    train_one(before[0], before[1], seed=9)
    train_one(live, optimizer, seed=9)
    for name, parameter in live.named_parameters():
        torch.testing.assert_close(parameter, before[0].get_parameter(name))


def test_row_09_torch_itself_swaps_the_moments_without_a_word() -> None:
    # What the row is about; the test above would pass by chance if this were not so.
    torch.manual_seed(0)
    net = Pair()
    before = torch.optim.Adam(net.parameters())
    train_one(net, before)
    # The weights have one shape, and so have the biases; in reverse, a bias would meet a weight.
    after = torch.optim.Adam([net.b.weight, net.b.bias, net.a.weight, net.a.bias])
    after.load_state_dict(before.state_dict())
    assert torch.equal(after.state[net.a.weight]["exp_avg"], before.state[net.b.weight]["exp_avg"])


def test_row_09_what_is_new_starts_empty_what_is_gone_is_dropped_and_both_are_said(tmp_path: Path, caplog: Log) -> None:
    caplog.set_level(logging.INFO, "ckptmgr")
    before = trained_pair(tmp_path / "run")
    live = Pair(("a", "c"))
    optimizer = torch.optim.Adam(live.parameters(), lr=0.1)
    restore_pair(tmp_path / "run", live, optimizer, Selection.without("model/b.*", "model/c.*"))
    found, wanted = moments(live, optimizer), moments(*before)
    assert same(found, {name: it for name, it in wanted.items() if name.startswith("a.")})
    text = "\n".join(caplog.messages)
    assert "model/b.weight" in text
    assert "model/c.weight" in text or "model/c.*" in text


@pytest.mark.parametrize("then_frozen", [False, True])
def test_row_09_a_layer_that_was_frozen_or_unfrozen_since_is_said(
    then_frozen: bool, tmp_path: Path, caplog: Log
) -> None:
    caplog.set_level(logging.INFO, "ckptmgr")
    torch.manual_seed(0)
    nets = (Pair(), Pair())
    made = []
    for net, is_frozen in zip(nets, (then_frozen, not then_frozen), strict=True):
        net.a.requires_grad_(not is_frozen)
        made.append(torch.optim.Adam([it for it in net.parameters() if it.requires_grad], lr=0.1))
    train_one(nets[0], made[0])
    saved(tmp_path / "run", {"model": nets[0], "optimizer": made[0]})
    restore_pair(tmp_path / "run", nets[1], made[1])
    wanted = {name: it for name, it in moments(nets[0], made[0]).items() if name.startswith("b.")}
    assert same(moments(nets[1], made[1]), wanted)
    assert any("model/a.weight" in message for message in caplog.messages)
    train_one(nets[1], made[1])


def test_row_09_another_kind_of_optimizer_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    trained_pair(tmp_path / "run")
    live = Pair()
    built = copy.deepcopy(live.state_dict())
    with pytest.raises(StateMismatchError, match="SGD"):
        restore_pair(tmp_path / "run", live, torch.optim.SGD(live.parameters(), lr=0.1, momentum=0.9))
    assert same(live.state_dict(), built)


# Row 10


class Program:
    """Everything that a training has: dropout, shuffling, a schedule, a scaler, draws of three generators."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=40)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
        self.loader = DataLoader(TensorDataset(x), 4, shuffle=True)
        self.losses: list[float] = []

    def run(self, run_dir: Path, nsteps: int) -> Program:
        state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
        }
        with Checkpointer(run_dir, state, every_n_steps=1, background=False) as ckpt:
            step = ckpt.resume()
            for (x,) in ckpt.batches(self.loader, epochs=10):
                noise = random.random() + float(np.random.rand())
                loss = self.model(x).square().mean() * (1 + noise)
                self.optimizer.zero_grad()
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.scheduler.step()
                self.losses.append(loss.item())
                step += 1
                ckpt.step(step)
                if step == nsteps:
                    break
        return self


def test_row_10_a_resume_is_bit_identical_in_weights_losses_schedule_scaler_and_draws(tmp_path: Path) -> None:
    straight = Program().run(tmp_path / "straight", 17)
    first = Program().run(tmp_path / "cut", 6)
    # In the middle of the second epoch, in what might be another process.
    second = Program().run(tmp_path / "cut", 13)
    torch.manual_seed(99)
    third = Program().run(tmp_path / "cut", 17)
    assert [*first.losses, *second.losses, *third.losses] == straight.losses
    assert same(third.model.state_dict(), straight.model.state_dict())
    assert third.scheduler.state_dict() == straight.scheduler.state_dict()
    assert third.scaler.state_dict() == straight.scaler.state_dict()
    assert third.scaler.get_scale() != 8.0


# Row 11


def test_row_11_data_parallel_goes_on_bare_and_back_with_its_moments(tmp_path: Path) -> None:
    """One cell of the matrix; ``tests/topology`` saves and resumes on every topology, with real processes."""
    wrapped, bare = (nn.DataParallel(Net()), Net())
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.1) for net in (wrapped, bare)]
    train_one(wrapped, optimizers[0])
    saved(tmp_path / "one", {"model": wrapped, "optimizer": optimizers[0]})
    restore_pair(tmp_path / "one", bare, optimizers[1])
    assert same(bare.state_dict(), wrapped.module.state_dict())
    assert same(moments(bare, optimizers[1]), moments(wrapped.module, optimizers[0]))
    train_one(bare, optimizers[1])
    saved(tmp_path / "two", {"model": bare, "optimizer": optimizers[1]})
    restore_pair(tmp_path / "two", wrapped, optimizers[0])
    assert same(wrapped.module.state_dict(), bare.state_dict())
    matrix = Path(__file__).parent.parent / "topology" / "test_matrix.py"
    assert "def test_" in matrix.read_text()
