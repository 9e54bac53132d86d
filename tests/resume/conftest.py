from collections.abc import Iterator

import pytest
from cases import Case
from forge import Forge
from runner import Runner


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    server = Forge()
    yield server
    server.close()


@pytest.fixture(scope="session")
def plain(request: pytest.FixtureRequest, forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(forge, tmp_path_factory.mktemp("plain"), "plain_script", selected(request, "plain"))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def lightning(
    request: pytest.FixtureRequest, forge: Forge, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runner]:
    runner = Runner(forge, tmp_path_factory.mktemp("lightning"), "lightning_script", selected(request, "lightning"))
    yield runner
    runner.close()


def selected(request: pytest.FixtureRequest, face: str) -> list[Case]:
    """Return the cases of the matrix that this session runs, in order."""
    cases = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    return [case for case in cases if isinstance(case, Case) and case.face == face]
