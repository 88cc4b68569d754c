"""What stands around the served page: bounded connections, uploads and times, and no other site's questions."""

import asyncio
import hmac
import time
from collections.abc import Mapping, Sequence

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS, FILES_A_CONNECTION = 100, 6  # fewer where a process may open few files
SECONDS_TO_ASK = 10.0  # for a connection that asks nothing, and between two parts of an upload
SECONDS_TO_SEND = 60.0  # for an upload, and for a part of an answer to be taken
SECONDS_TO_END = 3  # for those who are being answered, after Ctrl-C
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",  # row 5 of the next run is another picture
}


class Walls:
    """Refuses what other sites' pages ask, who lacks the key, bodies too long or slow; answers get ``HEADERS``."""

    def __init__(self, app: ASGIApp, max_bytes: int, key: str | None = None, origins: Sequence[str] = ()) -> None:
        self.app, self.max_bytes, self.key, self.origins = app, max_bytes, key, origins
        self.too_long = f"The upload has more than {max_bytes / 10**6:g} MB; send a smaller photo."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on within the walls, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_begun = False

        async def send_on(message: Message) -> None:
            nonlocal is_begun
            if message["type"] == "http.response.start":
                is_begun = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        is_allowed = headers.get("origin") in self.origins
        asks_first = is_allowed and scope["method"] == "OPTIONS"  # a browser, before it sends a key
        if self.key is not None and scope["path"] != "/health" and not asks_first and not has_key(headers, self.key):
            said = {"error": "Send the key of this server, as the header X-API-Key."}
            await JSONResponse(said, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send_on)
        elif scope["path"] != "/" and is_foreign(headers) and not is_allowed:
            await JSONResponse({"error": "Pages of other sites may not ask this server."}, 403)(scope, receive, send_on)
        elif declared.isdigit() and int(declared) > self.max_bytes:
            await JSONResponse({"error": self.too_long}, 413)(scope, receive, send_on)
        else:
            try:
                await self.app(scope, self._bounded(receive), send_on)
            except asyncio.CancelledError:  # by the server, which ends; it would print a traceback
                if not is_begun:
                    await JSONResponse({"error": "The server ends."}, 503)(scope, receive, send_on)

    def _bounded(self, receive: Receive) -> Receive:
        n_received, is_whole, started = 0, False, time.monotonic()

        async def receive_some() -> Message:
            nonlocal n_received, is_whole
            if is_whole:  # what follows is that the client leaves
                return await receive()
            left = min(SECONDS_TO_ASK, started + SECONDS_TO_SEND - time.monotonic())
            try:
                message = await asyncio.wait_for(receive(), left)
            except TimeoutError:
                raise HTTPException(408, "The upload is too slow; send it again, or a smaller photo.") from None
            n_received += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if n_received > self.max_bytes:
                raise HTTPException(413, self.too_long)
            return message

        return receive_some


def has_key(headers: Mapping[str, str], key: str) -> bool:
    """Whether a request brings a key, in one of its two headers."""
    brought = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(brought.encode(), key.encode())


def is_foreign(headers: Mapping[str, str]) -> bool:
    """Whether a browser says that another site's page asks; what is no browser says nothing."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    is_other = origin is not None and origin.partition("://")[2] != headers.get("host")
    return is_other or site in ("cross-site", "same-site")


def most_connections() -> int:
    """Connections at once, so that the process does not run out of files."""
    try:
        import resource  # not there on each system
    except ImportError:
        return MOST_CONNECTIONS
    n_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = n_files == resource.RLIM_INFINITY
    return MOST_CONNECTIONS if unlimited else max(1, min(MOST_CONNECTIONS, n_files // FILES_A_CONNECTION))


def server_of(app: ASGIApp) -> uvicorn.Server:
    """A server of bounded connections; one that asks nothing is closed after a while, or for the sake of others."""
    most = most_connections()
    return uvicorn.Server(uvicorn.Config(
        app, http=Impatient, ws="none", log_level="warning", server_header=False, backlog=max(1, most // 2),
        timeout_graceful_shutdown=SECONDS_TO_END,
    ))  # fmt: skip


class Impatient(H11Protocol):
    """uvicorn's own, which waits for the first question for ever, and accepts until there are no files left."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Where there are too many, turn away the one that has been silent for longest, this one if no other is."""
        super().connection_made(transport)
        self._silent_since = self.loop.time()
        self._watch()
        if len(self.connections) > most_connections():
            silent = [other for other in self.connections if isinstance(other, Impatient) and other._is_silent]
            min(silent, key=lambda other: other._silent_since)._turn_away()

    def on_response_complete(self) -> None:
        """Count the silence from here on."""
        self._silent_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Wait only so long for a client to take what it asked for."""
        super().pause_writing()
        self._giving_up = self.loop.call_later(SECONDS_TO_SEND, self.transport.abort)

    def resume_writing(self) -> None:
        """It is taken."""
        super().resume_writing()
        self._giving_up.cancel()

    @property
    def _is_silent(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if self._is_silent and self.loop.time() - self._silent_since > SECONDS_TO_ASK:
            self.transport.abort()
        elif self in self.connections:
            self.loop.call_later(1, self._watch)

    def _turn_away(self) -> None:
        self.connections.discard(self)
        self.transport.write(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\n\r\n")
        self.transport.close()
