import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOM = Path(__file__).parent
sys.path.insert(0, str(ROOM.parent / "resume"))

from forge import Forge  # noqa: E402
from job_launcher import Launcher  # noqa: E402


@pytest.fixture(scope="session")
def rank_forge() -> Iterator[Forge]:
    server = Forge(["torch.distributed.fsdp", "torch.distributed.tensor", "rank_program"], ROOM)
    yield server
    server.close()


@pytest.fixture
def launcher(rank_forge: Forge, tmp_path: Path) -> Launcher:
    return Launcher(rank_forge, tmp_path)
