"""``metilr index --approximate``, and what identify makes of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from metilr import approximate_search
from metilr.approximate_collection import save_searchable
from metilr.cli import main
from metilr.collection.collection import load_photo
from metilr.collection.collections_on_disk import open_with_threshold
from metilr.collection.index import index
from metilr.evaluation.database import Searchable
from metilr.retrieval.whitening import PCAWhitening
from tests.museum import write_museum
from tests.test_approximate_search import exhibits

OPTIONS = {
    "backbone": "r18_in", "weights": "random", "image_size": 40, "accelerator": "cpu", "num_workers": 0,
    "visits": 2, "database_views": "rows",
}  # fmt: skip
AS_OPTIONS = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def small_museums_are_let_through(monkeypatch):
    """8 images with 2 visits are 24 rows; with all lists open and all rows as candidates the lists still answer."""
    for name, value in {"MIN_ROWS": 24, "_WIDE": 1, "_CANDIDATES_A_NEIGHBOUR": 1, "_MARGIN": 0}.items():
        monkeypatch.setattr(approximate_search, name, value)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A museum's images, an index, and one with an approximate search."""
    folder = tmp_path_factory.mktemp("approximate")
    write_museum(folder / "met")
    shutil.move(folder / "met" / "images" / "MET", folder / "museum")
    index(folder / "museum", folder / "exact", **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(approximate_search, "MIN_ROWS", 24)
        index(folder / "museum", folder / "index", approximate=True, **OPTIONS)
    return folder


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """A copy of the latter, to be damaged."""
    return Path(shutil.copytree(made / "index", tmp_path / "index"))


@pytest.fixture
def failure(capsys):
    """The one line that a command ends in."""

    def call(*args: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1
        return lines[0]

    return call


def identify(made: Path, store: Path) -> list[str]:
    return ["identify", str(made / "museum"), "--store", str(store), "--accelerator", "cpu"]


def test_answers_are_those_of_an_exact_search(made, monkeypatch):
    exact, _ = open_with_threshold(None, made / "exact", accelerator="cpu")
    approximate, _ = open_with_threshold(None, made / "index", accelerator="cpu")
    assert exact.search is None and approximate.search.startswith("approximate: 4 of 4 lists")
    np.testing.assert_array_equal(approximate.database.rows, exact.database.rows)
    assert isinstance(approximate.database.rows, np.memmap)
    asked = []
    index = approximate.database.approximate
    monkeypatch.setattr(type(index), "_candidates", _noted(type(index)._candidates, asked))
    for file in sorted((made / "museum").rglob("*.jpg")):
        image = load_photo(file, 40).image
        assert approximate.answer(image) == exact.answer(image)
    assert len(asked) >= 8  # the lists were asked, not the rows


def _noted(function, calls):
    def noted(*args):
        calls.append(args)
        return function(*args)

    return noted


def test_identify_says_that_it_searches_approximately(made, capsys):
    how = "approximate: 4 of 4 lists, candidates scored exactly"
    main(identify(made, made / "index"))
    assert f"search       {how}\n" in capsys.readouterr().out
    main([*identify(made, made / "index"), "--json"])
    assert json.loads(capsys.readouterr().out)["collection"]["search"] == how
    main(identify(made, made / "exact"))
    assert "approximate:" not in capsys.readouterr().out


def test_serve_says_so_too(made, capsys, monkeypatch):
    for library in ("fastapi", "uvicorn", "python_multipart"):
        pytest.importorskip(library, reason="needs metilr[serve]")
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: None)
    main(["serve", "--store", str(made / "index"), "--port", "0", "--accelerator", "cpu"])
    assert "search       approximate: 4 of 4 lists" in capsys.readouterr().out


def test_a_stale_or_damaged_search_is_refused_and_can_be_deleted(made, copied, tmp_path, failure, capsys):
    whitening = PCAWhitening.load(copied / "whitening.npz")
    whitening.mean[0] += 1
    whitening.save(copied / "whitening.npz")
    assert "was made from other descriptors or with other options" in failure(*identify(made, copied))
    shutil.copy(made / "index" / "whitening.npz", copied)
    for name, message in (
        ("labels.npy", "labels.npy: cannot be read"),
        ("images.npy", "images.npy: cannot be read"),
        ("rows.npy", "rows.npy: cannot be read"),
        ("codes.faiss", "codes.faiss: cannot be read"),
        ("approximate.json", "approximate.json: cannot be read"),
    ):
        (copied / "approximate" / name).write_bytes(b"")
        line = failure(*identify(made, copied))
        assert message in line and "make" in line
        shutil.copy(made / "index" / "approximate" / name, copied / "approximate")
    np.save(copied / "approximate" / "labels.npy", np.zeros(23, dtype=np.int64))
    assert "labels.npy: does not belong to 24 rows" in failure(*identify(made, copied))
    shutil.rmtree(copied / "approximate")
    main(identify(made, copied))
    assert "approximate:" not in capsys.readouterr().out


def test_an_interrupted_command_keeps_what_is_finished(made, copied, failure):
    codes = copied / "approximate" / "codes.faiss"
    before = codes.stat().st_mtime_ns
    (copied / "index.json").unlink()
    assert f"{copied / 'approximate'}: is there, but --approximate is not" in failure(
        "index", made / "museum", copied, *AS_OPTIONS
    )
    index(made / "museum", copied, approximate=True, **OPTIONS)
    assert codes.stat().st_mtime_ns == before
    (copied / "index.json").unlink()
    (copied / "approximate" / "approximate.json").unlink()
    index(made / "museum", copied, approximate=True, **OPTIONS)
    assert codes.stat().st_mtime_ns != before
    assert codes.read_bytes() == (made / "index" / "approximate" / "codes.faiss").read_bytes()


def test_few_images_are_refused_before_they_are_described(made, tmp_path, failure, monkeypatch):
    monkeypatch.setattr(approximate_search, "MIN_ROWS", 25)
    line = failure("index", made / "museum", tmp_path / "index", *AS_OPTIONS, "--approximate", "true")
    assert "--approximate: 24 rows are few; below 25 an exact search takes less time" in line
    assert not (tmp_path / "index").exists()


def test_rows_are_written_as_they_are_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("metilr.approximate_collection.CHUNK_ROWS", 300)
    rows, _ = exhibits(n=1000)
    database = Searchable(rows, np.arange(1000) // 4, np.arange(1000))
    save_searchable(database, tmp_path / "a", "", quiet=True)
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "rows.npy"), rows)
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "labels.npy"), database.labels)
