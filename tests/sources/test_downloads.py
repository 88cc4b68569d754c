"""Downloads from servers that are slow, that lie, break off, or lead elsewhere."""

import asyncio
import email.utils
import socket
import time
from pathlib import Path
from threading import Event

import aiohttp
import pytest

from metilr.errors import UserError
from metilr.sources import fetch
from metilr.sources.fetch import DownloadError, DownloadOptions, Downloads, NoAnswerError, run_downloads
from tests.server import Fault

OPTIONS = DownloadOptions(allow_private=True, requests_per_second=10_000)


def get(folder: Path, *addresses: str, options=OPTIONS, ask_again=False, check=lambda file: None) -> list[bytes | str]:
    """The content of each address, or why there is none, one after the other."""

    async def work() -> list[bytes | str]:
        answers: list[bytes | str] = []
        async with Downloads(folder, options, ask_again) as downloads:
            for address in addresses:
                try:
                    answers.append((await downloads.file(address, check)).read_bytes())
                except DownloadError as error:
                    answers.append(str(error))
            answers += [f"kept {address}" for address in downloads.kept]
        return answers

    return run_downloads(work())


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([Fault(status=500), Fault(status=503)], 3),
        ([Fault(status=429, headers={"Retry-After": "0"})], 2),
        ([Fault(cut=3)], 2),
        ([Fault(reset=True, cut=2)], 2),
        ([Fault(lie=5)], 2),
        ([Fault(raw=b"")], 2),
    ],
    ids=["500 and 503", "429", "cut off", "reset", "more announced than sent", "no answer"],
)
def test_a_passing_fault_is_tried_again(server, tmp_path, faults, requests):
    server.files["a"], server.faults = b"content", list(faults)
    assert get(tmp_path, server.url + "a") == [b"content"]
    assert server.gets() == ["a"] * requests


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        (Fault(status=404), "HTTP 404", 1),
        (Fault(status=403), "HTTP 403", 1),
        (Fault(status=500), "HTTP 500 Internal Server Error, 5 times", 5),
        (Fault(status=302, headers={"Location": "/a"}), "redirects in a circle", fetch.MOST_REDIRECTS),
        (Fault(status=302, headers={"Location": "file:///etc/passwd"}), "is no web address", 1),
    ],
)
def test_a_lasting_fault_says_why(server, tmp_path, fault, reason, requests):
    server.files["a"], server.always = b"content", fault
    [answer] = get(tmp_path, server.url + "a")
    assert reason in answer and len(server.gets()) == requests
    assert [file for file in tmp_path.iterdir() if file.suffix == ".part"] == []


def test_a_server_that_sends_no_end_is_cut_at_the_limit(server, tmp_path):
    server.always = Fault(raw=b"HTTP/1.0 200 OK\r\n\r\n", endless=b"x" * 100_000)
    options = DownloadOptions(allow_private=True, max_file_megabytes=0.5)
    assert get(tmp_path, server.url + "a", options=options) == ["has more than 0.5 MB"]
    server.always, server.files["b"] = Fault(), b"x" * 600_000
    assert get(tmp_path, server.url + "b", options=options) == ["has more than 0.5 MB"]
    assert not list(tmp_path.iterdir())


def test_a_server_that_falls_silent_takes_too_long(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", aiohttp.ClientTimeout(total=5, sock_read=0.05))
    monkeypatch.setattr(fetch, "TRIES", 2)
    server.files["a"], server.always = b"content", Fault(cut=3, hang=(end := Event()))
    [answer] = get(tmp_path, server.url + "a")
    end.set()
    assert "imeout" in answer and answer.endswith(", 2 times")


def test_a_server_that_is_gone_is_given_up(server, tmp_path):
    address = server.url
    server.stop()
    answers = get(tmp_path, *(f"{address}{i}" for i in range(6)))
    assert all("Cannot connect" in answer for answer in answers[:3])
    assert answers[3:] == ["its server no longer answers"] * 3


@pytest.mark.parametrize("as_date", [False, True])
def test_a_server_is_left_alone_as_long_as_it_asks(server, tmp_path, as_date):
    server.files["a"] = b"content"
    pause = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    server.faults = [Fault(status=503, headers={"Retry-After": pause})]
    began = time.monotonic()
    assert get(tmp_path, server.url + "a") == [b"content"]
    assert time.monotonic() - began > 0.9  # what was asked for, and no measure of speed


def test_what_is_there_is_not_asked_for_again_and_then_only_if_it_changed(server, tmp_path):
    server.files |= {"a": b"one", "b": b"two"}
    addresses = [server.url + "a", server.url + "b"]
    assert get(tmp_path, *addresses) == [b"one", b"two"]
    assert get(tmp_path, *addresses) == [b"one", b"two"] and len(server.requests) == 2
    server.files["b"] = b"new"
    assert get(tmp_path, *addresses, addresses[0], ask_again=True) == [b"one", b"new", b"one"]
    assert len(server.requests) == 4  # each once; the unchanged one without its content
    assert get(tmp_path, *addresses) == [b"one", b"new"]


def test_what_was_there_is_kept_when_its_server_is_down_but_not_when_it_is_gone(server, tmp_path):
    server.files |= {"a": b"one", "b": b"two"}
    addresses = [server.url + "a", server.url + "b"]
    get(tmp_path, *addresses)
    server.always = Fault(status=503)
    assert get(tmp_path, *addresses, ask_again=True) == [b"one", b"two", *(f"kept {each}" for each in addresses)]
    server.always = Fault()
    del server.files["b"]
    assert get(tmp_path, *addresses, ask_again=True) == [b"one", "HTTP 404 Not Found"]


def test_half_of_a_download_is_none(server, tmp_path):
    server.files["a"] = b"content"
    get(tmp_path, server.url + "a")
    [file] = [file for file in tmp_path.iterdir() if not file.suffix]
    file.write_bytes(b"con")
    assert get(tmp_path, server.url + "a") == [b"content"] and len(server.requests) == 2
    file.with_suffix(".json").unlink()
    assert get(tmp_path, server.url + "a") == [b"content"] and len(server.requests) == 3


def test_what_a_check_refuses_is_not_kept(server, tmp_path):
    def refuse(file: Path) -> None:
        raise DownloadError("is a page")

    server.files["a"] = b"<html>"
    assert get(tmp_path, server.url + "a", check=refuse) == ["is a page"]
    assert not list(tmp_path.iterdir()) and len(server.requests) == 1


PRIVATE = "lies in a private network; allow_private true asks it all the same"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254", "2130706433", "0"])
def test_this_machine_and_private_networks_are_not_asked(server, tmp_path, host):
    server.files["a"] = b"secret"
    port = server.url.rstrip("/").rpartition(":")[2]
    [answer] = get(tmp_path, f"http://{host}:{port}/a", options=DownloadOptions())
    assert answer == ("is no web address" if host.isdigit() else PRIVATE)  # a number alone is no host to aiohttp
    assert not server.requests


def test_a_public_name_that_leads_to_a_private_address_is_not_asked(server, tmp_path, monkeypatch):
    """By its address at the moment of connecting, so that a name which changes its address gains nothing."""
    resolver = aiohttp.ThreadedResolver

    async def resolve(self, host, port=0, family=0):
        return await actual(self, "127.0.0.1", port, family)

    actual = resolver.resolve
    monkeypatch.setattr(resolver, "resolve", resolve)
    monkeypatch.setattr("aiohttp.connector.DefaultResolver", resolver)
    server.files["a"] = b"secret"
    port = server.url.rstrip("/").rpartition(":")[2]
    assert get(tmp_path, f"http://museum.example:{port}/a", options=DownloadOptions()) == [PRIVATE]
    assert get(tmp_path, f"http://museum.example:{port}/a") == [b"secret"]


def test_requests_begin_no_faster_than_asked_for(server, tmp_path):
    server.files |= {str(i): b"x" for i in range(6)}

    async def work() -> None:
        options = DownloadOptions(allow_private=True, requests_per_second=20, connections=3)
        async with Downloads(tmp_path, options) as downloads:
            await asyncio.gather(*(downloads.file(f"{server.url}{i}", lambda file: None) for i in range(6)))

    began = time.monotonic()
    asyncio.run(work())
    assert time.monotonic() - began >= 5 / 20  # six requests, five pauses


def test_in_a_notebook_too(server, tmp_path):
    server.files["a"] = b"content"

    async def cell() -> list[bytes | str]:
        return get(tmp_path, server.url + "a")

    assert asyncio.run(cell()) == [b"content"]


@pytest.mark.parametrize("name", ["connections", "requests_per_second", "max_file_megabytes", "max_images"])
def test_limits_of_nothing_are_refused(name):
    with pytest.raises(UserError, match=f"{name} 0: must be above 0"):
        DownloadOptions(**{name: 0})
    assert issubclass(NoAnswerError, DownloadError)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True), ("2606:4700::1", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False), ("::1", False), ("fe80::1%eth0", False), ("fc00::1", False), ("fec0::1", False),
        ("::ffff:127.0.0.1", False), ("64:ff9b::7f00:1", False), ("64:ff9b:1::1", False), ("2002:7f00:1::", False),
        ("::127.0.0.1", False),
    ],
)  # fmt: skip
def test_public_addresses(address, expected):
    assert fetch.is_public(address) == expected


def test_a_redirect_into_a_private_network_is_not_followed(server, tmp_path, monkeypatch):
    """The first request may go to this machine; the second is as any other."""
    others = iter([True, False])
    monkeypatch.setattr(fetch, "is_public", lambda host: next(others))
    server.faults = [Fault(status=302, headers={"Location": server.url.replace("127.0.0.1", "localhost") + "a"})]
    server.files["a"] = b"secret"
    assert get(tmp_path, server.url + "start", options=DownloadOptions()) == [PRIVATE]
    assert server.gets() == ["start"]


def test_neither_passwords_nor_proxies_of_this_machine_are_used(server, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("default login anna password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.files["a"] = b"content"
    assert get(tmp_path / "downloads", server.url + "a") == [b"content"]
    assert "Authorization" not in server.requests[0][2]


def test_a_proxy_that_is_named_is_asked(server, tmp_path):
    options = DownloadOptions(requests_per_second=10_000, proxy=server.url)
    server.make = lambda path: b"through it" if path.startswith("http://museum.example") else None
    assert get(tmp_path, "http://museum.example/a", options=options) == [b"through it"]


@pytest.mark.parametrize(
    "address", ["http://[abc/", "http://a..b/", "http://xn--/", "http://" + 70 * "a" + "/", "http:///"]
)
def test_what_is_no_address_is_told(tmp_path, monkeypatch, address):
    def unknown(host, *_, **__):
        host.encode("idna")  # as Python does first
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)  # a name server can take many seconds to say so
    [answer] = get(tmp_path, address, options=DownloadOptions())
    assert answer == "is no web address" or "Cannot connect" in answer or "Name or service" in answer


def test_an_odd_pause_counts_for_none(server, tmp_path):
    server.files["a"] = b"content"
    server.faults = [Fault(status=503, headers={"Retry-After": each}) for each in ("\xb2", "soon", "-5")]
    assert get(tmp_path, server.url + "a") == [b"content"]


def test_what_was_there_is_kept_when_a_page_comes_in_its_place(server, tmp_path):
    def refuse_pages(file: Path) -> None:
        if file.read_bytes().startswith(b"<"):
            raise DownloadError("is a page")

    server.files["a"] = b"one"
    get(tmp_path, server.url + "a", check=refuse_pages)
    server.files["a"] = b"<html>we are back soon</html>"
    kept = [b"one", f"kept {server.url}a"]
    assert get(tmp_path, server.url + "a", ask_again=True, check=refuse_pages) == kept


def test_a_server_that_only_fails_is_given_up(server, tmp_path):
    server.always = Fault(status=500)
    answers = get(tmp_path, *(f"{server.url}{i}" for i in range(8)))
    assert answers[:3] == ["HTTP 500 Internal Server Error, 5 times"] * 3
    assert answers[3:] == ["its server no longer answers"] * 5 and len(server.gets()) == 15
