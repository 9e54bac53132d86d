"""What a configuration may name: what was reviewed, what the user's side allows, and nothing on behalf of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.errors import ConfigError, NotAllowedError, UsageError
from ckptmgr.format.layout import RUN_MARKER
from ckptmgr.instantiate import allow_list
from ckptmgr.instantiate.allow_list import AllowList, allow_targets, factory, is_factory
from ckptmgr.instantiate.load import load_target
from ckptmgr.instantiate.targets import Target


@pytest.fixture(autouse=True)
def _nothing_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allow_list, "_declared", [])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return project_at(tmp_path / "project", 'allow = ["my_pkg.*"]')


def project_at(folder: Path, line: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(f"[tool.ckptmgr]\n{line}\n")
    return folder


def run_at(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_MARKER).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("torch.nn.Linear", "built in"),
        ("torch.optim.lr_scheduler.StepLR", "built in"),
        ("torch.utils.data.DataLoader", "built in"),
        ("lightning.pytorch.callbacks.EarlyStopping", "built in"),
        ("pytorch_lightning.Trainer", "built in"),
        ("torchmetrics.classification.accuracy.Accuracy", "built in"),
        ("ckptmgr.CheckpointManager", "built in"),
        ("my_pkg.Net", "pyproject.toml"),
        ("my_pkg.deep.er.Net", "pyproject.toml"),
        ("typed.Net", "--allow"),
        ("coded.net.Net", "allow_targets()"),
        ("my_pkg", None),
        ("my_pkgs.Net", None),
        ("my_pkg._private.Net", None),
        ("my_pkg.__dict__", None),
        ("typed.Other", None),
        ("coded.net", None),
        ("torchmetrics.text.bert.BERTScore", None),
        ("torch.load", None),
        ("os.system", None),
    ],
)
def test_a_name_is_denied_unless_somebody_allows_it(project: Path, name: str, source: str | None) -> None:
    allow_targets("coded.net.*")
    assert AllowList.gather(cwd=project, extra=["typed.Net"]).source_of(name) == source


def test_only_an_exact_line_names_exactly(project: Path) -> None:
    allow = AllowList.gather(cwd=project, extra=["typed.make", "my_pkg._private.Net"])
    assert allow.names_exactly("typed.make")
    assert allow.names_exactly("my_pkg._private.Net")
    assert not allow.names_exactly("my_pkg.make")
    assert not allow.names_exactly("torch.nn.Linear")


def test_a_directory_within_the_project_has_the_projects_list(project: Path) -> None:
    (project / "a" / "b").mkdir(parents=True)
    assert AllowList.gather(cwd=project / "a" / "b").source_of("my_pkg.Net") == "pyproject.toml"


def test_a_run_directory_has_no_say(project: Path) -> None:
    run = project_at(run_at(project / "runs" / "one"), 'allow = ["evil.*"]')
    for cwd in (run, project_at(run / "code", 'allow = ["evil.*"]')):
        allow = AllowList.gather(cwd=cwd)
        assert allow.source_of("evil.Net") is None
        assert allow.source_of("my_pkg.Net") == "pyproject.toml"  # that of the project around the run
        assert allow.project_file == project / "pyproject.toml"


def test_a_run_within_a_run_has_no_say_either(project: Path) -> None:
    outer = project_at(run_at(project / "runs" / "one"), 'allow = ["evil.*"]')
    assert AllowList.gather(cwd=run_at(outer / "inner")).source_of("evil.Net") is None


def test_a_link_to_a_file_in_a_run_directory_has_no_say(tmp_path: Path) -> None:
    run = project_at(run_at(tmp_path / "run"), 'allow = ["evil.*"]')
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "pyproject.toml").symlink_to(run / "pyproject.toml")
    allow = AllowList.gather(cwd=folder)
    assert allow.source_of("evil.Net") is None
    assert allow.project_file is None


def test_the_whole_file_system_is_no_project() -> None:
    assert AllowList.gather(cwd=Path("/")).project_file is None


def test_a_project_without_a_list_allows_what_is_built_in(tmp_path: Path) -> None:
    for text in ("", "[tool.other]\nx = 1\n", "[tool.ckptmgr]\n"):
        (tmp_path / "pyproject.toml").write_text(text)
        assert AllowList.gather(cwd=tmp_path).source_of("my_pkg.Net") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[tool.ckptmgr\n", "not valid TOML"),
        ("tool = 3\n", "not a table"),
        ("[tool]\nckptmgr = 3\n", "not a table"),
        ('[tool.ckptmgr]\nallow = "my_pkg.*"\n', "not a list"),
        ("[tool.ckptmgr]\nallow = [3]\n", "of type int"),
        ('[tool.ckptmgr]\nallow = ["*"]\n', "os.system"),
        ('[tool.ckptmgr]\nalow = ["my_pkg.*"]\n', "'allow'"),
        ("[tool.ckptmgr]\nx = " + "[" * 5000, "not valid TOML"),
    ],
)
def test_a_project_file_that_cannot_be_meant_is_an_error(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        AllowList.gather(cwd=tmp_path)
    assert str(tmp_path / "pyproject.toml") in caught.value.what
    assert says in str(caught.value)


def test_a_project_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"not valid TOML"):
        AllowList.gather(cwd=tmp_path)


def test_a_project_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*pyproject\.toml"):
        AllowList.gather(cwd=tmp_path)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("*", "everything"),
        (".*", "nothing stands before"),
        ("**", "star"),
        ("my_*.Net", "star"),
        ("my_pkg.*.Net", "star"),
        ("my_pkg*", "star"),
        ("*.Net", "star"),
        ("", "empty"),
        (" ", "no Python name"),
        ("my_pkg.* ", "star"),
        ("my pkg.*", "no Python name"),
        ("my-pkg.*", "no Python name"),
        ("my_pkg", "package.module.Class"),
        ("my_pkg..Net", "empty parts"),
        ("my_pkg.", "empty parts"),
        (".my_pkg.Net", "empty parts"),
        ("my_pkg.__init__", "Python keeps"),
        ("my_pkg/net.py", "no Python name"),
        ("my_pkg:Net", "no Python name"),
        ("os.*", "standard library"),
        ("subprocess.*", "standard library"),
        ("\uff4dy_pkg.Net", "look like others"),
        (3, "of type int"),
        (None, "of type NoneType"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused_wherever_it_is_given(
    tmp_path: Path, pattern: Any, says: str
) -> None:
    with pytest.raises(UsageError, match=r"^allow_targets\(\): ") as coded:
        allow_targets(pattern)
    with pytest.raises(UsageError, match=r"^--allow: ") as typed:
        AllowList.gather(cwd=tmp_path, extra=[pattern])
    assert says in str(coded.value)
    assert says in str(typed.value)
    assert "my_pkg.*" in str(typed.value)


def test_a_wrong_pattern_declares_none_of_its_call(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        allow_targets("good.Net", "*")
    assert AllowList.gather(cwd=tmp_path).source_of("good.Net") is None


def test_whoever_insists_may_name_one_thing_of_the_standard_library(tmp_path: Path) -> None:
    assert AllowList.gather(cwd=tmp_path, extra=["collections.OrderedDict"]).names_exactly("collections.OrderedDict")


def test_what_is_declared_later_does_not_change_a_list(tmp_path: Path) -> None:
    allow = AllowList.gather(cwd=tmp_path)
    allow_targets("late.*")
    assert allow.source_of("late.Net") is None
    assert AllowList.gather(cwd=tmp_path).source_of("late.Net") == "allow_targets()"


def test_functions_class_methods_and_static_methods_can_be_declared() -> None:
    class Net:
        @classmethod
        @factory
        def inner(cls) -> None: ...

        @factory
        @classmethod
        def outer(cls) -> None: ...

        @factory
        @staticmethod
        def static() -> None: ...

        @classmethod
        def undeclared(cls) -> None: ...

    @factory
    def make() -> int:
        return 3

    assert make() == 3
    assert all(is_factory(function) for function in (make, Net.inner, Net.outer, Net.static))
    assert not is_factory(Net.undeclared)


@pytest.mark.parametrize("thing", [int, len, 3, "my_pkg.make"])
def test_what_is_no_function_of_the_user_cannot_be_declared(thing: Any) -> None:
    with pytest.raises(UsageError, match=r"factory\(\)"):
        factory(thing)


LOAD_ALL = """
from pathlib import Path
from ckptmgr.instantiate.allow_list import AllowList
from ckptmgr.instantiate.load import load_target
from ckptmgr.instantiate.reviewed import REVIEWED
from ckptmgr.instantiate.targets import Target

allow = AllowList.gather(cwd=Path.cwd())
exact = [entry.pattern for entry in REVIEWED if not entry.pattern.endswith(".*")]
print(sum(callable(load_target(Target("x", name), allow)) for name in exact))
"""


def test_every_name_that_is_built_in_exists(tmp_path: Path) -> None:
    # In a process of its own: both trees of Lightning are imported, which other tests would notice.
    command = [sys.executable, "-c", LOAD_ALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 70


def test_what_a_reviewed_package_offers_from_elsewhere_was_not_reviewed(tmp_path: Path) -> None:
    allow = AllowList.gather(cwd=tmp_path)
    assert allow.source_of("torchmetrics.BLEUScore") == "built in"  # as far as the name goes
    with pytest.raises(NotAllowedError, match=r"it is torchmetrics\.text\."):
        load_target(Target("x", "torchmetrics.BLEUScore"), allow)


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn.Linear",
        "torch.nn.modules.linear.Linear",
        "torch.nn.parallel.DistributedDataParallel",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.ReduceLROnPlateau",
        "torch.optim.swa_utils.AveragedModel",
        "torchmetrics.Accuracy",
        "torchmetrics.MetricCollection",
        "torchmetrics.classification.MulticlassF1Score",
    ],
)
def test_what_was_reviewed_can_be_loaded_by_its_usual_names(tmp_path: Path, name: str) -> None:
    assert isinstance(load_target(Target("x", name), AllowList.gather(cwd=tmp_path)), type)
