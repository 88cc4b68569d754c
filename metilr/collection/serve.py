"""``metilr serve``: a page and a JSON endpoint that say which exhibit a photo shows."""

import asyncio
import contextlib
import importlib.util
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from metilr.collection import Identified, PhotoOptions, Threshold, collection_document, named
from metilr.collection.identify import data_uri
from metilr.collection.photos import BadPhotoError, Decoder, TooManyPixelsError
from metilr.data.decode import HEIF, BadImageError, formats
from metilr.distributed import end_if_unguarded
from metilr.errors import UserError
from metilr.progress import make_console, printable

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from metilr.collection.collection import Collection

MAX_MEGABYTES = 20  # phones' photos have 2 to 12
MOST_WAITING = 32  # photos and pictures that wait for their turn; a page asks for five at once
LIBRARIES = ("fastapi", "uvicorn", "python_multipart")


def serve(
    options: PhotoOptions | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_megabytes: float = MAX_MEGABYTES,
) -> None:
    """Serve a page that says which exhibit a photo shows.

    The same answer as JSON: curl -F photo=@PHOTO http://127.0.0.1:8000/identify. Nothing is kept, and nothing is
    asked of the network. Ctrl-C ends it.

    Args:
        options: What photos are compared with, a run or a store.
        host: Address to listen at. The default is reached from this machine alone; 0.0.0.0 lets everyone in the
            network in, without a password.
        port: Port to listen at; 0 takes a free one.
        max_megabytes: Larger uploads are refused.

    Raises:
        UserError: If an option or a file is not usable, or the port is taken; says which and what to do.
    """
    missing = [library for library in LIBRARIES if importlib.util.find_spec(library) is None]
    if missing:
        raise UserError(f"metilr serve needs {' and '.join(missing)}: pip install 'metilr[serve]'")
    if not max_megabytes > 0:
        raise UserError(f"{max_megabytes}: choose a number above 0", "max_megabytes")
    options = options or PhotoOptions()
    end_if_unguarded()
    with _listen(host, port) as listener, contextlib.closing(Decoder()) as decoder:
        from metilr.collection.open_collection import open_with_threshold  # these take seconds
        from metilr.collection.walls import server_of

        collection, chosen = open_with_threshold(options)
        hosts = ["127.0.0.1", "localhost", "[::1]", "::1", host] if is_loopback(host) else ["*"]
        app = build_app(collection, chosen, int(max_megabytes * 10**6), hosts, options.max_pixels, decoder)
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
        reason = f"{host} cannot be listened at there ({error.strerror})"
        raise UserError(f"{port}: {reason}; choose another", "port") from None
    return listener


def build_app(
    collection: "Collection",
    threshold: Threshold,
    max_bytes: int,
    hosts: Sequence[str],
    max_pixels: int,
    decoder: Decoder,
) -> "ASGIApp":
    """Build the application.

    Requests of more than ``max_bytes`` are refused while they come in, photos of more than ``max_pixels`` before they
    are decoded. ``hosts`` are the names by which the server may be asked; ``*`` for any.
    """
    import jinja2
    from fastapi import FastAPI, HTTPException, Request, Response, UploadFile
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse
    from fastapi.staticfiles import StaticFiles
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from metilr.collection.walls import Walls

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        decoder.close()  # or the end would wait for what it decodes

    app = FastAPI(title="metilr", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    templates = jinja2.Environment(loader=jinja2.PackageLoader("metilr.collection"), autoescape=True)
    # A phone that is told that HEIC is wanted sends it; else it makes a JPEG of it.
    accept = "image/*,.avif,.heic,.heif" if HEIF in formats() else "image/*"
    page = templates.get_template("serve.html").render(
        formats=", ".join("HEIC" if kind == HEIF else kind for kind in formats()),
        collection=collection,
        threshold=threshold,
        max_bytes=max_bytes,
        max_megapixels=max_pixels / 10**6,
        accept=accept,
    )
    turn, n_waiting = asyncio.Lock(), 0  # a photo decoded and in the model takes up to a gigabyte

    @contextlib.asynccontextmanager
    async def in_turn(request: Request) -> AsyncIterator[None]:
        nonlocal n_waiting
        if n_waiting >= MOST_WAITING:
            raise HTTPException(503, "Many photos are waiting; try again in a few seconds.", {"Retry-After": "5"})
        n_waiting += 1
        try:
            async with turn:
                await refuse_who_left(request)
                yield
        finally:
            n_waiting -= 1

    async def refuse_who_left(request: Request) -> None:
        if await request.is_disconnected():
            raise HTTPException(499, "The client has left.")  # nobody reads it

    @app.get("/")
    def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.post("/identify")
    async def identify(request: Request, photo: UploadFile) -> dict[str, Any]:
        async with in_turn(request):
            try:
                sizes = collection.image_size, await run_in_threadpool(lambda: collection.largest_side), max_pixels
                decoded = await run_in_threadpool(decoder.photo, await photo.read(), *sizes)
                await refuse_who_left(request)
                answer = await run_in_threadpool(collection.answer, decoded.image, draw=True)
            except BadPhotoError as error:
                status = 413 if isinstance(error, TooManyPixelsError) else 422
                raise HTTPException(status, f"The photo {error}.") from None
        decision, has_val = threshold.decide(answer.log_confidence), threshold.figures is not None
        said = Identified("photo", answer, decision, reduced=decoded.reduced, has_val=has_val)
        document = said.as_json(collection)
        for match, listed in zip(answer.matches, document["matches"], strict=True):
            listed["picture"] = f"/images/{match.row}" if collection.image(match.row).is_file() else None
            listed["named"] = printable(named(match))
        return {
            "headline": printable(said.headline),
            "detail": printable(said.detail),
            **document,
            "regions": None if answer.regions is None else data_uri(answer.regions),
            "threshold": threshold.as_json(),
            "collection": collection_document(collection),
        }

    @app.get("/images/{row}")
    async def show_image(request: Request, row: int) -> Response:
        if row not in collection.images:
            raise HTTPException(404, "There is no such image.")
        async with in_turn(request):
            try:
                picture = await run_in_threadpool(decoder.thumbnail, collection.image(row))
            except (BadImageError, BadPhotoError):
                raise HTTPException(404, "The image is no longer there, or cannot be decoded.") from None
        return Response(picture, media_type="image/jpeg")

    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))

    @app.exception_handler(StarletteHTTPException)
    def tell_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    def tell_what_to_send(request: Request, error: RequestValidationError) -> JSONResponse:
        is_upload = request.url.path == "/identify"
        said = "Send one photo, as the form field 'photo'." if is_upload else "There is no such image."
        return JSONResponse({"error": said}, 422)

    @app.exception_handler(Exception)
    def tell_defect(request: Request, error: Exception) -> JSONResponse:
        said = "Something went wrong with this photo; the server goes on. Its log says more."
        return JSONResponse({"error": said}, 500)

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return Walls(app, max_bytes)
