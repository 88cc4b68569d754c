"""Files over HTTP that arrive whole: continued where they broke off, retried, never mixed from two versions."""

import contextlib
import http.client
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from metilr.errors import UserError
from metilr.files import rename_on_disk, write_atomically
from metilr.transfer import MOST, FetchError, TooMuch, content_length, copy_body, open_url, receive

TRIES = 6  # attempts in a row that bring nothing new; the waits between them add up to a minute
LONGEST_WAIT = 60  # seconds, also where the server asks for more
OVERLAP = 1 << 16  # bytes that are asked for again when a download continues, to see that the file is the same
RANGE_REFUSED = 416

Report = Callable[[int, int | None], None]  # bytes that are there, and of how many, if that is known


@dataclass(frozen=True)
class Remote:
    """What a server says about a file: with this a later answer is known to be about the same content.

    Attributes:
        url: Where the file is.
        size: Bytes.
        etag: The server's name of this version.
        modified: When the server says that it was changed last.
    """

    url: str
    size: int | None = None
    etag: str | None = None
    modified: str | None = None

    def differs(self, other: "Remote") -> bool:
        """Whether anything that both tell is not the same."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return any(mine is not None and theirs is not None and mine != theirs for mine, theirs in pairs)

    def condition(self) -> dict[str, str]:
        """The header that makes a server send the rest of this version alone."""
        strong = self.etag if self.etag and not self.etag.startswith("W/") else None
        validator = strong or self.modified
        return {"If-Range": validator} if validator and validator.isascii() and validator.isprintable() else {}


def fetch(
    url: str,
    path: Path,
    remedy: str,
    expected_size: int | None = None,
    most: int = MOST,
    report: Report = lambda done, total: None,
    sleep: Callable[[float], object] = time.sleep,
    tell: Callable[[str], object] = lambda why: None,
) -> None:
    """Download to a file that appears whole or not at all; what an earlier call left is continued.

    Until then the content lies in ``PATH.part``, and what the server said about it in ``PATH.part.json``. A part
    is continued only by the same version of the file: the server is asked so (``If-Range``), its answer is
    compared with what it said before, and the last bytes are asked for again and compared. A server that cannot
    continue sends the file from the beginning.

    Args:
        url: Where the file is.
        path: Where it goes; its folder exists.
        remedy: What a message tells the user to do if the download fails.
        expected_size: The file's published size in bytes; another announced size is refused at once.
        most: Bytes that a file of unknown size can have; more are refused, announced or not.
        report: Called with the bytes that are there and those that there will be.
        sleep: Waits before another attempt; what it returns is ignored.
        tell: Called before, with the reason and how long it will be.

    Raises:
        UserError: If the server refuses, or if several attempts in a row bring nothing new.
        OSError: If the file cannot be written; it names the file.
    """
    part = _part(path)
    longest, fruitless = _size(part) if _read_record(part, url) else 0, 0
    while True:
        try:
            _attempt(url, part, expected_size, most, report)
            break
        except FetchError as error:
            size = _size(part)
            # A server that cuts each answer at the same place brings bytes every time, and nothing new.
            longest, fruitless = (size, 0) if size > longest else (longest, fruitless + 1)
            if not error.passing:
                raise UserError(f"{url}: {error}; {remedy}") from error
            if fruitless >= TRIES:
                raise UserError(f"{url}: {error}, {TRIES} times in a row; what is there is kept: {remedy}") from error
            seconds = min(LONGEST_WAIT, 2**fruitless if error.wait is None else error.wait)
            tell(f"{error}; next attempt in {seconds:g} s")
            sleep(seconds)
    rename_on_disk(part, path)
    _record(part).unlink(missing_ok=True)


def downloaded_part(path: Path) -> int:
    """Bytes of a file that an interrupted ``fetch`` left."""
    return _size(_part(path))


def _attempt(url: str, part: Path, expected_size: int | None, most: int, report: Report) -> None:
    before = _read_record(part, url)
    have = _size(part) if before else 0
    headers = {}
    start = max(0, have - OVERLAP)
    if before and have:
        headers = {"Range": f"bytes={start}-", **before.condition()}
    try:
        response = open_url(url, headers)
    except FetchError as error:
        if error.status != RANGE_REFUSED or not have:
            raise
        raise _changed(part) from error  # it is shorter now
    with response:
        continues = response.status == http.client.PARTIAL_CONTENT
        remote = _remote(url, response)
        if expected_size is not None and remote.size not in (None, expected_size):
            raise FetchError(f"announces {remote.size:,} bytes, the published file has {expected_size:,}", False)
        if remote.size is not None and remote.size > most:
            raise FetchError(f"announces {remote.size:,} bytes, more than the {most:,} that it can have", False)
        total = expected_size if remote.size is None else remote.size
        limit = most if total is None else total
        if continues and (before is None or _first_byte(response) != start or remote.differs(before)):
            raise _changed(part)
        if not continues:
            have = 0
            part.unlink(missing_ok=True)
            write_atomically(_record(part), json.dumps(asdict(remote)))
        try:
            with part.open("r+b" if continues else "wb") as file:
                if continues and not _overlaps(response, file, start, have):
                    raise _changed(part)
                size = have + copy_body(response, file, limit - have, lambda n: report(have + n, total))
        except TooMuch as error:
            _changed(part)
            part.unlink()
            raise TooMuch(f"sends more than {limit:,} bytes, which is all that it can have", False) from error
        except OSError as error:
            error.filename = str(part)  # a failing write does not tell
            raise
    if total is not None and size != total:
        raise FetchError(f"the connection broke off at {size:,} of {total:,} bytes")


def _changed(part: Path) -> FetchError:
    """Forget a part of what is no longer there; the next attempt begins anew."""
    _record(part).unlink(missing_ok=True)
    return FetchError("the file changed on the server")


def _overlaps(response: http.client.HTTPResponse, file: IO[bytes], start: int, have: int) -> bool:
    """Whether server and file have the same bytes from ``start`` to the file's end, which is where both are left."""
    again = b""
    while len(again) < have - start:
        chunk = receive(response, have - start - len(again))
        if not chunk:
            raise FetchError("the connection broke off")
        again += chunk
    file.seek(start)
    return file.read() == again


def _remote(url: str, response: http.client.HTTPResponse) -> Remote:
    size = content_length(response)
    if response.status == http.client.PARTIAL_CONTENT:
        total = re.search(r"/([0-9]{1,18})$", response.headers.get("Content-Range", ""))
        size = int(total[1]) if total else None
    return Remote(url, size, response.headers.get("ETag"), response.headers.get("Last-Modified"))


def _first_byte(response: http.client.HTTPResponse) -> int | None:
    found = re.match(r"bytes ([0-9]{1,18})-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _record(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_record(part: Path, url: str) -> Remote | None:
    """What the server said about a part; None if that is not known, or was said by another server."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        remote = Remote(**json.loads(_record(part).read_text(encoding="utf-8")))
        texts = all(value is None or type(value) is str for value in (remote.etag, remote.modified))
        return remote if remote.url == url and texts else None
    return None


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
