"""A calibrated confidence from descriptors to figures: what it sees of val, and what it leaves alone."""

from dataclasses import replace

import numpy as np
import pytest

from metilr.evaluation import calibration
from metilr.evaluation.calibration import background_of, calibrate_recognition
from metilr.evaluation.options import MethodOptions
from metilr.evaluation.recognition import figures_of, recognise
from metilr.metrics import gap
from tests.evaluation.test_recognition import synthetic, unit

PLAIN = MethodOptions("none")


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr("metilr.retrieval.confidence.REPEATS", 2)


def museum(n_queries=300):
    """Queries, and distractors that show five other things again and again: their likeness tells them apart."""
    descriptors, truth, rows = synthetic(n_queries=n_queries)
    rng = np.random.default_rng(9)
    things = rng.standard_normal((5, 12))
    for split in ("val", "test"):
        is_distractor = truth.labels[split] == -1
        shown = things[rng.integers(5, size=is_distractor.sum())]
        rows[split][is_distractor] = unit(shown + 0.2 * rng.standard_normal(shown.shape)).astype(np.float32)
        descriptors.parts[split][:] = [rows[split]]
    return descriptors, truth, rows


def test_strangers_that_are_like_val_s_distractors_lose_confidence_and_labels_stay():
    descriptors, truth, _ = museum()
    plain = recognise(descriptors, truth, PLAIN)
    calibrated, fit = calibrate_recognition(plain, descriptors, truth, PLAIN)
    assert fit.gains and calibrated.calibration == fit.calibration
    for split, before in plain.answers.items():
        after = calibrated.answers[split]
        np.testing.assert_array_equal(after.labels, before.labels)
        np.testing.assert_array_equal(after.similarity, before.similarity)
        target = truth.labels[split]
        assert gap(after.log_confidence, after.labels, target) > gap(before.log_confidence, before.labels, target)
    assert figures_of(calibrated, truth)["threshold"]["log_confidence"] == pytest.approx(np.log(0.9))


def test_test_has_no_say():
    descriptors, truth, rows = museum()
    _, fit = calibrate_recognition(recognise(descriptors, truth, PLAIN), descriptors, truth, PLAIN)
    descriptors.parts["test"][:] = [unit(rows["test"][::-1] + 1).astype(np.float32)]
    truth.labels["test"][:] = np.roll(truth.labels["test"], 7)
    _, again = calibrate_recognition(recognise(descriptors, truth, PLAIN), descriptors, truth, PLAIN)
    assert again == fit


def seen_of_background(monkeypatch, descriptors, truth):
    """Which queries of val the background of each query holds, bool ``(Q, Q)``, and the groups that are held out."""
    seen = {}

    def fit(answers, evidence, target, groups, background_queries):
        seen["kept"] = np.zeros((len(target), len(target)), dtype=bool)
        seen["kept"][:, background_queries] = ~evidence.is_same
        seen["groups"] = groups

    monkeypatch.setattr("metilr.evaluation.calibration.fit_calibration", fit)
    calibrate_recognition(recognise(descriptors, truth, PLAIN), descriptors, truth, PLAIN)
    return seen["kept"], seen["groups"]


def test_a_query_leaves_out_itself_its_copies_and_what_its_photographer_took(monkeypatch):
    descriptors, truth, rows = museum()
    distractors = np.flatnonzero(truth.labels["val"] == -1)
    rows["val"][distractors[3]] = rows["val"][distractors[8]]  # one file under two names
    taken_by = np.full(300, -1)
    taken_by[[distractors[0], distractors[5], 2]] = 0
    truth = replace(truth, photographers={"val": taken_by})
    kept, groups = seen_of_background(monkeypatch, descriptors, truth)
    for i in range(300):
        for j in range(300):
            is_same = i == j or {i, j} == {distractors[3], distractors[8]}
            is_same |= taken_by[i] == taken_by[j] == 0
            assert kept[i, j] == (j in distractors and not is_same)
            is_one_exhibit = truth.labels["val"][i] == truth.labels["val"][j] >= 0
            if taken_by[i] == taken_by[j] == -1:
                assert (groups[i] == groups[j]) == (is_same or is_one_exhibit)
    assert len({*groups[taken_by == 0]}) == 1 and not set(groups[taken_by == 0]) & set(groups[taken_by == -1])


def test_too_few_distractors_are_no_background():
    descriptors, truth, _ = museum()
    is_distractor = truth.labels["val"] == -1
    assert len(background_of(descriptors, truth, None)) == is_distractor.sum()
    truth.labels["val"][np.flatnonzero(is_distractor)[19:]] = 0
    assert len(background_of(descriptors, truth, None)) == 0
    _, fit = calibrate_recognition(recognise(descriptors, truth, PLAIN), descriptors, truth, PLAIN)
    assert fit.calibration.features == ["similarity", "lead", "mean_10"]


def test_queries_without_a_descriptor_stay_last():
    descriptors, truth, _ = museum()
    for split in ("val", "test"):
        descriptors.is_valid[split][[4, 9]] = False
    calibrated, fit = calibrate_recognition(recognise(descriptors, truth, PLAIN), descriptors, truth, PLAIN)
    assert fit.gains
    for of in calibrated.answers.values():
        assert np.isneginf(of.log_confidence[[4, 9]]).all() and np.isfinite(np.delete(of.log_confidence, [4, 9])).all()


def test_of_the_background_of_test_the_nearest_are_all_that_counts(monkeypatch):
    descriptors, truth, rows = museum()
    method = MethodOptions("none", query_crops=[0.8])
    crops = {f"{split}_crops": unit(rows[split] + 0.3 * rows[split][:, ::-1]) for split in ("val", "test")}
    descriptors.parts.update({split: [part.astype(np.float32)] for split, part in crops.items()})
    descriptors.is_valid.update({split: np.ones(len(part), dtype=bool) for split, part in crops.items()})
    seen = []
    gather = calibration.gather_evidence
    monkeypatch.setattr(calibration, "gather_evidence", lambda *of: seen.append(gather(*of)) or seen[-1])
    calibrate_recognition(recognise(descriptors, truth, method), descriptors, truth, method)
    background = rows["val"][truth.labels["val"] == -1].astype(float)
    views = np.stack([descriptors.parts[split][0] for split in ("test", "test_crops")], axis=1).astype(float)
    nearest = -np.sort(-(views @ background.T).max(axis=1), axis=1)
    expected = np.column_stack([nearest[:, :n].mean(axis=1) for n in (1, 5, 20)])
    np.testing.assert_allclose(seen[-1].features()[:, -3:], expected, atol=1e-6)
