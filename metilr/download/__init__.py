"""Files over HTTP that arrive whole: continued where they broke off, retried, never mixed from two versions."""

import contextlib
import json
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import requests
import urllib3

from metilr.errors import UserError, one_line
from metilr.files import file_sha256, named, read_json, write_atomically
from metilr.progress import printable

MOST = 10_000_000_000  # bytes of a download of which nobody tells the size
TRIES = 6  # attempts in a row that bring nothing new; the waits between them add up to a minute
TIMEOUT, LONGEST_WAIT = 30, 60  # seconds without a byte; between attempts, also where the server asks for more
LEAST_RATE, RATE_SECONDS = 1000, 60  # bytes a second that an attempt brings, on average over so long
PASSING = frozenset({408, 416, 425, 429, 500, 502, 503, 504})  # HTTP statuses that another attempt may mend
HEADERS = {"User-Agent": "metilr", "Accept-Encoding": "identity"}


def fetch(
    url: str,
    path: Path,
    remedy: str,
    *,
    size: int | None = None,
    sha256: str | None = None,
    tries: int = TRIES,
    report: Callable[[int, int | None], None] = lambda done, total: None,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Download to a file that appears whole or not at all; what an earlier call left in ``PATH.part`` is continued.

    A part is continued only by the same version of the file, by the server's own word (``If-Range``); a server that
    names no version sends the file anew.

    ``remedy`` ends each message. ``size`` (bytes) and ``sha256`` (all or its first digits) are the published ones:
    another file is refused and thrown away. ``tries`` are attempts in a row that bring next to nothing, less than
    ``LEAST_RATE`` since the last that brought more. ``report`` is called with the bytes that are there and those that
    there will be, None if nobody tells.
    """
    part = path.with_name(path.name + ".part")
    with filelock.FileLock(f"{part}.lock"), named(part):
        longest, fruitless, since = 0, 0, time.monotonic()
        while not path.exists():  # another process may have fetched it meanwhile
            wait = None
            try:
                wait = _receive(url, part, size, report)
                reason = "the connection broke off"
                if wait is None:
                    break
            except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, ValueError) as error:
                raise UserError(f"{printable(url)}: cannot be asked ({one_line(error)}); {remedy}") from None
            except requests.RequestException as error:
                reason = one_line(error)
            except _Refused as error:
                raise UserError(f"{url}: {printable(str(error))}; {remedy}") from None
            there = part.stat().st_size if part.exists() else 0
            fruitless += 1
            if there > longest + LEAST_RATE * (time.monotonic() - since):
                longest, fruitless, since = there, 0, time.monotonic()
            if fruitless >= tries:
                what = f"{printable(reason)}, {tries} times in a row; what is there is kept"
                raise UserError(f"{url}: {what}: {remedy}") from None
            sleep(min(LONGEST_WAIT, wait or 2**fruitless))
        else:
            return
        digest = file_sha256(part)
        if sha256 is not None and not digest.startswith(sha256):
            part.unlink()
            _version_of(part).unlink(missing_ok=True)
            raise UserError(f"{url}: its sha256 is {digest}, the published file's {sha256}; {remedy}")
        part.replace(path)
        for file in (_version_of(part), Path(f"{part}.lock")):  # who waits for the lock finds the file there
            file.unlink(missing_ok=True)


class _Refused(Exception):
    """What another attempt will not mend."""


def _receive(url: str, part: Path, size: int | None, report: Callable[[int, int | None], None]) -> float | None:
    """One attempt; returns None when the file is whole, else the seconds that the server asks to wait, 0 for any."""
    version_file = _version_of(part)
    begun: dict[str, Any] = {}
    if part.exists():
        with contextlib.suppress(OSError, ValueError):  # without a note that can be read it begins anew
            begun = read_json(version_file)
    have = part.stat().st_size if begun.get("url") == url and begun.get("version") else 0
    headers = {**HEADERS, "Range": f"bytes={have}-", "If-Range": begun["version"]} if have else HEADERS
    with _answer(requests.get, url, headers=headers, stream=True) as response:
        if response.status_code in PASSING:
            if response.status_code == 416:  # the part is as long as the file, or longer: begin anew
                part.unlink(missing_ok=True)
            after = response.headers.get("Retry-After", "")
            return float(after) if after.isdecimal() else 0.0
        if not response.ok:
            raise _Refused(f"the server answers {response.status_code} {response.reason}")
        etag = response.headers.get("ETag", "")
        version = etag if etag.startswith('"') else response.headers.get("Last-Modified")
        place = response.headers.get("Content-Range", "")
        is_partial, is_same = response.status_code == 206, version == begun.get("version")
        continued = is_partial and is_same and place.startswith(f"bytes {have}-")
        if is_partial and not continued:
            part.unlink(missing_ok=True)
            return 0.0
        have = have if continued else 0
        length = _length(response)
        total = None if length is None else have + length
        if size is not None and total not in (None, size):
            raise _Refused(f"the server announces {total:,} bytes, the published file has {size:,}")
        most = size or total or MOST
        write_atomically(version_file, json.dumps({"url": url, "version": version}))
        with part.open("ab" if continued else "wb") as file:
            for chunk in _chunks(response):
                have += len(chunk)
                if have > most:
                    raise _Refused("the server sends more bytes than the file can have")
                file.write(chunk)
                report(have, total if total is not None else size)
    return None if have == (total or have) and size in (None, have) else 0.0


def _answer(ask: Callable[..., requests.Response], url: str, **options: Any) -> requests.Response:
    """What a server answers, body aside, by when it must have; in a thread, since a byte now and then is no silence."""
    answers: queue.Queue[requests.Response | Exception] = queue.Queue()

    def run() -> None:
        try:
            answers.put(ask(url, timeout=TIMEOUT, **options))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        answer = answers.get(timeout=RATE_SECONDS + TIMEOUT)
    except queue.Empty:
        raise requests.Timeout("no whole answer") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """The body as it comes in, as long as it does not come too slowly."""
    n_bytes, since = 0, time.monotonic()
    try:
        while chunk := response.raw.read1(1 << 16, decode_content=False):
            yield chunk
            n_bytes += len(chunk)
            seconds = time.monotonic() - since
            if seconds > RATE_SECONDS:
                if n_bytes < LEAST_RATE * seconds:
                    raise requests.ConnectionError(f"less than {LEAST_RATE / 1000:g} kB a second")
                n_bytes, since = 0, time.monotonic()
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(error) from None


def _version_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def remote_size(url: str) -> int | None:
    """Bytes that a server announces for a file; None if it does not tell, or cannot be asked now."""
    with contextlib.suppress(requests.RequestException, _Refused):
        return _length(_answer(requests.head, url, headers=HEADERS, allow_redirects=True))
    return None


def _length(response: requests.Response) -> int | None:
    text = response.headers.get("Content-Length")
    if text is not None and not re.fullmatch("[0-9]{1,18}", text):
        raise _Refused(f"the server announces a length that is none ({text[:20]})")
    return None if text is None else int(text)
