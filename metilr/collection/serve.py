"""``metilr serve``: a page and an API that say which exhibit a photo shows."""

import contextlib
import importlib.util
import ipaddress
import logging
import multiprocessing.connection
import os
import re
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.markup import escape

from metilr.collection import PhotoOptions
from metilr.collection.photos import Decoder
from metilr.distributed import end_if_unguarded, end_with_parent
from metilr.errors import UserError, one_line
from metilr.files import regular
from metilr.progress import make_console, printable

MAX_MEGABYTES = 20  # phones' photos have 2 to 12
SHORTEST_KEY = 16  # signs of an API key
LIBRARIES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
Tell = Callable[[str, str | None], None]  # told the collection's name, and how it is searched


def serve(
    options: PhotoOptions | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_megabytes: float = MAX_MEGABYTES,
    api_key_file: Path | None = None,
    allow_origins: Sequence[str] = (),
    log_requests: bool = False,
    workers: int = 1,
) -> None:
    """Serve a page and an API that say which exhibit a photo shows.

    The same answer as JSON: curl -F photo=@PHOTO http://127.0.0.1:8000/identify. All that programs can ask is at /docs,
    /openapi.json says it to programs, /health and /metrics (Prometheus) tell how the server is. Nothing is kept, and
    nothing is asked of the network. Ctrl-C ends it.

    Args:
        options: What photos are compared with, a run or a store.
        host: Address to listen at. The default is reached from this machine alone; 0.0.0.0 lets everyone in the
            network in, without a password.
        port: Port to listen at; 0 takes a free one.
        max_megabytes: Larger uploads are refused.
        api_key_file: File with a key: then only who sends it, as X-API-Key or bearer token, is answered (at /health
            everybody). The page cannot send one.
        allow_origins: Other sites whose pages may ask, such as https://museum.example; without it none.
        log_requests: Print a line of JSON for each request: when, what, with which status, how long.
        workers: Processes that answer, each with the model and the collection in its memory and its share of the cores.

    Raises:
        UserError: If an option or a file is not usable, or the port is taken; says which and what to do.
    """
    missing = [library for library in LIBRARIES if importlib.util.find_spec(library) is None]
    if missing:
        raise UserError(f"metilr serve needs {' and '.join(missing)}: pip install 'metilr[serve]'")
    if not max_megabytes > 0:
        raise UserError(f"{max_megabytes}: choose a number above 0", "max_megabytes")
    if workers < 1:
        raise UserError(f"{workers}: choose 1 or more", "workers")
    options, key = options or PhotoOptions(), None if api_key_file is None else _read_key(Path(api_key_file))
    if wrong := [each for each in allow_origins if not re.fullmatch(r"https?://[^/]+", each)]:
        raise UserError(f"{wrong[0]}: must be like https://museum.example, without a path", "allow_origins")
    end_if_unguarded()
    hosts = ("127.0.0.1", "localhost", "[::1]", "::1", host) if is_loopback(host) else ("*",)
    serving = Serving(options, int(max_megabytes * 10**6), hosts, key, tuple(allow_origins), log_requests)
    console = make_console()
    with _listen(host, port) as listener:

        def tell(name: str, search: str | None) -> None:
            listener.listen()  # so that who reads the next line can ask already
            address = escape(f"[{host}]" if ":" in host else host) + f":{listener.getsockname()[1]}"
            console.print(f"[bold]serving[/]      {escape(printable(name))} at http://{address}/ (Ctrl-C ends it)")
            if search is not None:
                console.print(f"[bold]search[/]       {search}")
            if not is_loopback(host):
                without = "without a password" if key is None else "who has the key"
                console.print(f"[bold yellow]note:[/] everyone who reaches this address can use it, {without}")

        try:
            serving.run(listener, tell) if workers == 1 else _run_workers(workers, serving, listener, tell)
        except KeyboardInterrupt:  # the way to end it, and no fault
            console.print("ended")


@dataclass(frozen=True)
class Serving:
    """What is served, and to whom."""

    options: PhotoOptions
    max_bytes: int
    hosts: Sequence[str]
    key: str | None
    origins: tuple[str, ...]
    log_requests: bool

    def run(self, listener: socket.socket, tell: Tell) -> None:
        """Answer at a socket until Ctrl-C; ``tell`` is called when that begins."""
        with contextlib.closing(Decoder()) as decoder:
            from metilr.collection.app import Limits, build_app  # these take seconds
            from metilr.collection.open_collection import open_with_threshold
            from metilr.collection.walls import server_of

            collection, chosen = open_with_threshold(self.options)
            limits = Limits(self.max_bytes, self.options.max_pixels, self.hosts, self.key, self.origins)
            app = build_app(collection, chosen, limits, decoder, self.log_requests)
            logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # the sender is told
            decoder.wait()
            tell(collection.name, collection.search)
            server_of(app).run(sockets=[listener])


def _run_workers(n: int, serving: Serving, listener: socket.socket, tell: Tell) -> None:
    """Serve by n processes; one that ends by itself ends all, with an error."""
    context = multiprocessing.get_context("spawn")
    ready, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # read where the client is imported: what is counted adds up
        workers = [context.Process(target=_work, args=(n, serving, listener, theirs)) for _ in range(n)]
        try:
            for worker in workers:
                worker.start()
            theirs.close()
            ended = [worker.sentinel for worker in workers]
            for _ in workers:
                multiprocessing.connection.wait([ready, *ended])
                said: Any = ready.recv() if ready.poll() else None
                if isinstance(said, UserError):
                    raise said
                if said is None:
                    raise EOFError
            tell(*said)
            multiprocessing.connection.wait(ended)
            raise UserError("a process of the server has ended; what it printed says why")
        except EOFError:
            raise UserError("a process of the server ended at its start; was memory short?") from None
        finally:
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]
            for worker in workers:
                if worker.pid is not None:
                    worker.terminate()
                    worker.join()


def _work(n: int, serving: Serving, listener: socket.socket, ready: Connection) -> None:
    """What a process does: as the only one would, with its share of the cores."""
    end_with_parent()
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // n))
    try:
        serving.run(listener, lambda *said: ready.send(said))
    except UserError as error:
        ready.send(error)
    except KeyboardInterrupt:
        pass


def _read_key(file: Path) -> str:
    try:
        key = regular(file).read_text().strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)})", "api_key_file") from None
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable():
        raise UserError(f"{file}: must hold a key of {SHORTEST_KEY} or more ASCII signs in a line", "api_key_file")
    return key


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded, so as not to fail after it."""
    if not 0 <= port < 2**16:
        raise UserError(f"{port}: choose a number from 0 to 65535", "port")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except socket.gaierror as error:
        raise UserError(f"{host}: not an address of this machine ({error.strerror})", "host") from None
    except OSError as error:
        reason = f"{host} cannot be listened at there ({error.strerror})"
        raise UserError(f"{port}: {reason}; choose another", "port") from None
    return listener
