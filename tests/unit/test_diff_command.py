"""``ckptmgr diff`` as its user meets it: what it prints, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from diff_samples import Training, by_path, save_in_turn, save_state
from run_samples import create_run, save, start

from ckptmgr.cli.main import run
from ckptmgr.diff import compare
from ckptmgr.errors import CorruptCheckpointError
from ckptmgr.format.layout import attempt_key
from ckptmgr.format.record import encode_record
from ckptmgr.launch.experiment import Experiment, ExperimentRecord, building_experiment, document_digest
from ckptmgr.launch.git import GitState
from ckptmgr.launch.start_record import describe_start
from ckptmgr.storage.open import open_storage

Output = pytest.CaptureFixture[str]


@pytest.fixture
def training() -> Training:
    return Training()


def printed(arguments: list[str], capsys: Output, *, status: int = 0) -> str:
    assert run(["diff", *arguments]) == status
    return capsys.readouterr().out


def as_json(arguments: list[str], capsys: Output) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(printed(["--json", *arguments], capsys))
    return document


def flip_in_weights(run_dir: str, step: int) -> Path:
    """Damage the last byte of a checkpoint's model; sizes stay as they are."""
    (path,) = Path(run_dir).glob(f"checkpoints/{step:010d}-*/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def test_the_largest_change_comes_first_and_is_as_large_as_torch_says(
    tmp_path: Path, training: Training, capsys: Output
) -> None:
    weight, bias = training.model[0].weight, training.model[2].bias
    before = {"weight": weight.detach().clone(), "bias": bias.detach().clone()}

    def change() -> None:
        weight.add_(torch.arange(12.0).view(4, 3) / 1000)
        bias.mul_(-3)

    run_dir = save_in_turn(tmp_path / "run", training.state, [change])
    diff = compare(f"{run_dir}@1", f"{run_dir}@2")
    assert [tensor.path for tensor in diff.changed] == ["model/2.bias", "model/0.weight"]
    for tensor, name, live in zip(diff.changed, ("bias", "weight"), (bias, weight), strict=True):
        a, b = before[name].double(), live.detach().double()
        assert tensor.measured is not None
        assert tensor.measured.max_abs == (a - b).abs().max().item()
        assert tensor.measured.relative == pytest.approx(((a - b).norm() / a.norm()).item(), rel=1e-12)
        assert tensor.measured.ndifferent == (a != b).sum()
    table = printed([f"{run_dir}@1", f"{run_dir}@2"], capsys)
    assert table.index("model/2.bias") < table.index("model/0.weight")
    assert "2 tensors changed" in table.splitlines()[-1]


def test_one_reference_alone_is_compared_with_the_checkpoint_before_it(
    tmp_path: Path, training: Training, capsys: Output
) -> None:
    weight = training.model[0].weight
    run_dir = save_in_turn(tmp_path / "run", training.state, [lambda: weight.add_(1), lambda: weight.add_(1)])
    document = as_json([run_dir], capsys)
    assert (document["a"]["step"], document["b"]["step"]) == (2, 3)
    assert as_json([f"{run_dir}@2"], capsys)["a"]["step"] == 1
    assert run(["diff", f"{run_dir}@1"]) == 10
    assert "first" in capsys.readouterr().err


def test_what_is_recorded_of_both_is_compared(tmp_path: Path, training: Training, capsys: Output) -> None:
    run_dir = save_in_turn(tmp_path / "run", training.state, [lambda: None])
    document = as_json([f"{run_dir}@1", f"{run_dir}@2"], capsys)
    facts = {fact["name"]: (fact["a"], fact["b"]) for fact in document["facts"]}
    assert facts == {"step": ("1", "2"), "metric loss": ("1.0", "0.5")}
    assert document["tensors"] == []
    assert not document["is_same"]


def test_options_of_an_optimizer_are_told_by_their_place(tmp_path: Path, capsys: Output) -> None:
    one = save_state(tmp_path / "one", Training(lr=0.01).state)
    other = save_state(tmp_path / "other", Training(lr=0.1).state)
    lines = printed([one, other, "--only", "optimizer/groups"], capsys).splitlines()
    assert "  optimizer/groups/0/lr: 0.01 -> 0.1" in lines
    (change,) = as_json([one, other, "--only", "optimizer/groups/*/lr"], capsys)["values"]
    assert change == {"path": "optimizer/groups/0/lr", "a": "0.01", "b": "0.1", "rank": None}


def test_the_state_of_an_optimizer_is_compared_tensor_by_tensor(tmp_path: Path, training: Training) -> None:
    moment = training.optimizer.state[training.model[0].weight]["exp_avg"]
    run_dir = save_in_turn(tmp_path / "run", training.state, [lambda: moment.add_(0.25)])
    (tensor,) = compare(run_dir).changed
    assert tensor.path == "optimizer/model/0.weight/exp_avg"
    assert tensor.measured is not None
    assert tensor.measured.max_abs == pytest.approx(0.25)


def test_equal_checkpoints_have_no_difference_and_exit_with_0(tmp_path: Path, capsys: Output) -> None:
    one, other = (save_state(tmp_path / name, Training().state) for name in ("one", "other"))
    text = printed([one, other, "--exit-code"], capsys)
    assert text.splitlines()[-1].startswith("no difference: ")
    assert compare(one, other, read=True).is_same
    assert {tensor.verdict for tensor in compare(one, other, read=True).tensors} == {"equal"}


def test_a_difference_exits_with_1_only_where_that_is_asked_for(tmp_path: Path, capsys: Output) -> None:
    one = save_state(tmp_path / "one", Training().state)
    training = Training()
    with torch.no_grad():
        training.model[0].bias[1] += 1
    other = save_state(tmp_path / "other", training.state)
    printed([one, other], capsys, status=0)
    assert "model/0.bias" in printed([one, other, "--exit-code"], capsys, status=1)
    # Nothing else differs.
    printed([one, other, "--exit-code", "--only", "optimizer"], capsys, status=0)
    printed([one, other, "--exit-code", "--no-weights"], capsys, status=1)


def test_tensors_with_equal_digests_are_read_only_on_request(tmp_path: Path, capsys: Output) -> None:
    one, other = (save_state(tmp_path / name, Training().state) for name in ("one", "other"))
    path = flip_in_weights(other, 1)
    assert "not read" in printed([one, other, "--exit-code"], capsys)
    assert run(["diff", one, other, "--read"]) == 12
    assert path.name in capsys.readouterr().err


def test_nan_is_told_and_is_never_equal_also_where_bits_are(tmp_path: Path, training: Training, capsys: Output) -> None:
    with torch.no_grad():
        training.model[0].weight[1, :] = float("nan")
        training.model[0].weight[0, 0] = float("inf")
    run_dir = save_in_turn(tmp_path / "run", training.state, [lambda: training.model[2].weight[0, 0].fill_(torch.nan)])
    diff = compare(f"{run_dir}@1", f"{run_dir}@2", read=True)
    same, broken = (by_path(diff)[f"model/{name}"] for name in ("0.weight", "2.weight"))
    assert (same.verdict, same.is_same_bits, same.is_change) == ("equal bits", True, False)
    assert same.measured is not None
    assert (same.measured.nnan, same.measured.ninf, same.measured.ndifferent) == ((3, 3), (1, 1), 3)
    assert broken.verdict == "different"
    assert broken.measured is not None
    assert (broken.measured.nnan, broken.measured.max_abs, broken.measured.ndifferent) == ((0, 1), 0.0, 1)
    # The one that went wrong comes first, however small other changes are.
    assert diff.changed[0].path == "model/2.weight"
    table = printed([f"{run_dir}@1", f"{run_dir}@2", "--read", "--only", "model"], capsys)
    row = next(line for line in table.splitlines() if line.startswith("model/0.weight"))
    assert "equal bits" in row
    assert "3 -> 3" in row
    assert "1 with equal bits and NaN in them" in table
    # Without reading nobody claims more than that digests are equal.
    unread = by_path(compare(f"{run_dir}@1", f"{run_dir}@2"))["model/0.weight"]
    assert (unread.verdict, unread.measured) == ("equal bits", None)


def test_json_has_words_for_what_json_has_not(tmp_path: Path, training: Training, capsys: Output) -> None:
    run_dir = save_in_turn(tmp_path / "run", training.state, [lambda: training.model[0].bias[0].fill_(torch.inf)])
    (tensor,) = as_json([run_dir], capsys)["tensors"]
    assert (tensor["verdict"], tensor["measured"]["max_abs"], tensor["measured"]["ninf"]) == (
        "different",
        "inf",
        [0, 1],
    )


def test_a_limit_cuts_each_list_and_says_what_is_left(tmp_path: Path, training: Training, capsys: Output) -> None:
    def change() -> None:
        for parameter in training.model.parameters():
            parameter.add_(1)

    run_dir = save_in_turn(tmp_path / "run", training.state, [change])
    text = printed([run_dir, "--limit", "2", "--only", "model"], capsys)
    assert sum(line.startswith("model/") for line in text.splitlines()) == 2
    assert "and 4 more (--limit 6 prints them)" in text
    assert "6 tensors changed" in text
    assert len(as_json([run_dir, "--limit", "1"], capsys)["tensors"]) == 1


def test_a_pattern_that_matches_nothing_is_no_equality(tmp_path: Path, training: Training, capsys: Output) -> None:
    run_dir = save_in_turn(tmp_path / "run", training.state, [lambda: None])
    for pattern in ("modl/*", "model/9.weight", "optimizer/groups/7"):
        assert run(["diff", run_dir, "--only", pattern]) == 2
        assert pattern in capsys.readouterr().err
    for pattern in ("model", "model/0.*", "optimizer/groups/0/lr", "*/exp_avg", "ckptmgr_rng"):
        printed([run_dir, "--only", pattern, "--exit-code", "--only", "model/2.bias"], capsys, status=0)


def test_damage_exits_with_12_and_names_the_file(tmp_path: Path, training: Training, capsys: Output) -> None:
    run_dir = save_in_turn(tmp_path / "run", training.state, [lambda: training.model[2].bias.add_(1)])
    flip_in_weights(run_dir, 2)
    # Digests differ, so both are read.
    (path,) = Path(run_dir).glob("checkpoints/0000000002-*/model.safetensors")
    path.write_bytes(path.read_bytes()[:4096] + bytes(path.stat().st_size - 4096))
    assert run(["diff", f"{run_dir}@1", f"{run_dir}@2"]) == 12
    assert "model.safetensors" in capsys.readouterr().err
    path.unlink()
    for arguments in ([f"{run_dir}@1", f"{run_dir}@2"], [f"{run_dir}@2", f"{run_dir}@1", "--no-weights"]):
        assert run(["diff", *arguments]) == 12
        assert "is missing" in capsys.readouterr().err
    (document,) = Path(run_dir).glob("checkpoints/0000000001-*/state.json")
    document.write_bytes(document.read_bytes().replace(b"0.01", b"0.02"))
    assert run(["diff", f"{run_dir}@1", f"{run_dir}@1"]) == 12
    assert "state.json" in capsys.readouterr().err


def test_what_is_not_there_exits_with_10(tmp_path: Path, training: Training, capsys: Output) -> None:
    run_dir = save_in_turn(tmp_path / "run", training.state, [lambda: None])
    for other in (tmp_path / "nothing", f"{run_dir}@77", f"{run_dir}@paper", tmp_path / "nothing.safetensors"):
        for arguments in ([run_dir, str(other)], [str(other), run_dir]):
            assert run(["diff", *arguments]) == 10
            output = capsys.readouterr()
            assert output.out == ""
            assert [line.split(":")[0].strip() for line in output.err.splitlines()[1:]] == ["why", "next"]


def test_two_runs_that_call_their_entries_otherwise_are_compared(tmp_path: Path, capsys: Output) -> None:
    one, other = Training(), Training()
    other.optimizer.param_groups[0]["lr"] = 0.5
    with torch.no_grad():
        other.model[0].bias += 1
        other.optimizer.state[other.model[0].bias]["exp_avg"] += 1
    first = save_state(tmp_path / "one", one.state)
    second = save_state(tmp_path / "other", {"net": other.model, "opt": other.optimizer})
    diff = compare(first, second)
    assert {entry.name: entry.renamed for entry in diff.entries} == {"model": "net", "optimizer": "opt"}
    assert {tensor.path for tensor in diff.changed} == {"model/0.bias", "optimizer/model/0.bias/exp_avg"}
    changes = {change.path: (change.a, change.b) for change in diff.values}
    assert changes["optimizer/groups/0/lr"] == ("0.01", "0.5")
    assert not [path for path in changes if path.startswith(("model/", "optimizer/state", "optimizer/parameters"))]
    assert "model: called net in b" in printed([first, second], capsys)


def test_an_entry_of_one_side_alone_is_one_line(tmp_path: Path, capsys: Output) -> None:
    training = Training()
    first = save_state(tmp_path / "one", training.state)
    second = save_state(tmp_path / "other", {"model": training.model, "counters": {"seen": 3}})
    text = printed([first, second], capsys)
    assert "optimizer: only in a (optimizer v1)" in text
    assert "counters: only in b (values v1)" in text
    assert "exp_avg" not in text


def test_keys_shapes_and_dtypes_that_changed_are_told(tmp_path: Path) -> None:
    before = {"kept": torch.ones(3), "gone": torch.ones(2), "grown": torch.ones(2, 3), "cast": torch.tensor([1.0, 1.1])}
    after = {**before, "grown": torch.ones(4, 3), "cast": before["cast"].bfloat16(), "new": torch.ones(1)}
    del after["gone"]
    first, second = (
        save_state(tmp_path / name, {"extra": dict(values)}) for name, values in (("a", before), ("b", after))
    )
    found = {path: tensor.verdict for path, tensor in by_path(compare(first, second)).items() if "extra" in path}
    assert found == {
        "extra/gone": "only in a",
        "extra/new": "only in b",
        "extra/grown": "other shape",
        "extra/cast": "other dtype",
        "extra/kept": "equal bits",
    }
    cast = by_path(compare(first, second))["extra/cast"]
    assert cast.measured is not None
    # Exactly what the cast has cost.
    assert cast.measured.max_abs == abs(torch.tensor(1.1).item() - torch.tensor(1.1).bfloat16().item())


def experiment(lr: float, env: str = "fixed") -> Experiment:
    config = f"model:\n  lr: {lr}\n  data: ${{oc.env:PLACE}}\nname: anything-{lr}\n"
    resolved = f"model:\n  lr: {lr}\n  data: {env}\nname: anything-{lr}\n"
    record = ExperimentRecord(
        config_digest=document_digest(config.encode()), resolved_digest=document_digest(resolved.encode())
    )
    return Experiment(config, resolved, record)


def save_configured(run_dir: Path, lr: float, env: str = "fixed") -> str:
    with building_experiment(experiment(lr, env)):
        return save_state(run_dir, Training().state)


def test_configurations_are_compared_by_key_and_as_they_were_resolved(tmp_path: Path, capsys: Output) -> None:
    first = save_configured(tmp_path / "one", 0.1, "/data/v1")
    second = save_configured(tmp_path / "other", 0.2, "/data/v2")
    lines = printed([first, second], capsys).splitlines()
    at = lines.index("configuration")
    assert lines[at + 1 : at + 3] == ["  model.lr: 0.1 -> 0.2", "  model.data: /data/v1 -> /data/v2"]
    assert "anything" not in "\n".join(lines)
    # With a pattern the state alone is compared.
    assert as_json([first, second, "--only", "model"], capsys)["facts"] == []


def test_a_configuration_that_is_missing_is_said_and_a_damaged_one_is_damage(tmp_path: Path, capsys: Output) -> None:
    first = save_configured(tmp_path / "one", 0.1)
    second = save_state(tmp_path / "other", Training().state)
    assert run(["diff", second, first]) == 0
    assert f"{second} has no stored configuration" in capsys.readouterr().err
    assert any("neither has" in note for note in compare(second, second).notes)
    path = Path(first, attempt_key(1, "config"))
    path.write_text(path.read_text().replace("0.1", "0.3"))
    for other in (first, second):
        assert run(["diff", first, other]) == 12
    assert "config.yaml" in capsys.readouterr().err
    path.unlink()
    with pytest.raises(CorruptCheckpointError, match="missing"):
        compare(first, first)


def test_code_and_versions_are_compared(tmp_path: Path, capsys: Output) -> None:
    runs = []
    for name, commit, digest in (("one", "a" * 40, None), ("other", "b" * 40, "c" * 64)):
        storage = open_storage(tmp_path / name)
        create_run(storage)
        attempt = start(storage)
        git = GitState(commit=commit, branch=name, is_dirty=digest is not None, diff_digest=digest)
        record = msgspec.structs.replace(describe_start(), git=git)
        storage.write(attempt_key(attempt, "start"), [encode_record(record)])
        save(storage, attempt, 100)
        runs.append(str(tmp_path / name))
    facts = {fact["name"]: (fact["a"], fact["b"]) for fact in as_json(runs, capsys)["facts"]}
    assert facts == {"commit": ("a" * 40, "b" * 40), "uncommitted changes": (None, "c" * 64)}
    assert "aaaaaaaaaa  bbbbbbbbbb" in printed(runs, capsys)


def test_what_stands_in_a_run_cannot_write_over_the_terminal(tmp_path: Path, capsys: Output) -> None:
    state = {"extra": {"\x1b[2Jkey": "\x1b[31m[bold]", "t\x1b[2J": torch.ones(1)}}
    run_dir = save_in_turn(
        tmp_path / "run", state, [lambda: state["extra"].update({"\x1b[2Jkey": "other", "t\x1b[2J": torch.zeros(1)})]
    )
    text = printed([run_dir], capsys)
    assert "\x1b" not in text
    assert "\\x1b[2Jkey" in text


def test_secrets_in_values_are_not_printed(tmp_path: Path) -> None:
    state = {"extra": {"api_key": "one-secret-that-is-long", "url": "https://me:password1@host/x"}}
    run_dir = save_in_turn(
        tmp_path / "run",
        state,
        [lambda: state["extra"].update(api_key="another-secret", url="https://me:pass2@host/x")],
    )
    told = " ".join(f"{change.a} {change.b}" for change in compare(run_dir).values)
    assert "secret" not in told.replace("[redacted]", "")
    assert "password1" not in told
    assert len([change for change in compare(run_dir).values if "extra" in change.path]) == 2


def test_a_configuration_in_place_of_a_run_is_told_from_one(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "cnn.yaml"
    path.write_text("trainer: {}")
    assert run(["diff", str(path), str(path)]) == 2
    assert f"ckptmgr run {path}" in capsys.readouterr().err
