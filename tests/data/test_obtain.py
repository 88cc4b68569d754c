"""One archive from the server to its files, and several at once: digests, records, kills, faults of one of them."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.progress import Progress

from metilr.data import disk_space, download_records
from metilr.data import obtain as module
from metilr.data.archives import Archive
from metilr.data.download_records import ALL, DownloadRecords
from metilr.data.obtain import Stopped, Workplace, is_unpacked, obtain, obtain_all
from metilr.errors import UserError
from tests.full_disk import files_of_at_most
from tests.server import PLAIN, Fault, Server
from tests.tarballs import IMAGES, header, tarball, tree

CONTENT = tarball(*((f"MET/{path}", content) for path, content in IMAGES.items()))
OTHER = tarball(*((f"MET/{path}", content[::-1]) for path, content in IMAGES.items()))
ARCHIVE = Archive("MET.tar.gz", "images/MET", depth=2)
QUERIES = Archive("test_met.tar.gz", "images/test_met", depth=1)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Museum(Workplace):
    """A workplace that does not wait, beside its server."""

    def wait(self, seconds: float) -> None:
        self.check_stop()

    @property
    def downloads(self) -> dict:
        return json.loads(self.records.file.read_text())

    @property
    def archive(self) -> Path:
        return self.file(ARCHIVE)

    @property
    def images(self) -> dict[str, bytes]:
        return tree(self.root / "images" / "MET")

    def again(self) -> "Museum":
        """As the next process finds it."""
        return museum(self.root, self.base)


def museum(root: Path, base: str) -> Museum:
    (root / "archives").mkdir(parents=True, exist_ok=True)
    return Museum(root, base, DownloadRecords(root / "archives" / "downloads.json"), Progress(disable=True))


@pytest.fixture
def work(server, tmp_path) -> Museum:
    server.files = {"MET.tar.gz": CONTENT, "test_met.tar.gz": tarball(("test_met/a.jpg", b"a"))}
    return museum(tmp_path / "met", server.url)


def refused(work: Workplace, archive: Archive = ARCHIVE) -> str:
    with pytest.raises(UserError) as caught:
        obtain(archive, work)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("known", [True, False])
def test_an_archive_is_downloaded_recorded_and_unpacked(work, server, known):
    archive = replace(ARCHIVE, size=len(CONTENT), sha256=sha256(CONTENT)) if known else ARCHIVE
    assert not is_unpacked(work.records.get("MET.tar.gz"), archive)
    obtain(archive, work)
    assert work.images == IMAGES
    [(name, entry)] = work.downloads.items()
    assert name == "MET.tar.gz" and entry.pop("date").endswith("+00:00")
    assert entry == {
        "url": server.url + "MET.tar.gz", "bytes": len(CONTENT), "sha256": sha256(CONTENT), "unpacked": ALL,
    }  # fmt: skip
    assert is_unpacked(work.again().records.get("MET.tar.gz"), archive)
    assert not is_unpacked(work.again().records.get("MET.tar.gz"), replace(archive, sha256=sha256(OTHER)))


def test_a_published_digest_is_demanded(work, server):
    archive = replace(ARCHIVE, sha256=sha256(OTHER))
    said = refused(work, archive)
    assert said.startswith(f"{server.url}MET.tar.gz: its sha256 is {sha256(CONTENT)}") and "--mirror" in said
    assert sha256(OTHER) in said
    assert not work.archive.exists() and not work.records.file.exists() and work.images == {}
    server.files["MET.tar.gz"] = OTHER
    obtain(archive, work)
    assert len(work.images) == len(IMAGES)


def test_a_file_put_there_by_hand_is_taken_if_it_is_the_published_one(work, server):
    work.archive.write_bytes(CONTENT)
    said = refused(work, replace(ARCHIVE, sha256=sha256(OTHER)))
    assert said.startswith(f"{work.archive}: its sha256 is") and "delete it" in said and work.archive.exists()
    obtain(replace(ARCHIVE, sha256=sha256(CONTENT)), work)
    assert work.images == IMAGES and server.requests == []


def test_another_archive_than_the_recorded_one_is_refused(work, server):
    obtain(ARCHIVE, work)
    work.records.set_unpacked("MET.tar.gz", 0)
    work.archive.unlink()
    server.files["MET.tar.gz"] = OTHER
    said = refused(work)
    assert sha256(OTHER) in said and f"{sha256(CONTENT)} was recorded on 20" in said
    assert str(work.records.file) in said
    assert work.images == IMAGES  # nothing of the other
    work.records.forget("MET.tar.gz")  # as the message says
    obtain(ARCHIVE, work.again())
    assert work.images == {path: content[::-1] for path, content in IMAGES.items()}


def test_a_damaged_archive_is_replaced_once_it_is_deleted(work, server):
    server.files["MET.tar.gz"] = CONTENT[:-500]  # as a length that was announced too short leaves it
    said = refused(work)
    assert said.startswith(f"{work.archive}: is damaged") and "delete it" in said
    assert refused(work.again()) == said and work.downloads == {}
    server.files["MET.tar.gz"] = CONTENT
    work.archive.unlink()
    obtain(ARCHIVE, work.again())
    assert work.images == IMAGES


def test_a_page_in_place_of_an_archive_is_not_kept(work, server):
    """As networks send it that want a log-in first; nobody has to delete anything afterwards."""
    server.files["MET.tar.gz"] = b"<html>Welcome to our hotel"
    assert refused(work).startswith(f"{server.url}MET.tar.gz: sends what is no .tar.gz; run the same command again")
    assert not work.archive.exists() and not work.records.file.exists()
    work.archive.write_bytes(b"<html>Welcome to our hotel")  # of an earlier version
    assert "sends what is no .tar.gz" in refused(work.again()) and len(server.gets()) == 2
    server.files["MET.tar.gz"] = CONTENT
    work.archive.write_bytes(b"")
    later = work.again()
    with later.progress.console.capture() as said:
        obtain(ARCHIVE, later)
    assert "MET.tar.gz: is no .tar.gz, thrown away and downloaded" in said.get()
    assert work.images == IMAGES


def test_a_record_says_what_is_on_disk(work, monkeypatch):
    """After a power cut the files of a later record would be passed over as unpacked."""
    events: list[str] = []
    monkeypatch.setattr(module, "STATE_EVERY", -1)
    monkeypatch.setattr(os, "sync", lambda: events.append("flush"))
    put = DownloadRecords.set_unpacked
    monkeypatch.setattr(DownloadRecords, "set_unpacked", lambda *args: (events.append(str(args[2])), put(*args)))
    obtain(ARCHIVE, work)
    assert events[1::2] == [*map(str, range(len(IMAGES))), "-1"] and set(events[::2]) == {"flush"}


def test_a_download_says_why_it_waits(work, server, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(work.progress, "reset", lambda task, **changes: said.append(changes["description"]))
    server.faults = [Fault(status=503)]
    obtain(ARCHIVE, work)
    assert said[0] == "the server answers 503 Service Unavailable; next attempt in 2 s: MET.tar.gz"
    assert said[1] == "downloading MET.tar.gz"


def test_a_download_of_unknown_size_leaves_room_on_the_disk(work, server, monkeypatch):
    server.always = Fault(raw=PLAIN + CONTENT)
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**10, 0, 10**8))
    said = refused(work)
    assert said.startswith(f"{work.archive.parent}: 100.0 MB free, and the server does not tell the size of MET.tar.gz")
    monkeypatch.undo()
    obtain(ARCHIVE, work)
    assert work.images == IMAGES


def test_a_hostile_archive_is_not_recorded(work, server):
    server.files["MET.tar.gz"] = tarball(header("MET/1", b"2", link="/"), ("MET/1/1.jpg", b"x"))
    assert "member 'MET/1' is a link to '/'" in refused(work)
    assert work.downloads == {} and work.images == {}


KILLED = """
import os, signal, sys
from pathlib import Path
from rich.progress import Progress
from metilr.data import obtain
from metilr.data.archives import Archive
from metilr.data.download_records import DownloadRecords
from metilr.data.obtain import Workplace
root, base, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
opened, calls = Path.open, []
def counted(self, *arguments, **options):
    calls.append(self)
    if len(calls) == n: os.kill(os.getpid(), signal.SIGKILL)
    return opened(self, *arguments, **options)
records = DownloadRecords(root / "archives" / "downloads.json")
obtain.STATE_EVERY = -1
Path.open = counted
obtain.obtain(Archive("MET.tar.gz", "images/MET", depth=2), Workplace(root, base, records, Progress(disable=True)))
"""
FILES_OPENED = 28  # by an undisturbed run; a kill comes before one of them


@pytest.mark.parametrize("n", [2, 3, 4, 6, 8, 14, 21, FILES_OPENED])
def test_a_process_that_is_killed_at_any_point_is_continued(work, tmp_path, n):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, work.root, work.base, str(n)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL, run.stderr
    left = work.images
    left.pop(".MET.tar.gz.member", None)
    assert IMAGES.items() >= left.items()
    obtain(ARCHIVE, work.again())
    assert work.images == IMAGES and work.archive.read_bytes() == CONTENT
    assert sorted(file.name for file in work.archive.parent.iterdir() if not file.name.startswith(".")) == [
        "MET.tar.gz",
        "downloads.json",
    ]


def test_a_full_disk_is_named_and_continued(work):
    obtain(QUERIES, work)  # imports and the like are done
    with files_of_at_most(len(CONTENT) - 1000):
        said = refused(work)
    assert said.startswith(f"{work.archive}.part: File too large") and "same command" in said
    work.archive.write_bytes(CONTENT)
    with files_of_at_most(5000):  # archive's there, the larger images find no room
        said = refused(work.again())
    assert "images/MET/" in said and "File too large" in said
    assert 0 < len(work.images) < len(IMAGES) and 0 < work.downloads["MET.tar.gz"]["unpacked"] < len(IMAGES)
    obtain(ARCHIVE, work.again())
    assert work.images == IMAGES


def test_one_that_fails_does_not_stop_the_others(work, server):
    del server.files["test_met.tar.gz"]
    missing = replace(QUERIES, name="test_other.tar.gz")
    with pytest.raises(UserError) as caught:
        obtain_all([QUERIES, ARCHIVE, missing], work)
    first, second = re.fullmatch(
        rf"{server.url}(\S+\.gz): the server answers 404 Not Found; run .* \(and so with (\S+\.gz)\)", str(caught.value)
    ).groups()
    assert {first, second} == {"test_met.tar.gz", "test_other.tar.gz"}
    assert work.images == IMAGES and list(work.downloads) == ["MET.tar.gz"]


def test_different_failures_are_all_told(work, server):
    server.files["test_met.tar.gz"] = b"no archive"
    del server.files["MET.tar.gz"]
    with pytest.raises(UserError, match="404 Not Found") as caught:
        obtain_all([QUERIES, ARCHIVE], work)
    assert "test_met.tar.gz: sends what is no .tar.gz" in str(caught.value) and "; and " in str(caught.value)


def test_a_server_that_fails_for_good(work, server):
    server.always = Fault(status=500)
    assert "500 Internal Server Error, 6 times in a row" in refused(work)


def test_defects_are_not_taken_for_faults_of_the_data(work, monkeypatch):
    def broken(*_: object) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(module, "unpack", broken)
    with pytest.raises(TypeError, match="a defect"):
        obtain_all([ARCHIVE], work)


def test_stop_ends_a_download_and_an_unpacking(work, server):
    hang = threading.Event()
    server.faults = [Fault(cut=1000, hang=hang)]
    loading = threading.Thread(target=lambda: obtain_all([ARCHIVE], work))
    loading.start()
    while not work.archive.with_name("MET.tar.gz.part").exists():
        assert loading.is_alive()
    work.stop.set()
    hang.set()
    loading.join()
    assert not work.archive.exists() and work.images == {}

    work = work.again()
    work.archive.write_bytes(CONTENT)
    work.records.add("MET.tar.gz", "", len(CONTENT), sha256(CONTENT))
    bar = Museum.bar

    class Stopping(Museum):
        def bar(self, archive: Archive):
            show = bar(self, archive)

            def stopping(what: str, done: int, total: int | None) -> None:
                if len(self.images) == 4:
                    self.stop.set()
                show(what, done, total)

            return stopping

    with pytest.raises(Stopped):
        obtain(ARCHIVE, Stopping(work.root, work.base, work.records, work.progress))
    assert len(work.images) == 4 and work.downloads["MET.tar.gz"]["unpacked"] == 4


def test_each_stage_has_a_bar_with_a_rate_and_a_time_of_its_own(work, server):
    """What an earlier call downloaded is there from the start, and no part of the rate."""
    clock = iter(range(1000, 10**6, 2))  # two seconds between any two looks
    progress = Progress(disable=True, get_time=lambda: float(next(clock)))
    show = Museum(work.root, work.base, work.records, progress).bar(ARCHIVE)
    [task] = progress.tasks
    for done in (5_000_000, 5_000_100, 5_000_200):
        show("downloading", done, 5_000_200)
    assert task.description == "downloading MET.tar.gz" and task.finished
    for done in (0, 1000, 2000):
        show("unpacking", done, 5_000_200)
    assert task.description == "unpacking MET.tar.gz" and not task.finished
    assert task.completed == 2000 and 0 < task.speed <= 1000 and task.time_remaining > 4000


@pytest.mark.parametrize("content", ["[]", "{", '{"MET.tar.gz": {}}', '{"MET.tar.gz": null}', "\0"])
def test_unreadable_records_are_named(work, content):
    work.records.file.write_text(content)
    with pytest.raises(UserError, match=r"downloads\.json: not readable .*delete it"):
        work.again()


def test_records_of_many_threads_are_all_kept(work, monkeypatch):
    names = [f"{i}.tar.gz" for i in range(8)]
    at_work: list[str] = []
    together: list[int] = []
    write = download_records.write_atomically

    def slow_write(file: Path, text: str) -> None:
        at_work.append(text)
        together.append(len(at_work))
        time.sleep(0.005)
        write(file, text)
        at_work.pop()

    monkeypatch.setattr(download_records, "write_atomically", slow_write)
    threads = [threading.Thread(target=work.records.add, args=(name, "", 1, "")) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(work.downloads) == sorted(names) and set(together) == {1}


def test_the_official_archives_are_where_their_publisher_has_them(server: Server):
    """Names, sizes and digests as published; the sets hold one another's queries."""
    from metilr.data.archives import ARCHIVES, OFFICIAL

    assert OFFICIAL == "http://ptak.felk.cvut.cz/met/dataset/"
    known = {each.name: (each.size, each.sha256) for each in ARCHIVES["mini"] if each.sha256}
    assert {name: size for name, (size, _) in known.items()} == {
        "test_met.tar.gz": 34_048_842,
        "small_MET.tar.gz": 2_865_082_125,
    }
    assert all(len(digest) == 64 and int(digest, 16) for _, digest in known.values())
    assert set(ARCHIVES["queries"]) == set(ARCHIVES["mini"]) & set(ARCHIVES["full"])
    assert {each.name for each in ARCHIVES["full"]} - {each.name for each in ARCHIVES["queries"]} == {"MET.tar.gz"}
