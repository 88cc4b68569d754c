"""Files over HTTP, from a server that does what networks and publishers do."""

import hashlib
import random
import time
from pathlib import Path

import pytest

import metilr.download as module
from metilr.download import LONGEST_WAIT, TRIES, fetch, remote_size
from metilr.errors import UserError
from tests.server import FINE, PLAIN, Fault, Server

NAME = "images.tar.gz"
CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
CUT = 100_000
ENDLESS = b"a" * (1 << 16)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Client:
    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.path = server, folder / NAME
        self.waits: list[float] = []
        server.files[NAME] = CONTENT

    def __call__(self, **options) -> bytes:
        fetch(self.server.url + NAME, self.path, "try another", sleep=self.waits.append, **options)
        assert {file.name for file in self.path.parent.iterdir()} <= {NAME, f"{NAME}.part.lock"}
        return self.path.read_bytes()

    def refused(self, **options) -> str:
        with pytest.raises(UserError) as caught:
            self(**options)
        assert not self.path.exists() and "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{self.server.url}{NAME}: ")
        assert str(caught.value).endswith("try another")
        return str(caught.value)

    def break_off(self) -> None:
        """Leave a part of CUT bytes, as a process does that is killed."""

        def kill(done: int, total: int | None) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self(report=kill)
        self.path.with_name(f"{NAME}.part").write_bytes(CONTENT[:CUT])

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, _, headers in self.server.requests]


@pytest.fixture
def client(server, tmp_path) -> Client:
    return Client(server, tmp_path)


def test_a_file_arrives_whole(client):
    seen: list[tuple[int, int | None]] = []
    assert client(report=lambda done, total: seen.append((done, total)), size=len(CONTENT)) == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    assert client.ranges() == [None] and client.waits == []
    assert client() == CONTENT and len(client.server.requests) == 1  # it is there


def test_a_part_whose_note_was_cut_short_begins_anew(client):
    client.break_off()
    [note] = [file for file in client.path.parent.iterdir() if file.name not in (f"{NAME}.part", f"{NAME}.part.lock")]
    note.write_text("")
    assert client() == CONTENT and client.ranges()[-1] is None


def test_an_empty_file_and_one_without_a_length(client):
    client.server.files[NAME] = b""
    assert client() == b""
    client.path.unlink()
    client.server.always = Fault(raw=PLAIN + CONTENT)
    assert client() == CONTENT


@pytest.mark.parametrize("reset", [False, True])
def test_cut_connections_are_continued(client, reset):
    client.server.faults = [Fault(cut=CUT, reset=reset), Fault(cut=50_000), Fault(cut=10)]
    assert client() == CONTENT
    asked = client.ranges()
    assert asked[0] is None and None not in asked[2:] and len(client.waits) == len(asked) - 1


def test_a_killed_download_is_continued_by_the_next_call(client):
    client.break_off()
    assert client() == CONTENT and client.ranges() == [None, f"bytes={CUT}-"]


def test_a_part_that_is_whole_or_longer_is_no_trap(client):
    client.break_off()
    client.path.with_name(f"{NAME}.part").write_bytes(CONTENT + b"x")
    assert client() == CONTENT


@pytest.mark.parametrize("validators", [("ETag",), ("Last-Modified",), ()])
@pytest.mark.parametrize("conditions", [True, False])
@pytest.mark.parametrize("new", [OTHER, OTHER[:10_000]])
def test_a_file_that_changed_in_between_is_loaded_anew(client, validators, conditions, new):
    """Also from a server that names no version, or sends the rest of another one than was asked for."""
    client.server.validators, client.server.conditions = validators, conditions
    client.break_off()
    client.server.files[NAME] = new
    client.server.modified = "Thu, 02 Sep 2021 12:00:00 GMT"
    assert client() == new


def test_a_server_that_sends_another_range_than_was_asked_for(client):
    client.server.faults = [Fault(cut=CUT), Fault(shift=1)]
    assert client() == CONTENT and len(client.server.requests) == 3


def test_a_part_of_another_address_is_not_continued(client, server):
    client.break_off()
    server.files["other"] = OTHER
    fetch(f"{server.url}other", client.path, "")
    assert client.path.read_bytes() == OTHER


def test_a_server_without_ranges(client):
    client.server.ranges = False
    client.server.faults = [Fault(cut=CUT)]
    assert client() == CONTENT
    client.path.unlink()
    client.server.always = Fault(cut=CUT)
    assert f"{TRIES} times in a row; what is there is kept" in client.refused()


def test_errors_that_pass(client):
    client.server.faults = [Fault(status=503), Fault(status=429, headers={"Retry-After": "7"}), Fault(status=500)]
    assert client() == CONTENT and client.waits[1] == 7
    client.path.unlink()
    client.server.faults = [Fault(status=503, headers={"Retry-After": "9" * 30})]
    assert client() == CONTENT and client.waits[-1] == LONGEST_WAIT


def test_errors_that_do_not_pass(client):
    client.server.always = Fault(status=503)
    client.refused()
    assert len(client.server.requests) == TRIES
    client.server.always = Fault(status=404)
    assert "the server answers 404" in client.refused() and len(client.server.requests) == TRIES + 1


def test_what_is_there_is_kept_when_the_server_fails_for_good(client):
    client.server.faults = [Fault(cut=CUT)] + [Fault(status=500)] * TRIES
    assert "what is there is kept" in client.refused()
    assert client.path.with_name(f"{NAME}.part").stat().st_size > 0
    assert client() == CONTENT and client.ranges()[-1] != "bytes=0-"


def test_a_connection_that_falls_silent_is_left(client, monkeypatch):
    import threading

    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    hang = threading.Event()
    client.server.faults = [Fault(cut=CUT, hang=hang)]
    assert client() == CONTENT and len(client.server.requests) == 2
    hang.set()


HEAD = b'HTTP/1.1 200 OK\r\nContent-Length: 300000\r\nETag: "1"\r\n\r\n'


@pytest.mark.parametrize("raw", [HEAD, PLAIN, CHUNKED, b"HTTP/1.1 200 OK\r\n"])  # the last one's headers never end
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(client, monkeypatch, raw):
    monkeypatch.setattr(module, "RATE_SECONDS", 0.3)
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    client.server.always = Fault(raw=raw, endless=b"1\r\na\r\n" if raw == CHUNKED else b"a", pace=0.05)
    started = time.monotonic()
    assert f"{TRIES} times in a row" in client.refused()
    assert time.monotonic() - started < 20 and len(client.server.requests) == TRIES
    client.server.always = FINE
    assert client() == CONTENT


def test_cut_again_and_again_after_a_byte_is_given_up(client, monkeypatch):
    monkeypatch.setattr(module, "LEAST_RATE", 10**9)
    client.server.always = Fault(cut=1000)
    assert f"{TRIES} times in a row" in client.refused()


@pytest.mark.parametrize("raw", [PLAIN, CHUNKED])
def test_a_body_that_never_ends_is_left(client, raw):
    chunk = ENDLESS if raw == PLAIN else b"10000\r\n" + ENDLESS + b"\r\n"
    client.server.always = Fault(raw=raw, endless=chunk)
    written: list[int] = []
    assert "more bytes" in client.refused(size=len(CONTENT), report=lambda done, total: written.append(done))
    assert max(written) <= len(CONTENT)


@pytest.mark.parametrize("lie", [-1, 1])
def test_another_length_than_the_published_is_refused_at_once(client, lie):
    assert "the published file has" in client.refused(size=len(CONTENT) + lie) and client.waits == []


def test_a_length_that_is_too_long_is_given_up(client):
    client.server.always = Fault(lie=10)
    client.refused()


def test_the_published_digest_is_demanded_and_another_file_thrown_away(client):
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert "its sha256 is" in client.refused(sha256="0" * 64)
    assert not client.path.with_name(f"{NAME}.part").exists()
    assert client(sha256=digest[:8]) == CONTENT


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: ftp://host/\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n",
        b"HTTP/1.1 404 \x1b[31mno\r\n\r\n",
        CHUNKED + b"zz\r\n",
        b"\0" * 70_000,
    ],
)
def test_malformed_answers_end_in_one_line(client, raw):
    client.server.always = Fault(raw=raw)
    assert client.refused().isprintable()


def test_the_size_that_a_server_tells(client, server):
    assert remote_size(server.url + NAME) == len(CONTENT)
    assert remote_size(f"{server.url}nowhere") is None
    server.stop()
    assert remote_size(server.url + NAME) is None
    assert f"{TRIES} times in a row" in client.refused()
