"""What a museum says of its exhibits in all answers; the API of ``metilr serve`` beyond one photo."""

import contextlib
import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from metilr.cli import main
from metilr.collection import PhotoOptions
from metilr.collection.open_collection import open_with_threshold
from metilr.collection.photos import Decoder
from tests.browser import browser as browser  # a fixture
from tests.collection.conftest import INDEXED, write_images
from tests.small_runs import index

pytest.importorskip("fastapi", reason="needs metilr[serve]")
pytest.importorskip("prometheus_client", reason="needs metilr[serve]")
testclient = pytest.importorskip("fastapi.testclient", reason="needs httpx")

from metilr.collection.app import MOST_PHOTOS, Limits, build_app  # noqa: E402  # after what it needs

LABELS = """Object ID,Title,Artist Display Name,Object Date,Link Resource,Rights and Reproduction,Medium,Thumbnail
9,<b>Vase</b> & "Jug",Ann Painter,1888,https://museum.example/9,CC0,"=HYPERLINK(""x"")",javascript:alert(1)
12,Bust,,,javascript:alert(1),,Marble,
"""
LIMITS = Limits(500_000, 50_000_000, ["127.0.0.1"])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """An index whose exhibits have labels, beside the folder of images."""
    around = tmp_path_factory.mktemp("labelled")
    (around / "labels.csv").write_text(LABELS)
    index(write_images(around), around / "index", csv=around / "labels.csv", **INDEXED)
    return around


@pytest.fixture(scope="module")
def collection(labelled):
    return open_with_threshold(PhotoOptions(store=labelled / "index", threshold=-5.0, accelerator="cpu"))


@pytest.fixture(scope="module")
def client(collection):
    with contextlib.closing(Decoder()) as decoder:
        yield client_of(collection, decoder)


def client_of(collection, decoder, limits=LIMITS, log=False):
    app = build_app(*collection, limits, decoder, log)
    return testclient.TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


def upload(labelled: Path, *names: str):
    return [("photo", (name, (labelled / "museum" / name).read_bytes())) for name in names]


ABOUT = {
    "title": '<b>Vase</b> & "Jug"', "artist": "Ann Painter", "date": "1888", "link": "https://museum.example/9",
    "rights": "CC0", "more": {"Medium": '=HYPERLINK("x")', "Thumbnail": "javascript:alert(1)"},
}  # fmt: skip


def test_labels_are_in_the_document_the_table_and_the_page(labelled, tmp_path, capsys):
    photo = str(labelled / "museum/9/2.jpg")
    command = ["identify", photo, "--store", str(labelled / "index"), "--threshold", "-5", "--accelerator", "cpu"]
    main([*command, "--json", "--csv", str(tmp_path / "answers.csv"), "--page", str(tmp_path / "answers.html")])
    [answer] = json.loads(capsys.readouterr().out)["photos"]
    assert answer["about"] == ABOUT == answer["matches"][0]["about"]
    said = {"9": ABOUT, "12": {"title": "Bust", "more": {"Link Resource": "javascript:alert(1)", "Medium": "Marble"}}}
    assert len(answer["matches"]) == 5
    assert all(match.get("about") == said.get(match["exhibit"]) for match in answer["matches"])
    with (tmp_path / "answers.csv").open(newline="") as stream:
        [row] = csv.DictReader(stream)
    assert (row["photo"], row["exhibit"], row["title"], row["link"]) == (photo, "9", ABOUT["title"], ABOUT["link"])
    assert row["thumbnail"] == "" and row["error"] == "" and float(row["similarity"]) == answer["similarity"]
    page = (tmp_path / "answers.html").read_text()
    assert "&lt;b&gt;Vase&lt;/b&gt; &amp; &#34;Jug&#34;, Ann Painter, 1888" in page and "<b>" not in page
    assert 'href="https://museum.example/9"' in page and 'href="javascript' not in page


def test_labels_are_on_the_terminal(labelled, capsys):
    photo = str(labelled / "museum/9/2.jpg")
    main(["identify", photo, "--store", str(labelled / "index"), "--threshold", "-5", "--accelerator", "cpu"])
    words = " ".join(capsys.readouterr().out.split())
    assert '<b>Vase</b> & "Jug", Ann Painter, 1888' in words
    assert "exhibit 9 rights CC0 link https://museum.example/9" in words


def test_several_photos_get_the_answers_of_each(labelled, client):
    names = ["9/2.jpg", "33/7.jpg", "9/3.jpg"]
    alone = [client.post("/identify", files=upload(labelled, name)).json() for name in names]
    files = upload(labelled, *names)
    files.insert(1, ("photo", ("broken.jpg", b"no image")))
    answers = client.post("/identify", files=files).json()["photos"]
    assert answers[1] == {"name": "broken.jpg", "error": "The photo cannot be decoded (not an image)."}
    for name, one, answer in zip(names, alone, [answers[0], *answers[2:]], strict=True):
        assert answer.pop("name") == name
        assert answer["exhibit"] == one["exhibit"] and answer["decision"] == one["decision"]
        assert answer["similarity"] == pytest.approx(one["similarity"], abs=1e-5)
        assert answer["matches"][0]["path"] == one["matches"][0]["path"]
    assert client.post("/identify", files=upload(labelled, *["9/2.jpg"] * (MOST_PHOTOS + 1))).status_code == 413


def test_photos_answered_together_are_answered_as_alone(labelled, collection):
    opened, _ = collection
    images = [opened.image(row) for row in range(8)]
    photos = [torch_image(opened, image) for image in images]
    together = opened.answers(photos)
    for photo, answer in zip(photos, together, strict=True):
        alone = opened.answer(photo)
        assert (answer.exhibit, [match.row for match in answer.matches]) == (
            alone.exhibit, [match.row for match in alone.matches],
        )  # fmt: skip
        assert answer.log_confidence == pytest.approx(alone.log_confidence, abs=1e-4)
    shapes = [tuple(photo.shape) for photo in photos]
    assert 1 < len({*shapes}) < len(shapes)  # some of one shape, which go together, and some of others


def torch_image(collection, file):
    from metilr.collection.photos import load_photo

    return load_photo(file, collection.image_size).image


def test_an_exhibit_by_its_name(client):
    document = client.get("/exhibits/9").json()
    assert document["exhibit"] == "9" and len(document["images"]) == 2
    assert {name: value for name, value in document["about"].items() if value} == ABOUT
    assert client.get(document["images"][0]).headers["content-type"] == "image/jpeg"
    assert client.get("/exhibits/nothing").status_code == 404
    assert client.get("/exhibits/<img src=x onerror=alert(1)>.jpg").json()["images"]
    assert client.get("/exhibits/https://museum.example/a").json() == {"error": "There is no such exhibit."}


def test_health_metrics_and_what_can_be_asked(labelled, client):
    client.post("/identify", files=upload(labelled, "9/2.jpg"))
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["collection"]["exhibits"] == 6 and health["waiting"] == 0
    metrics = client.get("/metrics").text
    assert 'metilr_requests_total{path="/identify",status="200"}' in metrics
    assert 'metilr_photos_total{decision="exhibit"}' in metrics and "metilr_request_seconds_bucket" in metrics
    client.get("/nowhere/1")
    client.get("/nowhere/2")
    assert (
        'path="other",status="404"} 2.0' in client.get("/metrics").text and "nowhere" not in client.get("/metrics").text
    )
    api = client.get("/openapi.json").json()
    assert set(api["paths"]) == {"/identify", "/exhibits/{exhibit}", "/images/{row}", "/health", "/metrics"}
    assert api["components"]["schemas"]["AnswerDocument"]["properties"]["decision"]["enum"]
    page = client.get("/docs").text
    assert all(path in page for path in api["paths"]) and "http" not in page.replace('lang="en"', "")


def test_answers_are_what_the_schema_says(labelled, client):
    """Nothing of the answer is lost by the typed document: it is that of ``identify --json``, and more."""
    document = client.post("/identify", files=upload(labelled, "9/2.jpg")).json()
    assert document["about"] == ABOUT
    names = "headline detail decision exhibit log_confidence similarity matches reduced regions threshold collection"
    assert {*names.split()} <= document.keys()
    assert document["headline"].endswith("Ann Painter, 1888") and "confidence" not in document
    assert {"exhibit", "named", "similarity", "path", "picture"} <= document["matches"][0].keys()


def test_with_a_key_only_who_has_it_is_answered(labelled, collection):
    limits = Limits(500_000, 50_000_000, ["127.0.0.1"], "a key of twenty signs")
    with contextlib.closing(Decoder()) as decoder:
        client = client_of(collection, decoder, limits)
        for path in ("/", "/docs", "/exhibits/9", "/metrics", "/static/serve.js"):
            assert client.get(path).status_code == 401
        assert client.get("/health").status_code == 200
        for headers in ({"X-API-Key": limits.key}, {"Authorization": f"Bearer {limits.key}"}):
            assert client.get("/exhibits/9", headers=headers).status_code == 200
        for headers in ({"X-API-Key": "another"}, {"Authorization": "Bearer"}, {"X-API-Key": b"\xe9"}):
            assert client.get("/exhibits/9", headers=headers).status_code == 401


def test_other_sites_may_ask_only_if_they_are_named(labelled, collection, client):
    site = {"Origin": "https://museum.example", "Sec-Fetch-Site": "cross-site"}
    assert client.get("/exhibits/9", headers=site).status_code == 403
    limits = Limits(500_000, 50_000_000, ["127.0.0.1"], None, ("https://museum.example",))
    with contextlib.closing(Decoder()) as decoder:
        allowed = client_of(collection, decoder, limits)
        answer = allowed.get("/exhibits/9", headers=site)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://museum.example"
        assert allowed.get("/exhibits/9", headers={**site, "Origin": "https://other.example"}).status_code == 403
        locked = client_of(collection, decoder, replace(limits, key="a key of twenty signs"))
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "X-API-Key"}
        for server in (allowed, locked):  # as a browser asks before it sends a photo, without the key
            answer = server.options("/identify", headers={**site, **asked})
            assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == site["Origin"]
        assert locked.get("/exhibits/9", headers=site).status_code == 401


def test_a_line_of_json_for_each_request_names_nobody(labelled, collection, capsys):
    with contextlib.closing(Decoder()) as decoder:
        client = client_of(collection, decoder, log=True)
        client.post("/identify", files=upload(labelled, "9/2.jpg"))
        client.get("/exhibits/secret")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/identify", 200), ("GET", "/exhibits/{exhibit:path}", 404),
    ]  # fmt: skip
    assert set(lines[0]) == {"time", "method", "path", "status", "seconds"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--api_key_file", "gone"], "--api_key_file gone: cannot be read"),
        (["--api_key_file", "short"], "--api_key_file short: must hold a key of 16 or more"),
        (["--allow_origins", "museum.example"], "--allow_origins museum.example: must be like https://"),
    ],
)
def test_a_bad_option_of_the_server(labelled, tmp_path, monkeypatch, failure, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("secret")
    assert message in failure("serve", "--store", labelled / "index", *options)


@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_shows_a_label(labelled, tmp_path, browser, width):
    photo = labelled / "museum/9/2.jpg"
    main(["identify", str(photo), "--store", str(labelled / "index"), "--threshold", "-5", "--accelerator", "cpu",
          "--page", str(tmp_path / "answers.html")])  # fmt: skip
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto((tmp_path / "answers.html").as_uri())
    assert page.locator("h2").inner_text() == '<b>Vase</b> & "Jug", Ann Painter, 1888'
    assert page.locator(".label a").get_attribute("href") == "https://museum.example/9"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
