"""A calibrated confidence: against loops and scikit-learn's own composition."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from metilr.metrics import gap
from metilr.retrieval.confidence import (
    STRENGTHS,
    Evidence,
    background_means,
    background_similarities,
    evidence_of_search,
    fit_calibration,
    held_out_parts,
)
from metilr.retrieval.knn import Matches, Predictions

N, N_BACKGROUND, REPEATS = 90, 40, 3


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr("metilr.retrieval.confidence.REPEATS", REPEATS)


def made_up(seed=0):
    """Val of 50 met queries and 40 distractors, whose evidence tells something."""
    rng = np.random.default_rng(seed)
    target = np.r_[rng.integers(10, size=50), np.full(40, -1)]
    labels = np.where((rng.random(N) < 0.7) & (target >= 0), target, rng.integers(10, size=N))
    is_right = labels == target
    of_answer = rng.normal(size=(N, 3)) + 0.5 * is_right[:, None]
    background = rng.normal(size=(N, N_BACKGROUND)) - 0.5 * is_right[:, None]
    answers = Predictions(labels, rng.normal(size=N) - 5, of_answer[:, 0], np.zeros(N, dtype=np.int64))
    background_queries = np.arange(50, N)
    is_same = np.arange(N)[:, None] == background_queries
    evidence = Evidence(tuple("abcdef"), of_answer, background, is_same)
    groups = np.arange(N) // 2
    return answers, evidence, target, groups, background_queries


@pytest.mark.parametrize("n_photographs", [3, 30])
def test_background_means_are_those_of_a_loop(n_photographs):
    rng = np.random.default_rng(1)
    similarities, left_out = rng.normal(size=(7, n_photographs)), rng.random((7, n_photographs)) < 0.3
    left_out[3] = True
    means = background_means(similarities, left_out)
    for row, kept, found in zip(similarities, ~left_out, means, strict=True):
        nearest = sorted(row[kept], reverse=True)
        expected = [np.mean(nearest[:n]) if len(nearest) else 0 for n in (1, 5, 20)]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_view_that_is_nearest_to_a_photograph_counts():
    rng = np.random.default_rng(2)
    queries, photographs = rng.normal(size=(5, 3, 4)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    found = background_similarities(queries, photographs)
    for i, query in enumerate(queries):
        for j, photograph in enumerate(photographs):
            expected = max(sum(float(a) * float(b) for a, b in zip(view, photograph, strict=True)) for view in query)
            assert found[i, j] == pytest.approx(expected, abs=1e-12)


def test_the_lead_is_over_the_most_similar_image_of_another_exhibit():
    answers = Predictions(np.array([4, 7, 2]), np.zeros(3), np.array([0.9, 0.5, 0.3]), np.zeros(3, dtype=np.int64))
    rows = np.array([[0, 1, 2], [1, 0, -1], [2, -1, -1]])
    similarities = np.array([[0.9, 0.6, 0.2], [0.8, 0.5, np.nan], [0.3, np.nan, np.nan]])
    match_labels = np.array([[4, 7, 2], [4, 7, 9], [2, 9, 9]])  # the second was reordered: it is not the most similar
    nearest = np.array([[0.9, 0.7], [0.8, 0.6], [0.3, 0.1]])
    found = evidence_of_search(answers, Matches(rows, similarities), match_labels, nearest)
    np.testing.assert_allclose(found, [[0.9, 0.3, 0.8], [0.5, -0.3, 0.7], [0.3, 0.3, 0.2]])


def regression(features, is_right, strength):
    """Standardised, with an L2 penalty of so much per query: scikit-learn's own composition."""
    model = LogisticRegression(C=1 / (strength * len(features)), max_iter=10_000, tol=1e-8)
    return make_pipeline(StandardScaler(), model).fit(features, is_right)


def naive_fit(answers, evidence, target, groups, background_queries, strength):
    """GAP of held-out parts, plain and calibrated, and the logits that were held out, query by query in loops."""
    is_right, n_met = answers.labels == target, (target >= 0).sum()
    plain, calibrated, logits = [], [], [[] for _ in range(N)]
    for fitted, judged in held_out_parts(is_right, groups, np.arange(N)):
        photographs = [j for j, query in enumerate(background_queries) if query in fitted]
        means = []
        for i in range(N):
            others = [j for j in photographs if background_queries[j] != i]
            nearest = sorted(evidence.background[i, others], reverse=True)
            means.append([np.mean(nearest[:n]) for n in (1, 5, 20)])
        features = np.column_stack([evidence.of_answer, means])
        logit = regression(features[fitted], is_right[fitted], strength).decision_function(features[judged])
        share = (target[judged] >= 0).sum() / n_met / REPEATS
        case = answers.labels[judged], target[judged]
        plain.append(share * gap(answers.log_confidence[judged], *case))
        calibrated.append(share * gap(logit, *case))
        for i, value in zip(judged, logit, strict=True):
            logits[i].append(value)
    return sum(plain), sum(calibrated), np.mean(logits, axis=1)


def test_parts_hold_whole_groups_and_share_out_right_answers():
    rng = np.random.default_rng(5)
    groups, is_right, places = rng.integers(60, size=200), rng.random(200) < 0.2, np.arange(3, 200)
    parts = held_out_parts(is_right, groups, places)
    assert len(parts) == 5 * REPEATS
    for repeat in range(REPEATS):
        of_repeat = parts[5 * repeat : 5 * repeat + 5]
        assert sorted(np.concatenate([judged for _, judged in of_repeat])) == places.tolist()
        for fitted, judged in of_repeat:
            assert sorted([*fitted, *judged]) == places.tolist()
            assert not {*groups[fitted]} & {*groups[judged]}
        most_of_a_group = max(is_right[places][groups[places] == group].sum() for group in groups)
        n_right = [is_right[judged].sum() for _, judged in of_repeat]
        assert max(n_right) - min(n_right) <= most_of_a_group
    assert [judged.tolist() for _, judged in parts[:5]] != [judged.tolist() for _, judged in parts[5:10]]
    assert held_out_parts(is_right, np.zeros(200), places) is None


def test_no_query_is_judged_by_a_model_or_a_background_that_knows_its_group():
    val = made_up()
    fit = fit_calibration(*val)
    plain, *_ = naive_fit(*val, STRENGTHS[0])
    reached = {strength: naive_fit(*val, strength)[1] for strength in STRENGTHS}
    assert fit.plain_gap == pytest.approx(plain)
    assert fit.calibrated_gap == pytest.approx(max(reached.values()))
    assert fit.calibration.strength == max(s for s in STRENGTHS if reached[s] == pytest.approx(fit.calibrated_gap))
    assert fit.gains
    assert fit.n_background == N_BACKGROUND


def test_the_fit_is_scikit_learns_scaled_to_what_held_out_logits_were_worth():
    answers, evidence, target, *_ = val = made_up()
    calibration, features, is_right = fit_calibration(*val).calibration, evidence.features(), answers.labels == target
    logit = regression(features, is_right, calibration.strength).decision_function(features)
    _, _, held_out = naive_fit(*val, calibration.strength)
    worth = regression(held_out[:, None], is_right, STRENGTHS[0])
    expected = worth.predict_log_proba(logit[:, None])[:, 1]
    np.testing.assert_allclose(calibration.log_confidence(features), expected, rtol=1e-6)
    applied = calibration.apply(answers, evidence)
    np.testing.assert_array_equal(applied.labels, answers.labels)
    np.testing.assert_array_equal(applied.log_confidence, calibration.log_confidence(features))


def test_evidence_that_tells_nothing_gains_nothing():
    answers, evidence, target, groups, background_queries = made_up()
    rng = np.random.default_rng(3)
    sure = Predictions(answers.labels, (answers.labels == target).astype(float), answers.similarity, answers.nearest)
    noise = Evidence(evidence.names, rng.normal(size=(N, 3)), rng.normal(size=(N, N_BACKGROUND)), evidence.is_same)
    fit = fit_calibration(sure, noise, target, groups, background_queries)
    assert fit is None or not fit.gains


def test_a_skipped_query_is_not_fitted_on_and_stays_last():
    answers, evidence, target, groups, background_queries = made_up()
    answers.log_confidence[7] = -np.inf
    answers.labels[7] = -1
    fit = fit_calibration(answers, evidence, target, groups, background_queries)
    evidence.of_answer[7] = 1e6
    assert fit_calibration(answers, evidence, target, groups, background_queries) == fit
    assert fit.calibration.apply(answers, evidence).log_confidence[7] == -np.inf


@pytest.mark.parametrize("are_right", [True, False])
def test_where_all_answers_are_alike_nothing_is_fitted(are_right):
    answers, evidence, target, groups, background_queries = made_up()
    labels = np.where(target < 0, 0, target) if are_right else np.full(N, 11)
    target = np.where(target < 0, 0, target) if are_right else target
    same = Predictions(labels, answers.log_confidence, answers.similarity, answers.nearest)
    assert fit_calibration(same, evidence, target, groups, background_queries) is None
