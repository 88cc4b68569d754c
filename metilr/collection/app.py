"""The application that ``metilr serve`` runs: a page, and an API of typed documents."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp

from metilr import __version__
from metilr.collection import Identified, Threshold, collection_document, named
from metilr.collection.api import AnswerDocument, AnswersDocument, ErrorDocument, ExhibitDocument, HealthDocument
from metilr.collection.collection import Answer, Collection
from metilr.collection.identify import data_uri
from metilr.collection.measured import Measured, Meters
from metilr.collection.photos import BadPhotoError, Decoder, Photo, TooManyPixelsError
from metilr.collection.walls import Walls
from metilr.data.decode import HEIF, BadImageError, formats
from metilr.errors import UserError
from metilr.progress import printable

logger = logging.getLogger(__name__)

MOST_WAITING = 32  # requests that wait for their turn; a page asks for five pictures at once
MOST_PHOTOS = 16  # in a request
SECONDS_FOR_ALL = 30.0  # of decoding, for the photos of a request


@dataclass(frozen=True)
class Limits:
    """What is refused: longer requests, larger photos, other names of this server, and who lacks the key."""

    max_bytes: int
    max_pixels: int
    hosts: Sequence[str]  # ``*`` for any
    key: str | None = None
    origins: tuple[str, ...] = ()


class Service:
    """A collection that is asked by many, one request at a time: a photo in the model takes up to a gigabyte."""

    def __init__(
        self, collection: Collection, threshold: Threshold, max_pixels: int, decoder: Decoder, meters: Meters
    ) -> None:
        self.collection, self.threshold, self.max_pixels = collection, threshold, max_pixels
        self.decoder, self.meters = decoder, meters
        self.turn, self.n_waiting = asyncio.Lock(), 0

    @contextlib.asynccontextmanager
    async def in_turn(self, request: Request) -> AsyncIterator[None]:
        """Wait for those who came before; refuse at once where too many do."""
        if self.n_waiting >= MOST_WAITING:
            raise HTTPException(503, "Many photos are waiting; try again in a few seconds.", {"Retry-After": "5"})
        self.n_waiting += 1
        try:
            async with self.turn:
                await _refuse_who_left(request)
                yield
        finally:
            self.n_waiting -= 1

    async def answers(self, request: Request, contents: Sequence[bytes]) -> list[dict[str, Any] | BadPhotoError]:
        """The documents of some photos, or why there is none; they go through the network together."""
        largest = await run_in_threadpool(lambda: self.collection.largest_side)
        photos: list[Photo | BadPhotoError] = []
        until = time.monotonic() + SECONDS_FOR_ALL
        for content in contents:
            try:
                if time.monotonic() > until:
                    raise BadPhotoError("comes after others that took too long to decode; send it by itself")
                size = self.collection.image_size
                photos.append(await run_in_threadpool(self.decoder.photo, content, size, largest, self.max_pixels))
            except BadPhotoError as error:
                photos.append(error)
        await _refuse_who_left(request)
        images = [photo.image for photo in photos if not isinstance(photo, BadPhotoError)]
        found = iter(await run_in_threadpool(self.collection.answers, images, draw=True))
        said: list[dict[str, Any] | BadPhotoError] = []
        for photo in photos:
            if isinstance(photo, BadPhotoError):
                said.append(photo)
                continue
            answer = next(found)
            said.append(answer if isinstance(answer, BadPhotoError) else self._document(answer, photo.reduced))
        for each in said:
            self.meters.photos.labels("bad photo" if isinstance(each, BadPhotoError) else each["decision"]).inc()
        return said

    def _document(self, answer: Answer, is_reduced: bool) -> dict[str, Any]:
        decision, has_val = self.threshold.decide(answer.log_confidence), self.threshold.figures is not None
        said = Identified("photo", answer, decision, reduced=is_reduced, has_val=has_val)
        document = said.as_json(self.collection)
        for match, listed in zip(answer.matches, document["matches"], strict=True):
            listed["picture"] = f"/images/{match.row}" if self.collection.image(match.row).is_file() else None
            listed["named"] = printable(named(match))
        return {
            "headline": printable(said.headline),
            "detail": printable(said.detail),
            **document,
            "regions": None if answer.regions is None else data_uri(answer.regions),
            "threshold": self.threshold.as_json(),
            "collection": collection_document(self.collection),
        }

    def exhibit(self, exhibit: str) -> ExhibitDocument:
        """What is known of an exhibit; KeyError if there is none of that name."""
        rows = np.flatnonzero(self.collection.ground_truth.labels["database"] == self.collection.label_of[exhibit])
        images = [f"/images/{row}" for row in rows.tolist() if row in self.collection.images]
        return ExhibitDocument(exhibit=exhibit, about=self.collection.about(exhibit), images=images)

    def page(self, max_bytes: int) -> str:
        """The page for visitors."""
        # A phone that is told that HEIC is wanted sends it; else it makes a JPEG of it.
        accept = "image/*,.avif,.heic,.heif" if HEIF in formats() else "image/*"
        return _template("serve.html").render(
            formats=", ".join("HEIC" if kind == HEIF else kind for kind in formats()),
            collection=self.collection,
            threshold=self.threshold,
            max_bytes=max_bytes,
            max_megapixels=self.max_pixels / 10**6,
            accept=accept,
        )


async def _refuse_who_left(request: Request) -> None:
    if await request.is_disconnected():
        raise HTTPException(499, "The client has left.")  # nobody reads it


def _template(name: str) -> jinja2.Template:
    return jinja2.Environment(loader=jinja2.PackageLoader("metilr.collection"), autoescape=True).get_template(name)


def build_app(
    collection: Collection, threshold: Threshold, limits: Limits, decoder: Decoder, log_requests: bool = False
) -> ASGIApp:
    """Build the application.

    Requests that are too long are refused while they come in, photos with too many pixels before they are decoded.
    """
    meters = Meters()
    service = Service(collection, threshold, limits.max_pixels, decoder, meters)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        decoder.close()  # or the end would wait for what it decodes

    app = FastAPI(title="metilr", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_routes(app, service, limits.max_bytes)
    _add_errors(app)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(limits.hosts), www_redirect=False)
    if limits.origins:
        headers = ["X-API-Key", "Authorization"]
        app.add_middleware(
            CORSMiddleware, allow_origins=limits.origins, allow_methods=["GET", "POST"], allow_headers=headers
        )
    return Measured(Walls(app, limits.max_bytes, limits.key, limits.origins), meters, log_requests)


def _add_routes(app: FastAPI, service: Service, max_bytes: int) -> None:
    page = service.page(max_bytes)
    refused: dict[int | str, dict[str, Any]] = {code: {"model": ErrorDocument} for code in (413, 422, 503)}

    @app.get("/", include_in_schema=False)
    def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.post("/identify", responses=refused, response_model_exclude_unset=True)
    async def identify(request: Request, photo: list[UploadFile]) -> AnswerDocument | AnswersDocument:
        """Say which exhibit a photo shows: its answer; of several, each as a field `photo`, a list of answers."""
        if len(photo) > MOST_PHOTOS:
            raise HTTPException(413, f"Send at most {MOST_PHOTOS} photos at once.")
        async with service.in_turn(request):
            answers = await service.answers(request, [await each.read() for each in photo])
        if len(photo) == 1:
            [answer] = answers
            if isinstance(answer, BadPhotoError):
                status = 413 if isinstance(answer, TooManyPixelsError) else 422
                raise HTTPException(status, f"The photo {answer}.") from None
            return AnswerDocument(**answer)
        named = [(each.filename or "", answer) for each, answer in zip(photo, answers, strict=True)]
        return AnswersDocument(photos=[
            ErrorDocument(name=name, error=f"The photo {answer}.") if isinstance(answer, BadPhotoError)
            else AnswerDocument(name=name, **answer) for name, answer in named
        ])  # fmt: skip

    @app.get("/exhibits/{exhibit:path}", responses={404: {"model": ErrorDocument}})
    def exhibits(exhibit: str) -> ExhibitDocument:
        """Tell what is known of an exhibit, by the name that answers give it."""
        try:
            return service.exhibit(exhibit)
        except KeyError:
            raise HTTPException(404, "There is no such exhibit.") from None

    pictures: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}, 404: {"model": ErrorDocument}}

    @app.get("/images/{row}", response_class=Response, responses=pictures)
    async def show_image(request: Request, row: int) -> Response:
        """Show an image of the collection, small."""
        if row not in service.collection.images:
            raise HTTPException(404, "There is no such image.")
        async with service.in_turn(request):
            try:
                picture = await run_in_threadpool(service.decoder.thumbnail, service.collection.image(row))
            except (BadImageError, BadPhotoError):
                raise HTTPException(404, "The image is no longer there, or cannot be decoded.") from None
        return Response(picture, media_type="image/jpeg")

    @app.get("/health")
    def health() -> HealthDocument:
        """Tell that the server answers."""
        about = collection_document(service.collection)
        return HealthDocument(version=__version__, collection=about, waiting=service.n_waiting)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics() -> Response:
        """Tell Prometheus how many requests and photos there were, and how long they took."""
        return Response(service.meters.text(), media_type="text/plain; version=0.0.4")

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(_template("docs.html").render(api=app.openapi()))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    def tell_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    def tell_what_to_send(request: Request, error: RequestValidationError) -> JSONResponse:
        is_upload = request.url.path == "/identify"
        said = "Send a photo, or several, as the form field 'photo'." if is_upload else "There is no such image."
        return JSONResponse({"error": said}, 422)

    @app.exception_handler(UserError)
    def tell_that_something_is_missing(request: Request, error: UserError) -> JSONResponse:
        logger.error("%s", error)
        said = "Something that the server needs cannot be had just now; its log says what."
        return JSONResponse({"error": said}, 503, {"Retry-After": "5"})

    @app.exception_handler(Exception)
    def tell_defect(request: Request, error: Exception) -> JSONResponse:
        said = "Something went wrong with this photo; the server goes on. Its log says more."
        return JSONResponse({"error": said}, 500)
