"""Catalogues that are elsewhere: tables of addresses and IIIF, told apart by their content."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from metilr.errors import UserError
from metilr.sources.fetch import DownloadOptions
from metilr.sources.remote import NOT_ASKED, read_source
from tests.iiif import Institution, picture
from tests.server import Fault

OPTIONS = DownloadOptions(allow_private=True, requests_per_second=10_000)


def read(source, tmp_path, side=60, options=OPTIONS, **more):
    return read_source(source, tmp_path / "images", options, side, quiet=True, **more)


def jpeg(number: int) -> bytes:
    content = io.BytesIO()
    picture(number).save(content, "JPEG")
    return content.getvalue()


@pytest.mark.parametrize("form", [2, 3])
@pytest.mark.parametrize(("side", "level", "size"), [(60, 2, "60,"), (60, 0, "60,45"), (None, 2, None), (500, 1, None)])
def test_a_collection_is_downloaded_in_the_size_that_is_asked_for(server, tmp_path, form, side, level, size):
    museum = Institution(server, {"vase": [1], "bust": [2, 3]}, form)
    museum.level = level
    catalogue = read(museum.address, tmp_path, side)
    size = {"60,45": "60," if form == 2 else "60,45", None: "full" if form == 2 else "max"}.get(size, size)
    assert sorted(museum.asked) == [f"{i}/full/{size}/0/default.jpg" for i in (1, 2, 3)]
    assert catalogue.exhibits == tuple(f"{server.url}object/{name}" for name in ("vase", "bust", "bust"))
    for path, number in zip(catalogue.paths, (1, 2, 3), strict=True):
        with Image.open(catalogue.folder / path) as image:
            assert max(image.size) == (side if side == 60 else 120)
            expected = picture(number, *image.size)
        difference = [
            abs(a - b) for a, b in zip(Image.open(catalogue.folder / path).tobytes(), expected.tobytes(), strict=True)
        ]
        assert sum(difference) / len(difference) < 8  # that of the JPEG; other pictures differ by 80
    assert (catalogue.name, catalogue.about[f"{server.url}object/vase"].title) == ("Prints", "Object vase")
    assert not catalogue.failed


def test_a_manifest_in_a_file(server, tmp_path):
    museum = Institution(server, {"album": [1, 2]})
    file = tmp_path / "manifest.json"
    file.write_text("\ufeff" + json.dumps(museum.manifest("album")))
    catalogue = read(file, tmp_path)
    assert len(catalogue.names) == 2 and all("canvas" in name for name in catalogue.names)


def table(tmp_path: Path, server, rows: int = 3) -> Path:
    lines = ["Object ID,Title,Artist Display Name,Primary Image,Gallery"]
    lines += [f'{100 + i},"Vase, No. {i}",Ann Painter,{server.url}{i}.jpg,' for i in range(rows)]
    (tmp_path / "MetObjects.csv").write_text("\n".join(lines))
    return tmp_path / "MetObjects.csv"


@pytest.mark.parametrize("at", ["file", "address"])
def test_a_table_of_addresses(server, tmp_path, at):
    server.files |= {f"{i}.jpg": jpeg(i) for i in range(3)}
    file = table(tmp_path, server)
    server.files["table.csv"] = file.read_bytes()
    catalogue = read(file if at == "file" else f"{server.url}table.csv", tmp_path)
    assert catalogue.exhibits == ("100", "101", "102")
    about = catalogue.about["101"]
    assert (about.caption, about.more) == ("Vase, No. 1, Ann Painter", {})
    assert [(catalogue.folder / path).read_bytes() for path in catalogue.paths] == [jpeg(i) for i in range(3)]


def test_a_table_that_may_be_cut_off_is_refused(server, tmp_path):
    """Without a length, half of it looks like a whole one."""
    half = b"HTTP/1.0 200 OK\r\nContent-Type: text/csv\r\n\r\n" + table(tmp_path, server).read_bytes()[:-40]
    server.faults = [Fault(raw=half)]
    with pytest.raises(UserError, match=r"table\.csv: its server does not say how long it is; download it by other"):
        read(f"{server.url}table.csv", tmp_path)


def test_a_parquet_table(server, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    server.files |= {f"{i}.jpg": jpeg(i) for i in range(3)}
    columns = {
        "exhibit": [7.0, 8.0, 9.0],
        "title": ["A", None, "C"],
        "path": [f"{server.url}{i}.jpg" for i in range(3)],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "objects")
    catalogue = read(tmp_path / "objects", tmp_path)
    assert catalogue.exhibits == ("7", "8", "9")
    assert {name: about.title for name, about in catalogue.about.items()} == {"7": "A", "9": "C"}
    (tmp_path / "broken").write_bytes((tmp_path / "objects").read_bytes()[:-9])
    with pytest.raises(UserError, match="broken: cannot be read as Parquet"):
        read(tmp_path / "broken", tmp_path)


def test_a_table_of_local_files_needs_no_network(tmp_path):
    (tmp_path / "list.csv").write_text("file,inventory number,title\na.jpg,1,Vase\nb.jpg,2,\n")
    catalogue = read(tmp_path / "list.csv", tmp_path)
    assert (catalogue.folder, catalogue.paths, catalogue.exhibits) == (tmp_path, ("a.jpg", "b.jpg"), ("1", "2"))
    assert {name: about.title for name, about in catalogue.about.items()} == {"1": "Vase"}


def test_an_image_that_cannot_be_had_is_listed_and_the_rest_goes_on(server, tmp_path):
    server.files |= {f"{i}.jpg": jpeg(i) for i in range(6)}
    server.files |= {"1.jpg": b"<html>moved</html>", "2.jpg": jpeg(2)[:-400]}
    del server.files["3.jpg"]
    catalogue = read(table(tmp_path, server, 6), tmp_path)
    assert catalogue.exhibits == ("100", "104", "105")
    assert set(catalogue.failed) == {f"{server.url}{i}.jpg" for i in (1, 2, 3)}
    reasons = [catalogue.failed[f"{server.url}{i}.jpg"] for i in (1, 2, 3)]
    assert reasons[0] == "is no image" and "cannot be decoded (" in reasons[1] and reasons[2] == "HTTP 404 Not Found"


def test_of_one_picture_under_two_exhibits_the_first_counts(server, tmp_path):
    server.files |= {f"{i}.jpg": jpeg(i) for i in range(2)}
    (tmp_path / "t.csv").write_text(
        "\n".join(
            ["id,image", *(f"{name},{server.url}{i}.jpg" for name, i in (("a", 0), ("b", 0), ("c", 1), ("c", 1)))]
        )
    )
    catalogue = read(tmp_path / "t.csv", tmp_path)
    assert catalogue.exhibits == ("a", "c")
    assert catalogue.failed == {f"{server.url}0.jpg": "is of exhibit b and of a; taken for the latter's"}


def test_more_images_than_asked_for_are_left_out_and_listed(server, tmp_path):
    server.files |= {f"{i}.jpg": jpeg(i) for i in range(5)}
    options = DownloadOptions(allow_private=True, requests_per_second=10_000, max_images=3)
    catalogue = read(table(tmp_path, server, 5), tmp_path, options=options)
    assert len(catalogue.paths) == 3
    assert catalogue.failed == {f"{server.url}{i}.jpg": NOT_ASKED for i in (3, 4)}


def test_a_server_that_dies_in_the_middle(server, tmp_path):
    server.files |= {f"{i}.jpg": jpeg(i) for i in range(30)}
    server.faults = [Fault()] * 4
    server.always = Fault(raw=b"")
    catalogue = read(table(tmp_path, server, 30), tmp_path)
    assert len(catalogue.paths) == 4 and len(catalogue.failed) == 26
    assert "its server no longer answers" in catalogue.failed.values()
    server.always = Fault()
    before = len(server.requests)
    assert len(read(table(tmp_path, server, 30), tmp_path).paths) == 30  # the same command continues
    assert len(server.requests) - before == 26


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<!doctype html>", "is a page or a document; name a IIIF manifest"),
        ("%PDF-1.7", "is a page or a document"),
        ('{"type": "Manifest"', "is no JSON"),
        ('{"type": "Manifest"}', "the manifest has no id"),
        ("a;b\n1;2\n", "has no column of exhibits"),
        ("id,image\n1,https://x.example/a.jpg\n2,b.jpg\n", "line 3: 'b.jpg' is no web address, as others here are"),
    ],
)
def test_a_source_that_is_none_is_told_in_one_line(tmp_path, content, message):
    (tmp_path / "source").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "source", tmp_path)
    assert str(tmp_path / "source") in str(error.value) and "\n" not in str(error.value)


def test_sources_that_lead_nowhere(server, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        read(tmp_path / "nowhere", tmp_path)
    with pytest.raises(UserError, match=f"{server.url}gone: HTTP 404"):
        read(f"{server.url}gone", tmp_path)
    with pytest.raises(UserError, match=r"none of its images can be had; the first, .*0\.jpg: HTTP 404"):
        read(table(tmp_path, server), tmp_path)
    museum = Institution(server, {"vase": [1, 2]})
    with pytest.raises(UserError, match=r"has one exhibit, .*name a collection"):
        read(museum.address, tmp_path)
