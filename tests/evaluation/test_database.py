"""What the method makes of the database and of queries, against loops over rows."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from metilr.data.ground_truth import GroundTruth
from metilr.evaluation.database import (
    Searchable,
    build_searchable,
    pair_differences,
    query_views,
    ring_pairs,
    whitening_of,
)
from metilr.evaluation.options import MethodOptions
from metilr.extraction.descriptors import Descriptors


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def museum(n=12, width=6, n_visits=3, n_crops=2, n_queries=5, parts=1):
    """Descriptors with views, one database image and one query without any, of exhibits with one to three images."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.concatenate([np.arange(7), [0, 1, 1, 2, 3]]))[:n]
    counts = {
        "database": n, "val": n_queries, "test": n_queries, "visits": n * n_visits,
        "val_crops": n_queries * n_crops, "test_crops": n_queries * n_crops,
    }  # fmt: skip
    rows = {split: unit(rng.standard_normal((count, width)) + 0.5) for split, count in counts.items()}
    made = {split: np.ones(count, dtype=bool) for split, count in counts.items()}
    made["database"][4] = made["visits"][4 * n_visits : 5 * n_visits] = False
    made["val"][2] = made["val_crops"][2 * n_crops : 3 * n_crops] = False
    queries = rng.integers(-1, 7, (2, n_queries))
    truth = GroundTruth(
        Path("museum"), "full",
        {split: tuple(f"{split}/{i}" for i in range(counts[split])) for split in ("database", "val", "test")},
        {"database": labels, "val": queries[0], "test": queries[1]}, np.arange(7), {},
    )  # fmt: skip
    return Descriptors({s: np.array_split(x, parts, axis=1) for s, x in rows.items()}, made, [{}] * parts), truth, rows


def test_visits_as_rows_are_found_as_by_brute_force():
    descriptors, truth, rows = museum()
    method = MethodOptions("none", visits=3, database_views="rows")
    database = build_searchable(descriptors, truth, method, None)
    made = [i for i in range(12) if i != 4]
    expected = [(rows["database"][i], i) for i in made]
    expected += [(rows["visits"][3 * i + v], i) for i in made for v in range(3)]
    np.testing.assert_allclose(database.rows, np.array([row for row, _ in expected]), atol=1e-7)
    assert database.images.tolist() == [image for _, image in expected]
    assert database.labels.tolist() == [int(truth.labels["database"][image]) for _, image in expected]

    queries = query_views(descriptors, "val", MethodOptions("none"), None)
    assert queries.shape == (4, 1, 6)
    found = database.nearest(queries, 7)
    for query, similarities, places in zip(queries[:, 0], found.similarities, found.rows, strict=True):
        exact = [float(np.dot(query.astype(float), row.astype(float))) for row in database.rows]
        order = sorted(range(len(exact)), key=lambda i: (-exact[i], i))[:7]
        assert places.tolist() == order
        np.testing.assert_allclose(similarities, [exact[i] for i in order], atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 11])
def test_the_best_crop_counts_as_by_brute_force(k):
    descriptors, truth, rows = museum()
    method = MethodOptions("none", query_crops=(0.8, 0.5))
    database = build_searchable(descriptors, truth, method, None)
    queries = query_views(descriptors, "val", method, None)
    assert queries.shape == (4, 3, 6)
    found = database.nearest(queries, k)
    for place, query in enumerate([0, 1, 3, 4]):
        views = [rows["val"][query], rows["val_crops"][2 * query], rows["val_crops"][2 * query + 1]]
        best = [max(float(np.dot(view.astype(float), row.astype(float))) for view in views) for row in database.rows]
        order = sorted(range(len(best)), key=lambda i: (-best[i], i))[:k]
        assert found.rows[place].tolist() == order
        np.testing.assert_allclose(found.similarities[place], [best[i] for i in order], atol=1e-7)


def test_candidates_are_found_however_many_images_the_nearest_exhibits_have():
    rng = np.random.default_rng(4)
    labels = np.repeat(np.arange(6), 30)
    rows = unit(np.eye(6)[labels] + 0.05 * rng.standard_normal((180, 6)))
    queries = unit(np.eye(6)[[2, 5]] + 0.3 * rng.standard_normal((2, 6)))[:, None]
    database = Searchable(rows, labels, np.arange(180))
    for width in (1, 7, 50):
        matches = database.matches(queries, database.nearest(queries, width), 4)
        for query, found, similarities in zip(queries[:, 0], matches.rows, matches.similarities, strict=True):
            exact = rows.astype(float) @ query.astype(float)
            nearest = [max(np.flatnonzero(labels == label), key=lambda row: exact[row]) for label in range(6)]
            expected = sorted(nearest, key=lambda row: -exact[row])[:4]
            assert found.tolist() == expected
            np.testing.assert_allclose(similarities, exact[expected])


def test_pairs_in_rings():
    labels = np.array([5, 2, 5, 2, 2, 7, -1, -1, 2])
    first, second = ring_pairs(labels)
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 2), (1, 3), (3, 4), (4, 8), (8, 1)]
    assert [part.size for part in ring_pairs(np.arange(4))] == [0, 0]


@pytest.mark.parametrize("parts", [1, 2])
def test_differences_of_pairs(monkeypatch, parts):
    descriptors, truth, rows = museum(parts=parts)
    made = [i for i in range(12) if i != 4]
    expected = [rows["database"][i] - rows["visits"][3 * i + v] for i in made for v in range(3)]
    by_label = {}
    for i in made:
        by_label.setdefault(int(truth.labels["database"][i]), []).append(i)
    for members in by_label.values():
        pairs = set() if len(members) < 2 else {tuple(sorted(p)) for p in itertools.pairwise([*members, members[0]])}
        expected += [rows["database"][a] - rows["database"][b] for a, b in pairs]
    for chunk_rows in (1, 5, 8192):
        monkeypatch.setattr("metilr.evaluation.database.CHUNK_ROWS", chunk_rows)
        found = np.concatenate(list(pair_differences(descriptors, truth)))
        assert found.shape == (len(expected), 6)
        scatter = found.T.astype(float) @ found  # neither order nor sign of a difference matters
        np.testing.assert_allclose(scatter, np.array(expected).T.astype(float) @ np.array(expected), atol=1e-5)


def test_whitening_learned_from_the_visits_of_the_store():
    descriptors, truth, _ = museum()
    learned = whitening_of(descriptors, truth, MethodOptions("learned", visits=3, pair_shrinkage=1e-9))
    differences = np.concatenate(list(pair_differences(descriptors, truth))) @ learned.projection
    np.testing.assert_allclose(differences.T @ differences / len(differences), np.eye(6), atol=1e-5)
    assert learned.n_pairs == len(differences) and learned.n == 11
