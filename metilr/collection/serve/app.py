"""``metilr serve``: a page and a JSON endpoint that say which exhibit a photo shows."""

import importlib.util
import ipaddress
import socket
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from metilr.collection.collection import MAX_PHOTO_MEGAPIXELS
from metilr.data.decode import pixels_of
from metilr.errors import UserError
from metilr.evaluation.results import MIN_PRECISION
from metilr.extraction.options import Accelerator
from metilr.progress import printable

MAX_MEGABYTES = 20  # phones' photos have 2 to 12
_LIBRARIES = ("fastapi", "uvicorn", "python_multipart")


def serve(
    run: Path | None = None,
    store: Path | None = None,
    ckpt: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    min_precision: float = MIN_PRECISION,
    threshold: float | None = None,
    max_megabytes: float = MAX_MEGABYTES,
    max_megapixels: float = MAX_PHOTO_MEGAPIXELS,
    accelerator: Accelerator = "auto",
) -> None:
    """Serve a page that says which exhibit a photo shows.

    The same answer as JSON: curl -F photo=@PHOTO http://127.0.0.1:8000/identify. Nothing is kept, and nothing is
    asked of the network. Ctrl-C ends it.

    Args:
        run: Folder that metilr evaluate wrote: its database, its model, its k and tau, and its val for the threshold.
        store: Folder that metilr index wrote, in place of a run.
        ckpt: The checkpoint that made the run or the index, if it was moved. Another one is refused.
        host: Address to listen at. The default is reached from this machine alone; 0.0.0.0 lets everyone in the
            network in, without a password.
        port: Port to listen at; 0 takes a free one.
        min_precision: An exhibit is named where at least this share of such answers was right on val of the run.
        threshold: An exhibit is named from this log-confidence on, in place of one chosen on val.
        max_megabytes: Larger uploads are refused.
        max_megapixels: A photo of more is not decoded.
        accelerator: Where the model runs; auto takes a GPU if there is one.

    Raises:
        UserError: If an option or a file is not usable, or the port is taken; says which and what to do.
    """
    missing = [library for library in _LIBRARIES if importlib.util.find_spec(library) is None]
    if missing:
        raise UserError(f"metilr serve needs {' and '.join(missing)}: pip install 'metilr[serve]'")
    if not max_megabytes > 0:
        raise UserError(f"{max_megabytes}: choose a number above 0", "max_megabytes")
    max_pixels = pixels_of(max_megapixels)
    with _listen(host, port) as listener:
        # Imported late: they take seconds, and the first two are not everyone's.
        import uvicorn

        from metilr.collection.open_collection import open_with_threshold
        from metilr.collection.serve.web import build_app

        collection, chosen = open_with_threshold(run, store, ckpt, min_precision, threshold, accelerator)
        hosts = ["127.0.0.1", "localhost", "[::1]", "::1", host] if is_loopback(host) else ["*"]
        app = build_app(collection, chosen, int(max_megabytes * 10**6), hosts, max_pixels)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
        listener.listen()  # so that who reads the next line can ask already
        console = Console(highlight=False)
        address = f"[{host}]" if ":" in host else host
        console.print(
            f"[bold]serving[/]      {escape(printable(collection.name))} at "
            f"http://{escape(address)}:{listener.getsockname()[1]}/ (Ctrl-C ends it)",
            soft_wrap=True,
        )
        if collection.search is not None:
            console.print(f"[bold]search[/]       {collection.search}", soft_wrap=True)
        if not is_loopback(host):
            console.print("[bold yellow]note:[/] everyone who reaches this address can use it, without a password")
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # the way to end it, and no fault
            console.print("ended")


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
        raise UserError(
            f"{port}: {host} cannot be listened at there ({error.strerror}); choose another", "port"
        ) from None
    return listener
