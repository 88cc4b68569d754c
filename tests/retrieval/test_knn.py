import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

from metilr.errors import UserError
from metilr.metrics.functional import DISTRACTOR, gap
from metilr.retrieval.knn import K_GRID, NO_LABEL, NO_ROW, TAU_GRID, classify, top_matches, tune, with_skipped
from metilr.retrieval.search import Neighbours, search


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def clustered(rng, n_classes=45, width=12, n_queries=50):
    """Exhibits around centres; some images are there twice, some of them under two classes."""
    centres = rng.standard_normal((n_classes, width))
    labels = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, 90 - n_classes)])
    database = unit(centres[labels] + 0.5 * rng.standard_normal((len(labels), width)))
    database = np.concatenate([database, database[:15], database[30:40]])
    labels = np.concatenate([labels, labels[:15], rng.integers(0, n_classes, 10)])
    order = rng.permutation(len(labels))
    database, labels = database[order], labels[order]
    truth = rng.integers(0, n_classes, n_queries)
    queries = unit(centres[truth] + 0.9 * rng.standard_normal((n_queries, width)))
    queries[:4] = database[:4]  # similarity 1 up to rounding, with ties where the image is there twice
    truth[n_queries // 2 :] = DISTRACTOR
    return database, labels, n_classes, queries, truth


def opposite(rng):
    """All similarities are negative: classes without a neighbour are better."""
    database, labels, n_classes, queries, truth = clustered(rng)
    direction = 5 * np.eye(12)[0]
    return unit(database + direction), labels, n_classes, unit(queries - direction), truth


def mixed_signs(rng):
    """A database in three directions, so that a query has few similarities above 0."""
    labels = rng.integers(0, 20, 60)
    database = np.eye(4, dtype=np.float32)[rng.integers(0, 3, 60)] * rng.choice([-1, 1], (60, 1))
    queries = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 30)]  # the last direction: similarity 0 to all
    return database.astype(np.float32), labels, 22, queries, rng.integers(-1, 20, 30)


def few_classes(rng):
    return clustered(rng, n_classes=3, width=4)


def one_class(rng):
    return clustered(rng, n_classes=1, width=4)


DATA = [clustered, opposite, mixed_signs, few_classes, one_class]


def loop_classify(database, labels, n_classes, query, k, tau):
    """The Met paper's classifier for one query, word by word, in float64."""
    similarities = [math.fsum(row * query) for row in database.astype(np.float64)]
    nearest = sorted(range(len(database)), key=lambda row: (-similarities[row], row))[:k]
    s = [0.0] * n_classes
    giver = [NO_ROW] * n_classes
    for row in reversed(nearest):  # the most similar and smallest row of a class has the last word
        s[labels[row]], giver[labels[row]] = similarities[row], row
    label = s.index(max(s))
    others = [math.exp(tau * (s_c - s[label])) for c, s_c in enumerate(s) if c != label]
    return label, -math.log1p(math.fsum(others)), s[label], giver[label]


@pytest.mark.parametrize("make", DATA)
def test_equals_the_loop_at_every_grid_point(make):
    database, labels, n_classes, queries, truth = make(np.random.default_rng(0))
    neighbours = search(database, queries, max(K_GRID))
    tuning = tune(neighbours, labels, n_classes, truth)
    assert (tuning.k_grid, tuning.tau_grid) == (K_GRID, TAU_GRID)
    n_absent_wins = 0
    for i, k in enumerate(K_GRID):
        for j, tau in enumerate(TAU_GRID):
            found = classify(neighbours, labels, n_classes, k, tau)
            loop = [loop_classify(database, labels, n_classes, q.astype(np.float64), k, tau) for q in queries]
            label, log_confidence, similarity, nearest = map(np.array, zip(*loop, strict=True))
            np.testing.assert_array_equal(found.labels, label)
            np.testing.assert_array_equal(found.nearest, nearest)
            np.testing.assert_allclose(found.log_confidence, log_confidence, rtol=1e-9, atol=1e-15)
            np.testing.assert_allclose(found.similarity, similarity, rtol=0, atol=1e-12)
            scored = gap(found.log_confidence, label, truth)
            np.testing.assert_allclose(tuning.surface[i, j], scored, rtol=0, atol=1e-12)
            n_absent_wins += (nearest == NO_ROW).sum()
    assert tuning.surface[K_GRID.index(tuning.k), TAU_GRID.index(tuning.tau)] == tuning.surface.max()
    assert (n_absent_wins > 0) == (make in (opposite, mixed_signs))


@pytest.mark.parametrize("make", DATA)
@pytest.mark.parametrize("tau", [0.01, 1.0, 15.0])
def test_confidence_is_the_softmax_over_all_classes(make, tau):
    database, labels, n_classes, queries, _ = make(np.random.default_rng(1))
    neighbours = search(database, queries, 10)
    found = classify(neighbours, labels, n_classes, 10, tau)
    s = np.zeros((len(queries), n_classes))
    for query, (similarities, rows) in enumerate(zip(neighbours.similarities, neighbours.rows, strict=True)):
        for c in set(labels[rows]):
            s[query, c] = similarities[labels[rows] == c].max()
    softmax = np.exp(tau * s) / np.exp(tau * s).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(found.log_confidence), softmax.max(axis=1), rtol=1e-12)


def test_tau_500_does_not_saturate():
    # The best class leads by 0.5 and more: the softmax itself is exactly 1.0 for all of these.
    similarities = np.array([[0.99 - 0.001 * i, 0.4 - 0.01 * (i % 7), -0.2] for i in range(40)])
    neighbours = Neighbours(similarities, np.tile(np.arange(3), (40, 1)))
    found = classify(neighbours, np.array([4, 2, 7]), 1000, 3, 500.0)
    with localcontext() as context:
        context.prec = 300  # 1 + exp(-500) has its 217th digit to keep
        exact = []
        for best, *others in similarities:
            odds = [(500 * (Decimal(s) - Decimal(best))).exp() for s in [*others, 0.0]]
            exact.append(-(1 + odds[0] + odds[1] + 997 * odds[2]).ln())
        for value, reference in zip(found.log_confidence, exact, strict=True):
            assert abs(Decimal(value) / reference - 1) < Decimal("1e-9")
    assert (np.exp(found.log_confidence) == 1.0).all()
    assert len(set(found.log_confidence)) == 40
    order = sorted(range(40), key=lambda i: -exact[i])
    np.testing.assert_array_equal(np.argsort(-found.log_confidence, kind="stable"), order)


def test_the_largest_tau_tells_the_largest_lead():
    neighbours = Neighbours(np.array([[1.0], [1.0 - 2e-16]]), np.array([[0], [0]]))
    found = classify(neighbours, np.array([0, 1]), 2, 1, 700.0)
    assert 0 > found.log_confidence[0] > found.log_confidence[1]


def test_equal_classes_go_to_the_smaller_label_within_k():
    neighbours = Neighbours(np.array([[0.5, 0.5, 0.5]]), np.array([[0, 1, 2]]))
    labels = np.array([5, 3, 4])
    assert [classify(neighbours, labels, 9, k, 1.0).labels[0] for k in (1, 2, 3)] == [5, 3, 3]
    assert [classify(neighbours, labels, 9, k, 1.0).nearest[0] for k in (1, 2, 3)] == [0, 1, 1]


def test_tuning_prefers_the_smaller_k_then_the_usual_tau():
    database, labels = np.eye(60, dtype=np.float32), np.arange(60)
    tuning = tune(search(database, database, 50), labels, 60, labels, k_grid=(5, 2, 5), tau_grid=(9.0, 3.0))
    assert (tuning.k, tuning.tau) == (2, 9.0)  # nearer to 50
    assert (tuning.k_grid, tuning.tau_grid) == ((2, 5), (3.0, 9.0))
    np.testing.assert_array_equal(tuning.surface, np.ones((2, 2)))


def test_tuning_leaves_out_k_beyond_the_database():
    database = np.eye(6, dtype=np.float32)
    tuning = tune(search(database, database, 6), np.arange(6), 6, np.arange(6))
    assert tuning.k_grid == (1, 2, 3, 5)
    with pytest.raises(UserError, match=r"k .* 6 database images"):
        tune(search(database, database, 6), np.arange(6), 6, np.arange(6), k_grid=(7, 10))


def test_skipped_queries_are_wrong_and_rank_last():
    database, labels, n_classes, queries, truth = clustered(np.random.default_rng(3))
    skipped = np.zeros(len(queries), dtype=bool)
    skipped[[0, 7, -1]] = True  # two met queries and a distractor
    neighbours = search(database, queries[~skipped], 50)
    predictions = with_skipped(classify(neighbours, labels, n_classes, 5, 20.0), skipped)
    assert (predictions.labels[skipped] == NO_LABEL).all() and (predictions.nearest[skipped] == NO_ROW).all()
    assert (predictions.log_confidence[skipped] == -np.inf).all()
    assert np.isnan(predictions.similarity[skipped]).all()
    full = classify(search(database, queries, 50), labels, n_classes, 5, 20.0)
    np.testing.assert_array_equal(predictions.labels[~skipped], full.labels[~skipped])

    tuning = tune(neighbours, labels, n_classes, truth, skipped=skipped)
    n_met, n_met_left = (truth != DISTRACTOR).sum(), (truth[~skipped] != DISTRACTOR).sum()
    assert n_met_left == n_met - 2
    without = tune(neighbours, labels, n_classes, truth[~skipped])
    np.testing.assert_allclose(tuning.surface, without.surface * n_met_left / n_met, rtol=1e-12)
    scored = gap(predictions.log_confidence, predictions.labels, truth)
    np.testing.assert_allclose(scored, tuning.surface[K_GRID.index(5), TAU_GRID.index(20)], rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="47 answered"):
        with_skipped(classify(neighbours, labels, n_classes, 5, 20.0), np.zeros(50, dtype=bool))


def good_call(**changes):
    call = {"neighbours": GOOD, "database_labels": np.array([0, 1, 2]), "n_classes": 3, "k": 2, "tau": 1.0}
    return classify(**{**call, **changes})


GOOD = Neighbours(np.array([[0.9, 0.1]]), np.array([[0, 1]]))


@pytest.mark.parametrize("tau", [0, -1.0, 700.1, np.inf, np.nan])
def test_refuses_tau(tau):
    with pytest.raises(UserError, match="tau "):
        good_call(tau=tau)
    with pytest.raises(UserError, match="tau "):
        tune(GOOD, np.array([0, 1, 2]), 3, np.array([0]), k_grid=(1,), tau_grid=(tau,))


def test_refuses_k_and_a_split_without_met_queries():
    for k in (0, 4):
        with pytest.raises(UserError, match=r"k .* 3 images"):
            good_call(k=k)
    with pytest.raises(ValueError, match="kept 2 neighbours"):
        good_call(k=3)
    with pytest.raises(UserError, match="no query shows an exhibit"):
        tune(GOOD, np.array([0, 1, 2]), 3, np.array([DISTRACTOR]), k_grid=(1,))


@pytest.mark.parametrize(
    "labels", [np.array([0, 1, 3]), np.array([-1, 0, 1]), np.array([0]), np.zeros((3, 1), int), np.zeros(3)]
)
def test_refuses_labels_that_do_not_fit(labels):
    with pytest.raises(ValueError, match="labels"):
        good_call(database_labels=labels, k=1)


def test_result_of_no_query_is_empty():
    assert good_call(neighbours=Neighbours(np.empty((0, 2)), np.empty((0, 2), dtype=np.int64))).labels.shape == (0,)


def test_where_tau_makes_no_difference_the_usual_one_is_chosen():
    """With one neighbour the confidence falls with the similarity at any tau, so all rank alike."""
    rng = np.random.default_rng(1)
    neighbours = Neighbours(np.sort(rng.uniform(0.1, 0.9, (30, 1)), axis=0)[::-1], np.arange(30)[:, None] % 12)
    tuning = tune(neighbours, np.arange(12), 12, np.arange(30) % 12 * (rng.random(30) < 0.6), [1], [0.01, 20, 100, 500])
    assert (tuning.surface == tuning.surface[0, 0]).all()
    assert tuning.tau == 100  # nearest to 50 by ratio: 2 against 2.5


def loop_matches(neighbours, labels, n):
    all_rows, all_similarities = [], []
    for rows, similarities in zip(neighbours.rows.tolist(), neighbours.similarities.tolist(), strict=True):
        seen = []
        found = []
        for row, similarity in zip(rows, similarities, strict=True):
            if labels[row] not in seen and len(found) < n:
                seen.append(int(labels[row]))
                found.append((row, similarity))
        found += [(NO_ROW, float("nan"))] * (n - len(found))
        all_rows.append([row for row, _ in found])
        all_similarities.append([similarity for _, similarity in found])
    return all_rows, all_similarities


def test_matches_are_one_image_an_exhibit_in_the_order_of_similarity():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 40)
    rows = np.stack([rng.permutation(40)[:9] for _ in range(30)])
    neighbours = Neighbours(-np.sort(-rng.random((30, 9)), axis=1), rows)
    for n in (1, 5, 12):  # 12 exhibits are not there
        matches = top_matches(neighbours, labels, n)
        expected_rows, expected_similarities = loop_matches(neighbours, labels, n)
        assert matches.rows.tolist() == expected_rows
        np.testing.assert_array_equal(matches.similarities, expected_similarities)
