"""What is not as it was: found, graded, and the likeliest cause of a failure first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_samples import create_run, save, start

from ckptmgr.diagnose.drift import TESTED_LIGHTNING, Drift, drift_lines, grade, refuse_drift
from ckptmgr.diagnose.then_and_now import environment_now, environment_then
from ckptmgr.errors import EnvironmentDriftError
from ckptmgr.format.layout import attempt_key
from ckptmgr.format.record import encode_record
from ckptmgr.launch.git import GitState
from ckptmgr.launch.start_record import describe_start
from ckptmgr.lightning.compat import TESTED_VERSIONS
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.environment import recorded_versions
from ckptmgr.storage.open import open_storage


def one(name: str, then: str, now: str | None) -> Drift:
    (drift,) = grade({name: then}, {} if now is None else {name: now})
    return drift


@pytest.mark.parametrize(
    ("name", "then", "now", "expected"),
    [
        ("torch", "2.13.0+cpu", "2.11.0+cpu", "warning"),
        ("torch", "2.11.0", "2.13.0", "info"),
        ("torch", "2.13.0", "2.13.1", "info"),
        ("torch", "2.13.0+cpu", "2.13.0+cu126", "info"),
        ("torch", "2.4.1", "2.13.0", "warning"),
        ("torch", "2.13.0", None, "breaking"),
        ("lightning", "2.5.0", "2.6.1", "info"),
        ("lightning", "2.6.0", "2.5.5", "warning"),
        ("lightning", "2.6.0", "2.7.0", "breaking"),
        ("pytorch-lightning", "1.9.5", "2.6.0", "warning"),
        ("format", "9", "2", "breaking"),
        ("format", "1", "2", "info"),
        ("ckptmgr", "0.2.0", "0.1.0", "warning"),
        ("ckptmgr", "0.1.0", "0.2.0", "info"),
        ("scikit-learn", "1.4.2", "1.5.0", "warning"),
        ("scikit-learn", "1.4.2", "1.4.9", "info"),
        ("skops", "0.11", None, "warning"),
        ("torchdata", "0.11.0", "0.12.0", "warning"),
        ("tokenizers", "0.21.0", "0.20.0", "warning"),
        ("tokenizers", "0.20.0", "0.21.0", "info"),
        ("transformers", "4.50.0", "5.0.0", "warning"),
        ("numpy", "2.1.0", "1.26.4", "warning"),
        ("numpy", "1.26.4", "1.26.0", "info"),
        ("python", "3.11.2", "3.12.0", "info"),
        ("cuda", "12.4", None, "info"),
        ("machine", "x86_64", "arm64", "info"),
        ("git.commit", "aaaa", "bbbb", "warning"),
        ("config.optimizer.lr", "0.1", "0.01", "warning"),
        ("somebody", "1", "2", "info"),
        ("torch", "a git build", "2.13.0", "warning"),
    ],
)
def test_each_difference_has_its_grade_and_a_reason(name: str, then: str, now: str | None, expected: str) -> None:
    drift = one(name, then, now)
    assert drift.grade == expected
    assert drift.why


def test_what_most_likely_explains_a_failure_comes_first() -> None:
    then = {"python": "3.11", "numpy": "2.0", "torch": "2.13.0", "scikit-learn": "1.4.0", "format": "9", "cuda": "12"}
    now = {"python": "3.12", "numpy": "2.1", "torch": "2.11.0", "scikit-learn": "1.5.0", "format": "2"}
    assert [drift.name for drift in grade(then, now)] == ["format", "torch", "scikit-learn", "numpy", "python", "cuda"]


def test_what_was_not_recorded_is_not_compared_and_a_new_key_of_the_configuration_is() -> None:
    assert grade({}, {"pandas": "2.0"}) == []
    (drift,) = grade({}, {"config.seed": "1"})
    assert (drift.then, drift.now) == (None, "1")


def test_lines_tell_each_that_matters_and_the_others_together() -> None:
    lines = drift_lines(grade({"torch": "2.13", "numpy": "2.0", "python": "3.11"}, {"torch": "2.6", "numpy": "2.1"}))
    assert lines == [
        "warning: torch 2.13 -> 2.6: an older torch may lack the dtypes, layers and options of the one that wrote it",
        "info: numpy 2.0 -> 2.1, python 3.11 -> none",
    ]
    assert drift_lines([]) == []


def test_strictness_refuses_what_is_more_than_info() -> None:
    refuse_drift(grade({"numpy": "2.0"}, {"numpy": "2.1"}), "runs/x@1")
    with pytest.raises(EnvironmentDriftError, match=r"torch 2\.13 -> 2\.6") as caught:
        refuse_drift(grade({"torch": "2.13"}, {"torch": "2.6"}), "runs/x@1")
    assert caught.value.code == "drift"


def test_the_tested_versions_of_lightning_are_those_of_the_callback() -> None:
    assert TESTED_LIGHTNING == TESTED_VERSIONS


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=12)), st.dictionaries(st.text(max_size=8), st.text()))
def test_no_version_is_too_strange(then: dict[str, str], now: dict[str, str]) -> None:
    drifts = grade(then, now)
    assert {drift.name for drift in drifts} >= {name for name in then if then[name] != now.get(name)}
    assert len(drift_lines(drifts)) <= len(drifts)


def test_what_is_recorded_tells_the_same_as_the_packages_and_imports_none_of_them() -> None:
    code = (
        "import sys; from ckptmgr.run.environment import recorded_versions as r; v = r();"
        "heavy = {'torch', 'lightning', 'transformers', 'sklearn'} & set(sys.modules); assert not heavy, heavy;"
        "import torch; assert v['torch'] == torch.__version__ and v.get('cuda') == torch.version.cuda, v"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"python", "ckptmgr", "torch", "machine"} <= recorded_versions().keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("cuda: Optional[str] = '12.4'\n", "12.4"), ("cuda = '11.8'\n", "11.8"), ("cuda = None\nhip = '5'\n", None)],
)
def test_cuda_is_read_from_the_text_of_torchs_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str | None
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "torch" / "version.py").write_text(text)
    code = "from ckptmgr.run.environment import recorded_versions as r; print(r().get('cuda'))"
    path = f"{tmp_path}:{Path(__file__).parent.parent.parent}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(expected)


def test_then_is_read_from_the_checkpoint_and_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").touch()
    monkeypatch.chdir(project)
    storage = open_storage(tmp_path / "run")
    create_run(storage)
    attempt = start(storage)
    record = msgspec.structs.replace(
        describe_start(),
        project_root="/elsewhere/project",
        versions={"torch": "2.0.0", "odd": "1"},
        git=GitState(commit="a" * 40, diff_digest="d" * 64),
    )
    storage.write(attempt_key(attempt, "start"), [encode_record(record)])
    save(storage, attempt, 100)
    catalog = Catalog(storage)
    then = environment_then(storage, catalog.latest())
    assert then["torch"] == "2.0.0"
    assert (then["git.commit"], then["git.changes"]) == ("a" * 12, "d" * 12)
    assert {drift.name for drift in grade(then, environment_now())} >= {"torch", "odd", "git.commit"}
    assert "format" not in then  # readers of a format read all earlier ones: it is no drift


def test_the_code_of_another_project_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage(tmp_path / "run")
    create_run(storage)
    attempt = start(storage)
    record = msgspec.structs.replace(describe_start(), project_root="/x/other", git=GitState(commit="a" * 40))
    storage.write(attempt_key(attempt, "start"), [encode_record(record)])
    save(storage, attempt, 100)
    assert "git.commit" not in environment_then(storage, Catalog(storage).latest())
