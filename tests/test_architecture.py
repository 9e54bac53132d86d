"""The floors of the house: imports point strictly down, siblings do not import each other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptmgr

PACKAGE = Path(ckptmgr.__file__).parent

FLOORS = [
    {"errors", "words"},
    {"format", "progress", "ranks"},
    {"policy", "storage"},
    {"run"},
    {"state", "launch"},
    {
        "writer",
        "boundary",
        "preemption",
        "loading",
        "topology",
        "config",
        "instantiate",
        "fork",
        "preprocess",
        "diagnose",
    },
    {"claim", "joint_save", "saved_so_far", "schedule", "golden", "diff", "resume_drift"},
    {"training_run", "loop_state"},
    {"loop_run"},
    {"checkpointer"},
    {"lightning"},
    {"experiment"},
    {"inference", "interop"},
    {"cli"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SIDE = {"testing"}
LOBBY = {"__init__", "__main__"}

# What a room may import of third parties, also inside functions. A room that is not listed may import anything.
ALLOWED = {
    "errors": set(),
    "format": {"msgspec", "xxhash", "numpy"},
    "policy": set(),
    "storage": {"fsspec", "stamina"},
    "run": {"msgspec", "xxhash", "numpy"},
    "launch": {"msgspec"},
    "writer": set(),
    "preemption": set(),
    "progress": {"rich"},
    "ranks": set(),
    "config": {"omegaconf", "yaml"},
    "instantiate": set(),
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield every imported module, and whether the import is only for type checkers."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or "", id(node) in typing_only


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in FILES} <= set(FLOOR_OF) | SIDE | LOBBY


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_strictly_down(path: Path) -> None:
    room = room_of(path)
    if room in LOBBY:
        return
    for module, _ in imports_of(path):
        if not module.startswith("ckptmgr."):
            continue
        target = module.split(".")[1]
        assert target not in SIDE or room in SIDE, f"{path} imports {module}: nothing may import it"
        if target != room and room not in SIDE:
            assert FLOOR_OF[target] < FLOOR_OF[room], f"{path} imports {module}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_the_third_parties_that_it_is_meant_to(path: Path) -> None:
    allowed = ALLOWED.get(room_of(path))
    if allowed is None:
        return
    found = {module.split(".")[0] for module, is_typing in imports_of(path) if not is_typing}
    assert found - allowed - sys.stdlib_module_names - {"ckptmgr"} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_five_minutes(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize(
    "module",
    [
        "ckptmgr",
        "ckptmgr.cli.main",
        "ckptmgr.run.catalog",
        "ckptmgr.run.verify",
        "ckptmgr.cli.export",
        "ckptmgr.cli.import_run",
        "ckptmgr.cli.prune",
        "ckptmgr.run.upkeep",
        "ckptmgr.run.life",
        "ckptmgr.cli.ls",
        "ckptmgr.cli.show",
        "ckptmgr.cli.diff",
        "ckptmgr.diff",
        "ckptmgr.cli.remap",
        "ckptmgr.cli.doctor",
        "ckptmgr.cli.doctor_text",
        "ckptmgr.cli.doctor_json",
        "ckptmgr.diagnose.diagnosis",
        "ckptmgr.diagnose.match",
        "ckptmgr.run.overview",
        "ckptmgr.storage.open",
        "ckptmgr.launch",
        "ckptmgr.config.compose",
        "ckptmgr.diagnose.sniff",
    ],
)
def test_what_does_not_compute_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_these() -> None:
    assert sorted(ckptmgr.__all__) == [
        "AnyOf",
        "Budget",
        "CheckpointManager",
        "CheckpointNotFoundError",
        "Checkpointer",
        "CkptmgrError",
        "CorruptCheckpointError",
        "ElasticSampler",
        "EveryEpochs",
        "EverySeconds",
        "EverySteps",
        "Fenced",
        "Golden",
        "GoldenMismatchError",
        "Inference",
        "KeepAll",
        "KeepBest",
        "KeepEveryEpochs",
        "KeepEverySteps",
        "KeepLast",
        "KeepTagged",
        "KeepWithin",
        "OnException",
        "OnImprovement",
        "OnSignal",
        "PerSampleSeed",
        "Preempted",
        "SaveFailedError",
        "Selection",
        "StateMismatchError",
        "Union",
        "UnsupportedStateError",
        "UsageError",
        "__version__",
        "allow_targets",
        "factory",
        "load_inference",
        "register_handler",
        "register_kind",
    ]
    for name in ckptmgr.__all__:
        assert getattr(ckptmgr, name) is not None
