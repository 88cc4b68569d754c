import math

import faiss
import numpy as np
import pytest

from metilr.errors import UserError
from metilr.retrieval import search as search_module
from metilr.retrieval.search import class_ranks, search

needs_gpu = pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="FAISS sees no GPU")


def unit(rng, n, width):
    x = rng.standard_normal((n, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def exhaustive(database, queries, k):
    """Correctly rounded inner products with every row, stable sort."""
    database, queries = database.astype(np.float64), queries.astype(np.float64)
    similarities = np.array([[math.fsum(row * query) for row in database] for query in queries])
    rows = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, rows, axis=1), rows


def assert_exact(found, database, queries, k):
    similarities, rows = exhaustive(database, queries, k)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.similarities, similarities, rtol=0, atol=1e-13)
    assert found.rows.dtype == np.int64 and found.similarities.dtype == np.float64


@pytest.mark.parametrize("k", [1, 5, 120, 300])
def test_equals_exhaustive_search(k):
    rng = np.random.default_rng(0)
    database, queries = unit(rng, 300, 33), unit(rng, 20, 33)
    assert_exact(search(database, queries, k), database, queries, k)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_many_duplicates_come_in_row_order(k):
    # 40 copies of each image, shuffled: more than the margin, so candidates at first lack the smallest rows.
    rng = np.random.default_rng(0)
    database = rng.permutation(np.repeat(unit(rng, 10, 70), 40, axis=0))
    queries = np.concatenate([database[:5], unit(rng, 10, 70)])
    found = search(database, queries, k)
    assert_exact(found, database, queries, k)
    for similarities, rows in zip(found.similarities, found.rows, strict=True):
        _, groups = np.unique(database[rows], axis=0, return_inverse=True)
        for group in set(groups.ravel()):
            assert len(set(similarities[groups.ravel() == group])) == 1  # to the last bit


@pytest.mark.parametrize("width", [1, 6])
def test_different_rows_may_tie(width):
    # Small integers: sums are exact, so very many rows tie without being equal.
    rng = np.random.default_rng(0)
    database = rng.integers(-1, 2, (500, width)).astype(np.float32)
    queries = rng.integers(-1, 2, (30, width)).astype(np.float32)
    assert_exact(search(database, queries, 7), database, queries, 7)


def test_differences_below_float32_rounding_decide():
    # 400 rows whose products differ by less than float32 sums can tell, at the boundary of the candidates.
    rng = np.random.default_rng(0)
    query = unit(rng, 1, 256)
    database = (query + 1e-7 * rng.standard_normal((400, 256))).astype(np.float32)
    assert_exact(search(database, query, 5), database, query, 5)
    similarities = exhaustive(database, query, 30)[0][0]
    assert np.ptp(similarities) < 1e-6 and len(set(similarities)) == 30


@pytest.mark.parametrize("scale", [1e-38, 3e-39, 1e-22, 1e3])
def test_numbers_too_small_for_float32_hide_nothing(scale):
    rng = np.random.default_rng(0)
    database = (scale * rng.standard_normal((700, 40)) * rng.uniform(1e-3, 1, (700, 1))).astype(np.float32)
    queries = 50 * unit(rng, 20, 40)
    expected = -np.sort(-(queries.astype(np.float64) @ database.astype(np.float64).T), axis=1)[:, :10]
    np.testing.assert_allclose(search(database, queries, 10).similarities, expected, rtol=1e-12)


@pytest.mark.parametrize("width", [33, 770])
def test_chunks_change_no_bit(monkeypatch, width):
    rng = np.random.default_rng(0)
    database = np.concatenate([unit(rng, 200, width)] * 3)
    queries = unit(rng, 50, width)
    whole = search(database, queries, 6)
    for name, value in {"_QUERIES": 7, "_CANDIDATES": 100, "_PRODUCTS": 3 * width}.items():
        monkeypatch.setattr(search_module, name, value)
    cut = search(database, queries, 6)
    np.testing.assert_array_equal(cut.rows, whole.rows)
    np.testing.assert_array_equal(cut.similarities, whole.similarities)
    alone = [search(database, query[None], 6).similarities[0] for query in queries]
    np.testing.assert_array_equal(alone, whole.similarities)


def test_reads_a_memory_mapped_database_and_finds_nothing_without_a_query(tmp_path):
    rng = np.random.default_rng(0)
    database, queries = unit(rng, 100, 16), unit(rng, 4, 16)
    np.save(tmp_path / "database.npy", database)
    mapped = np.load(tmp_path / "database.npy", mmap_mode="r")
    assert_exact(search(mapped, queries, 3), database, queries, 3)
    assert search(mapped, queries[:0], 2).rows.shape == search(mapped, queries[:0], 2).similarities.shape == (0, 2)


@pytest.mark.parametrize(
    ("database", "queries", "k", "message"),
    [
        (np.eye(3), np.eye(3), 4, r"k 4: the database has 3 images"),
        (np.eye(3), np.eye(3), 0, r"k 0"),
        (np.empty((0, 3)), np.eye(3), 1, r"k 1: the database has 0"),
        (np.eye(3), np.eye(4), 1, "width 4"),
        (np.eye(3)[0], np.eye(3), 1, r"database descriptors have shape"),
        (np.eye(3), np.eye(3)[0], 1, r"query descriptors have shape"),
        (np.diag([1, 1, np.nan]), np.eye(3), 1, "database descriptor 2 holds NaN"),
        (np.eye(3), np.diag([1, np.inf, 1]), 1, "query descriptor 1 holds NaN"),
    ],
)
def test_refuses_bad_input(database, queries, k, message):
    with pytest.raises(UserError, match=message):
        search(database.astype(np.float32), queries.astype(np.float32), k)


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(UserError, match="no GPU"):
        search(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), 1, device="gpu")


@pytest.fixture
def stand_in_gpu(monkeypatch):
    """FAISS's CPU index in the GPU's place; it notes the widths that it is asked for."""
    widths = []

    class Index:
        def __init__(self, index):
            self.index, self.add = index, index.add

        def search(self, queries, k):
            widths.append(k)
            return self.index.search(queries, k)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index, co: Index(index))
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", type("Options", (), {"shard": False}), raising=False)
    return widths


def test_gpu_is_never_asked_for_more_than_it_can_select(stand_in_gpu):
    rng = np.random.default_rng(0)
    database = np.concatenate([np.repeat(unit(rng, 1, 8), 5000, axis=0), unit(rng, 9000, 8)])
    queries = np.concatenate([database[:1], database[-3:]])
    gpu, cpu = search(database, queries, 10, device="gpu"), search(database, queries, 10)
    np.testing.assert_array_equal(gpu.rows, cpu.rows)
    np.testing.assert_array_equal(gpu.rows[0], np.arange(10))
    assert stand_in_gpu == [26, 104, 416, 1664]
    with pytest.raises(UserError, match=r"k 2040: .* at most 2032"):
        search(database, queries, 2040, device="gpu")


@pytest.mark.gpu
@needs_gpu
def test_gpu_equals_cpu():
    rng = np.random.default_rng(0)
    database = np.concatenate([unit(rng, 20000, 128), np.repeat(unit(rng, 5, 128), 100, axis=0)])
    queries = np.concatenate([unit(rng, 5000, 128), database[-3:]])
    gpu, cpu = search(database, queries, 50, device="gpu"), search(database, queries, 50)
    np.testing.assert_array_equal(gpu.rows, cpu.rows)
    np.testing.assert_array_equal(gpu.similarities, cpu.similarities)


def test_every_query_is_counted_once_when_it_is_answered():
    rng = np.random.default_rng(0)
    database = np.repeat(rng.standard_normal((4, 8)).astype(np.float32), 60, axis=0)  # ties: some widen their search
    told: list[int] = []
    search(database, rng.standard_normal((30, 8)).astype(np.float32), 3, done=told.append)
    assert sum(told) == 30


def ranks_by_loop(database, queries, labels, target):
    """Each query's exhibit among the exhibits in the order of their first row, from correctly rounded products."""
    ranks = []
    for views, wanted in zip(queries, target.tolist(), strict=True):
        similarities = [
            max(math.fsum(row * view) for view in views.astype(np.float64)) for row in database.astype(float)
        ]
        rows = sorted(range(len(database)), key=lambda row: (-similarities[row], row))
        order = list(dict.fromkeys(labels[rows].tolist()))
        ranks.append(math.nan if wanted == -1 else order.index(wanted) + 1 if wanted in order else math.inf)
    return ranks


@pytest.mark.parametrize("n_views", [1, 3])
@pytest.mark.parametrize("kind", ["images", "integers", "copies"])
def test_ranks_of_exhibits_are_those_of_a_loop(kind, n_views, monkeypatch):
    rng = np.random.default_rng(n_views)
    database, queries = unit(rng, 200, 16), unit(rng, 30 * n_views, 16)
    if kind == "integers":  # rows tie without being equal
        database, queries = (rng.integers(-1, 2, each.shape).astype(np.float32) for each in (database, queries))
    if kind == "copies":
        database = rng.permutation(np.repeat(database[:20], 10, axis=0))
    labels, target = rng.integers(0, 60, 200), rng.integers(-1, 62, 30)  # -1 shows no exhibit, 60 and 61 have no row
    queries = queries.reshape(30, n_views, 16)
    expected = ranks_by_loop(database, queries, labels, target)
    np.testing.assert_array_equal(class_ranks(database, queries, labels, target), expected)
    monkeypatch.setattr(search_module, "_SIMILARITIES", 1000)  # one query at a time, the database in blocks
    np.testing.assert_array_equal(class_ranks(database, queries, labels, target), expected)
    if n_views == 1:
        np.testing.assert_array_equal(class_ranks(database, queries[:, 0], labels, target), expected)


def test_ranks_refuse_what_does_not_fit_together():
    rng = np.random.default_rng(0)
    database, queries, labels = unit(rng, 9, 4), unit(rng, 2, 4), np.zeros(9, dtype=np.int64)
    with pytest.raises(UserError, match=r"labels \(8,\): name one of each of the 9 database rows"):
        class_ranks(database, queries, labels[:8], np.zeros(2, dtype=np.int64))
    with pytest.raises(UserError, match=r"target \(3,\): name one of each of the 2 queries"):
        class_ranks(database, queries, labels, np.zeros(3, dtype=np.int64))
    with pytest.raises(UserError, match="queries have width 3, the database 4"):
        class_ranks(database, queries[:, :3], labels, np.zeros(2, dtype=np.int64))
