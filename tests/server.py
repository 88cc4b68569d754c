"""An HTTP server on this machine that does to a download what networks and publishers do."""

import contextlib
import hashlib
import http.server
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message

MODIFIED = "Wed, 01 Sep 2021 12:00:00 GMT"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # bytes of the body after which the connection ends
    reset: bool = False  # by a reset in place of a plain close
    lie: int = 0  # added to the announced length
    shift: int = 0  # bytes before those that were asked for
    hang: threading.Event | None = None  # waited for after the cut
    raw: bytes | None = None  # sent in place of all that is said above
    endless: bytes = b""  # sent after it, again and again
    pace: float = 0.0  # seconds between them


FINE = Fault()
PLAIN = b"HTTP/1.0 200 OK\r\n\r\n"  # an answer that tells no length


class Server:
    """Serves ``files``; the n-th GET suffers the n-th of ``faults``, all later ones ``always``.

    Attributes:
        ranges: Answers Range at all.
        conditions: Answers If-Range as it should; else it sends the range of whatever is there now.
        validators: Which of ETag and Last-Modified it sends.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.make: Callable[[str], bytes | None] = lambda path: None  # what is in none of them
        self.ranges = self.conditions = True
        self.validators: tuple[str, ...] = ("ETag", "Last-Modified")
        self.modified = MODIFIED
        self.faults: list[Fault] = []
        self.always = FINE
        self.requests: list[tuple[str, str, Message]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(("GET", self.path, self.headers))
                self.answer(outer.faults.pop(0) if outer.faults else outer.always, with_body=True)

            def do_HEAD(self) -> None:
                outer.requests.append(("HEAD", self.path, self.headers))
                self.answer(FINE, with_body=False)

            def answer(self, fault: Fault, with_body: bool) -> None:
                path = self.path.removeprefix("/")
                content = outer.files[path] if path in outer.files else outer.make(path)
                if fault.raw is not None:
                    self.wfile.write(fault.raw)
                    while fault.endless:
                        self.wfile.write(fault.endless)
                        time.sleep(fault.pace)
                    self.close_connection = True
                    return
                if fault.status or content is None:
                    self.send_response(fault.status or 404)
                    for name, value in fault.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    return
                mine = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Last-Modified": outer.modified}
                validators = {name: mine[name] for name in outer.validators}
                if self.headers.get("If-None-Match") in validators.values() and fault == FINE:
                    self.send_response(304)
                    self.end_headers()
                    return
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                condition = self.headers.get("If-Range")
                same = not outer.conditions or condition is None or condition in validators.values()
                start, status = 0, 200
                if outer.ranges and wanted and same:
                    start, status = max(0, int(wanted[1]) - fault.shift), 206
                body = content[start:]
                if status == 206 and not body:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.end_headers()
                    return
                self.send_response(status)
                total = len(content) + fault.lie
                if status == 206:
                    self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
                self.send_header("Content-Length", str(total - start))
                for name, value in {**validators, **fault.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body[: fault.cut])
                    self.wfile.flush()
                if fault.hang is not None:
                    fault.hang.wait(60)
                if fault.reset:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()

            def finish(self) -> None:
                with contextlib.suppress(OSError, ValueError):  # reset, or left by the client
                    super().finish()

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Http(http.server.ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that left

        self._http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def gets(self) -> list[str]:
        return [path.removeprefix("/") for method, path, _ in self.requests if method == "GET"]

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
