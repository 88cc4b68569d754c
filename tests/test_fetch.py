import json
import os
import random
import re
import threading
from pathlib import Path

import pytest

from metilr import fetch as module
from metilr import transfer
from metilr.errors import UserError
from metilr.fetch import LONGEST_WAIT, OVERLAP, TRIES, fetch
from metilr.transfer import CHUNK
from tests.full_disk import files_of_at_most
from tests.server import PLAIN, Fault, Server

NAME = "images.tar.gz"
CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
CUT = 100_000


class Client:
    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.path = server, folder / NAME
        self.waits: list[float] = []
        server.files[NAME] = CONTENT

    def __call__(self, **options) -> bytes:
        fetch(self.server.url + NAME, self.path, "try --mirror", sleep=self.waits.append, **options)
        assert sorted(file.name for file in self.path.parent.iterdir()) == [NAME]  # no part, no record
        return self.path.read_bytes()

    def refused(self, **options) -> str:
        with pytest.raises(UserError) as caught:
            self(**options)
        assert not self.path.exists()
        assert str(caught.value).startswith(f"{self.server.url}{NAME}: ")
        assert str(caught.value).endswith("try --mirror")
        return str(caught.value)

    def break_off(self) -> None:
        """Leave a part, as a process does that is killed."""

        def kill(done: int, total: int | None) -> None:
            raise KeyboardInterrupt

        self.server.faults = [Fault(cut=CUT)]
        with pytest.raises(KeyboardInterrupt):
            self(report=kill)
        part = self.path.with_name(NAME + ".part")
        with part.open("ab") as file:  # what came before the kill, whatever that was: make it CUT bytes
            file.truncate(0)
            file.write(self.server.files[NAME][:CUT])


@pytest.fixture
def client(server, tmp_path) -> Client:
    folder = tmp_path / "archives"
    folder.mkdir()
    return Client(server, folder)


def ranges(server: Server) -> list[str | None]:
    return [headers.get("Range") for _, _, headers in server.requests]


def test_a_file_arrives_whole(client):
    seen: list[tuple[int, int | None]] = []
    assert client(report=lambda done, total: seen.append((done, total))) == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    assert ranges(client.server) == [None] and client.waits == []


def test_an_empty_file(client):
    client.server.files[NAME] = b""
    assert client() == b""


@pytest.mark.parametrize("reset", [False, True])
def test_cut_connections_are_continued(client, reset):
    client.server.faults = [Fault(cut=CUT, reset=reset), Fault(cut=OVERLAP + 50_000), Fault(cut=OVERLAP + 1)]
    assert client() == CONTENT
    asked = ranges(client.server)
    assert len(asked) == 4 and asked[0] is None
    if not reset:  # a reset takes away what the client has not read
        assert asked[1:] == [f"bytes={n - OVERLAP}-" for n in (CUT, CUT + 50_000, CUT + 50_001)]
    assert all(headers["If-Range"] for _, _, headers in client.server.requests[1:])


def test_a_killed_download_is_continued_by_the_next_call(client):
    client.break_off()
    assert client() == CONTENT
    assert ranges(client.server) == [None, f"bytes={CUT - OVERLAP}-"]


def test_a_part_that_was_whole_is_not_loaded_again(client):
    client.break_off()
    client.path.with_name(NAME + ".part").write_bytes(CONTENT)
    assert client() == CONTENT
    assert ranges(client.server)[1:] == [f"bytes={len(CONTENT) - OVERLAP}-"]


def test_a_server_without_ranges_sends_it_all_again(client):
    client.server.ranges = False
    client.server.faults = [Fault(cut=CUT)]
    assert client() == CONTENT
    assert len(client.server.requests) == 2


def test_a_server_without_ranges_that_always_cuts_is_given_up(client):
    client.server.ranges = False
    client.server.always = Fault(cut=CUT)
    assert f"broke off at {CUT:,} of {len(CONTENT):,} bytes, {TRIES} times in a row" in client.refused()
    assert len(client.server.requests) == TRIES + 1  # the first brought something


def test_a_length_that_is_never_reached_is_given_up(client):
    client.server.always = Fault(lie=100)
    assert f"broke off at {len(CONTENT):,} of {len(CONTENT) + 100:,} bytes" in client.refused()
    assert len(client.server.requests) == TRIES + 1


def test_a_length_that_was_too_long_once(client):
    client.server.faults = [Fault(lie=100)]
    assert client() == CONTENT


def test_a_length_that_is_too_short_ends_the_file_there(client):
    """HTTP has no more to tell: digests and archives' own ends are there for the rest."""
    client.server.always = Fault(lie=-100)
    assert client() == CONTENT[:-100]


@pytest.mark.parametrize("lie", [-100, 100])
def test_a_length_that_is_not_the_published_one_is_refused_at_once(client, lie):
    client.server.always = Fault(lie=lie)
    said = client.refused(expected_size=len(CONTENT))
    assert f"announces {len(CONTENT) + lie:,} bytes, the published file has {len(CONTENT):,}" in said
    assert len(client.server.requests) == 1


def test_errors_that_pass(client):
    client.server.faults = [Fault(status=500), Fault(status=503)]
    assert client() == CONTENT
    assert client.waits == [2, 4]


@pytest.mark.parametrize(("asked", "waited"), [("7", 7), ("99999", LONGEST_WAIT), ("Wed, 01 Sep 2021", 2)])
def test_the_server_says_how_long_to_wait(client, asked, waited):
    client.server.faults = [Fault(status=429, headers={"Retry-After": asked})]
    assert client() == CONTENT
    assert client.waits == [waited]


def test_errors_that_do_not_pass(client):
    client.server.always = Fault(status=500)
    assert f"the server answers 500 Internal Server Error, {TRIES} times in a row" in client.refused()
    assert len(client.server.requests) == TRIES
    assert client.waits == [2, 4, 8, 16, 32]


def test_what_is_there_is_kept_when_the_server_fails_for_good(client):
    client.server.faults = [Fault(cut=CUT)]
    client.server.always = Fault(status=500)
    client.refused()
    client.server.always = Fault()
    before = len(client.server.requests)
    assert client() == CONTENT
    assert ranges(client.server)[before:] == [f"bytes={CUT - OVERLAP}-"]


@pytest.mark.parametrize("status", [403, 404, 410, 501])
def test_refusals_are_final(client, status):
    client.server.always = Fault(status=status)
    assert f"the server answers {status} " in client.refused()
    assert len(client.server.requests) == 1 and client.waits == []


def test_no_server(client, server):
    server.stop()
    assert f"no connection (Connection refused), {TRIES} times in a row" in client.refused()
    assert len(client.waits) == TRIES - 1


def test_a_connection_that_falls_silent_is_left(client, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.2)
    hang = threading.Event()
    client.server.faults = [Fault(cut=CUT, hang=hang)]
    assert client() == CONTENT
    assert len(client.server.requests) == 2
    hang.set()


def test_a_redirection_away_from_http(client):
    client.server.always = Fault(status=302, headers={"Location": "file:///etc/hostname"})
    assert "302" in client.refused()
    assert len(client.server.requests) == 1


def test_a_body_without_a_length(client):
    client.server.always = Fault(raw=PLAIN + CONTENT)
    assert client() == CONTENT
    assert client(expected_size=len(CONTENT)) == CONTENT
    client.path.unlink()
    said = client.refused(expected_size=len(CONTENT) + 1)
    assert f"broke off at {len(CONTENT):,} of {len(CONTENT) + 1:,} bytes" in said


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
ENDLESS = b"a" * (1 << 16)


@pytest.mark.parametrize(
    ("raw", "endless"),
    [
        (PLAIN, ENDLESS),
        (CHUNKED + b"\r\n", b"10000\r\n" + ENDLESS + b"\r\n"),
        (CHUNKED + b"Content-Length: 300000\r\n\r\n", b"10000\r\n" + ENDLESS + b"\r\n"),
    ],
    ids=["plain", "chunked", "chunked with a length"],
)
@pytest.mark.parametrize("limit", [{"expected_size": len(CONTENT)}, {"most": len(CONTENT)}], ids=["published", "most"])
def test_a_body_that_never_ends_is_left(client, raw, endless, limit):
    client.server.always = Fault(raw=raw, endless=endless)
    written: list[int] = []
    said = client.refused(report=lambda done, total: written.append(done), **limit)
    assert f"sends more than {len(CONTENT):,} bytes" in said and max(written) <= len(CONTENT)
    assert [*client.path.parent.iterdir()] == []  # nothing of it is of use


def test_a_length_beyond_belief_is_refused_at_once(client):
    assert "announces 300,000 bytes, more than the 299,999" in client.refused(most=len(CONTENT) - 1)


def answer(*headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode("latin-1")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (answer(f"Content-Length: {'9' * 5000}"), r"announces a length that is none \(9{20}\)"),
        (answer(f"Content-Length: {'9' * 400}"), "announces a length that is none"),
        (answer("Content-Length: -5"), r"announces a length that is none \(-5\)"),
        (answer("Content-Length: \xb2"), "announces a length that is none"),
        (answer("Location: http://[::1", status="302 Found"), "cannot be asked"),
        (answer(f"Location: http://{'x' * 70}/", status="302 Found"), "cannot be asked"),
        (answer("Location: http://h\xf6st/", status="302 Found"), "cannot be asked|no connection"),
        (answer("Location: http://host:port/", status="302 Found"), "cannot be asked"),
        (answer("Location: /", status="302 \x1b[31mFound"), "the server answers 302 .*\N{REPLACEMENT CHARACTER}"),
        (answer(status="404 " + "x" * 5000), r"the server answers 404 x{100,200};"),
        (answer("Transfer-Encoding: chunked") + b"zz\r\n", "the connection broke off"),
        (answer("Transfer-Encoding: chunked") + b"-5\r\nabcdefgh", "the connection broke off"),
        (answer(*[f"A{i}: b" for i in range(200)]), "no connection"),
        (b"\0" * 70_000, "no connection"),
        (answer(f"Retry-After: {'9' * 5000}", status="503 Busy"), "the server answers 503 Busy"),
    ],
)  # fmt: skip
def test_malformed_answers_end_in_one_line(client, raw, said):
    client.server.always = Fault(raw=raw)
    line = client.refused()
    assert re.search(said, line) and line.isprintable() and len(line) < 400
    assert max(client.waits, default=0) <= LONGEST_WAIT


@pytest.mark.parametrize("told", [f"bytes {'9' * 5000}-1/2", f"bytes 0-1/{'9' * 5000}", "bytes \xb2-1/2", "b", ""])
def test_a_malformed_range_begins_anew(client, told):
    client.server.faults = [Fault(cut=CUT), Fault(raw=answer(f"Content-Range: {told}", status="206 Partial") + b"x")]
    assert client() == CONTENT
    assert ranges(client.server) == [None, f"bytes={CUT - OVERLAP}-", None]


@pytest.mark.parametrize("etag", ['"\xfc"', '"a\tb"'])
def test_a_name_of_a_version_that_cannot_be_sent_back_is_no_condition(client, etag):
    client.server.validators = ()
    client.server.faults = [Fault(cut=CUT, headers={"ETag": etag})]
    assert client() == CONTENT
    assert client.server.requests[1][2]["If-Range"] is None


def test_it_is_said_why_and_how_long_it_waits(client):
    said: list[str] = []
    client.server.faults = [Fault(status=500), Fault(status=503, headers={"Retry-After": "7"})]
    client(tell=said.append)
    assert said == [
        "the server answers 500 Internal Server Error; next attempt in 2 s",
        "the server answers 503 Service Unavailable; next attempt in 7 s",
    ]


def test_a_file_is_on_disk_before_it_gets_its_name(client, monkeypatch):
    flushed: list[tuple[str, bool]] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, client.path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    client()
    assert (f"{NAME}.part", False) in flushed and flushed[-1] == ("archives", True)


@pytest.mark.parametrize("validators", [("ETag", "Last-Modified"), ("ETag",), ("Last-Modified",), ()])
@pytest.mark.parametrize("conditions", [True, False])
@pytest.mark.parametrize("new", [OTHER, OTHER + OTHER, OTHER[:50_000], OTHER[: CUT - OVERLAP], OTHER[:10_000], b""])
def test_a_file_that_changed_in_between_is_loaded_anew(client, validators, conditions, new):
    """Also from a server that names no version, or sends the rest of another one than was asked for."""
    client.server.validators, client.server.conditions = validators, conditions
    client.break_off()
    client.server.files[NAME] = new
    client.server.modified = "Thu, 02 Sep 2021 12:00:00 GMT"
    assert client() == new


def test_a_server_that_sends_another_range_than_was_asked_for(client):
    """The same file: taken for what was asked for, its bytes would lie in the wrong places."""
    content = bytes(len(CONTENT) - 10) + CONTENT[-10:]  # the overlap is the same wherever it is taken from
    client.server.files[NAME] = content
    client.server.faults = [Fault(cut=CUT), Fault(shift=1)]
    assert client() == content
    assert len(client.server.requests) == 3


def test_a_part_of_elsewhere_does_not_count_as_progress(client):
    """Each attempt brings a little; less than the part that was thrown away had."""
    client.path.with_name(NAME + ".part").write_bytes(OTHER)
    client.server.faults = [Fault(cut=10_000)] + [Fault(cut=OVERLAP + 10_000)] * 20
    assert client() == CONTENT


def test_a_change_during_the_retries_of_one_call(client):
    client.server.faults = [Fault(cut=CUT), Fault(cut=OVERLAP + 100)]

    def exchange(seconds: float) -> None:
        client.server.files[NAME] = OTHER

    fetch(client.server.url + NAME, client.path, "", sleep=exchange)
    assert client.path.read_bytes() == OTHER


@pytest.mark.parametrize(
    "record",
    ["", "[]", "{}", '{"url": 1}', '{"url": "URL", "etag": 1}', "\0", '{"url": "http://elsewhere/x", "size": 300000}'],
)
def test_a_part_of_unknown_origin_is_not_used(client, record):
    client.break_off()
    client.path.with_name(NAME + ".part").write_bytes(OTHER[:CUT])
    client.path.with_name(NAME + ".part.json").write_text(record.replace("URL", client.server.url + NAME))
    assert client() == CONTENT
    assert ranges(client.server) == [None, None]


def test_weak_etags_are_no_condition(client):
    client.server.faults = [Fault(cut=CUT, headers={"ETag": 'W/"1"'})]
    client.server.validators = ()
    assert client() == CONTENT
    assert client.server.requests[1][2]["If-Range"] is None


def test_the_record_is_written_before_the_part(client, monkeypatch):
    """Else a kill between them would leave bytes that the next call takes for another version's."""
    there: list[bool] = []
    write = module.write_atomically
    monkeypatch.setattr(module, "write_atomically", lambda file, text: (there.append(part.exists()), write(file, text)))
    part = client.path.with_name(NAME + ".part")
    client.break_off()
    client.server.files[NAME] = OTHER
    assert client() == OTHER
    assert there == [False, False]


def test_a_full_disk_is_named_and_what_is_there_is_continued(client):
    with files_of_at_most(CUT), pytest.raises(OSError, match="too large") as caught:
        client()
    part = client.path.with_name(NAME + ".part")
    assert caught.value.filename == str(part) and not client.path.exists()
    kept = part.stat().st_size
    assert part.read_bytes() == CONTENT[:kept] and client.waits == []  # waiting frees no disk
    assert client() == CONTENT


def test_large_files_pass_in_pieces(client):
    client.server.files[NAME] = bytes(2 * CHUNK) + CONTENT
    written: list[int] = []
    assert client(report=lambda done, total: written.append(done)) == bytes(2 * CHUNK) + CONTENT
    assert max(later - earlier for earlier, later in zip([0, *written], written, strict=False)) <= CHUNK


def test_what_the_record_says(client):
    client.break_off()
    record = json.loads(client.path.with_name(NAME + ".part.json").read_text())
    assert record["url"] == client.server.url + NAME and record["size"] == len(CONTENT)
    assert record["etag"] and record["modified"]
