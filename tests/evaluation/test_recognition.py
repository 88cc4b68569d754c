import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

from metilr.data.ground_truth import GroundTruth, load_ground_truth
from metilr.errors import UserError
from metilr.evaluation.options import MethodOptions
from metilr.evaluation.recognition import check_method, recognise
from metilr.extraction.descriptors import Descriptors

GRID_K = (1, 2, 3, 5, 7, 10, 15, 20, 50)  # the Met paper's
GRID_TAU = (0.01, 0.1, 1, 5, 10, 15, 20, 25, 30, 50, 100, 500)


def a_truth(database_labels, val, test, n_classes):
    labels = {"database": database_labels, "val": val, "test": test}
    labels = {split: np.array(of_split, dtype=np.int64) for split, of_split in labels.items()}
    paths = {split: tuple(f"{split}/{i}.jpg" for i in range(len(of))) for split, of in labels.items()}
    ids = 100 + 3 * np.arange(n_classes)
    return GroundTruth(Path("museum"), "full", paths, labels, ids, {split: split for split in labels})


def synthetic(seed=0, n_classes=25, n_queries=40, width=12, n_parts=1):
    """Classes of one to three images; queries near a class, or of none."""
    rng = np.random.default_rng(seed)
    database_labels = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, n_classes)])
    rng.shuffle(database_labels)
    centres = rng.standard_normal((n_classes, width)) + 0.7
    rows = {"database": centres[database_labels] + 0.6 * rng.standard_normal((len(database_labels), width))}
    labels = {}
    for split in ("val", "test"):
        labels[split] = np.where(rng.random(n_queries) < 0.4, rng.integers(0, n_classes, n_queries), -1)
        base = np.where(labels[split][:, None] >= 0, centres[labels[split]], rng.standard_normal((n_queries, width)))
        rows[split] = base + 0.9 * rng.standard_normal((n_queries, width))
    rows = {s: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for s, x in rows.items()}
    truth = a_truth(database_labels, labels["val"], labels["test"], n_classes)
    parts = {split: np.array_split(x, n_parts, axis=1) for split, x in rows.items()}
    made = {split: np.ones(len(x), dtype=bool) for split, x in rows.items()}
    return Descriptors(parts, made, [{}] * n_parts), truth, rows


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def answer_by_loop(query, database, database_labels, n_classes, k, tau):
    """The Met paper's classifier for one query, in float64: label, log-confidence, similarity, nearest row."""
    similarities = [float(np.dot(query, row)) for row in database]
    nearest = sorted(range(len(database)), key=lambda row: (-similarities[row], row))[:k]
    s, witness = [0.0] * n_classes, [-1] * n_classes
    for row in nearest:
        label = database_labels[row]
        if witness[label] == -1:  # the first is the most similar
            s[label], witness[label] = similarities[row], row
    best = min(range(n_classes), key=lambda label: (-s[label], label))
    log_confidence = -math.log1p(math.fsum(math.exp(tau * (s[c] - s[best])) for c in range(n_classes) if c != best))
    return best, log_confidence, s[best], witness[best]


def gap_by_loop(labels, log_confidences, truth, met_only=False):
    order = [i for i in range(len(truth)) if truth[i] >= 0 or not met_only]
    order.sort(key=lambda i: -log_confidences[i])
    n_right, total = 0, 0.0
    for rank, i in enumerate(order, start=1):
        if truth[i] >= 0 and labels[i] == truth[i]:
            n_right += 1
            total += n_right / rank
    return total / sum(label >= 0 for label in truth)


def check_against_loop(recognition, truth, ready, k, tau, kept=None):
    """Compare every answer and figure; ``kept`` gives, by split, the rows that have a descriptor."""
    kept = kept or {split: list(range(len(x))) for split, x in ready.items()}
    database = ready["database"][kept["database"]]
    database_labels = truth.labels["database"][kept["database"]]
    for split in ("val", "test"):
        target = truth.labels[split].tolist()
        labels, confidences = [-1] * len(target), [-math.inf] * len(target)
        answers = recognition.answers[split]
        for i in range(len(target)):
            if i not in kept[split]:
                assert answers.labels[i] == -1 and answers.log_confidence[i] == -math.inf
                assert math.isnan(answers.similarity[i]) and answers.nearest[i] == -1
                continue
            label, confidence, similarity, row = answer_by_loop(
                ready[split][i], database, database_labels, truth.n_classes, k, tau
            )
            labels[i], confidences[i] = label, confidence
            assert answers.labels[i] == label
            assert answers.nearest[i] == (-1 if row == -1 else kept["database"][row])
            np.testing.assert_allclose(answers.similarity[i], similarity, atol=1e-6)
            np.testing.assert_allclose(answers.log_confidence[i], confidence, rtol=1e-4 * max(1, tau / 10), atol=1e-9)
        figures = recognition.figures[split]
        right = sum(label == true for label, true in zip(labels, target, strict=True) if true >= 0)
        assert figures["gap"] == pytest.approx(gap_by_loop(labels, confidences, target), abs=1e-6)
        assert figures["gap_minus"] == pytest.approx(gap_by_loop(labels, confidences, target, met_only=True), abs=1e-6)
        assert figures["acc"] == pytest.approx(right / sum(true >= 0 for true in target))
        assert figures["gap_least"] <= figures["gap"] <= figures["gap_greatest"]
        assert figures["n_queries"] == len(target) and figures["n_met"] == sum(true >= 0 for true in target)
        assert figures["n_skipped"] == len(target) - len(kept[split])


@pytest.mark.parametrize(("k", "tau"), [(1, 1.0), (3, 15.0), (10, 100.0), (50, 0.1), (7, 500.0)])
def test_given_k_and_tau_without_whitening(k, tau):
    descriptors, truth, rows = synthetic()
    recognition = recognise(descriptors, truth, MethodOptions(whitening="none", k=k, tau=tau))
    assert recognition.tuning is None and recognition.whitening is None
    assert (recognition.k, recognition.tau) == (k, tau)
    check_against_loop(recognition, truth, {s: unit(x.astype(np.float64)) for s, x in rows.items()}, k, tau)


def test_descriptors_of_any_length_are_compared_at_unit_length():
    descriptors, truth, rows = synthetic(n_parts=3)
    lengths = {split: np.linspace(0.1, 9, len(x), dtype=np.float32)[:, None] for split, x in rows.items()}
    parts = {split: [part * lengths[split] for part in descriptors.parts[split]] for split in rows}
    scaled = recognise(
        Descriptors(parts, descriptors.made, [{}] * 3), truth, MethodOptions(whitening="none", k=3, tau=15.0)
    )
    check_against_loop(scaled, truth, {s: unit(x.astype(np.float64)) for s, x in rows.items()}, 3, 15.0)


@pytest.mark.parametrize("n_parts", [1, 2])
@pytest.mark.parametrize("dim", [None, 5])
def test_pca_whitening_of_the_concatenation_equals_scikit_learn(dim, n_parts):
    descriptors, truth, rows = synthetic(seed=1, n_parts=n_parts)
    recognition = recognise(descriptors, truth, MethodOptions(whitening_dim=dim, k=3, tau=10.0))
    pca = PCA(n_components=dim, whiten=True, svd_solver="full").fit(rows["database"].astype(np.float64))
    ready = {split: unit(pca.transform(x.astype(np.float64))) for split, x in rows.items()}
    assert recognition.whitening.dim == (dim or 12)
    check_against_loop(recognition, truth, ready, 3, 10.0)


def test_k_and_tau_are_the_best_of_the_grid_on_val():
    descriptors, truth, rows = synthetic(seed=2)
    recognition = recognise(descriptors, truth, MethodOptions(whitening="none"))
    ready = {split: unit(x.astype(np.float64)) for split, x in rows.items()}
    assert recognition.tuning.k_grid == GRID_K and recognition.tuning.tau_grid == GRID_TAU
    database, database_labels = ready["database"], truth.labels["database"]
    target, found = truth.labels["val"].tolist(), []
    for i, k in enumerate(GRID_K):
        for j, tau in enumerate(GRID_TAU):
            answers = [answer_by_loop(q, database, database_labels, truth.n_classes, k, tau) for q in ready["val"]]
            value = gap_by_loop([a[0] for a in answers], [a[1] for a in answers], target)
            assert recognition.tuning.surface[i, j] == pytest.approx(value, abs=1e-6), (k, tau)
            # Of equals the smaller k, then the tau whose ratio to 50 is nearest to 1.
            found.append((-round(value, 9), k, max(tau / 50, 50 / tau), tau))
    _, k, _, tau = min(found)
    assert (recognition.k, recognition.tau) == (k, tau)
    check_against_loop(recognition, truth, ready, k, tau)


def test_only_what_is_not_given_is_tuned_and_test_has_no_say():
    descriptors, truth, _ = synthetic(seed=2)
    given_k = recognise(descriptors, truth, MethodOptions(whitening="none", k=4))
    assert given_k.k == 4 and given_k.tuning.k_grid == (4,) and given_k.tuning.tau_grid == GRID_TAU
    given_tau = recognise(descriptors, truth, MethodOptions(whitening="none", tau=33.0))
    assert given_tau.tau == 33.0 and given_tau.tuning.tau_grid == (33.0,) and given_tau.tuning.k_grid == GRID_K
    other_test = {**descriptors.parts, "test": [-part[::-1] for part in descriptors.parts["test"]]}
    again = recognise(Descriptors(other_test, descriptors.made, [{}]), truth, MethodOptions(whitening="none"))
    first = recognise(descriptors, truth, MethodOptions(whitening="none"))
    np.testing.assert_array_equal(again.tuning.surface, first.tuning.surface)
    assert (again.k, again.tau) == (first.k, first.tau)


@pytest.mark.parametrize("whitening", ["none", "pca"])
def test_images_left_out(whitening):
    _, truth, rows = synthetic(seed=3)
    rng = np.random.default_rng(0)
    made = {split: rng.random(len(x)) > 0.25 for split, x in rows.items()}
    gone_class = 24  # the last: the largest label that is left does not tell N
    made["database"] &= truth.labels["database"] != gone_class  # a class without a row still counts in N
    kept = {split: np.flatnonzero(m).tolist() for split, m in made.items()}
    garbage = {}
    for split, x in rows.items():
        x = x.copy()
        x[~made[split]] = 7.0  # must be read nowhere
        garbage[split] = [x]
    recognition = recognise(Descriptors(garbage, made, [{}]), truth, MethodOptions(whitening=whitening, k=3, tau=10.0))
    if whitening == "none":
        ready = {split: unit(x.astype(np.float64)) for split, x in rows.items()}
    else:
        pca = PCA(whiten=True, svd_solver="full").fit(rows["database"][made["database"]].astype(np.float64))
        ready = {split: unit(pca.transform(x.astype(np.float64))) for split, x in rows.items()}
    assert truth.n_classes == 25
    check_against_loop(recognition, truth, ready, 3, 10.0, kept)


def test_all_queries_left_out_is_no_crash():
    descriptors, truth, rows = synthetic()
    made = {**descriptors.made, "val": np.zeros(len(rows["val"]), dtype=bool)}
    recognition = recognise(Descriptors(descriptors.parts, made, [{}]), truth)
    assert recognition.figures["val"]["gap"] == recognition.figures["val"]["acc"] == 0
    assert recognition.figures["test"]["acc"] > 0 and recognition.k == 1


def test_a_database_smaller_than_the_grid():
    descriptors, truth, _ = synthetic(n_classes=4, width=3)  # 8 images
    recognition = recognise(descriptors, truth)
    assert recognition.tuning.k_grid == (1, 2, 3, 5, 7)
    assert recognition.whitening.dim == 3


def refused(descriptors, truth, **options):
    with pytest.raises(UserError) as caught:
        recognise(descriptors, truth, MethodOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_the_descriptors():
    descriptors, truth, _ = synthetic()
    assert "k 51: the database has 50 images; choose k from 1 to 50" in refused(descriptors, truth, k=51)
    made = {**descriptors.made, "database": np.arange(50) < 20}
    assert "choose k from 1 to 20" in refused(Descriptors(descriptors.parts, made, [{}]), truth, k=21)
    assert "whitening_dim 13: 50 database images of width 12 support 1 to 12" in refused(
        descriptors, truth, whitening_dim=13
    )
    nothing = {**descriptors.made, "database": np.zeros(50, dtype=bool)}
    for whitening in ("none", "pca"):
        assert "no database image" in refused(Descriptors(descriptors.parts, nothing, [{}]), truth, whitening=whitening)


def test_a_saved_whitening_gives_the_same_answers(tmp_path):
    descriptors, truth, _ = synthetic()
    first = recognise(descriptors, truth, MethodOptions(whitening_dim=6, k=2, tau=10.0))
    first.whitening.save(tmp_path / "w.npz")
    again = recognise(descriptors, truth, MethodOptions(whitening=str(tmp_path / "w.npz"), k=2, tau=10.0))
    np.testing.assert_array_equal(again.answers["test"].log_confidence, first.answers["test"].log_confidence)
    assert again.figures == first.figures


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 51}, "k 51: the database has 50 images; choose k from 1 to 50"),
        ({"k": 0}, "k 0"),
        ({"tau": 0.0}, "tau 0"),
        ({"tau": float("nan")}, "tau nan"),
        ({"whitening": "nowhere.npz"}, "whitening nowhere.npz: no such file"),
        ({"whitening": "none", "whitening_dim": 5}, "whitening_dim has no effect without whitening pca or learned"),
        ({"whitening_dim": 50}, "whitening_dim 50: 50 database images of width 64 support 1 to 49"),
        ({"whitening_dim": 0}, "whitening_dim 0"),
        ({"whitening_dim": 33, "width": 32}, "support 1 to 32"),
        ({"whitening_shrinkage": 1.5}, "whitening_shrinkage 1.5: choose a number from 0"),
        ({"whitening": "none", "whitening_shrinkage": 0.5}, "whitening_shrinkage has no effect"),
        ({"whitening": "learned", "n_classes": 50, "visits": 0}, "visits 0: with one image an exhibit"),
        ({"search_device": "gpu"}, "FAISS sees no GPU"),
        ({"search_device": "tpu"}, "search_device tpu: choose one of cpu, gpu"),
        ({"geometric_reorder": True}, "geometric_reorder has no effect without geometric_check"),
        ({"visits": 3}, "visits has no effect without"),
        ({"query_crops": (0.5, 1.5)}, "query_crops [0.5, 1.5]: choose shares between 0 and 1"),
    ],
)
def test_options_are_refused_before_any_image_is_read(options, said):
    def check(width=64, n_classes=25, **options):
        check_method(MethodOptions(**options), 50, width, n_classes)

    with pytest.raises(UserError) as caught:
        check(**options)
    assert said in str(caught.value) and "--" not in str(caught.value) and "\n" not in str(caught.value)
    check()
    check(whitening_dim=49, k=50, tau=500.0)
    check(whitening="learned", visits=0)  # pairs of images of one exhibit
    check(whitening="learned", n_classes=50)


def test_published_mini_set_at_its_real_scale(met_root):
    truth = load_ground_truth(met_root, "mini")
    rng = np.random.default_rng(0)
    rows = {split: rng.standard_normal((len(of), 512), dtype=np.float32) for split, of in truth.paths.items()}
    first_of_class = {label: row for row, label in reversed(list(enumerate(truth.labels["database"].tolist())))}
    for split in ("val", "test"):  # the first 40 met queries are near an image of their class
        for query in np.flatnonzero(truth.labels[split] >= 0)[:40]:
            noise = 0.1 * rng.standard_normal(512, dtype=np.float32)
            rows[split][query] = rows["database"][first_of_class[int(truth.labels[split][query])]] + noise
    made = {split: np.ones(len(x), dtype=bool) for split, x in rows.items()}
    recognition = recognise(Descriptors({s: [x] for s, x in rows.items()}, made, [{}]), truth)
    assert recognition.figures["val"]["n_queries"] == 2_165 and recognition.figures["test"]["n_queries"] == 19_319
    for split, n_met in (("val", 129), ("test", 1_003)):
        assert recognition.figures[split]["n_met"] == n_met
        assert recognition.figures[split]["acc"] == pytest.approx(40 / n_met, abs=2 / n_met)  # two more by chance
        assert recognition.figures[split]["gap"] == pytest.approx(40 / n_met, abs=2 / n_met)
