"""Forms that institutions write, and malformed ones; addresses of the Image API by its specification."""

import asyncio
import json

import pytest

from metilr.sources.fetch import DownloadError, DownloadOptions, Downloads
from metilr.sources.iiif import Found, find_in_iiif, image_request
from metilr.sources.iiif_values import ODD, text_of
from tests.iiif import IMAGE_2, IMAGE_3, V3, Institution


def find(document, tmp_path, address="https://museum.example/document", limit=1000, language="en") -> Found:
    async def work() -> Found:
        options = DownloadOptions(allow_private=True, requests_per_second=1000)
        async with Downloads(tmp_path / "downloads", options) as downloads:
            return await find_in_iiif(document, address, downloads, limit, language)

    return asyncio.run(work())


def manifest(*images, **more):
    """A manifest of form 3 with such images on its canvases."""
    notes = [{"motivation": "painting", "body": each} for each in images]
    canvases = [
        {"id": f"https://x.example/c{i}", "type": "Canvas", "items": [{"items": [note]}]}
        for i, note in enumerate(notes)
    ]
    return {"@context": [V3], "id": "https://x.example/m", "type": "Manifest", "items": canvases, **more}


PLAIN = {"id": "https://x.example/a.jpg", "type": "Image"}


@pytest.mark.parametrize("form", [2, 3])
def test_a_collection_leads_to_the_images_of_its_objects(server, tmp_path, form):
    museum = Institution(server, {"vase": [1], "bust": [2, 3]}, form)
    found = find(museum.collection(), tmp_path)
    vase, bust = f"{server.url}object/vase", f"{server.url}object/bust"
    assert [(place.address, place.exhibit, place.is_service) for place in found.places] == [
        (f"{server.url}image/1", vase, True),
        (f"{server.url}image/2", bust, True),
        (f"{server.url}image/3", bust, True),
    ]
    about = found.exhibits[vase]
    assert (about.title, about.artist, about.date) == ("Object vase", "Ann Painter", "1888")
    assert (about.link, about.rights) == (
        "https://museum.example/vase", "https://creativecommons.org/publicdomain/zero/1.0/",
    )  # fmt: skip
    assert about.more == ({"Medium": "Oil on canvas"} if form == 3 else {})
    assert found.name == "Prints" and not found.failed


@pytest.mark.parametrize("form", [2, 3])
def test_of_a_manifest_alone_each_canvas_is_an_exhibit(server, tmp_path, form):
    museum = Institution(server, {"album": [1, 2]}, form)
    found = find(museum.manifest("album"), tmp_path)
    canvases = [f"{server.url}object/album/canvas/{i}" for i in (1, 2)]
    assert [place.exhibit for place in found.places] == canvases
    assert [found.exhibits[each].caption for each in canvases] == [f"p. {i}, Ann Painter, 1888" for i in (1, 2)]


def test_the_language_that_is_asked_for_or_none_or_the_first():
    by_language = {"de": ["Krug"], "en-GB": ["Jug", "Mug"], "none": ["-"]}
    assert [text_of(by_language, each) for each in ("en", "de", "fr")] == ["Jug; Mug", "Krug", "-"]
    tagged = [{"@value": "Krug", "@language": "de"}, {"@value": "Jug", "@language": "en"}]
    assert [text_of(tagged, each) for each in ("en", "de", "fr")] == ["Jug", "Krug", "Krug"]
    assert text_of(["a", " b "], "en") == "a; b" and text_of({"fr": ["Vase"]}, "en") == "Vase"
    assert [text_of(each, "en") for each in (None, 7, {}, [])] == ["", "7", "", ""]
    assert text_of({"none": ["a", "b"]}, "en") == "a; b" and text_of({"de-CH": ["Krug"], "en": ["Jug"]}, "de") == "Krug"
    assert text_of("<p>Oil &amp; <i>gold</i></p>", "en") == "Oil & gold"


@pytest.mark.parametrize(
    "image",
    [
        PLAIN,
        {"type": "Choice", "items": [PLAIN, {"id": "https://x.example/infrared.jpg", "type": "Image"}]},
        {"type": "SpecificResource", "source": PLAIN, "selector": {"type": "ImageApiSelector"}},
        {"@type": "oa:Choice", "default": {"@id": "https://x.example/a.jpg", "@type": "dctypes:Image"}},
        [{"type": "TextualBody", "value": "a note"}, PLAIN],
    ],
    ids=["plain", "choice", "specific", "choice of form 2", "beside a text"],
)
def test_an_image_without_a_service_is_its_own_address(tmp_path, image):
    [place] = find(manifest(image), tmp_path).places
    assert (place.address, place.is_service) == ("https://x.example/a.jpg", False)


BASE, IMAGES = "https://x.example/i", "http://iiif.io/api/image/2"


@pytest.mark.parametrize(
    "service",
    [
        {"@id": f"{BASE}/", "@context": IMAGE_2, "profile": f"{IMAGES}/level1.json"},
        [{"id": BASE, "type": "ImageService2", "profile": "level1"}],
        [{"id": "https://x.example/search", "type": "SearchService2"}, {"id": BASE, "type": "ImageService3"}],
        {"@id": BASE, "@type": "iiif:ImageService2", "profile": [f"{IMAGES}/level0.json", {}]},
    ],
)
def test_an_image_service_in_its_forms(tmp_path, service):
    [place] = find(manifest({**PLAIN, "service": service}), tmp_path).places
    assert (place.address, place.is_service) == (BASE, True)


LOGIN_1 = {"@context": "http://iiif.io/api/auth/1/context.json", "profile": "http://iiif.io/api/auth/1/login"}
LOGIN_2 = [{"id": "https://x.example/probe", "type": "AuthProbeService2"}]


@pytest.mark.parametrize(
    "service",
    [
        {"id": BASE, "type": "ImageService3", "service": LOGIN_2},
        {"@id": BASE, "@context": IMAGE_2, "service": LOGIN_1},
    ],
)
def test_what_needs_a_login_is_refused_plainly(tmp_path, service):
    with pytest.raises(DownloadError, match="needs a login"):
        find(manifest({**PLAIN, "service": service}), tmp_path)
    info = {
        "id": "https://x.example/i",
        "type": "ImageService3",
        "width": 9,
        "height": 9,
        "service": service["service"],
    }
    with pytest.raises(DownloadError, match="needs a login"):
        image_request(info, 500)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "is no IIIF document"),
        ({"type": "Range"}, "is neither a manifest nor a collection"),
        ({"type": "Manifest"}, "the manifest has no id"),
        ({"type": "Manifest", "id": "urn:x"}, "the manifest: its id is no web address: urn:x"),
        (manifest(), "leads to no image"),
        (manifest({"type": "Image"}), "canvas 0: its image has no id"),
        (manifest({"type": "Video", "id": "https://x.example/v"}), "canvas 0 has no image"),
        (manifest({"type": "Image", "id": "file:///etc/passwd"}), "its image: its id is no web address"),
        (manifest({**PLAIN, "service": {"type": "ImageService3"}}), "canvas 0: the service of its image has no id"),
        ({**manifest(), "items": ["canvas"]}, "canvas 0 is no object"),
        ({**manifest(), "items": [{"type": "Canvas"}]}, "canvas 0 has no id"),
        ({"type": "Collection", "id": "https://x.example/c", "items": [{}]}, "member 0 of the collection has no id"),
        ({"type": "Collection", "id": "https://x.example/c"}, "leads to no image"),
    ],
)
def test_a_malformed_document_gives_one_line_with_the_place(tmp_path, document, message):
    with pytest.raises(DownloadError, match=message):
        find(document, tmp_path)


def test_nested_collections_pages_and_circles(server, tmp_path):
    Institution(server, {name: [i] for i, name in enumerate("abcd")})

    def collection(name, items, **more):
        listed = [{"id": f"{server.url}{each}", "type": "Manifest"} for each in items]
        document = {"id": f"{server.url}{name}", "type": "Collection", "items": listed, **more}
        server.files[name] = json.dumps(document).encode()
        return document

    collection("inner", ["object/b", "outer", "inner"])
    collection("page2", ["object/d"], next={"id": f"{server.url}page1", "type": "CollectionPage"})
    collection("page1", ["object/c"], next=f"{server.url}page2")
    top = collection("outer", ["object/a", "inner", "object/gone", "broken"], next=f"{server.url}page1")
    server.files["broken"] = b"<html>"
    found = find(top, tmp_path, f"{server.url}outer")
    assert [place.exhibit.rpartition("/")[2] for place in found.places] == list("abcd")
    assert set(found.failed) == {f"{server.url}object/gone", f"{server.url}broken"}
    assert (
        "HTTP 404" in found.failed[f"{server.url}object/gone"] and "is no JSON" in found.failed[f"{server.url}broken"]
    )


def test_no_more_is_read_than_the_limit_needs(server, tmp_path):
    museum = Institution(server, {f"o{i}": [i] for i in range(40)})
    found = find(museum.collection(), tmp_path, limit=5)
    assert 5 <= len(found.places) <= 8
    assert len([path for path in server.gets() if path.startswith("object/")]) <= 8


def info(level, width=4000, height=3000, third=True, **more):
    if third:
        return {"@context": IMAGE_3, "id": "https://x.example/i", "type": "ImageService3", "profile": f"level{level}",
                "width": width, "height": height, **more}  # fmt: skip
    profile = [f"http://iiif.io/api/image/2/level{level}.json"]
    return {
        "@context": IMAGE_2,
        "@id": "https://x.example/i",
        "profile": profile,
        "width": width,
        "height": height,
        **more,
    }


SIZES = [{"width": 1000, "height": 750}, {"width": 250, "height": 188}, {"width": 500, "height": 375}]


@pytest.mark.parametrize(
    ("document", "side", "size"),
    [
        (info(2), 500, "500,"),
        (info(1, 3000, 4000), 500, ",500"),
        (info(2), None, "max"),
        (info(2, third=False), None, "full"),
        (info(2, 400, 300), 500, "max"),
        (info(2, 400, 300, third=False), 500, "full"),
        (info(0, sizes=SIZES), 500, "500,375"),
        (info(0, sizes=SIZES), 400, "500,375"),
        (info(0, sizes=SIZES, third=False), 600, "1000,"),
        (info(0, sizes=SIZES), 2000, "max"),
        (info(0), 500, "max"),
        (info(2, maxWidth=300), 500, "300,"),
        (info(2, maxWidth=300), None, "300,"),
    ],
)
def test_the_request_of_an_image_by_what_its_service_can_do(document, side, size):
    assert image_request(document, side) == f"https://x.example/i/full/{size}/0/default.jpg"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("x", "info.json is no object"),
        ({"id": "https://x.example/i"}, "info.json says no width and height"),
        (info(2, height=None), "info.json says no width and height"),
        ({"width": 4, "height": 4}, "info.json has no id"),
        ({**info(2), "@context": "http://library.stanford.edu/iiif/image-api/1.1/context.json"}, "Image API 1"),
        (info(0, sizes=[{"width": 4}]), "lists a size without width and height"),
    ],
)
def test_an_info_json_that_says_too_little(document, message):
    with pytest.raises(DownloadError, match=message):
        image_request(document, 500)


DEEP: list = []
for _ in range(2000):
    DEEP = [DEEP]
OTHERS = ("text", None, 7, [], {}, [None], [[{}]], "http://[", "\ud800", DEEP)


def mutations(value, path=()):
    """Every place in a document, with the document in which something else stands there."""
    if isinstance(value, dict):
        places = list(value.items())
    elif isinstance(value, list):
        places = list(enumerate(value))
    else:
        return
    for key, inner in places:
        for other in OTHERS:
            yield (
                (*path, key),
                {**value, key: other}
                if isinstance(value, dict)
                else [other if i == key else each for i, each in enumerate(value)],
            )
        for place, changed in mutations(inner, (*path, key)):
            yield (
                place,
                {**value, key: changed}
                if isinstance(value, dict)
                else [changed if i == key else each for i, each in enumerate(value)],
            )


@pytest.mark.parametrize("form", [2, 3])
def test_whatever_stands_in_a_document_it_is_read_or_refused(server, tmp_path, form):
    museum = Institution(server, {"vase": [1]}, form)
    whole = {**museum.manifest("vase"), "requiredStatement": {"label": {"en": ["By"]}, "value": {"en": ["The museum"]}},
             "thumbnail": [{"id": "https://x.example/t.jpg"}]}  # fmt: skip
    n_read = 0
    for _, document in mutations(whole):
        try:
            found = find(document, tmp_path)
        except DownloadError as error:
            assert len(str(error)) < 500 and "\n" not in str(error)
        else:
            n_read += 1
            for about in found.exhibits.values():
                about.model_dump_json().encode()
    assert n_read > 100
    for _, document in mutations(museum.info("1")):
        try:
            image_request(document, 60).encode()
        except (DownloadError, *ODD):
            continue


def test_what_many_institutions_write_is_kept(tmp_path):
    pairs = [
        ({"none": ["Subject"]}, {"none": ["ships", "sea"]}), ({"none": ["Subject"]}, {"none": ["storm"]}),
        ("Year", 1888), ({"en": ["Künstler"]}, "Ann Painter"),
    ]  # fmt: skip
    metadata = [{"label": label, "value": value} for label, value in pairs]
    statement = {"label": {"en": ["Attribution"]}, "value": {"en": ["Courtesy of the museum"]}}
    document = manifest(
        PLAIN, label="Storm", metadata=metadata, rights=None, license="CC0", requiredStatement=statement
    )
    [about] = find(document, tmp_path).exhibits.values()
    assert (about.title, about.artist, about.date, about.rights) == ("Storm", "Ann Painter", "1888", "CC0")
    assert about.more == {"Subject": "ships; sea; storm", "Attribution": "Courtesy of the museum"}


def test_two_of_one_id_are_not_taken_for_one(server, tmp_path):
    twice = manifest(PLAIN, {"id": "https://x.example/b.jpg", "type": "Image"})
    twice["items"][1]["id"] = twice["items"][0]["id"]
    found = find(twice, tmp_path)
    assert [place.address for place in found.places] == [PLAIN["id"]] and len(found.failed) == 1
    for name in ("a", "b"):
        server.files[name] = json.dumps(
            {**manifest({**PLAIN, "id": f"https://x.example/{name}.jpg"}), "label": name}
        ).encode()
    items = [{"id": f"{server.url}{name}", "type": "Manifest"} for name in ("a", "b")]
    found = find({"type": "Collection", "id": f"{server.url}c", "items": items}, tmp_path)
    assert [about.title for about in found.exhibits.values()] == ["a"]
    assert "has the id of another manifest" in found.failed[f"{server.url}b"]


def test_pages_that_follow_each_other_for_ever_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr("metilr.sources.iiif.MORE_DOCUMENTS", 5)

    def make(path: str) -> bytes:
        following = f"{server.url}{int(path) + 1}"
        return json.dumps({"id": f"{server.url}{path}", "type": "Collection", "items": [], "next": following}).encode()

    server.make = make
    with pytest.raises(DownloadError, match="leads to more than 8 documents"):
        find(json.loads(make("0")), tmp_path, limit=3)
