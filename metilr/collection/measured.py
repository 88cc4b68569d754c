"""How a server is doing: what Prometheus reads, and a line of JSON for each request."""

import json
import os
import time
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # a photo takes half a second to some seconds of a core


class Meters:
    """What is counted, for one server."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("metilr_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.photos = Counter("metilr_photos", "Photos answered, by what was said.", ["decision"], registry=registry)
        self.seconds = Histogram(
            "metilr_request_seconds", "Time from a request to its answer.", ["path"], registry=registry, buckets=SECONDS
        )

    def text(self) -> bytes:
        """All of it, as Prometheus reads it, of all processes that serve together."""
        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            MultiProcessCollector(registry := CollectorRegistry())
        return generate_latest(registry)


class Measured:
    """Counts requests, and prints a line for each where that is wanted: no address and no name of a photo."""

    def __init__(self, app: ASGIApp, meters: Meters, log: bool) -> None:
        self.app, self.meters, self.log = app, meters, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def send_on(message: Message) -> None:
            nonlocal status
            status = message["status"] if message["type"] == "http.response.start" else status
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        finally:
            path = getattr(scope.get("route"), "path", "other")  # of few kinds, whatever strangers ask for
            seconds = time.monotonic() - began
            self.meters.requests.labels(path, str(status)).inc()
            self.meters.seconds.labels(path).observe(seconds)
            if self.log:
                now = datetime.now(UTC).isoformat(timespec="milliseconds")
                line = {"time": now, "method": scope["method"], "path": path, "status": status}
                print(json.dumps({**line, "seconds": round(seconds, 4)}), flush=True)
