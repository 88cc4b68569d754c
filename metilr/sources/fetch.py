"""What lies at web addresses, in a folder on disk: asked for politely, within limits, never in a private network."""

import asyncio
import contextlib
import email.utils
import errno
import hashlib
import ipaddress
import json
import socket
import time
import uuid
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from metilr import __version__
from metilr.errors import UserError, one_line
from metilr.files import read_json, replaced_file, write_atomically

TRIES = 5
FIRST_WAIT = 1.0  # s before the second try, twice as long before each one after it
LONGEST_WAIT = 120.0  # s that a server may ask for
TIMEOUT = aiohttp.ClientTimeout(total=300, sock_connect=10, sock_read=30)
PASSING = {408, 425, 429, *range(500, 600)}  # answers that may be others a while later
GIVE_UP = 3  # addresses of a server in a row that gave nothing but such answers, or none
MOST_REDIRECTS = 10
DOCUMENT_MEGABYTES = 50  # of a manifest; the largest that libraries publish have a few
NAT64, LOCAL_NAT64 = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48")
CHUNK = 1 << 16
UNENDED = "its server does not say how long it is; download it by other means, and name the file"
Made = TypeVar("Made")


@dataclass(frozen=True)
class DownloadOptions:
    """How images at web addresses are downloaded.

    Attributes:
        cache: Folder that keeps what is downloaded; without it images, in the index.
        connections: Downloads at once.
        requests_per_second: Most requests that begin in a second.
        max_file_megabytes: A larger file is left out.
        max_images: Images of the source that are taken at most, the first ones.
        allow_private: Also ask addresses in private networks and of this machine. A manifest from elsewhere could name
            what it must not see.
        proxy: Ask through this proxy, such as http://proxy:3128, which then decides what may be asked.
    """

    cache: Path | None = None
    connections: int = 4
    requests_per_second: float = 10.0
    max_file_megabytes: float = 100.0
    max_images: int = 500_000
    allow_private: bool = False
    proxy: str | None = None

    def __post_init__(self) -> None:
        for name in ("connections", "requests_per_second", "max_file_megabytes", "max_images"):
            if not getattr(self, name) > 0:
                raise UserError(f"{getattr(self, name)}: must be above 0", name)


class DownloadError(Exception):
    """Why an address gives nothing, in a few words."""


class NoAnswerError(DownloadError):
    """An address that may give something another time."""


class PrivateAddressError(OSError):
    """A server in a private network, which is not to be asked."""


class Downloads:
    """A folder of downloads, with an asynchronous way to fill it.

    A file that is there is taken as it is, or with ``ask_again`` if the server says that it has not changed (ETag,
    Last-Modified), or says nothing of use. What a killed run has left of a file does not pass for one.
    """

    def __init__(self, folder: Path, options: DownloadOptions, ask_again: bool = False) -> None:
        self.folder, self.options, self.ask_again = folder, options, ask_again
        self.kept: list[str] = []  # addresses that gave no answer, of what they gave an earlier time
        self._current: set[str] = set()  # asked by this object already
        self._unreachable: dict[str, int] = {}  # addresses in a row, by server
        self._not_before: dict[str, float] = {}  # when a server wants to be asked again
        self._next_request = 0.0
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._free = asyncio.Semaphore(options.connections)

    async def __aenter__(self) -> "Downloads":
        self.folder.mkdir(parents=True, exist_ok=True)
        agent = {"User-Agent": f"metilr/{__version__}"}
        connector = aiohttp.TCPConnector(socket_factory=self._socket, limit=self.options.connections)
        self._session = aiohttp.ClientSession(connector=connector, timeout=TIMEOUT, headers=agent)
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._session.close()

    async def document(self, address: str, max_megabytes: float = DOCUMENT_MEGABYTES) -> Any:
        """Read the JSON document at an address; DownloadError if there is none."""

        def check(file: Path) -> None:
            try:
                read_json(file)
            except (ValueError, RecursionError) as error:
                raise DownloadError(f"is no JSON ({one_line(error)})") from None

        return read_json(await self.file(address, check, max_megabytes))

    async def file(
        self, address: str, check: Callable[[Path], None], max_megabytes: float | None = None, is_source: bool = False
    ) -> Path:
        """Download the file at an address.

        Args:
            address: Where it is.
            check: Is called with a file that is new, in a thread, and raises DownloadError if it is not to be had.
            max_megabytes: Limit of its size; without it that of the options.
            is_source: Ask whether it has changed in any case, and refuse a table whose half would pass for the whole.

        Raises:
            DownloadError: If it cannot be had, or is refused by ``check``.
            OSError: If the disk fails.
        """
        file = self.folder / hashlib.sha256(address.encode(errors="replace")).hexdigest()[:24]
        limit = int((max_megabytes or self.options.max_file_megabytes) * 10**6)
        async with self._locks.setdefault(address, asyncio.Lock()):  # who else wants it waits
            note = file.with_suffix(".json")
            is_current = not (self.ask_again or is_source) or address in self._current
            known = _known(file, note)
            if known and is_current:
                return file
            try:
                async with self._free:
                    received = await self._tried(address, file, known, limit, check, is_source)
                if received is not None:
                    write_atomically(note, json.dumps({"address": address, **received}) + "\n")
            except NoAnswerError:
                if not known:
                    raise
                self.kept.append(address)
            self._current.add(address)
        return file

    async def _tried(
        self, address: str, file: Path, known: dict[str, str], limit: int, check: Callable[[Path], None],
        is_source: bool,
    ) -> dict[str, str] | None:  # fmt: skip
        """Ask until there is an answer that stays; its validators, or None if the file that is there is current."""
        server, reason = _server_of(address), ""
        names = {"etag": "If-None-Match", "modified": "If-Modified-Since"}
        headers = {header: known[name] for name, header in names.items() if name in known}
        how: dict[str, Any] = {"headers": headers, "max_redirects": MOST_REDIRECTS, "proxy": self.options.proxy}
        for attempt in range(TRIES):
            if self._unreachable.get(server, 0) >= GIVE_UP:
                raise NoAnswerError("its server no longer answers")
            await self._turn(server)
            pause = FIRST_WAIT * 2**attempt
            try:
                async with self._session.get(address, **how) as answer:
                    if answer.status not in PASSING:
                        self._unreachable[server] = 0
                    if answer.status == 304 and known:
                        return None
                    if answer.status == 200:
                        if is_source and not _has_end(answer):
                            raise DownloadError(UNENDED)
                        return await _received(answer, file, limit, check)
                    reason = f"HTTP {answer.status} {answer.reason or ''}".strip()
                    if answer.status not in PASSING:
                        raise DownloadError(reason)
                    pause = max(pause, _asked_pause(answer.headers.get("Retry-After", "")))
            except aiohttp.TooManyRedirects:
                raise DownloadError("redirects in a circle") from None
            except (TimeoutError, aiohttp.ClientError) as error:
                if isinstance(error, (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError)):
                    raise DownloadError("is no web address") from None
                cause = getattr(error, "os_error", None)
                if isinstance(cause, PrivateAddressError):
                    raise DownloadError(cause.strerror or "") from None
                reason = one_line(error) if str(error) else "takes too long"
            except ValueError:  # of a name that is none, also in a redirect
                raise DownloadError("is no web address") from None
            self._not_before[server] = max(self._not_before.get(server, 0), time.monotonic() + pause)
        self._unreachable[server] = self._unreachable.get(server, 0) + 1
        raise NoAnswerError(f"{reason}, {TRIES} times")

    async def _turn(self, server: str) -> None:
        """Wait until the next request may begin."""
        begin = max(time.monotonic(), self._next_request)
        self._next_request = begin + 1 / self.options.requests_per_second
        await asyncio.sleep(begin - time.monotonic())
        while (left := self._not_before.get(server, 0) - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def _socket(self, address: Any) -> socket.socket:
        """Make the socket of a connection, unless it is one into a private network, whatever name led there."""
        family, kind, protocol, _, (host, *_) = address
        if not self.options.allow_private and self.options.proxy is None and not is_public(host):
            reason = "lies in a private network; allow_private true asks it all the same"
            raise PrivateAddressError(errno.EACCES, reason)
        return socket.socket(family, kind, protocol)


def is_public(host: str) -> bool:
    """Whether an IP address is one of the public internet, and so is the IPv4 address within one of IPv6."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        within = address.ipv4_mapped or address.sixtofour
        if address in NAT64 or int(address) < 2**32:  # the second form is out of use
            within = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address in LOCAL_NAT64 or address.is_site_local or (within is not None and not within.is_global):
            return False
    return address.is_global and not address.is_multicast


def _server_of(address: str) -> str:
    try:
        return urlsplit(address).netloc
    except ValueError:  # of brackets left open
        raise DownloadError("is no web address") from None


def run_downloads(work: Coroutine[Any, Any, Made]) -> Made:
    """Run asynchronous work to its end, also where a loop is at work already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _known(file: Path, note: Path) -> dict[str, str]:
    """What is known of a file that was downloaded; empty if it was not, or not to the end."""
    if file.exists() and note.exists():
        with contextlib.suppress(ValueError):
            known = read_json(note)
            if isinstance(known, dict) and known.get("bytes") == str(file.stat().st_size):
                return known
    return {}


async def _received(
    answer: aiohttp.ClientResponse, file: Path, limit: int, check: Callable[[Path], None]
) -> dict[str, str]:
    """Write an answer's body to a file once it is whole and checked; its size and validators."""
    too_large = DownloadError(f"has more than {limit / 10**6:g} MB")
    if (answer.content_length or 0) > limit:
        raise too_large
    n_bytes, unchecked = 0, file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")  # two runs may share the folder
    try:
        with replaced_file(unchecked) as stream:
            async for chunk in answer.content.iter_chunked(CHUNK):
                n_bytes += len(chunk)
                if n_bytes > limit:
                    raise too_large
                stream.write(chunk)
        try:
            await asyncio.to_thread(check, unchecked)
        except DownloadError as error:  # a page of errors may come with status 200
            raise NoAnswerError(str(error)) from None
        unchecked.replace(file)
    finally:
        unchecked.unlink(missing_ok=True)
    validators = {"etag": answer.headers.get("ETag"), "modified": answer.headers.get("Last-Modified")}
    return {"bytes": str(n_bytes), **{name: value for name, value in validators.items() if value}}


def _has_end(answer: aiohttp.ClientResponse) -> bool:
    """Whether an answer that is cut off can be told from a whole one: by its length, its chunks, or as JSON."""
    is_chunked = "chunked" in answer.headers.get("Transfer-Encoding", "").lower()
    return answer.content_length is not None or is_chunked or "json" in answer.content_type


def _asked_pause(retry_after: str) -> float:
    """Seconds that a server wants to be left alone, from Retry-After: a number, or a date."""
    if retry_after.isascii() and retry_after.strip().isdigit():
        return min(LONGEST_WAIT, float(retry_after))
    with contextlib.suppress(ValueError):
        return min(LONGEST_WAIT, max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()))
    return 0.0
