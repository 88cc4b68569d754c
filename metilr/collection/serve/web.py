"""The web application: three routes, and the walls around them."""

import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from fastapi import FastAPI, HTTPException, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metilr.collection.collection import BadPhotoError, Collection, TooManyPixelsError, load_photo
from metilr.collection.identify import data_uri
from metilr.collection.threshold import Threshold, answer_document, collection_document, detail, headline
from metilr.data.decode import BadImageError
from metilr.progress import printable
from metilr.report.page import jpeg_thumbnail

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",  # row 5 of the next run is another picture
}


def build_app(
    collection: Collection, threshold: Threshold, max_bytes: int, hosts: Sequence[str], max_pixels: int
) -> FastAPI:
    """Build the application.

    Requests of more than ``max_bytes`` are refused while they come in, photos of more than ``max_pixels`` before they
    are decoded. ``hosts`` are the names by which the server may be asked; ``*`` for any.
    """
    app = FastAPI(title="metilr", docs_url=None, redoc_url=None, openapi_url=None)
    templates = jinja2.Environment(loader=jinja2.PackageLoader("metilr.collection.serve"), autoescape=True)
    page = templates.get_template("serve.html").render(
        collection=collection, threshold=threshold, max_bytes=max_bytes, max_megapixels=max_pixels / 10**6
    )
    one_at_a_time = threading.Lock()  # a photo decoded and in the model takes up to a gigabyte

    @app.get("/")
    def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.post("/identify")
    def identify(photo: UploadFile) -> dict[str, Any]:
        with one_at_a_time:
            try:
                loaded = load_photo(photo.file, collection.image_size, collection.largest_side, max_pixels)
                answer = collection.answer(loaded.image, draw=True)
            except BadPhotoError as error:
                raise HTTPException(
                    413 if isinstance(error, TooManyPixelsError) else 422, f"The photo {error}."
                ) from None
        decision = threshold.decide(answer.log_confidence)
        document = answer_document(collection, answer, decision)
        for match, listed in zip(answer.matches, document["matches"], strict=True):
            listed["picture"] = f"/images/{match.row}" if collection.image(match.row).is_file() else None
        return {
            "headline": printable(headline(decision, answer)),
            "detail": printable(detail(decision, answer)),
            **document,
            "reduced": loaded.reduced,
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
    app.add_exception_handler(StarletteHTTPException, _tell_error)
    app.add_exception_handler(RequestValidationError, _tell_what_to_send)
    app.add_exception_handler(Exception, _tell_defect)
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

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes
        self.refusal = f"The upload has more than {max_bytes / 10**6:g} MB; send a smaller photo."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a body that ends in an error where it passes the limit."""
        declared = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            await JSONResponse({"error": self.refusal}, 413)(scope, receive, send)
            return
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, self.refusal)
            return message

        await self.app(scope, receive_some, send)


def _tell_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


def _tell_what_to_send(request: Request, error: Exception) -> JSONResponse:
    is_upload = request.url.path == "/identify"
    said = "Send one photo, as the form field 'photo'." if is_upload else "There is no such image."
    return JSONResponse({"error": said}, 422)


def _tell_defect(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": "Something went wrong with this photo; the server goes on. Its log says more."}, 500)
