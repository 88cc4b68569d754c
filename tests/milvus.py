"""A Milvus server on this machine, from the environment of its own that `make milvus` installs it into."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[1] / ".venv-milvus" / "bin" / "milvus-lite"


@contextlib.contextmanager
def running(folder: Path) -> Iterator[str]:
    """The address of a server that keeps its data in a folder."""
    pytest.importorskip("pymilvus", reason="needs metilr[milvus]")
    if not SERVER.exists():
        pytest.skip("no Milvus server at .venv-milvus (make .venv-milvus/.installed)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [SERVER, "server", "--data-dir", folder, "--host", "127.0.0.1", "--port", str(port)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
