"""One HTTP request: its answer, and the bytes that come with it as far as the connection holds."""

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import IO

from metilr.progress import printable

CHUNK = 1 << 20  # bytes asked for at a time
TIMEOUT = 30  # seconds without a byte after which a connection counts as broken
MOST = 10_000_000_000  # bytes of a file of which nobody tells the size
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses that another attempt may mend


class FetchError(Exception):
    """An attempt failed; says why in a line that a terminal can be given, whatever the server's own words are.

    Attributes:
        passing: Another attempt may succeed.
        wait: Seconds that the server asks to wait before it.
        status: The HTTP status, if that is the reason.
    """

    def __init__(self, reason: str, passing: bool = True, wait: float | None = None, status: int | None = None) -> None:
        super().__init__(printable(" ".join(reason.split())[:200]))
        self.passing, self.wait, self.status = passing, wait, status


class TooMuch(FetchError):
    """A body went on after all that it may have."""


def remote_size(url: str) -> int | None:
    """Bytes that the server announces for a file; None if it does not tell.

    Raises:
        FetchError: If it cannot be asked.
    """
    with open_url(url, method="HEAD") as response:
        return content_length(response)


def open_url(url: str, headers: Mapping[str, str] | None = None, method: str | None = None) -> http.client.HTTPResponse:
    """Send a request, and return the answer to it if it is a good one.

    Raises:
        FetchError: If the server cannot be reached or answers with an error.
    """
    own = {"User-Agent": "metilr", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers={**own, **(headers or {})}, method=method)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        seconds = error.headers.get("Retry-After", "")
        raise FetchError(
            f"the server answers {error.code} {error.reason}".rstrip(),
            passing=error.code in PASSING,
            wait=float(seconds) if seconds.isdecimal() else None,
            status=error.code,
        ) from error
    except (ValueError, http.client.InvalidURL) as error:  # the given one, or one that the server sends on to
        raise FetchError(f"an address that cannot be asked ({_in_words(error)})", passing=False) from error
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(f"no connection ({_in_words(error)})") from error
    if not isinstance(response, http.client.HTTPResponse):  # sent on to ftp: or the like
        response.close()
        raise FetchError("the server sends to an address that is not HTTP", passing=False)
    return response


def content_length(response: http.client.HTTPResponse) -> int | None:
    """Bytes that an answer announces; None if it does not tell.

    Raises:
        FetchError: If it tells what is no such number.
    """
    text = response.headers.get("Content-Length")
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,18}", text):
        raise FetchError(f"announces a length that is none ({text[:20]})", passing=False)
    return int(text)


def copy_body(response: http.client.HTTPResponse, file: IO[bytes], most: int, report: Callable[[int], None]) -> int:
    """Append what a server sends to a file, as far as the connection holds; returns the number of bytes.

    Args:
        response: The answer.
        file: Open to write.
        most: Bytes that it may send; a body need not have the announced length, nor an end.
        report: Called with the number of bytes so far.

    Raises:
        TooMuch: If it sends more.
        FetchError: If the connection breaks in a way that shows. One that is closed early looks like an end:
            compare the number with the announced one.
        OSError: If the file cannot be written.
    """
    size = 0
    while chunk := receive(response, CHUNK):
        if size + len(chunk) > most:
            raise TooMuch("sends more bytes than the file can have", passing=False)
        file.write(chunk)
        size += len(chunk)
        report(size)
    return size


def receive(response: http.client.HTTPResponse, n: int) -> bytes:
    """At most ``n`` bytes of what a server sends, as soon as some are there; none at the end.

    Raises:
        FetchError: If the connection breaks in a way that shows.
    """
    try:
        return response.read1(n)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise FetchError(f"the connection broke off ({_in_words(error)})") from error


def _in_words(error: Exception) -> str:
    cause = getattr(error, "reason", error)  # urllib's own error holds the system's
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
