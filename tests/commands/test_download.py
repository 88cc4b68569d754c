"""``metilr download`` as a user runs it, from a mirror on this machine that has a museum of eight images."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from metilr.cli import main
from metilr.commands import download as module
from metilr.download.archives import ARCHIVES
from metilr.files import alone_in
from tests.mirror import UNKNOWN, serve
from tests.museum import DATABASE_IDS, MINI
from tests.server import Fault, Server
from tests.tarballs import tarball, tree

COUNTS = {"full": len(DATABASE_IDS), "mini": MINI, "val": 7, "test": 7}


class Mirror:
    def __init__(self, server: Server, museum: Path, root: Path, capsys: pytest.CaptureFixture) -> None:
        self.server, self.museum, self.root, self.capsys = server, museum, root, capsys

    def download(self, *options: str, root: Path | None = None) -> tuple[int, str]:
        """Run the command; returns its exit status and what it printed."""
        status = 0
        try:
            main(["download", "--root", str(root or self.root), "--mirror", self.server.url, "--quiet", *options])
        except SystemExit as end:
            status = int(str(end.code))
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err and len(captured.err.splitlines()) == (status == 2)
        return status, captured.out + captured.err

    def expected(self, *absent: str) -> dict[str, bytes]:
        return {path: content for path, content in tree(self.museum).items() if not path.startswith(absent)}

    def data(self) -> dict[str, bytes]:
        return {path: content for path, content in tree(self.root).items() if not path.startswith("archives/")}


@pytest.fixture
def mirror(server, tiny_museum, tmp_path, monkeypatch, capsys) -> Mirror:
    monkeypatch.setattr(module, "ARCHIVES", UNKNOWN)
    monkeypatch.setattr(module, "PUBLISHED_IMAGES", COUNTS)
    monkeypatch.setattr("metilr.download.LONGEST_WAIT", 0)
    serve(tiny_museum, server)
    return Mirror(server, tiny_museum, tmp_path / "data" / "met", capsys)


NOT_MINI = tuple(f"images/MET/{id_}/{i}." for i, id_ in enumerate(DATABASE_IDS) if i >= MINI)


@pytest.mark.parametrize(
    ("options", "absent", "verified"),
    [
        (["--full"], (), {"full", "mini", "val", "test"}),
        (["--mini", "true"], NOT_MINI, {"mini", "val", "test"}),
        ([], NOT_MINI, {"mini", "val", "test"}),
        (["--queries"], ("images/MET",), {"val", "test"}),
    ],
)
def test_a_set_is_downloaded_unpacked_and_verified(mirror, options, absent, verified):
    status, printed = mirror.download(*options)
    assert status == 0 and "nothing is wrong" in printed and "note:" not in printed
    assert mirror.data() == mirror.expected(*absent)
    assert set(re.findall(r"^│ (\w+) ", printed, flags=re.MULTILINE)) == verified
    names = mirror.server.gets()
    assert len(names) == len(set(names)) == (4 if options == ["--queries"] else 5)
    downloads = json.loads((mirror.root / "archives" / "downloads.json").read_text())
    assert set(downloads) == set(names)
    assert all(entry["bytes"] == len(mirror.server.files[name]) for name, entry in downloads.items())
    assert "--database" in printed or options == ["--queries"]

    status, printed = mirror.download(*options)  # nothing to do but to verify
    assert status == 0 and "nothing is wrong" in printed and mirror.server.gets() == names


def test_the_larger_set_adds_what_it_lacks(mirror):
    assert mirror.download("--mini")[0] == mirror.download("--full")[0] == 0
    assert mirror.server.gets().count("MET.tar.gz") == mirror.server.gets().count("test_met.tar.gz") == 1
    assert mirror.data() == mirror.expected()


def test_archives_are_kept_unless_told_otherwise(mirror):
    mirror.download()
    kept = {path.name for path in (mirror.root / "archives").glob("*.tar.gz")}
    assert kept == {archive.name for archive in ARCHIVES["mini"]}
    status, _ = mirror.download("--keep_archives", "false")
    assert status == 0 and not list((mirror.root / "archives").glob("*.tar.gz"))
    before = mirror.server.gets()
    assert mirror.download()[0] == 0 and mirror.server.gets() == before  # downloads.json remembers


def test_a_bad_network(mirror):
    bad = [Fault(status=500), Fault(cut=20), Fault(status=503), Fault(cut=10, reset=True), Fault()]
    mirror.server.faults = bad * len(ARCHIVES["full"])
    status, _ = mirror.download("--full")
    assert status == 0 and mirror.data() == mirror.expected()


def test_what_fails_is_named_and_the_rest_is_kept(mirror):
    content = mirror.server.files.pop("test_other.tar.gz")
    status, printed = mirror.download()
    assert status == 2 and f"{mirror.server.url}test_other.tar.gz: the server answers 404" in printed
    assert printed.splitlines()[-1].startswith("metilr download: error: ")
    mirror.server.files["test_other.tar.gz"] = content
    before = len(mirror.server.gets())
    assert mirror.download()[0] == 0
    assert "ground_truth.tar.gz" not in mirror.server.gets()[before:] and mirror.data() == mirror.expected(*NOT_MINI)


def test_published_digests_are_demanded_of_mirrors_too(mirror, monkeypatch):
    monkeypatch.setattr(module, "ARCHIVES", ARCHIVES)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**11, 0, 10**11))
    status, printed = mirror.download("--queries")
    assert (
        status == 2
        and "test_met.tar.gz: the server announces" in printed
        and "the published file has 34,048,842" in printed
    )
    assert not (mirror.root / "images" / "test_met").exists()


def test_images_that_are_missing_or_broken_are_found_and_unpacked_again(mirror):
    mirror.download()
    broken = [path for path in mirror.data() if path.startswith("images/test_other")][:2]
    (mirror.root / broken[0]).unlink()
    (mirror.root / broken[1]).write_text("no image")
    before = mirror.server.gets()
    status, printed = mirror.download()
    assert status == 1 and "2 images are wrong" in printed and "the same command unpacks" in printed
    downloads = json.loads((mirror.root / "archives" / "downloads.json").read_text())
    assert [name for name, entry in downloads.items() if entry["unpacked"] == 0] == ["test_other.tar.gz"]
    assert mirror.download()[0] == 0 and mirror.data() == mirror.expected(*NOT_MINI)
    assert mirror.server.gets() == before


def test_an_archive_without_one_of_the_images(mirror):
    files = tree(mirror.museum)
    some = [path for path in files if path.startswith("images/test_met")]
    mirror.server.files["test_met.tar.gz"] = tarball(*((path, files[path]) for path in some[1:]))
    status, printed = mirror.download("--queries", "--keep_archives", "false")
    assert status == 1 and f"{some[0].removeprefix('images/')}: missing" in printed
    assert (mirror.root / "archives" / "test_met.tar.gz").exists()  # kept: not all is well


def test_other_counts_than_the_published_are_noted(mirror, monkeypatch):
    monkeypatch.setattr(module, "PUBLISHED_IMAGES", {**COUNTS, "val": 2_165})
    status, printed = mirror.download("--queries")
    assert status == 0 and "note: valset.json names 7 images, 2,165 were published" in printed
    assert printed.count("note:") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mini", "--full"], "--mini and full exclude each other; choose one"),
        (["--mirror", "ftp://host/"], "--mirror ftp://host/: must be an address such as http://host/folder/"),
    ],
)
def test_mistakes_are_named(mirror, options, said):
    status, printed = mirror.download(*options)
    assert status == 2 and said in printed and mirror.server.requests == [] and not mirror.root.exists()


def test_two_downloads_into_one_folder(mirror):
    mirror.root.joinpath("archives").mkdir(parents=True)
    with alone_in(mirror.root / "archives", "another download", "stop it"):
        status, printed = mirror.download()
        assert status == 2 and "archives: another download is at work there" in printed
    assert mirror.download()[0] == 0


def test_no_room_is_said_before_anything_is_downloaded(mirror, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    status, printed = mirror.download()
    assert status == 2 and "0.0 GB free" in printed and "--root" in printed
    assert mirror.server.gets() == [] and mirror.data() == {}


INTERRUPTED = """
import sys
from metilr.commands import download
from metilr.cli import main
from tests.mirror import UNKNOWN
from tests.commands.test_download import COUNTS
download.ARCHIVES, download.PUBLISHED_IMAGES = UNKNOWN, COUNTS
main(["download", "--root", sys.argv[1], "--mirror", sys.argv[2]])
"""


def test_ctrl_c_keeps_what_is_there(mirror):
    """With one archive done, while the next one hangs in the middle."""
    hang = threading.Event()
    mirror.server.faults = [Fault(), Fault(cut=10, hang=hang)]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, mirror.root, mirror.server.url], stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        # Whoever runs the tests in the background hands down an ignored Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    records = mirror.root / "archives" / "downloads.json"
    while not records.exists() or records.read_text().count('"unpacked": -1') < 1:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    hang.set()
    assert process.returncode == 130
    assert error.splitlines()[-1] == (
        "metilr download: error: interrupted; finished work is kept, run the same command to continue"
    )
    before = mirror.server.gets()
    status, _ = mirror.download()
    assert status == 0 and mirror.data() == mirror.expected(*NOT_MINI)
    assert before[0] not in mirror.server.gets()[len(before) :]


def test_a_killed_unpacking_is_continued(mirror):
    """What was unpacked stays, half a file is written again, and the archive is not loaded again."""
    mirror.download("--queries")
    records = mirror.root / "archives" / "downloads.json"
    records.write_text(records.read_text().replace('"unpacked": -1', '"unpacked": 2'))  # as the first edition wrote it
    for file in [*(mirror.root / "images").rglob("*.jpg")][::2]:
        file.write_bytes(file.read_bytes()[:50])
    before = mirror.server.gets()
    assert mirror.download("--queries")[0] == 0 and mirror.server.gets() == before
    assert mirror.data() == mirror.expected("images/MET")


def test_another_archive_than_the_recorded_one_is_refused(mirror):
    mirror.download("--queries")
    for file in (mirror.root / "images" / "test_met").iterdir():
        file.unlink()
    mirror.download("--queries")  # is told to unpack it again
    (mirror.root / "archives" / "test_met.tar.gz").write_bytes(tarball(("test_met/x.jpg", b"x")))
    status, printed = mirror.download("--queries")
    assert status == 2 and "was recorded on" in printed and "downloads.json" in printed


def test_a_page_in_place_of_an_archive_is_not_kept(mirror):
    content = mirror.server.files["test_met.tar.gz"]
    mirror.server.files["test_met.tar.gz"] = b"<html>log in</html>"
    status, printed = mirror.download("--queries")
    assert status == 2 and "is no .tar.gz" in printed
    mirror.server.files["test_met.tar.gz"] = content
    assert mirror.download("--queries")[0] == 0


@pytest.mark.parametrize("content", ["{", '{"a": {"url": "u", "bytes": "many"}}'])
def test_unreadable_records_are_named(mirror, content):
    mirror.root.joinpath("archives").mkdir(parents=True)
    (mirror.root / "archives" / "downloads.json").write_text(content)
    status, printed = mirror.download()
    assert status == 2 and "downloads.json: not readable" in printed and "delete it" in printed
