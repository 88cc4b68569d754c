"""``metilr index --approximate``, and what identify and serve make of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from metilr.cli import main
from metilr.collection import PhotoOptions
from metilr.collection.collection import load_photo
from metilr.collection.open_collection import open_with_threshold
from metilr.retrieval import approximate
from metilr.retrieval.approximate import ApproximateIndex
from metilr.retrieval.whitening import PCAWhitening
from tests.collection.conftest import INDEXED, write_images
from tests.small_runs import index

OPTIONS = {**INDEXED, "visits": 2, "database_views": "rows"}
AS_OPTIONS = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
HOW = "approximate: 3 of 4 lists, candidates scored exactly"


@pytest.fixture(autouse=True)
def small_museums_are_let_through(monkeypatch):
    monkeypatch.setattr(approximate, "MIN_ROWS", 24)  # 8 images with 2 visits


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A museum's images, an index, and one with an approximate search."""
    folder = tmp_path_factory.mktemp("approximate")
    write_images(folder)
    index(folder / "museum", folder / "exact", **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(approximate, "MIN_ROWS", 24)
        index(folder / "museum", folder / "index", approximate=True, **OPTIONS)
    return folder


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """A copy of the latter, to be damaged."""
    return Path(shutil.copytree(made / "index", tmp_path / "index"))


def identify(made: Path, store: Path) -> list[str]:
    return ["identify", str(made / "museum"), "--store", str(store), "--accelerator", "cpu"]


def test_answers_come_from_the_index_and_are_those_of_an_exact_search(made, monkeypatch):
    exact, _ = open_with_threshold(PhotoOptions(store=made / "exact", accelerator="cpu"))
    opened, _ = open_with_threshold(PhotoOptions(store=made / "index", accelerator="cpu"))
    assert exact.search is None and opened.search == HOW
    np.testing.assert_array_equal(opened.database.rows, exact.database.rows)
    assert isinstance(opened.database.rows, np.memmap)
    asked, search = [], ApproximateIndex.search
    monkeypatch.setattr(ApproximateIndex, "search", lambda *args: asked.append(args) or search(*args))
    for file in sorted((made / "museum").rglob("[0-9].jpg")):
        image = load_photo(file, 40).image
        assert opened.answer(image) == exact.answer(image)
    assert len(asked) >= 8


def test_identify_and_serve_say_that_they_search_approximately(made, capsys, monkeypatch):
    main(identify(made, made / "index"))
    assert f"search       {HOW}\n" in capsys.readouterr().out
    main([*identify(made, made / "index"), "--json"])
    assert json.loads(capsys.readouterr().out)["collection"]["search"] == HOW
    main(identify(made, made / "exact"))
    assert "approximate:" not in capsys.readouterr().out
    for library in ("fastapi", "uvicorn", "python_multipart"):
        pytest.importorskip(library, reason="needs metilr[serve]")
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: None)
    main(["serve", "--store", str(made / "index"), "--port", "0", "--accelerator", "cpu"])
    assert f"search       {HOW}" in capsys.readouterr().out


def test_a_stale_or_damaged_search_is_refused_and_can_be_deleted(made, copied, failure, capsys):
    whitening = PCAWhitening.load(copied / "whitening.npz")
    whitening.mean[0] += 1
    whitening.save(copied / "whitening.npz")
    assert "was made from other descriptors or with other options" in failure(*identify(made, copied))
    shutil.copy(made / "index" / "whitening.npz", copied)
    for name in ("rows.npy", "columns.npy", "index.faiss", "approximate.json"):
        (copied / "approximate" / name).write_bytes(b"")
        line = failure(*identify(made, copied))
        assert (
            ("cannot be read" in line or "is damaged" in line)
            and str(copied / "approximate") in line
            and "make the index again" in line
        )
        shutil.copy(made / "index" / "approximate" / name, copied / "approximate")
    np.save(copied / "approximate" / "columns.npy", np.zeros((2, 23), dtype=np.int64))
    assert "columns.npy: does not belong to 24 rows" in failure(*identify(made, copied))
    shutil.rmtree(copied / "approximate")
    main(identify(made, copied))
    assert "approximate:" not in capsys.readouterr().out


def test_an_interrupted_command_keeps_what_is_finished(made, copied, failure):
    codes, note = copied / "approximate" / "index.faiss", copied / "approximate" / "approximate.json"
    before = codes.stat().st_mtime_ns
    (copied / "index.json").unlink()
    assert f"{copied / 'approximate'}: is there, but approximate is not" in failure(
        "index", made / "museum", copied, *AS_OPTIONS, "--visits", 2, "--database_views", "rows"
    )
    index(made / "museum", copied, approximate=True, **OPTIONS)
    assert codes.stat().st_mtime_ns == before
    (copied / "index.json").unlink()
    note.unlink()
    index(made / "museum", copied, approximate=True, **OPTIONS)
    assert codes.stat().st_mtime_ns != before
    assert codes.read_bytes() == (made / "index" / "approximate" / "index.faiss").read_bytes()


def test_few_images_are_refused_before_they_are_described(made, tmp_path, failure, monkeypatch):
    monkeypatch.setattr(approximate, "MIN_ROWS", 25)
    line = failure("index", made / "museum", tmp_path / "index", *AS_OPTIONS, "--approximate", "true")
    assert "24 rows are few; below 25" in line
    assert not list((tmp_path / "index").glob("store*"))
