"""``metilr serve``: its endpoints, its limits, and its page in a real browser."""

import base64
import contextlib
import http.client
import io
import os
import re
import runpy
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from metilr.cli import main
from metilr.collection import PhotoOptions
from metilr.collection.app import Limits, build_app
from metilr.collection.collection import Collection
from metilr.collection.index_schema import Index
from metilr.collection.open_collection import open_with_threshold
from metilr.collection.photos import BadPhotoError, Decoder, Photo
from metilr.collection.serve import is_loopback
from tests.browser import browser as browser  # a fixture
from tests.collection.conftest import UNTRAINED
from tests.hostile import NAME, REASONS
from tests.small_runs import evaluate, index

pytest.importorskip("fastapi", reason="needs metilr[serve]")
pytest.importorskip("uvicorn", reason="needs metilr[serve]")
httpx = pytest.importorskip("httpx", reason="is how servers are asked here")
testclient = pytest.importorskip("fastapi.testclient", reason="needs httpx")

MAX_BYTES = 200_000
MAX_PIXELS = 50_000_000
HOSTS = ["127.0.0.1", "localhost"]


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with contextlib.closing(Decoder()) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def app_of(decoder):
    def build(run: Path | None = None, store: Path | None = None, threshold: float | None = None, decoder=decoder):
        opened = open_with_threshold(PhotoOptions(run, store, threshold=threshold, accelerator="cpu"))
        return build_app(*opened, Limits(MAX_BYTES, MAX_PIXELS, HOSTS), decoder)

    return build


def client_of(app):
    return testclient.TestClient(app, base_url="http://127.0.0.1")


@pytest.fixture(scope="module")
def app(indexed, app_of):
    return app_of(store=indexed / "index", threshold=-3.0)


@pytest.fixture(scope="module")
def client(app):
    return client_of(app)


@pytest.fixture(scope="module")
def address(app) -> Iterator[str]:
    with served(app) as (address, _):
        yield address


@contextlib.contextmanager
def served(app) -> Iterator:
    """Where an application is really served, and its server."""
    from metilr.collection.walls import server_of

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = server_of(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/", server
        server.should_exit = True
        thread.join()


def send(client, content: bytes, name: str = "photo.jpg"):
    return client.post("/identify", files={"photo": (name, content)})


@pytest.mark.parametrize(
    ("read", "accept"), [(("JPEG", "AVIF"), "image/*"), (("JPEG", "AVIF", "HEIF"), "image/*,.avif,.heic,.heif")]
)
def test_the_page_asks_for_heic_where_it_is_read(indexed, app_of, monkeypatch, read, accept):
    """An iPhone that is asked for it sends it, and makes a JPEG of it where it is not."""
    monkeypatch.setattr("metilr.collection.app.formats", lambda: read)
    page = client_of(app_of(store=indexed / "index", threshold=-3.0)).get("/").text
    assert f'name="photo" accept="{accept}">' in page


def test_a_visitor_without_val_reads_of_similarity_alone(indexed, app_of):
    client = client_of(app_of(store=indexed / "index"))
    for words in (client.get("/").text, client.get("/static/serve.js").text):
        visible = words.partition("<header>")[2] or words
        assert not re.search(r"\b(val|query|queries)\b|log-conf|log_conf|evaluat|threshold|confidence", visible)
    answer = send(client, (indexed / "museum" / "9" / "2.jpg").read_bytes()).json()
    assert (answer["headline"], answer["detail"]) == ("undecided, most likely exhibit 9", "similarity 1.000")


def test_an_upload_gets_the_collection_s_answer(client, indexed):
    response = send(client, (indexed / "museum" / "9" / "2.jpg").read_bytes())
    answer = response.json()
    assert response.status_code == 200
    assert (answer["decision"], answer["exhibit"], answer["headline"]) == ("exhibit", "9", "exhibit 9")
    assert answer["matches"][0]["path"] == "9/2.jpg"
    assert answer["matches"][0]["similarity"] == pytest.approx(1, abs=1e-4)
    assert answer["threshold"]["log_confidence"] == -3.0
    picture = client.get(answer["matches"][0]["picture"])
    assert picture.status_code == 200 and picture.headers["content-type"] == "image/jpeg"


def test_the_page_shows_what_photo_and_answer_have_in_common(museum, run, app_of, tmp_path):
    options = {"store": museum.parent / "store", "output": tmp_path / "run", "geometric_check": 2}
    evaluate(museum, report=False, **options, **UNTRAINED)
    client = client_of(app_of(tmp_path / "run"))
    answer = send(client, (museum / "images" / "MET" / "9" / "2.jpg").read_bytes()).json()
    assert answer["matches"][0]["inliers"] > 20
    kind, _, encoded = answer["regions"].partition(",")
    assert kind == "data:image/jpeg;base64" and base64.b64decode(encoded).startswith(b"\xff\xd8")


def wait_for_pictures(page) -> None:
    """By asking again and again: the page's own policy forbids the waiting that Playwright would put into it."""
    for _ in range(100):
        if page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)"):
            return
        page.wait_for_timeout(100)
    raise AssertionError("a picture does not load")


def test_an_upload_too_small_for_the_model_is_refused(indexed, app_of, tmp_path):
    options = {**UNTRAINED, "backbone": "timm/convnext_atto", "image_size": 96}
    index(indexed / "museum", tmp_path / "index", **options)
    stream = io.BytesIO()
    Image.new("RGB", (96, 63)).save(stream, "PNG")
    response = send(client_of(app_of(store=tmp_path / "index")), stream.getvalue())
    assert response.status_code == 422
    assert response.json()["error"].startswith("The photo cannot be described (63x96 px is too small for timm/convnext")


def test_a_bad_upload_is_refused_and_harms_no_other(client, indexed, hostile):
    for kind, reason in REASONS.items():
        response = send(client, hostile[kind].read_bytes(), name=NAME)
        assert response.status_code == (413 if "megapixels" in reason else 422)
        assert reason in response.json()["error"]
    good = send(client, (indexed / "museum" / "9" / "2.jpg").read_bytes())
    assert good.status_code == 200 and good.json()["exhibit"] == "9"


def test_of_50_uploads_at_once_each_gets_its_own_answer_or_is_told_to_come_again(address, indexed, hostile):
    photos = [file for file in sorted((indexed / "museum").rglob("*.jpg")) if file.is_file()]
    uploads = [*(photos * 6)[:46], *[hostile["truncated"]] * 4]
    refused = []

    def ask(photo: Path) -> dict:
        with httpx.Client(base_url=address, timeout=60) as client:
            while (response := send(client, photo.read_bytes())).status_code == 503:
                refused.append(response.headers["retry-after"])
                time.sleep(0.2)
        return response.json()

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, uploads))
    assert [answer["exhibit"] for answer in answers[:46]] == [photo.parent.name for photo in uploads[:46]]
    assert all("cannot be decoded" in answer["error"] for answer in answers[46:])
    assert set(refused) <= {"5"}


def test_too_long_an_upload_is_refused_by_what_it_says_and_while_it_comes_in(client, indexed):
    too_long = bytes(MAX_BYTES + 1)
    response = send(client, too_long)
    assert response.status_code == 413 and "more than 0.2 MB" in response.json()["error"]

    taken = []

    def body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="photo"; filename="a"\r\n\r\n'
        for _ in range(100):
            taken.append(1)
            yield bytes(MAX_BYTES // 10)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = client.post("/identify", content=body(), headers=headers)  # without a Content-Length
    assert response.status_code == 413
    assert send(client, (indexed / "museum" / "9" / "2.jpg").read_bytes()).status_code == 200


def test_other_requests_get_an_error_in_words(client):
    for response in (
        client.post("/identify"),
        client.post("/identify", data={"photo": "text"}),
        client.post("/identify", content=b"\xff\x00", headers={"Content-Type": "multipart/form-data; boundary=x"}),
        client.get("/identify"),
        client.get("/images/8"),
        client.get("/images/-1"),
        client.get("/images/x"),
        client.get("/images/..%2f..%2findex.json"),
        client.get("/static/..%2fapp.py"),
    ):
        assert 400 <= response.status_code < 500, response.url
        assert response.headers["content-type"] == "application/json" and response.json()["error"]


def test_a_picture_that_is_gone_is_said(indexed, app_of, tmp_path):
    client = client_of(app_of(store=indexed / "index"))
    paths = Index.load(indexed / "index").catalogue.paths
    photo = indexed / "museum" / "41" / "4.jpg"
    content = photo.read_bytes()
    photo.rename(tmp_path / "away.jpg")
    try:
        answer = send(client, content).json()
        assert (answer["matches"][0]["exhibit"], answer["matches"][0]["picture"]) == ("41", None)
        assert answer["headline"] == "undecided, most likely exhibit 41"
        assert client.get(f"/images/{paths.index('41/4.jpg')}").status_code == 404
    finally:
        (tmp_path / "away.jpg").rename(photo)


def test_other_host_names_are_refused_and_pages_may_load_nothing_from_elsewhere(client):
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"Host": "localhost:8000"}).status_code == 200
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "<script>" not in page.text and "style=" not in page.text and "onclick" not in page.text
    assert "//" not in page.text.replace("<!doctype", "")
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("192.168.0.2") and not is_loopback("museum.example")


@contextlib.contextmanager
def opened(browser, address: str, width: int, scheme: str = "light") -> Iterator:
    """The page; what goes wrong in it is collected."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.errors, page.foreign = [], []
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("dialog", lambda dialog: (page.errors.append("dialog"), dialog.dismiss()))
    page.on("request", lambda r: None if r.url.startswith((address, "blob:")) else page.foreign.append(r.url))
    page.goto(address)
    yield page
    assert page.foreign == []
    page.close()


def upload(page, name: str, content: bytes) -> None:
    page.locator("#file").set_input_files({"name": name, "mimeType": "image/jpeg", "buffer": content})
    page.locator(".answer:not(.waiting)").wait_for()


DROP = """content => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(content)], "dropped.jpg"));
    return transfer;
}"""


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1400, "dark")])
def test_photos_chosen_and_dropped_on_the_page_are_answered_and_bad_ones_told(browser, address, indexed, width, scheme):
    good = (indexed / "museum" / "9" / "2.jpg").read_bytes()
    with opened(browser, address, width, scheme) as page:
        upload(page, NAME, (indexed / "museum" / NAME / "0.jpg").read_bytes())
        assert page.locator("h2").inner_text().lower() == f"exhibit {NAME}"
        assert page.locator("figcaption").inner_text() == NAME
        assert page.locator(".matches li").count() == 5
        wait_for_pictures(page)
        assert page.locator("img").count() == 6  # the photo and its matches; none came out of a name
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.errors == []
        upload(page, NAME, b"no image")
        assert page.locator(".answer.error h2").inner_text() == "The photo cannot be decoded (not an image)."
        page.errors.clear()  # the browser's own line about the status 422
        upload(page, "long.jpg", bytes(MAX_BYTES + 1))
        assert "at most 0.2 are taken" in page.locator(".answer.error h2").inner_text()
        transfer = page.evaluate_handle(DROP, list(good))
        page.dispatch_event("main", "dragover", {"dataTransfer": transfer})
        assert "over" in page.locator("#ask").get_attribute("class")
        page.dispatch_event("main", "drop", {"dataTransfer": transfer})  # beside the frame counts as well
        page.locator(".answer.exhibit").wait_for()
        assert page.locator("h2").inner_text().lower() == "exhibit 9" and page.errors == []
        assert "over" not in page.locator("#ask").get_attribute("class")


def test_the_keyboard_alone_reaches_the_choice(browser, address):
    with opened(browser, address, 1400) as page:
        choosers: list = []
        # Early: the browser needs a moment before it tells of them.
        page.on("filechooser", lambda chooser: choosers.append(chooser))
        page.reload()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "file"
        outline = "getComputedStyle(document.activeElement.closest('.button')).outlineStyle"
        assert page.evaluate(outline) == "solid"
        page.keyboard.press("Enter")
        for _ in range(100):
            page.wait_for_timeout(0 if choosers else 50)
        assert len(choosers) == 1


def serve_options(indexed) -> list[str]:
    return ["serve", "--store", str(indexed / "index"), "--port", "0", "--accelerator", "cpu"]


def port_in(line: str) -> int:
    return int(line.split("/ (")[0].rpartition(":")[2])


def port_of(started) -> int:
    """Where the command that a fork runs serves, as soon as it says so."""
    said = Path(f"{started[1]}.out")
    for _ in range(12_000):
        if said.exists() and "/ (" in said.read_text():
            return port_in(said.read_text())
        time.sleep(0.01)
    raise AssertionError(f"says no address: {said.read_text()}")


def test_the_command_serves_until_it_is_interrupted(indexed, forks, tmp_path):
    started = forks.start(tmp_path / "serve", serve_options(indexed))
    with urllib.request.urlopen(f"http://127.0.0.1:{port_of(started)}/", timeout=60) as page:
        assert b"Which exhibit is this?" in page.read()
    os.kill(started[0], signal.SIGTERM)
    ended = forks.wait(started)
    [serving, *others] = ended.printed.splitlines()
    assert ended.status == 0 and serving.startswith("serving ") and others == ["ended"], ended.printed


FORKS_ITS_WORKERS = """
import metilr.collection.open_collection, fastapi, uvicorn
from tests.forks import spawn_by_forks

spawn_by_forks()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_answer_and_count_together_and_end_together(indexed, forks, tmp_path):
    photo = (indexed / "museum" / "9" / "2.jpg").read_bytes()
    started = forks.start(tmp_path / "serve", [*serve_options(indexed), "--workers", "2"], FORKS_ITS_WORKERS)
    port = port_of(started)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client, ThreadPoolExecutor(4) as pool:
        answers = [*pool.map(lambda _: send(client, photo).json(), range(8))]
        assert {answer["matches"][0]["exhibit"] for answer in answers} == {"9"}
        for _ in range(4):  # whoever is asked
            assert 'metilr_photos_total{decision="undecided"} 8.0' in client.get("/metrics").text
    children = Path(f"/proc/{started[0]}/task/{started[0]}/children").read_text().split()
    workers = [child for child in children if Path(f"/proc/{child}/comm").read_text() == "spawned\n"]
    assert len(workers) == 2
    runpy.run_module("metilr.__main__", run_name="__mp_main__")  # what a worker of the command itself begins with
    os.kill(int(workers[1]), signal.SIGKILL)
    ended = forks.wait(started)
    assert ended.status == 2 and "a process of the server has ended" in ended.printed
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


HALF_AN_UPLOAD = (
    b"POST /identify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9000\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
)


FEW_FILES = """
import resource
from metilr.collection import walls

resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
walls.SECONDS_TO_END = 1
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits files as POSIX does")
def test_silent_connections_lock_nobody_out_and_half_an_upload_does_not_hold_the_end(indexed, forks, tmp_path):
    """Under 128 files, 120 of them were enough for 45,000 tracebacks and no answer."""
    started = forks.start(tmp_path / "serve", serve_options(indexed), FEW_FILES)
    port = port_of(started)
    with contextlib.ExitStack() as stack:
        photo = (indexed / "museum" / "9" / "2.jpg").read_bytes()
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            time.sleep(0.005)  # who finds the queue full comes again after a second
        half = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        half.sendall(HALF_AN_UPLOAD)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            assert send(client, photo).json()["matches"][0]["exhibit"] == "9"
        interrupted = time.monotonic()
        os.kill(started[0], signal.SIGINT)
        ended = forks.wait(started)
        assert time.monotonic() - interrupted < 15
    assert ended.status == 0 and "Traceback" not in ended.printed, ended.printed[:2000]
    assert ended.printed.count("\n") <= 3, ended.printed[:2000]


def test_a_connection_that_asks_nothing_is_closed_and_a_slow_upload_refused(app_of, indexed, monkeypatch):
    monkeypatch.setattr("metilr.collection.walls.SECONDS_TO_ASK", 1.0)
    with contextlib.closing(Decoder()) as own, served(app_of(store=indexed / "index", decoder=own)) as (address, _):
        place = ("127.0.0.1", int(address.rstrip("/").rpartition(":")[2]))
        for sent, answer in ((b"", b""), (b"GET / HTTP/1.1\r\nHost:", b""), (HALF_AN_UPLOAD, b"HTTP/1.1 408 ")):
            with socket.create_connection(place, timeout=10) as connection:
                connection.sendall(sent)
                received = b""
                with contextlib.suppress(ConnectionResetError):
                    while some := connection.recv(1 << 16):
                        received += some
                assert received[: len(answer)] == answer and bool(received) == bool(answer)


class Slow:
    """In place of the decoder: begins one photo, and lets it wait until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = [], threading.Event()

    def photo(self, content: bytes, *sizes: object) -> None:
        self.begun.append(content)
        self.go.wait(60)
        raise BadPhotoError("is slow")

    def close(self) -> None:
        self.go.set()


def begin(address: str, content: bytes) -> http.client.HTTPConnection:
    """A photo is sent; who closes the connection before the answer has left."""
    request = httpx.Request("POST", f"{address}identify", files={"photo": ("photo.jpg", content)})
    connection = http.client.HTTPConnection(request.url.netloc.decode(), timeout=60)
    connection.request("POST", "/identify", request.read(), dict(request.headers))
    return connection


def test_many_that_wait_are_told_to_come_again_and_who_left_is_not_served(app_of, indexed, monkeypatch):
    monkeypatch.setattr("metilr.collection.app.MOST_WAITING", 3)
    slow = Slow()
    with served(app_of(store=indexed / "index", decoder=slow)) as (address, _), ThreadPoolExecutor(8) as pool:
        client = httpx.Client(base_url=address, timeout=60)

        def until_waiting(n: int) -> None:
            while client.get("/health").json()["waiting"] < n:
                time.sleep(0.01)

        first = pool.submit(send, client, b"first")
        until_waiting(1)
        leaves = begin(address, b"gone")
        until_waiting(2)
        last = pool.submit(send, client, b"last")
        until_waiting(3)
        refused = send(client, b"too many")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert "try again in a few seconds" in refused.json()["error"]
        leaves.close()
        slow.go.set()
        assert [first.result().status_code, last.result().status_code] == [422, 422]
        assert slow.begun == [b"first", b"last"]
        assert send(client, b"later").status_code == 422


def test_who_leaves_while_the_photo_is_decoded_is_not_answered(app_of, indexed, monkeypatch):
    described, slow = [], Slow()
    monkeypatch.setattr(Collection, "answers", lambda *_, **__: described.append(1))
    monkeypatch.setattr(slow, "photo", lambda *_: (slow.begun.append(1), slow.go.wait(60), Photo(None, False))[-1])
    with served(app_of(store=indexed / "index", decoder=slow)) as (address, server):
        leaves = begin(address, b"left")
        while not slow.begun:
            time.sleep(0.01)
        leaves.close()
        slow.go.set()
        while server.server_state.tasks:
            time.sleep(0.01)
    assert slow.begun == [1] and described == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://127.0.0.1:8001"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_pages_of_other_sites_may_not_ask(client, indexed, headers, status):
    content = (indexed / "museum" / "9" / "2.jpg").read_bytes()
    assert client.post("/identify", files={"photo": ("a", content)}, headers=headers).status_code == status
    assert client.get("/images/0", headers=headers).status_code == status
    assert client.get("/", headers=headers).status_code == 200  # a link may lead here


@pytest.fixture
def unread_index(tmp_path, monkeypatch) -> None:
    """What looks like an index, as long as nobody reads it."""
    monkeypatch.chdir(tmp_path)
    Path("INDEX").mkdir()
    Path("INDEX/index.json").touch()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000", "--store", "INDEX"], "--port 70000"),
        (["--host", "203.0.113.1", "--store", "INDEX"], "--port 8000: 203.0.113.1 cannot be listened at"),
        (["--host", "no.such.host.invalid", "--store", "INDEX"], "--host no.such.host.invalid: not an address"),
        (["--max_megabytes", "0", "--store", "INDEX"], "--max_megabytes 0"),
        ([], "give either run"),
        (["--port", "0", "--store", "nowhere"], "nowhere: not an index"),
    ],
)
def test_a_bad_option_ends_in_one_line_that_names_it(unread_index, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(["serve", *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error


def test_without_its_libraries_the_command_says_how_to_get_them(unread_index, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(SystemExit):
        main(["serve", "--store", "INDEX"])
    assert "metilr serve needs uvicorn: pip install 'metilr[serve]'" in capsys.readouterr().err
    main(["--help"])
    assert "serve" in capsys.readouterr().out
