"""``metilr serve``: a page and an API that say which exhibit a photo shows."""

import contextlib
import importlib.util
import ipaddress
import logging
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from metilr.collection import PhotoOptions
from metilr.collection.photos import Decoder
from metilr.distributed import end_if_unguarded
from metilr.errors import UserError, one_line
from metilr.files import regular
from metilr.progress import make_console, printable

MAX_MEGABYTES = 20  # phones' photos have 2 to 12
SHORTEST_KEY = 16  # signs of an API key
LIBRARIES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def serve(
    options: PhotoOptions | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_megabytes: float = MAX_MEGABYTES,
    api_key_file: Path | None = None,
    allow_origins: Sequence[str] = (),
    log_requests: bool = False,
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

    Raises:
        UserError: If an option or a file is not usable, or the port is taken; says which and what to do.
    """
    missing = [library for library in LIBRARIES if importlib.util.find_spec(library) is None]
    if missing:
        raise UserError(f"metilr serve needs {' and '.join(missing)}: pip install 'metilr[serve]'")
    if not max_megabytes > 0:
        raise UserError(f"{max_megabytes}: choose a number above 0", "max_megabytes")
    options, key = options or PhotoOptions(), None if api_key_file is None else _read_key(Path(api_key_file))
    if wrong := [each for each in allow_origins if not re.fullmatch(r"https?://[^/]+", each)]:
        raise UserError(f"{wrong[0]}: must be like https://museum.example, without a path", "allow_origins")
    end_if_unguarded()
    with _listen(host, port) as listener, contextlib.closing(Decoder()) as decoder:
        from metilr.collection.app import Limits, build_app  # these take seconds
        from metilr.collection.open_collection import open_with_threshold
        from metilr.collection.walls import server_of

        collection, chosen = open_with_threshold(options)
        hosts = ["127.0.0.1", "localhost", "[::1]", "::1", host] if is_loopback(host) else ["*"]
        limits = Limits(int(max_megabytes * 10**6), options.max_pixels, hosts, key, tuple(allow_origins))
        app = build_app(collection, chosen, limits, decoder, log_requests)
        logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # the sender is told
        server = server_of(app)
        decoder.wait()
        listener.listen()  # so that who reads the next line can ask already
        console, name = make_console(), escape(printable(collection.name))
        address = escape(f"[{host}]" if ":" in host else host) + f":{listener.getsockname()[1]}"
        console.print(f"[bold]serving[/]      {name} at http://{address}/ (Ctrl-C ends it)")
        if collection.search is not None:
            console.print(f"[bold]search[/]       {collection.search}")
        if not is_loopback(host):
            without = "without a password" if key is None else "who has the key"
            console.print(f"[bold yellow]note:[/] everyone who reaches this address can use it, {without}")
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # the way to end it, and no fault
            console.print("ended")


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
