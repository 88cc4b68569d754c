"""``metilr serve``: a page and a JSON endpoint that say which exhibit a photo shows, and the walls around them."""

import importlib.util
import ipaddress
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from metilr.collection.identify import data_uri
from metilr.collection.threshold import Identified, PhotoOptions, Threshold, collection_document
from metilr.data.decode import HEIF, BadImageError, formats
from metilr.errors import UserError
from metilr.progress import printable

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from metilr.collection.collection import Collection

MAX_MEGABYTES = 20  # phones' photos have 2 to 12
LIBRARIES = ("fastapi", "uvicorn", "python_multipart")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",  # row 5 of the next run is another picture
}


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
    with _listen(host, port) as listener:
        import uvicorn  # these take seconds

        from metilr.collection.open_collection import open_with_threshold

        collection, chosen = open_with_threshold(options)
        hosts = ["127.0.0.1", "localhost", "[::1]", "::1", host] if is_loopback(host) else ["*"]
        app = build_app(collection, chosen, int(max_megabytes * 10**6), hosts, options.max_pixels)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
        listener.listen()  # so that who reads the next line can ask already
        console, name = Console(highlight=False), escape(printable(collection.name))
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
    collection: "Collection", threshold: Threshold, max_bytes: int, hosts: Sequence[str], max_pixels: int
) -> "FastAPI":
    """Build the application.

    Requests of more than ``max_bytes`` are refused while they come in, photos of more than ``max_pixels`` before they
    are decoded. ``hosts`` are the names by which the server may be asked; ``*`` for any.
    """
    import jinja2
    from fastapi import FastAPI, HTTPException, Request, Response, UploadFile
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse
    from fastapi.staticfiles import StaticFiles
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from metilr.collection.collection import BadPhotoError, TooManyPixelsError
    from metilr.report.page import jpeg_thumbnail

    app = FastAPI(title="metilr", docs_url=None, redoc_url=None, openapi_url=None)
    templates = jinja2.Environment(loader=jinja2.PackageLoader("metilr.collection"), autoescape=True)
    # A phone that is told that HEIC is wanted sends it; else it makes a JPEG of it.
    accept = "image/*,.avif,.heic,.heif" if HEIF in formats() else "image/*"
    page = templates.get_template("serve.html").render(
        collection=collection,
        threshold=threshold,
        max_bytes=max_bytes,
        max_megapixels=max_pixels / 10**6,
        accept=accept,
    )
    one_at_a_time = threading.Lock()  # a photo decoded and in the model takes up to a gigabyte

    @app.get("/")
    def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.post("/identify")
    def identify(photo: UploadFile) -> dict[str, Any]:
        with one_at_a_time:
            try:
                loaded, answer = collection.answer_file(photo.file, max_pixels, draw=True)
            except BadPhotoError as error:
                status = 413 if isinstance(error, TooManyPixelsError) else 422
                raise HTTPException(status, f"The photo {error}.") from None
        decision, has_val = threshold.decide(answer.log_confidence), threshold.figures is not None
        said = Identified("photo", answer, decision, reduced=loaded.reduced, has_val=has_val)
        document = said.as_json(collection)
        for match, listed in zip(answer.matches, document["matches"], strict=True):
            listed["picture"] = f"/images/{match.row}" if collection.image(match.row).is_file() else None
        return {
            "headline": printable(said.headline),
            "detail": printable(said.detail),
            **document,
            "regions": None if answer.regions is None else data_uri(answer.regions),
            "threshold": threshold.as_json(),
            "collection": collection_document(collection),
        }

    @app.get("/images/{row}")
    def show_image(row: int) -> Response:
        if row not in collection.images:
            raise HTTPException(404, "There is no such image.")
        try:
            return Response(jpeg_thumbnail(collection.image(row)), media_type="image/jpeg")
        except BadImageError:
            raise HTTPException(404, "The image is no longer there, or cannot be decoded.") from None

    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))

    @app.exception_handler(StarletteHTTPException)
    def tell_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)

    @app.exception_handler(RequestValidationError)
    def tell_what_to_send(request: Request, error: RequestValidationError) -> JSONResponse:
        is_upload = request.url.path == "/identify"
        said = "Send one photo, as the form field 'photo'." if is_upload else "There is no such image."
        return JSONResponse({"error": said}, 422)

    @app.exception_handler(Exception)
    def tell_defect(request: Request, error: Exception) -> JSONResponse:
        said = "Something went wrong with this photo; the server goes on. Its log says more."
        return JSONResponse({"error": said}, 500)

    # The last added is the outermost.
    app.add_middleware(LimitedBody, max_bytes=max_bytes)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    return app


class LimitedBody:
    """Refuse a request's body that is too long: by what it says of itself, and while it comes in."""

    def __init__(self, app: "ASGIApp", max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes
        self.refusal = f"The upload has more than {max_bytes / 10**6:g} MB; send a smaller photo."

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass the request on with a body that ends in an error where it passes the limit."""
        from fastapi import HTTPException
        from fastapi.responses import JSONResponse

        declared = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            await JSONResponse({"error": self.refusal}, 413)(scope, receive, send)
            return
        received = 0

        async def receive_some() -> "Message":
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, self.refusal)
            return message

        await self.app(scope, receive_some, send)
