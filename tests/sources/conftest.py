import pytest

from metilr.sources import fetch
from tests.server import Server


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; what waits for it waits briefly."""
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.001)
    server = Server()
    yield server
    server.stop()
