import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import Forks
from tests.hub import Hub
from tests.museum import write_museum
from tests.server import Server
from tests.small_runs import Place

SHARED = Path(os.environ.get("METILR_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the tests of W&B log to it."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture
def tiny_museum(tmp_path: Path) -> Path:
    return write_museum(tmp_path / "museum")


@pytest.fixture
def met_root(tmp_path: Path) -> Path:
    """The published mini database, val and test files, without images."""
    source = SHARED / "met_ground_truth"
    if not source.is_dir():
        pytest.skip(f"no published ground truth at {source} (METILR_SHARED names its parent)")
    folder = tmp_path / "met" / "ground_truth"
    folder.mkdir(parents=True)
    for name in ("mini_MET_database.json", "valset.json", "testset.json"):
        (folder / name).symlink_to(source / name)
    return folder.parent


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hugging Face Hub on this machine, that huggingface_hub asks, and an empty cache."""
    hub = Hub()
    hub.use(monkeypatch, tmp_path / "hub_cache")
    yield hub
    hub.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files right here, of few long tests, then those of most tests: several workers end together."""
    n_tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.parent != Path(__file__).parent, -n_tests[item.path]))


FORKS = pytest.StashKey[Forks]()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Of several workers, which run all tests: let each one's forking process import while the tests are collected."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        session.config.stash[FORKS] = Forks()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if forks := session.config.stash.get(FORKS, None):
        forks.stop()


@pytest.fixture(scope="session")
def forks(pytestconfig: pytest.Config) -> Forks:
    if FORKS not in pytestconfig.stash:
        pytestconfig.stash[FORKS] = Forks()
    return pytestconfig.stash[FORKS]


@pytest.fixture(scope="session")
def place(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Clean runs, made once."""
    place = Place(forks, tmp_path_factory.mktemp("runs"))
    for outcome in place.clean.values():
        assert outcome.status == 0, outcome.printed
    return place
