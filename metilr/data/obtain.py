"""From official archives to their files: downloaded, checked, unpacked, several at once, each from where it was."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape
from rich.progress import Progress

from metilr.data.archives import Archive
from metilr.data.disk_space import require_reserve
from metilr.data.download_records import ALL, DownloadRecord, DownloadRecords
from metilr.data.unpack import DamagedArchive, HostileArchive, unpack
from metilr.errors import UserError
from metilr.fetch import downloaded_part, fetch
from metilr.files import file_sha256, flush_all

STATE_EVERY = 5  # seconds between records of how far unpacking is
FAREWELL = 3  # seconds that threads have to end after Ctrl-C; one that waits for the network is left behind
GZIP = b"\x1f\x8b"  # how all such files begin
REMEDY = "run the same command again, or name a copy with --mirror URL"

Show = Callable[[str, int, int | None], None]  # what is being done, bytes done, bytes in all


class Stopped(Exception):
    """Raised in a thread whose work is to end early."""


@dataclass(frozen=True)
class Workplace:
    """What those who obtain archives share.

    Attributes:
        root: The data root.
        base: Address that archive names are appended to.
        records: Of the archives' folder, which is where archives go.
        progress: Shows a bar for each archive.
        stop: Set to end all work soon.
    """

    root: Path
    base: str
    records: DownloadRecords
    progress: Progress
    stop: threading.Event = field(default_factory=threading.Event)

    def file(self, archive: Archive) -> Path:
        """Where an archive lies."""
        return self.records.file.parent / archive.name

    def check_stop(self) -> None:
        """End this thread's work when it is time.

        Raises:
            Stopped: Then.
        """
        if self.stop.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Sleep, until it is time to end."""
        self.stop.wait(seconds)
        self.check_stop()

    def bar(self, archive: Archive) -> Show:
        """Make a bar for an archive; returns what moves it."""
        task = self.progress.add_task(archive.name, total=None)
        shown = ""

        def show(what: str, done: int, total: int | None) -> None:
            nonlocal shown
            self.check_stop()
            if what != shown:  # with a rate of its own, that does not count what was there before
                shown = what
                self.progress.reset(task, description=f"{what} {archive.name}", completed=done, total=total)
            self.progress.update(task, completed=done, total=total)

        return show


def is_unpacked(record: DownloadRecord | None, archive: Archive) -> bool:
    """Whether an archive is done with, by its record: all of it unpacked, and from the published file."""
    return record is not None and record.unpacked == ALL and archive.sha256 in (None, record.sha256)


def obtain_all(archives: Sequence[Archive], work: Workplace) -> None:
    """Obtain several archives at once; if one fails, the others go on.

    Raises:
        UserError: At the end, with all that went wrong.
        KeyboardInterrupt: After Ctrl-C; what is there is kept.
    """
    failures: list[tuple[Archive, Exception]] = []

    def run(archive: Archive) -> None:
        try:
            obtain(archive, work)
        except Stopped:
            pass
        except Exception as error:  # for the thread that waits below
            failures.append((archive, error))

    # Not an executor's threads: Python waits for those at its end, also for one that the network keeps waiting.
    threads = [threading.Thread(target=run, args=(archive,), daemon=True) for archive in archives]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # without a limit Ctrl-C would wait too
    except KeyboardInterrupt:
        work.stop.set()
        end = time.monotonic() + FAREWELL
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        raise
    for _, error in failures:
        if not isinstance(error, UserError):
            raise error
    if failures:
        raise UserError(_joined(failures))


def _joined(failures: Sequence[tuple[Archive, Exception]]) -> str:
    """One line of several failures; archives that fail for one reason are named together."""
    by_reason: dict[str, list[Archive]] = {}
    for archive, error in failures:
        by_reason.setdefault(str(error).replace(archive.name, "{name}"), []).append(archive)
    parts = []
    for reason, (first, *others) in by_reason.items():
        also = f" (and so with {', '.join(each.name for each in others)})" if others else ""
        parts.append(reason.replace("{name}", first.name) + also)
    return "; and ".join(parts)


def obtain(archive: Archive, work: Workplace) -> None:
    """Download an archive, check its digest and unpack it, as far as that is not done.

    Raises:
        UserError: If it cannot be downloaded, is not the published file or the one that was recorded, is damaged or
            hostile, or cannot be written.
        Stopped: If all work is to end.
    """
    path, show = work.file(archive), work.bar(archive)
    try:
        fetched = not path.is_file()
        if not fetched and archive.sha256 is None and not _begins_as_gzip(path):
            path.unlink()
            work.progress.console.print(f"{archive.name}: is no .tar.gz, thrown away and downloaded", soft_wrap=True)
            fetched = True
        if fetched:
            _fetch(archive, work, show)
        if archive.sha256 is None and not _begins_as_gzip(path):
            path.unlink()
            raise UserError(f"{work.base}{archive.name}: sends what is no .tar.gz; {REMEDY}")
        _check_digest(archive, work, show, fetched)
        _unpack(archive, work, show)
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(
            f"{error.filename or path}: {error.strerror}; mend that and run the same command: what is there is kept"
        ) from error


def _fetch(archive: Archive, work: Workplace, show: Show) -> None:
    path = work.file(archive)

    def report(done: int, total: int | None) -> None:
        if total is None:
            require_reserve(path.parent, archive.name)
        show("downloading", done, total)

    def tell(why: str) -> None:
        show(f"{escape(why)}:", downloaded_part(path), None)

    fetch(work.base + archive.name, path, REMEDY, archive.size, archive.most, report, work.wait, tell)


def _begins_as_gzip(path: Path) -> bool:
    """Whether a file can be an archive at all: networks that want a log-in first send a page in its place."""
    with path.open("rb") as file:
        return file.read(len(GZIP)) == GZIP


def _check_digest(archive: Archive, work: Workplace, show: Show, fetched: bool) -> None:
    """Refuse what is not the published archive or not the one that was here before; record a new one."""
    path, record = work.file(archive), work.records.get(archive.name)
    size = path.stat().st_size
    digest = file_sha256(path, lambda done: show("checking", done, size))
    url = work.base + archive.name
    if archive.sha256 not in (None, digest):
        if fetched:
            path.unlink()
            raise UserError(f"{url}: its sha256 is {digest}, the published archive's {archive.sha256}; {REMEDY}")
        raise UserError(
            f"{path}: its sha256 is {digest}, the published archive's {archive.sha256}; delete it, and the same "
            "command downloads it again"
        )
    if archive.sha256 is None and record is not None and record.sha256 != digest:
        raise UserError(
            f"{path}: its sha256 is {digest}, but {record.sha256} was recorded on {record.date}; delete the file to "
            f"download it again, or, if the publisher has changed it, its entry in {work.records.file}"
        )
    if record is None or record.sha256 != digest:
        work.records.add(archive.name, url, size, digest)


def _unpack(archive: Archive, work: Workplace, show: Show) -> None:
    path, folder, record = work.file(archive), work.root / archive.folder, work.records.get(archive.name)
    assert record is not None  # _check_digest made it
    size, dealt, recorded_at = record.bytes, record.unpacked, time.monotonic()

    def keep(members: int) -> None:
        flush_all()  # a record that is on disk before its files would have them passed over after a power cut
        work.records.set_unpacked(archive.name, members)

    def report(members: int, read: int) -> None:
        nonlocal dealt, recorded_at
        dealt = max(dealt, members)
        show("unpacking", read, size)
        if time.monotonic() > recorded_at + STATE_EVERY:
            recorded_at = time.monotonic()
            keep(dealt)

    try:
        unpacked = unpack(path, folder, archive.depth, archive.suffix, record.unpacked, report)
    except (DamagedArchive, HostileArchive):
        work.records.forget(archive.name)  # or its digest would keep a better one out
        raise
    except (Stopped, OSError):
        keep(dealt)
        raise
    keep(ALL)
    rest = f", {unpacked.left_out:,} other files left out" if unpacked.left_out else ""
    work.progress.console.print(
        f"{archive.name}: {unpacked.files:,} files in {escape(str(folder))}{rest}", soft_wrap=True
    )
