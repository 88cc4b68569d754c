"""Approximate search against brute force in NumPy."""

import faiss
import numpy as np
import pytest

from metilr import approximate_search
from metilr.approximate_search import ApproximateIndex, build_codes, check_size, count_lists
from metilr.errors import UserError
from metilr.retrieval.search import search

N = 4000


@pytest.fixture(autouse=True)
def small_databases_are_let_through(monkeypatch):
    monkeypatch.setattr(approximate_search, "MIN_ROWS", 1000)


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


@pytest.mark.parametrize("width", [30, 32])  # codes take 4 dimensions each: 30 is filled up
def test_finds_the_first_neighbours_with_their_exact_similarities(width, monkeypatch):
    monkeypatch.setattr(approximate_search, "PROBES", 2)  # 16 of 64 lists
    rows, queries = exhibits(width=width)
    found = ApproximateIndex(build_codes(rows), rows).search(queries, 5)
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
    index = ApproximateIndex(build_codes(rows), rows)
    expected = search(rows, queries, 20)
    recall = []
    for n_probes in (1, 8, 64):
        monkeypatch.setattr(approximate_search, "_probes", lambda n_lists, n=n_probes: n)
        recall.append((index.search(queries, 20).rows[:, :1] == expected.rows[:, :1]).mean())
    assert recall[0] < recall[1] < recall[2] and recall[0] < 0.5 and recall[2] > 0.9


def test_with_all_lists_open_it_equals_the_exact_search_to_the_last_bit(monkeypatch):
    monkeypatch.setattr(approximate_search, "_WIDE", 1)
    monkeypatch.setattr(approximate_search, "_CANDIDATES_A_NEIGHBOUR", 40)  # nearly all rows
    rows, queries = exhibits()
    rows = np.concatenate([rows, rows[:40], rows[:40]])  # copies tie: the smaller row comes first
    found, exact = ApproximateIndex(build_codes(rows), rows).search(queries, 100), search(rows, queries, 100)
    np.testing.assert_array_equal(found.rows, exact.rows)
    np.testing.assert_array_equal(found.similarities, exact.similarities)
    copies = ApproximateIndex(build_codes(rows), rows).search(rows[:10], 3)
    np.testing.assert_array_equal(copies.rows, np.arange(10)[:, None] + [0, N, N + 40])


def test_chunks_of_queries_change_nothing_and_every_query_is_counted_once(monkeypatch):
    rows, queries = exhibits()
    index = ApproximateIndex(build_codes(rows), rows)
    whole = index.search(queries, 7)
    monkeypatch.setattr(approximate_search, "_QUERIES", 8)
    told: list[int] = []
    cut = index.search(queries, 7, told.append)
    np.testing.assert_array_equal(cut.rows, whole.rows)
    assert told == [8] * 6 + [2]


def test_more_lists_are_opened_where_some_hold_too_few_rows(monkeypatch):
    monkeypatch.setattr(approximate_search, "_probes", lambda n_lists: 1)  # of 64, with 62 rows each on average
    rows, queries = exhibits()
    told: list[int] = []
    found = ApproximateIndex(build_codes(rows), rows).search(queries, 100, told.append)
    assert found.rows.min() >= 0 and all(len(set(row)) == 100 for row in found.rows.tolist())
    assert np.isfinite(found.similarities).all() and len(told) > 1 and sum(told) == 50


def test_a_search_for_very_many_is_exact():
    rows, queries = exhibits(n=2000, n_queries=3)
    index = ApproximateIndex(build_codes(rows), rows)
    for k in (200, 2000):
        np.testing.assert_array_equal(index.search(queries, k).rows, brute_force(rows, queries, k)[1])


def test_seed_and_rows_decide_the_codes_and_chunks_do_not(monkeypatch):
    rows, _ = exhibits()
    once = faiss.serialize_index(build_codes(rows, seed=3))
    monkeypatch.setattr(approximate_search, "_CHUNK", 700)
    np.testing.assert_array_equal(faiss.serialize_index(build_codes(rows, seed=3)), once)
    assert not np.array_equal(faiss.serialize_index(build_codes(rows, seed=4)), once)


def test_building_reads_a_bounded_number_of_rows_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(approximate_search, "_CHUNK", 500)
    monkeypatch.setattr(approximate_search, "_ROWS_A_LIST", 10)
    taken = []

    class Watched(np.memmap):
        def __getitem__(self, which):
            part = super().__getitem__(which)
            taken.append(len(part))
            return np.asarray(part)

    rows, _ = exhibits()
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r").view(Watched)
    np.testing.assert_array_equal(faiss.serialize_index(build_codes(mapped)), faiss.serialize_index(build_codes(rows)))
    assert max(taken) == 640 and taken.count(500) == 8  # 10 rows for each of 64 lists, then chunks


@pytest.mark.parametrize(
    ("n", "lists", "opened"),
    [(1000, 32, 32), (100_000, 256, 128), (1_000_000, 1024, 256), (10_000_000, 4096, 512), (10**8, 8192, 724)],
)
def test_lists_and_those_opened_follow_from_the_number_of_rows(n, lists, opened):
    assert count_lists(n) == lists and approximate_search._probes(lists) == opened


def test_codes_take_an_eighth_of_the_memory_at_most():
    rows = unit(np.random.default_rng(0).standard_normal((1000, 512)))
    assert len(faiss.serialize_index(build_codes(rows))) <= rows.nbytes / 8


def test_bad_input_is_refused(monkeypatch):
    rows, queries = exhibits(n=2000)
    index = ApproximateIndex(build_codes(rows), rows)
    for bad, k, message in (
        (queries, 0, "--k 0: the database has 2000"),
        (queries, 2001, "--k 2001"),
        (queries[:, :31], 1, "width 31, database descriptors 32"),
        (queries[0], 1, "query descriptors have shape"),
        (np.where(np.arange(50)[:, None] == 7, np.nan, queries), 1, "query descriptor 7 holds NaN"),
    ):
        with pytest.raises(UserError, match=message):
            index.search(bad, k)
    with pytest.raises(UserError, match="database descriptors have shape"):
        build_codes(rows[0])
    broken = rows.copy()
    broken[1500, 3] = np.inf
    monkeypatch.setattr(approximate_search, "_ROWS_A_LIST", 20)  # of 32 lists: the sample misses some rows
    with pytest.raises(UserError, match=r"database descriptor.* holds NaN or infinite"):
        build_codes(broken)
    with pytest.raises(UserError, match="--approximate: 999 rows are few; below 1,000 an exact search takes less time"):
        check_size(999)
    with pytest.raises(UserError, match="999 rows are few"):
        build_codes(rows[:999])


def test_no_query_finds_nothing():
    rows, queries = exhibits(n=2000)
    found = ApproximateIndex(build_codes(rows), rows).search(queries[:0], 3)
    assert found.rows.shape == found.similarities.shape == (0, 3)
