"""What the method makes of the database and of queries, against loops over rows."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from metilr.data.ground_truth import GroundTruth
from metilr.errors import UserError
from metilr.evaluation.database import (
    Searchable,
    as_compared,
    build_searchable,
    class_weights_of,
    pair_differences,
    query_views,
    whitening_of,
)
from metilr.evaluation.options import MethodOptions
from metilr.extraction.descriptors import Descriptors

MADE = [i for i in range(12) if i != 4]  # database images with a descriptor


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def museum(parts=1):
    """Descriptors with 3 visits and 2 crops an image, of exhibits with one to three images."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.concatenate([np.arange(7), [0, 1, 1, 2, 3]]))
    counts = {"database": 12, "val": 5, "test": 5, "visits": 36, "val_crops": 10, "test_crops": 10}
    rows = {split: unit(rng.standard_normal((count, 6)) + 0.5) for split, count in counts.items()}
    made = {split: np.ones(count, dtype=bool) for split, count in counts.items()}
    made["database"][4] = made["visits"][12:15] = made["val"][2] = made["val_crops"][4:6] = False
    queries = rng.integers(-1, 7, (2, 5))
    truth = GroundTruth(
        Path("museum"), "full",
        {split: tuple(f"{split}/{i}" for i in range(counts[split])) for split in ("database", "val", "test")},
        {"database": labels, "val": queries[0], "test": queries[1]}, np.arange(7), {},
    )  # fmt: skip
    return Descriptors({s: np.array_split(x, parts, axis=1) for s, x in rows.items()}, made, [{}] * parts), truth, rows


def check_nearest(found, similarities_of, k):
    """Compare rows and similarities found for queries with exact similarities, all rows a query."""
    for rows, similarities, exact in zip(found.rows, found.similarities, similarities_of, strict=True):
        order = sorted(range(len(exact)), key=lambda i: (-exact[i], i))[:k]
        assert rows.tolist() == order
        np.testing.assert_allclose(similarities, [exact[i] for i in order], atol=1e-7)


@pytest.mark.parametrize("factor", [1, 1e20, 1e-30])
def test_rows_of_any_length_are_compared_by_their_directions(factor):
    rows = np.random.default_rng(0).standard_normal((4, 6))
    with np.errstate(all="raise"):
        compared = as_compared((rows * factor).astype(np.float32), None)
    np.testing.assert_allclose(compared, unit(rows), rtol=1e-6)


def test_visits_as_rows_are_found_as_by_brute_force():
    descriptors, truth, rows = museum()
    database = build_searchable(descriptors, truth, MethodOptions("none", visits=3, database_views="rows"), None)
    expected = [(rows["database"][i], i) for i in MADE]
    expected += [(rows["visits"][3 * i + v], i) for i in MADE for v in range(3)]
    np.testing.assert_allclose(database.rows, np.array([row for row, _ in expected]), atol=1e-7)
    assert database.images.tolist() == [image for _, image in expected]
    assert database.labels.tolist() == [int(truth.labels["database"][image]) for _, image in expected]
    queries = query_views(descriptors, "val", MethodOptions("none"), None)
    assert queries.shape == (4, 1, 6)
    exact = [[float(np.dot(query.astype(float), row.astype(float))) for row in database.rows] for [query] in queries]
    check_nearest(database.nearest(queries, 7), exact, 7)


def prototypes_by_loop(rows, labels, kept):
    """The unit-length mean of each label's rows, and the row most similar to it, by label."""
    found = {}
    for label in sorted(set(labels[kept].tolist())):
        members = [i for i in kept if labels[i] == label]
        mean = sum(rows[i].astype(float) / np.linalg.norm(rows[i].astype(float)) for i in members) / len(members)
        mean /= np.linalg.norm(mean)
        similar = [float(rows[i] @ mean) / float(np.linalg.norm(rows[i].astype(float))) for i in members]
        found[label] = mean, next(i for i, s in zip(members, similar, strict=True) if s > max(similar) - 1e-5)
    return found


@pytest.mark.parametrize("whitening", ["none", "pca"])
def test_prototypes_are_the_means_of_whitened_images(whitening):
    descriptors, truth, rows = museum(2)
    method = MethodOptions(whitening, database_rows="prototypes", whitening_dim=None if whitening == "none" else 4)
    learned = whitening_of(descriptors, truth, method)
    database = build_searchable(descriptors, truth, method, learned)
    compared = rows["database"] if learned is None else (rows["database"] - learned.mean) @ learned.projection
    expected = prototypes_by_loop(compared, truth.labels["database"], MADE)
    assert database.labels.tolist() == list(expected) and len(expected) < len(MADE)
    np.testing.assert_allclose(database.rows, [mean for mean, _ in expected.values()], atol=1e-6)
    assert database.images.tolist() == [image for _, image in expected.values()]


def test_class_weights_are_searched_in_place_of_images(tmp_path):
    """Two rows each of the database's exhibits but one, whose image has no descriptor, and of a strange one."""
    descriptors, truth, rows = museum()
    truth = replace(truth, exhibit_ids=10 * np.arange(7), root=Path("museum"))
    method = MethodOptions("none", database_rows="classifier")
    rng, ids = np.random.default_rng(1), np.repeat([60, 0, 20, 35, 10, 40, 30, 50], 2)
    weights = rng.standard_normal((16, 6)).astype(np.float32)
    shown = {10 * int(truth.labels["database"][i]) for i in MADE}
    assert 1 < len(shown) < 7
    save_weights(tmp_path / "a.ckpt", ids, weights)
    read = class_weights_of(method, tmp_path / "a.ckpt", truth)
    database = build_searchable(descriptors, truth, method, None, classifier=read)
    kept = [i for i, exhibit_id in enumerate(ids) if exhibit_id in shown]
    assert database.labels.tolist() == [ids[i] // 10 for i in kept]
    np.testing.assert_allclose(database.rows, unit(weights[kept]), atol=1e-6)
    for i, image in zip(kept, database.images, strict=True):
        members = [row for row in MADE if 10 * truth.labels["database"][row] == ids[i]]
        assert image == max(members, key=lambda row: float(rows["database"][row] @ weights[i]))

    unknown = replace(truth, exhibit_ids=np.array([0, 10, 11, 20, 30, 31, 60]))
    with pytest.raises(UserError, match=r"does not know 2 exhibits of museum \(11, 31\); train it on this database"):
        class_weights_of(method, tmp_path / "a.ckpt", unknown)
    with pytest.raises(UserError, match="database_rows classifier: needs class weights; give the ckpt"):
        class_weights_of(method, None, truth)


def save_weights(file, ids, rows):
    content = {"classifier": {"exhibit_ids": torch.from_numpy(ids)}}
    torch.save({"state_dict": {"classifier.weight": torch.from_numpy(rows)}, "metilr": content}, file)


@pytest.mark.parametrize("k", [1, 3, 11])
def test_the_best_crop_counts_as_by_brute_force(k):
    descriptors, truth, rows = museum()
    method = MethodOptions("none", query_crops=(0.8, 0.5))
    database = build_searchable(descriptors, truth, method, None)
    queries = query_views(descriptors, "val", method, None)
    assert queries.shape == (4, 3, 6)
    exact = []
    for query in (0, 1, 3, 4):
        views = [rows["val"][query], rows["val_crops"][2 * query], rows["val_crops"][2 * query + 1]]
        exact.append([max(float(np.dot(v.astype(float), row.astype(float))) for v in views) for row in database.rows])
    check_nearest(database.nearest(queries, k), exact, k)


def test_candidates_are_found_however_many_images_the_nearest_exhibits_have():
    rng = np.random.default_rng(4)
    labels = np.repeat(np.arange(6), 30)
    rows = unit(np.eye(6)[labels] + 0.05 * rng.standard_normal((180, 6)))
    queries = unit(np.eye(6)[[2, 5]] + 0.3 * rng.standard_normal((2, 6)))[:, None]
    database = Searchable(rows, labels, np.arange(180))
    for width in (1, 50):
        matches = database.matches(queries, database.nearest(queries, width), 4)
        for query, found, similarities in zip(queries[:, 0], matches.rows, matches.similarities, strict=True):
            exact = rows.astype(float) @ query.astype(float)
            nearest = [max(np.flatnonzero(labels == label), key=lambda row: exact[row]) for label in range(6)]
            expected = sorted(nearest, key=lambda row: -exact[row])[:4]
            assert found.tolist() == expected
            np.testing.assert_allclose(similarities, exact[expected])


@pytest.mark.parametrize("parts", [1, 2])
def test_differences_of_pairs(monkeypatch, parts):
    descriptors, truth, rows = museum(parts)
    expected = [rows["database"][i] - rows["visits"][3 * i + v] for i in MADE for v in range(3)]
    for label in range(7):
        members = [i for i in MADE if truth.labels["database"][i] == label]
        pairs = {tuple(sorted(p)) for p in itertools.pairwise([*members, *members[:1]]) if len(members) > 1}
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
