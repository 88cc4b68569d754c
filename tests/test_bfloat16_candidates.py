import faiss
import numpy as np
import pytest
import torch

from metilr import bfloat16_candidates
from metilr.bfloat16_candidates import Bfloat16Candidates, has_bfloat16
from metilr.retrieval import search as search_module
from metilr.retrieval.search import search

pytestmark = pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no bfloat16 arithmetic")


def clustered(rng, n, width, spread):
    centres = rng.standard_normal((n // 5, width))
    rows = np.repeat(centres, 5, axis=0) + spread * rng.standard_normal((n // 5 * 5, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def in_float32(monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr(search_module, "has_bfloat16", lambda: False)
        return search(*arguments)


@pytest.fixture
def asked(monkeypatch):
    """How many candidates were asked of bfloat16 products, by call."""
    widths = []
    find = Bfloat16Candidates.__call__

    def noted(self, queries, width):
        widths.append(width)
        return find(self, queries, width)

    monkeypatch.setattr(Bfloat16Candidates, "__call__", noted)
    monkeypatch.setattr(search_module, "_BFLOAT16_ROWS", 1)
    monkeypatch.setattr(search_module, "_BFLOAT16_QUERIES", 1)
    return widths


@pytest.mark.parametrize("spread", [1e-3, 0.3, 3.0])
@pytest.mark.parametrize("k", [1, 50])
def test_the_search_is_as_exact_as_by_float32(monkeypatch, asked, spread, k):
    rng = np.random.default_rng(0)
    database = clustered(rng, 9000, 48, spread)
    queries = np.concatenate([clustered(rng, 40, 48, spread), database[:20], -database[:5]])
    found = search(database, queries, k)
    assert asked  # it did go that way
    expected = in_float32(monkeypatch, database, queries, k)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.similarities, expected.similarities)


def test_what_bfloat16_leaves_open_is_searched_in_float32(monkeypatch, asked):
    # All rows resemble each other: thousands lie within the error of bfloat16.
    rng = np.random.default_rng(0)
    base = clustered(rng, 5, 32, 1.0)[:1]
    database = base + np.float32(0.05) * clustered(rng, 3000, 32, 1.0)
    queries = base + np.float32(0.05) * clustered(rng, 70, 32, 1.0)
    in_float32_asked = []
    find = faiss.knn

    def noted(queries, database, width, **options):
        in_float32_asked.append(width)
        return find(queries, database, width, **options)

    monkeypatch.setattr(faiss, "knn", noted)
    found = search(database, queries, 3)
    assert asked == [67] and in_float32_asked[0] == 19 and max(in_float32_asked) < 400
    np.testing.assert_array_equal(found.rows, in_float32(monkeypatch, database, queries, 3).rows)


def test_bfloat16_is_given_up_where_it_settles_little(monkeypatch, asked):
    rng = np.random.default_rng(0)
    base = clustered(rng, 5, 32, 1.0)[:1]
    alike = base + np.float32(0.01) * clustered(rng, 3000, 32, 1.0)
    for database, n_asked in ((alike, 1), (clustered(rng, 3000, 32, 0.5), 3)):
        monkeypatch.setattr(search_module, "_QUERIES", 100)
        asked.clear()
        queries, answered = database[:300] + np.float32(1e-3), []
        found = search(database, queries, 3, done=answered.append)
        assert len(asked) == n_asked and sum(answered) == 300
        np.testing.assert_array_equal(found.rows, in_float32(monkeypatch, database, queries, 3).rows)


@pytest.mark.parametrize("scale", [1e-38, 3e-39, 1e-30, 1e-22])
@pytest.mark.parametrize("of_queries", [1.0, 50.0, 1e10])
def test_numbers_too_small_for_float32_hide_nothing(asked, scale, of_queries):
    rng = np.random.default_rng(0)
    database = (scale * rng.standard_normal((700, 40))).astype(np.float32)
    database[:200] /= 30  # subnormal at 1e-38: bfloat16 products take them for 0
    queries = (of_queries * clustered(rng, 70, 40, 0.5)).astype(np.float32)
    exact = queries.astype(np.float64) @ database.astype(np.float64).T
    found = search(database, queries, 10)
    assert asked
    np.testing.assert_allclose(found.similarities, -np.sort(-exact, axis=1)[:, :10], rtol=1e-12)


def test_large_and_small_norms(monkeypatch, asked):
    rng = np.random.default_rng(0)
    database = clustered(rng, 4000, 24, 0.5) * rng.uniform(1e-3, 1e3, (4000, 1)).astype(np.float32)
    queries = clustered(rng, 30, 24, 0.5) * 50
    found, expected = search(database, queries, 10), in_float32(monkeypatch, database, queries, 10)
    np.testing.assert_array_equal(found.rows, expected.rows)


def test_proposes_the_largest_rounded_products():
    rng = np.random.default_rng(0)
    database, queries = clustered(rng, 20_000, 40, 0.5), clustered(rng, 70, 40, 0.5)
    find = Bfloat16Candidates(database, np.linalg.norm(database, axis=1))
    similarities, rows = find(queries, 33)
    products = (torch.from_numpy(queries).bfloat16() @ torch.from_numpy(database).bfloat16().T).float().numpy()
    np.testing.assert_array_equal(similarities, -np.sort(-products, axis=1)[:, :33])
    np.testing.assert_array_equal(np.take_along_axis(products, rows, axis=1), similarities)
    assert all(len(set(of_query)) == 33 for of_query in rows.tolist())


def test_no_order_of_rows_is_too_much(monkeypatch):
    # Each row is nearer than all before: every product is among the best when it comes.
    rng = np.random.default_rng(0)
    database, queries = clustered(rng, 3000, 16, 0.5), clustered(rng, 10, 16, 0.5)
    database = database[np.argsort(database @ queries[0])]
    norms = np.linalg.norm(database, axis=1)
    similarities, rows = Bfloat16Candidates(database, norms)(queries, 20)
    for name, value in {"_ROWS": 100, "_PENDING": 64}.items():
        monkeypatch.setattr(bfloat16_candidates, name, value)
    cut_similarities, cut_rows = Bfloat16Candidates(database, norms)(queries, 20)
    np.testing.assert_array_equal(cut_similarities, similarities)
    assert rows.shape == cut_rows.shape == (10, 20)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_no_rounding_passes_the_bound(scale):
    rng = np.random.default_rng(0)
    database, queries = scale * clustered(rng, 2000, 96, 0.5), clustered(rng, 50, 96, 0.5)
    find = Bfloat16Candidates(database, np.linalg.norm(database, axis=1))
    rounded = (torch.from_numpy(queries).bfloat16() @ torch.from_numpy(database).bfloat16().T).double().numpy()
    exact = queries.astype(np.float64) @ database.astype(np.float64).T
    bound = find.errors(queries, np.linalg.norm(queries, axis=1))[:, None] + 2.0**-8 * np.abs(rounded)
    assert (np.abs(rounded - exact) <= bound).all()
    assert (np.abs(rounded - exact) > bound / 20).any()  # the bound says something


def test_reads_a_mapped_file_without_a_warning(tmp_path, recwarn, asked):
    rng = np.random.default_rng(0)
    database = clustered(rng, 500, 8, 0.5)
    np.save(tmp_path / "rows.npy", database)
    search(np.load(tmp_path / "rows.npy", mmap_mode="r"), database[:5], 2)
    of_old_faiss = "accept a copy keyword"  # what faiss-gpu's lower bound says of any array
    assert asked and not [warning for warning in recwarn if of_old_faiss not in str(warning.message)]
