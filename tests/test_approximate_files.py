"""An approximate index on disk: what is read back, and what is refused."""

import json

import numpy as np
import pytest

from metilr import approximate_search
from metilr.approximate_files import load_approximate, save_approximate
from metilr.approximate_search import ApproximateIndex, build_codes
from metilr.errors import UserError
from metilr.random_rows import RandomRows
from tests.test_approximate_search import exhibits


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An index of 2000 rows in memory, and queries."""
    rows, queries = exhibits(n=2000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(approximate_search, "MIN_ROWS", 1000)
        return ApproximateIndex(build_codes(rows), rows), queries


@pytest.fixture
def saved(built, tmp_path):
    """The same, saved beside its rows."""
    np.save(tmp_path / "rows.npy", built[0].rows)
    save_approximate(built[0], tmp_path / "index", "a digest")
    return tmp_path


def load(folder, made_from="a digest"):
    return load_approximate(folder / "index", folder / "rows.npy", made_from)


def test_what_is_loaded_finds_what_was_saved(built, saved):
    index, queries = built
    loaded = load(saved)
    assert str(loaded) == "approximate: 32 of 32 lists, candidates scored exactly"
    for k in (1, 10, 300):  # the last is searched exactly
        found, expected = loaded.search(queries, k), index.search(queries, k)
        np.testing.assert_array_equal(found.rows, expected.rows)
        np.testing.assert_array_equal(found.similarities, expected.similarities)


def test_nothing_is_copied_beside_the_codes(saved):
    assert sorted(file.name for file in (saved / "index").iterdir()) == ["approximate.json", "codes.faiss"]
    assert isinstance(load(saved).rows, np.memmap)


def test_a_save_that_is_cut_off_leaves_no_index(built, saved, monkeypatch):
    monkeypatch.setattr("metilr.approximate_files.file_sha256", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_approximate(built[0], saved / "index", "a digest")
    with pytest.raises(UserError, match=r"approximate\.json: cannot be read .*No such file"):
        load(saved)


def test_damaged_files_are_named(saved):
    codes, note = saved / "index" / "codes.faiss", saved / "index" / "approximate.json"
    content, text = codes.read_bytes(), note.read_text()
    for damaged in (content[:-100], content[:5000] + b"\0\0\0" + content[5003:], b""):
        codes.write_bytes(damaged)
        with pytest.raises(UserError, match=r"codes\.faiss: cannot be read .*to search exactly, or make the index"):
            load(saved)
    codes.unlink()
    with pytest.raises(UserError, match=r"codes\.faiss: cannot be read"):
        load(saved)
    for damaged in ("{", "[]", "{}", text.replace("approximate/1", "approximate/0"), text[:-40]):
        note.write_text(damaged)
        with pytest.raises(UserError, match=r"approximate\.json: cannot be read"):
            load(saved)


def test_codes_that_faiss_cannot_read_are_named_even_if_they_are_those_saved(saved, monkeypatch):
    codes, note = saved / "index" / "codes.faiss", saved / "index" / "approximate.json"
    codes.write_bytes(b"something else")
    monkeypatch.setattr("metilr.approximate_files.file_sha256", lambda f: json.loads(note.read_text())["codes_sha256"])
    with pytest.raises(UserError, match=r"codes\.faiss: cannot be read"):
        load(saved)


def test_other_rows_are_refused(built, saved):
    rows = built[0].rows
    swapped = rows.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    for other in (rows[:-1], rows[:, :-1], swapped):
        np.save(saved / "rows.npy", other)
        with pytest.raises(UserError, match=r"rows\.npy: holds other rows than .*codes\.faiss was built over"):
            load(saved)
    np.save(saved / "rows.npy", rows)
    with pytest.raises(UserError, match="was made from other descriptors or with other options"):
        load(saved, "another digest")


def test_single_rows_of_a_file_are_those_of_the_file(tmp_path):
    rows = np.random.default_rng(0).standard_normal((5000, 33)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    picked = RandomRows(tmp_path / "rows.npy")
    wanted = np.array([4999, 0, 77, 77, 2500])
    picked.expect(wanted)  # up to the last byte of the file
    picked.expect(wanted[:0])
    np.testing.assert_array_equal(picked.array[wanted], rows[wanted])
    np.testing.assert_array_equal(picked.array, rows)
    assert not picked.array.flags.writeable


def test_a_file_that_holds_no_rows_is_refused(tmp_path):
    file = tmp_path / "rows.npy"
    with pytest.raises(UserError, match=r"rows\.npy: cannot be read"):
        RandomRows(file)
    rows = np.ones((50, 8), dtype=np.float32)
    for other in (rows.astype(np.float64), rows[0], rows[:0], np.asfortranarray(rows)):
        np.save(file, other)
        with pytest.raises(UserError, match=r"rows\.npy: holds float"):
            RandomRows(file)
    np.save(file, rows)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"rows\.npy: cannot be read"):
        RandomRows(file)
