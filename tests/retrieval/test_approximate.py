"""Approximate search against brute force in NumPy."""

import json

import faiss
import numpy as np
import pytest

from metilr.errors import UserError
from metilr.retrieval import approximate
from metilr.retrieval.approximate import ApproximateIndex, build_approximate, check_size
from metilr.retrieval.search import search

N = 4000  # sorted into 64 lists, of which 23 are opened


@pytest.fixture(autouse=True)
def small_databases_are_let_through(monkeypatch):
    monkeypatch.setattr(approximate, "MIN_ROWS", 1000)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def exhibits(n=N, width=32, n_queries=50):
    """Rows in clusters of four, and queries beside some of them."""
    rng = np.random.default_rng(0)
    centres = unit(rng.standard_normal((-(-n // 4), width)))
    rows = rng.permutation(unit(np.repeat(centres, 4, axis=0) + 0.1 * rng.standard_normal((4 * len(centres), width))))
    queries = rows[rng.choice(n, n_queries, replace=False)] + 0.05 * rng.standard_normal((n_queries, width))
    return rows[:n], unit(queries)


def brute_force(rows, queries, k):
    similarities = queries.astype(np.float64) @ rows.astype(np.float64).T
    found = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, found, axis=1), found


def open_lists(monkeypatch, n):
    """Have a search open another number of lists."""
    ask = ApproximateIndex._candidates
    monkeypatch.setattr(ApproximateIndex, "_candidates", lambda self, queries, k, _: ask(self, queries, k, n))


@pytest.mark.parametrize("width", [30, 32])  # codes take 4 dimensions each: 30 is filled up
def test_finds_the_first_neighbours_with_their_exact_similarities(width):
    rows, queries = exhibits(width=width)
    index = build_approximate(rows)
    assert len(faiss.serialize_index(index.index)) < rows.nbytes / 2  # mostly the centroids, at this size
    assert str(index) == "approximate: 23 of 64 lists, candidates scored exactly"
    found = index.search(queries, 5)
    similarities, expected = brute_force(rows, queries, 5)
    assert (found.rows[:, 0] == expected[:, 0]).mean() >= 0.98
    every = queries.astype(np.float64) @ rows.astype(np.float64).T
    np.testing.assert_allclose(found.similarities, np.take_along_axis(every, found.rows, axis=1), rtol=0, atol=1e-13)
    assert (np.diff(found.similarities) <= 0).all() and all(len(set(row)) == 5 for row in found.rows.tolist())
    assert (found.similarities <= similarities + 1e-13).all()
    assert found.rows.dtype == np.int64 and found.similarities.dtype == np.float64


def test_lists_that_are_not_opened_are_not_seen(monkeypatch):
    # Without any structure the lists decide what is found: an exact search in disguise would find everything.
    rng = np.random.default_rng(0)
    rows, queries = unit(rng.standard_normal((N, 32))), unit(rng.standard_normal((50, 32)))
    index, expected, recall = build_approximate(rows), brute_force(rows, queries, 20)[1], []
    for n_opened in (1, 8, 64):
        with monkeypatch.context() as patch:
            open_lists(patch, n_opened)
            recall.append((index.search(queries, 20).rows[:, 0] == expected[:, 0]).mean())
    assert recall[0] < recall[1] < recall[2] and recall[0] < 0.5 and recall[2] > 0.9


def test_where_all_rows_are_candidates_it_equals_the_exact_search_to_the_last_bit(monkeypatch):
    rows, queries = exhibits(n=2000)
    rows = np.concatenate([rows, rows[:40], rows[:40]])  # copies tie: the smaller row comes first
    index, n = build_approximate(rows), len(rows)
    copies = index.search(rows[:10], 3)
    np.testing.assert_array_equal(copies.rows, np.arange(10)[:, None] + [0, 2000, 2040])
    ask = ApproximateIndex._candidates
    monkeypatch.setattr(ApproximateIndex, "_candidates", lambda self, queries, *_: ask(self, queries, n, 64))
    found, exact = index.search(queries, 50), search(rows, queries, 50)
    np.testing.assert_array_equal(found.rows, exact.rows)
    np.testing.assert_array_equal(found.similarities, exact.similarities)


def test_chunks_of_queries_change_nothing_and_every_query_is_counted_once(monkeypatch):
    rows, queries = exhibits()
    index = build_approximate(rows)
    whole = index.search(queries, 7)
    monkeypatch.setattr(approximate, "_CANDIDATES", 500)
    told: list[int] = []
    cut = index.search(queries, 7, told.append)
    np.testing.assert_array_equal(cut.rows, whole.rows)
    assert len(told) > 1 and sum(told) == 50
    none = index.search(queries[:0], 3)
    assert none.rows.shape == none.similarities.shape == (0, 3)


def test_all_lists_are_opened_where_those_asked_hold_too_few_rows(monkeypatch):
    rows, queries = exhibits()
    index, asked, ask = build_approximate(rows), [], ApproximateIndex._candidates

    def one_at_first(self, queries, n, n_opened):
        asked.append(n_opened)
        return ask(self, queries, n, 1 if len(asked) == 1 else n_opened)  # 62 rows a list on average

    monkeypatch.setattr(ApproximateIndex, "_candidates", one_at_first)
    found = index.search(queries, 100)
    assert asked == [23, 64]
    assert found.rows.min() >= 0 and all(len(set(row)) == 100 for row in found.rows.tolist())
    assert np.isfinite(found.similarities).all()


def test_seed_and_rows_decide_the_index_and_chunks_do_not(monkeypatch):
    rows, _ = exhibits()
    once = faiss.serialize_index(build_approximate(rows, seed=3).index)
    monkeypatch.setattr(approximate, "_CHUNK", 700)
    np.testing.assert_array_equal(faiss.serialize_index(build_approximate(rows, seed=3).index), once)
    assert not np.array_equal(faiss.serialize_index(build_approximate(rows, seed=4).index), once)


def test_bad_input_is_refused():
    rows, queries = exhibits(n=2000)
    index = build_approximate(rows)
    for bad, k, message in (
        (queries, 0, "k 0: the database has 2,000"),
        (queries, 2001, "k 2001"),
        (queries[:, :31], 1, "width 31, the database 32"),
        (queries[0], 1, "query descriptors have shape"),
        (np.where(np.arange(50)[:, None] == 7, np.nan, queries), 1, "query descriptor 7 holds NaN"),
    ):
        with pytest.raises(UserError, match=message):
            index.search(bad, k)
    with pytest.raises(UserError, match="database descriptors have shape"):
        build_approximate(rows[0])
    broken = rows.copy()
    broken[1500, 3] = np.inf
    with pytest.raises(UserError, match="database descriptors hold NaN or infinite"):
        build_approximate(broken)
    with pytest.raises(UserError, match="999 rows are few; below 1,000 an exact search"):
        check_size(999)
    with pytest.raises(UserError, match="999 rows are few"):
        build_approximate(rows[:999])


@pytest.fixture
def saved(tmp_path):
    """An index, its queries, and the folder where it is saved beside its rows."""
    rows, queries = exhibits(n=2000)
    index = build_approximate(rows)
    np.save(tmp_path / "rows.npy", rows)
    index.save(tmp_path / "index", "a digest")
    return index, queries, tmp_path


def load(folder, made_from="a digest"):
    return ApproximateIndex.load(folder / "index", folder / "rows.npy", made_from)


def test_what_is_loaded_finds_what_was_saved_and_copies_no_rows(saved):
    index, queries, folder = saved
    loaded = load(folder)
    for k in (1, 10, 300):  # the last is searched exactly
        found, expected = loaded.search(queries, k), index.search(queries, k)
        np.testing.assert_array_equal(found.rows, expected.rows)
        np.testing.assert_array_equal(found.similarities, expected.similarities)
    last = loaded.search(index.rows[-1:], 1)  # read ahead up to the last byte of the file
    assert last.rows == [[1999]]
    assert isinstance(loaded.rows, np.memmap)
    assert sorted(file.name for file in (folder / "index").iterdir()) == ["approximate.json", "index.faiss"]


def test_damaged_unfinished_and_foreign_files_are_refused(saved, monkeypatch):
    index, _, folder = saved
    codes, note = folder / "index" / "index.faiss", folder / "index" / "approximate.json"
    content, text = codes.read_bytes(), note.read_text()
    flipped = bytearray(content)
    flipped[len(content) * 3 // 4] ^= 1  # FAISS would read it, and name another row
    for damaged in (content[:-100], b"", b"something else", bytes(flipped)):
        codes.write_bytes(damaged)
        with pytest.raises(UserError, match=r"index: is damaged, .*to search exactly, or make the index"):
            load(folder)
    codes.write_bytes(content)
    for damaged in ("{", "[1]", "1"):
        note.write_text(damaged)
        with pytest.raises(UserError, match="its index cannot be read"):
            load(folder)
    note.write_text(text)
    for other in (index.rows[:-1], index.rows[:, :-1], index.rows.astype(np.float64), index.rows[::-1]):
        np.save(folder / "rows.npy", other)
        with pytest.raises(UserError, match="was made from other descriptors or with other options"):
            load(folder)
    (folder / "rows.npy").unlink()
    with pytest.raises(UserError, match=r"rows\.npy: cannot be read"):
        load(folder)
    np.save(folder / "rows.npy", index.rows)
    with pytest.raises(UserError, match="was made from other descriptors or with other options"):
        load(folder, "another digest")
    note.write_text(json.dumps({**json.loads(text), "schema": "metilr.approximate/1"}))
    with pytest.raises(UserError, match="was made from other descriptors or with other options"):
        load(folder)
    monkeypatch.setattr(faiss, "write_index", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index.save(folder / "index", "a digest")
    with pytest.raises(UserError, match=r"index: its index cannot be read .*approximate\.json"):
        load(folder)
