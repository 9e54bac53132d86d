from collections.abc import Iterator

import pytest
from forge import Forge
from runner import Runner


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    server = Forge()
    yield server
    server.close()


@pytest.fixture(scope="session")
def plain(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(forge, tmp_path_factory.mktemp("plain"), "plain_script")
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def lightning(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(forge, tmp_path_factory.mktemp("lightning"), "lightning_script")
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def selected_cases(request: pytest.FixtureRequest) -> list[object]:
    """The cases of the matrix that this session runs, in order."""
    return [
        item.callspec.params["case"]
        for item in request.session.items
        if hasattr(item, "callspec") and "case" in item.callspec.params
    ]
