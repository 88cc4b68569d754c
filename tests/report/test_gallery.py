import json

import numpy as np
import pytest
from PIL import Image

from metilr.data.ground_truth import load_ground_truth
from metilr.evaluation.recognition import Recognition
from metilr.report.page import OUTCOMES, arrange, write_gallery
from metilr.retrieval.knn import Matches, Predictions

# The tiny museum's labels by exhibit: 9, 12, 33, 41, 70, 500. Val shows 9, 70, 41, 9 and three distractors.
ANSWERS = Predictions(
    labels=np.array([0, 0, 3, 1, 2, 5, -1]),
    log_confidence=np.array([-0.5, -0.1, -0.01, -2.0, -0.2, -3.0, -np.inf]),
    similarity=np.full(7, 0.5),
    nearest=np.array([2, 2, 4, 6, 7, 5, -1]),
)
MATCHES = Matches(
    rows=np.array([[2, 0], [2, 0], [4, 5], [6, 2], [7, 6], [5, -1], [-1, -1]]),
    similarities=np.array(
        [[0.9, 0.5], [0.8, 0.7], [0.9, 0.1], [0.6, 0.55], [0.5, 0.4], [0.3, np.nan], [np.nan, np.nan]]
    ),
)


@pytest.fixture
def answered(tiny_museum):
    truth = load_ground_truth(tiny_museum)
    splits = ("val", "test")
    recognition = Recognition(dict.fromkeys(splits, ANSWERS), {}, None, 1, 50.0, None, dict.fromkeys(splits, MATCHES))
    return truth, recognition


def test_failures_come_first(answered):
    gallery = arrange(*answered, "val", threshold=-1.0)
    outcomes = [OUTCOMES[outcome] for outcome in gallery.outcomes]
    assert outcomes == ["right", "wrong", "right", "wrong", "false alarm", "passed over", "passed over"]
    assert gallery.order.tolist() == [1, 3, 4, 0, 2, 5, 6]  # wrong: surest first; right: least sure first
    np.testing.assert_allclose(gallery.margins, [0.4, 0.1, 0.8, 0.05, 0.1, np.nan, np.nan], atol=1e-12)
    assert gallery.low_margin == pytest.approx(np.quantile([0.4, 0.1, 0.8, 0.05], 0.25))


def test_without_a_threshold_no_distractor_is_a_false_alarm(answered):
    gallery = arrange(*answered, "val", threshold=None)
    assert "false alarm" not in {OUTCOMES[outcome] for outcome in gallery.outcomes}


def test_pictures_go_to_the_first_of_each_outcome(answered):
    gallery = arrange(*answered, "val", threshold=-1.0)
    assert gallery.first(1) == [1, 4, 0, 5]
    assert sorted(gallery.first(9)) == list(range(7))


def test_what_is_written(answered, tmp_path):
    truth, recognition = answered
    (truth.image(truth.paths["val"][3])).write_bytes(b"no image")
    galleries = {split: arrange(truth, recognition, split, -1.0) for split in ("val", "test")}
    n_missing = write_gallery(tmp_path, truth, recognition, galleries, 9, None, quiet=True)
    assert n_missing == 1
    text = (tmp_path / "gallery.js").read_text()
    content = json.loads(text.removeprefix("window.GALLERY = ").removesuffix(";\n"))
    assert set(content["pictures"]) == {file.stem for file in (tmp_path / "pictures").iterdir()}
    assert "val3" not in content["pictures"] and {"val0", "test6", "d2", "d4"} <= set(content["pictures"])
    entry = content["splits"]["val"][0]
    row, path, kind, label, answer, outcome, log_confidence, margin, rows, similarities, inliers = entry
    assert (row, path, kind) == (1, truth.paths["val"][1], "met")
    assert [content["exhibits"][label], content["exhibits"][answer]] == [70, 9]
    assert (content["outcomes"][outcome], log_confidence) == ("wrong", -0.1)
    assert margin == pytest.approx(0.1) and (rows, similarities, inliers) == ([2, 0], [0.8, 0.7], [])
    assert content["database"]["2"] == [truth.paths["database"][2], 0]
    skipped = content["splits"]["val"][-1]
    assert skipped[4] is None and skipped[6:] == [None, None, [], [], []]
    with Image.open(tmp_path / "pictures" / "d2.jpg") as picture:
        assert max(picture.size) <= 200
