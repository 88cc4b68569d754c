"""Answers and figures from descriptors, against the paper's classifier and GAP as loops over queries."""

import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

from metilr.data.ground_truth import GroundTruth, load_ground_truth
from metilr.errors import UserError
from metilr.evaluation.options import MethodOptions
from metilr.evaluation.recognition import Recognition, check_method, check_recognition, recognise
from metilr.extraction.descriptors import Descriptors
from metilr.geometry.check import GeometricCheck
from metilr.metrics import acc, gap
from metilr.retrieval.knn import Matches, Predictions

GRID_K = (1, 2, 3, 5, 7, 10, 15, 20, 50)  # the Met paper's
GRID_TAU = (0.01, 0.1, 1, 5, 10, 15, 20, 25, 30, 50, 100, 500)


def synthetic(seed=0, n_classes=25, n_queries=40, width=12, n_parts=1):
    """Classes of one to three images; queries near a class, or of none."""
    rng = np.random.default_rng(seed)
    labels = {"database": np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, n_classes)])}
    rng.shuffle(labels["database"])
    centres = rng.standard_normal((n_classes, width)) + 0.7
    rows = {"database": centres[labels["database"]] + 0.6 * rng.standard_normal((2 * n_classes, width))}
    for split in ("val", "test"):
        labels[split] = np.where(rng.random(n_queries) < 0.4, rng.integers(0, n_classes, n_queries), -1)
        base = np.where(labels[split][:, None] >= 0, centres[labels[split]], rng.standard_normal((n_queries, width)))
        rows[split] = base + 0.9 * rng.standard_normal((n_queries, width))
    rows = {s: unit(x).astype(np.float32) for s, x in rows.items()}
    paths = {split: tuple(f"{split}/{i}.jpg" for i in range(len(of))) for split, of in labels.items()}
    ids = 100 + 3 * np.arange(n_classes)
    truth = GroundTruth(Path("museum"), "full", paths, labels, ids, {split: split for split in labels})
    parts = {split: np.array_split(x, n_parts, axis=1) for split, x in rows.items()}
    made = {split: np.ones(len(x), dtype=bool) for split, x in rows.items()}
    return Descriptors(parts, made, [{}] * n_parts), truth, rows


def unit(x):
    x = x.astype(np.float64)
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


def check_against_loop(recognition, truth, rows, k, tau, kept=None):
    """Compare every answer; ``kept`` gives, by split, the rows that have a descriptor."""
    kept = kept or {split: list(range(len(x))) for split, x in rows.items()}
    ready = {split: unit(x) for split, x in rows.items()}
    database, database_labels = ready["database"][kept["database"]], truth.labels["database"][kept["database"]]
    for split in ("val", "test"):
        answers = recognition.answers[split]
        for i, query in enumerate(ready[split]):
            if i not in kept[split]:
                assert answers.labels[i] == -1 and answers.log_confidence[i] == -math.inf
                assert math.isnan(answers.similarity[i]) and answers.nearest[i] == -1
                continue
            expected = answer_by_loop(query, database, database_labels, truth.n_classes, k, tau)
            label, log_confidence, similarity, row = expected
            assert answers.labels[i] == label
            assert answers.nearest[i] == (-1 if row == -1 else kept["database"][row])
            np.testing.assert_allclose(answers.similarity[i], similarity, atol=1e-6)
            rtol = 1e-4 * max(1, tau / 10)
            np.testing.assert_allclose(answers.log_confidence[i], log_confidence, rtol=rtol, atol=1e-9)
        assert recognition.ranks[split].tolist() == pytest.approx(
            [
                rank_by_loop(query, database, database_labels, target, i in kept[split])
                for i, (query, target) in enumerate(zip(ready[split], truth.labels[split].tolist(), strict=True))
            ],
            nan_ok=True,
        )


def rank_by_loop(query, database, database_labels, target, has_descriptor):
    """The place of the exhibit ``target`` among the exhibits of the rows, most similar first."""
    if target == -1:
        return math.nan
    rows = sorted(range(len(database)), key=lambda row: (-float(np.dot(query, database[row])), row))
    order = list(dict.fromkeys(database_labels[rows].tolist()))
    return order.index(target) + 1 if has_descriptor and target in order else math.inf


@pytest.mark.parametrize(("k", "tau"), [(1, 1.0), (10, 100.0), (50, 0.1), (7, 500.0)])
def test_given_k_and_tau_without_whitening(k, tau):
    """Descriptors of any length, in parts, are compared at unit length."""
    descriptors, truth, rows = synthetic(n_parts=3)
    lengths = {split: np.linspace(0.1, 9, len(x), dtype=np.float32)[:, None] for split, x in rows.items()}
    parts = {split: [part * lengths[split] for part in descriptors.parts[split]] for split in rows}
    scaled = Descriptors(parts, descriptors.is_valid, [{}] * 3)
    recognition = recognise(scaled, truth, MethodOptions(whitening="none", k=k, tau=tau))
    assert recognition.tuning is None and recognition.whitening is None
    assert (recognition.k, recognition.tau) == (k, tau)
    check_against_loop(recognition, truth, rows, k, tau)


@pytest.mark.parametrize(("dim", "n_parts"), [(None, 2), (5, 1)])
def test_pca_whitening_of_the_concatenation_equals_scikit_learn(dim, n_parts):
    descriptors, truth, rows = synthetic(seed=1, n_parts=n_parts)
    recognition = recognise(descriptors, truth, MethodOptions(whitening_dim=dim, k=3, tau=10.0))
    pca = PCA(n_components=dim, whiten=True, svd_solver="full").fit(rows["database"].astype(np.float64))
    assert recognition.whitening.dim == (dim or 12)
    whitened = {split: pca.transform(x.astype(np.float64)) for split, x in rows.items()}
    check_against_loop(recognition, truth, whitened, 3, 10.0)


def test_k_and_tau_are_the_best_of_the_grid_on_val():
    descriptors, truth, rows = synthetic(seed=2)
    recognition = recognise(descriptors, truth, MethodOptions(whitening="none"))
    tuning, database, queries = recognition.tuning, unit(rows["database"]), unit(rows["val"])
    assert tuning.k_grid == GRID_K and tuning.tau_grid == GRID_TAU
    target, found = truth.labels["val"], []
    for i, k in enumerate(GRID_K):
        for j, tau in enumerate(GRID_TAU):
            answers = [answer_by_loop(q, database, truth.labels["database"], truth.n_classes, k, tau) for q in queries]
            value = gap([a[1] for a in answers], [a[0] for a in answers], target)
            assert tuning.surface[i, j] == pytest.approx(value, abs=1e-6), (k, tau)
            # Of equals the smaller k, then the tau whose ratio to 50 is nearest to 1.
            found.append((-round(value, 9), k, max(tau / 50, 50 / tau), tau))
    _, k, _, tau = min(found)
    assert (recognition.k, recognition.tau) == (k, tau)
    check_against_loop(recognition, truth, rows, recognition.k, recognition.tau)


def test_only_what_is_not_given_is_tuned_and_test_has_no_say():
    descriptors, truth, _ = synthetic(seed=2)
    given_k = recognise(descriptors, truth, MethodOptions(whitening="none", k=4))
    assert given_k.k == 4 and given_k.tuning.k_grid == (4,) and given_k.tuning.tau_grid == GRID_TAU
    given_tau = recognise(descriptors, truth, MethodOptions(whitening="none", tau=33.0))
    assert given_tau.tau == 33.0 and given_tau.tuning.tau_grid == (33.0,) and given_tau.tuning.k_grid == GRID_K
    other_test = {**descriptors.parts, "test": [-part[::-1] for part in descriptors.parts["test"]]}
    again = recognise(Descriptors(other_test, descriptors.is_valid, [{}]), truth, MethodOptions(whitening="none"))
    first = recognise(descriptors, truth, MethodOptions(whitening="none"))
    np.testing.assert_array_equal(again.tuning.surface, first.tuning.surface)
    assert (again.k, again.tau) == (first.k, first.tau)


@pytest.mark.parametrize("options", [{"whitening": "none"}, {"whitening_dim": 5, "k": 1}])
def test_prototypes_have_one_row_an_exhibit_and_one_neighbour(options):
    descriptors, truth, rows = synthetic(seed=4)
    recognition = recognise(descriptors, truth, MethodOptions(database_rows="prototypes", **options))
    assert recognition.tuning.k_grid == (1,) and recognition.tuning.tau_grid == GRID_TAU
    if recognition.whitening is not None:
        pca = PCA(n_components=5, whiten=True, svd_solver="full").fit(rows["database"].astype(np.float64))
        rows = {split: pca.transform(x.astype(np.float64)) for split, x in rows.items()}
    database, labels = unit(rows["database"]), truth.labels["database"]
    prototypes = unit(np.array([database[labels == label].mean(axis=0) for label in range(truth.n_classes)]))
    for split in ("val", "test"):
        similarities, answers = unit(rows[split]) @ prototypes.T, recognition.answers[split]
        best = similarities.max(axis=1)
        near = best > 0  # else the classes that are no neighbour, of similarity 0, are nearer
        assert near.sum() > 30 and (answers.nearest[~near] == -1).all()
        assert answers.labels[near].tolist() == similarities.argmax(axis=1)[near].tolist()
        np.testing.assert_allclose(answers.similarity[near], best[near], atol=1e-6)
        odds = (truth.n_classes - 1) * np.exp(-recognition.tau * best[near])
        np.testing.assert_allclose(answers.log_confidence[near], -np.log1p(odds), rtol=1e-4)
        assert (labels[answers.nearest[near]] == answers.labels[near]).all()


@pytest.mark.parametrize("whitening", ["none", "pca"])
def test_images_left_out(whitening):
    _, truth, rows = synthetic(seed=3)
    rng = np.random.default_rng(0)
    made = {split: rng.random(len(x)) > 0.25 for split, x in rows.items()}
    made["database"] &= truth.labels["database"] != 24  # a class without a row still counts in N, the last one too
    kept = {split: np.flatnonzero(m).tolist() for split, m in made.items()}
    garbage = {split: [np.where(made[split][:, None], x, np.float32(7))] for split, x in rows.items()}  # read nowhere
    recognition = recognise(Descriptors(garbage, made, [{}]), truth, MethodOptions(whitening=whitening, k=3, tau=10.0))
    if whitening == "pca":
        pca = PCA(whiten=True, svd_solver="full").fit(rows["database"][made["database"]].astype(np.float64))
        rows = {split: pca.transform(x.astype(np.float64)) for split, x in rows.items()}
    check_against_loop(recognition, truth, rows, 3, 10.0, kept)


def test_all_queries_left_out_and_a_database_smaller_than_the_grid():
    descriptors, truth, rows = synthetic(n_classes=4, width=3)  # 8 images
    made = {**descriptors.is_valid, "val": np.zeros(len(rows["val"]), dtype=bool)}
    recognition = recognise(Descriptors(descriptors.parts, made, [{}]), truth)
    cases = recognition.cases(truth)
    assert gap(*cases["val"]) == acc(*cases["val"]) == 0 and acc(*cases["test"]) > 0
    assert recognition.tuning.k_grid == (1, 2, 3, 5, 7) and recognition.k == 1 and recognition.whitening.dim == 3


def test_what_does_not_fit_the_descriptors():
    descriptors, truth, _ = synthetic()

    def refused(made, **options):
        with pytest.raises(UserError) as caught:
            made = {**descriptors.is_valid, "database": np.arange(50) < made}
            recognise(Descriptors(descriptors.parts, made, [{}]), truth, MethodOptions(**options))
        return str(caught.value)

    assert "choose k from 1 to 20" in refused(20, k=21)
    assert "whitening_dim 13: 50 database images of width 12 support 1 to 12" in refused(50, whitening_dim=13)
    for whitening in ("none", "pca"):
        assert "no database image" in refused(0, whitening=whitening)


def test_a_saved_whitening_gives_the_same_answers(tmp_path):
    descriptors, truth, _ = synthetic()
    first = recognise(descriptors, truth, MethodOptions(whitening_dim=6, k=2, tau=10.0))
    first.whitening.save(tmp_path / "w.npz")
    again = recognise(descriptors, truth, MethodOptions(whitening=str(tmp_path / "w.npz"), k=2, tau=10.0))
    np.testing.assert_array_equal(again.answers["test"].log_confidence, first.answers["test"].log_confidence)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 51}, "k 51: the database has 50 images; choose k from 1 to 50"),
        ({"k": 0}, "k 0"),
        ({"tau": float("nan")}, "tau nan"),
        ({"whitening": "nowhere.npz"}, "whitening nowhere.npz: no such file"),
        ({"whitening": "none", "whitening_dim": 5}, "whitening_dim has no effect without whitening pca or learned"),
        ({"whitening_dim": 50}, "whitening_dim 50: 50 database images of width 64 support 1 to 49"),
        ({"whitening_dim": 33, "width": 32}, "support 1 to 32"),
        ({"whitening_shrinkage": 1.5}, "whitening_shrinkage 1.5: choose a number from 0"),
        ({"whitening": "none", "whitening_shrinkage": 0.5}, "whitening_shrinkage has no effect"),
        ({"whitening": "learned", "n_classes": 50, "visits": 0}, "visits 0: with one image an exhibit"),
        ({"search_device": "gpu"}, "FAISS sees no GPU"),
        ({"search_device": "tpu"}, "search_device tpu: choose one of cpu, gpu"),
        ({"geometric_reorder": True}, "geometric_reorder has no effect without geometric_check"),
        ({"geometric_turns": 8}, "geometric_turns has no effect without geometric_check"),
        ({"geometric_turns": 0, "geometric_check": 5}, "geometric_turns 0: choose 1"),
        ({"visits": 3}, "visits has no effect without"),
        ({"visits": 0, "database_views": "rows"}, "database_views rows: choose none, or visits such as 6"),
        (
            {"database_rows": "prototypes", "k": 2},
            "k 2: database_rows prototypes has rows of which the nearest alone counts; choose 1",
        ),
        ({"database_rows": "prototypes", "database_views": "rows"}, "database_views rows: adds rows to images, not to"),
        ({"database_rows": "means"}, "database_rows means: choose one of images, prototypes, classifier"),
        (
            {"database_rows": "classifier"},
            "whitening pca: class weights are compared as they were learned; choose none",
        ),
        ({"query_crops": (0.5, 1.5)}, "query_crops (0.5, 1.5): choose shares between 0 and 1"),
        ({"query_crops": (0.5, 0.5)}, "query_crops (0.5, 0.5): choose shares between 0 and 1, each once"),
    ],
)
def test_options_are_refused_before_any_image_is_read(options, said):
    def check(width=64, n_classes=25, **options):
        check_method(MethodOptions(**options), 50, width, n_classes)

    with pytest.raises(UserError) as caught:
        check(**options)
    assert said in str(caught.value) and "--" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "n_classes"),
    [
        ({"whitening_dim": 49, "k": 50, "tau": 500.0}, 25),
        ({"whitening": "learned", "visits": 0}, 25),  # pairs of images of one exhibit
        ({"whitening": "learned"}, 50),
    ],
)
def test_options_that_fit(options, n_classes):
    check_method(MethodOptions(**options), 50, 64, n_classes)


def test_published_mini_set_at_its_real_scale(met_root):
    truth = load_ground_truth(met_root, "mini")
    rng = np.random.default_rng(0)
    rows = {split: rng.standard_normal((len(of), 32), dtype=np.float32) for split, of in truth.paths.items()}
    first = truth.first_images()
    for split in ("val", "test"):  # the first 40 met queries are near an image of their class
        near = np.flatnonzero(truth.labels[split] >= 0)[:40]
        noise = 0.1 * rng.standard_normal((40, 32), dtype=np.float32)
        rows[split][near] = rows["database"][first[truth.labels[split][near]]] + noise
    made = {split: np.ones(len(x), dtype=bool) for split, x in rows.items()}
    cases = recognise(Descriptors({s: [x] for s, x in rows.items()}, made, [{}]), truth).cases(truth)
    for split, n_queries, n_met in (("val", 2_165, 129), ("test", 19_319, 1_003)):
        assert len(cases[split][2]) == n_queries and (cases[split][2] >= 0).sum() == n_met
        assert acc(*cases[split]) == pytest.approx(40 / n_met, abs=2 / n_met)  # two more by chance
        assert gap(*cases[split]) == pytest.approx(40 / n_met, abs=2 / n_met)


PLAIN, TURNED = ((0, 300), (80, 0)), ((0, 0), (0, 80))  # where a turn misleads, and where it is all that helps


@pytest.mark.parametrize(
    ("on_val", "on_test", "turns", "right"),
    [
        (TURNED, TURNED, 2, {"val", "test"}),
        (PLAIN, PLAIN, 1, {"val", "test"}),
        (TURNED, PLAIN, 2, {"val"}),
        (PLAIN, TURNED, 1, {"val"}),
        (((80, 0), (0, 300)), TURNED, 2, {"val", "test"}),
        (((0, 0), (0, 0)), TURNED, 1, set()),
    ],
)
def test_turned_queries_count_where_val_gains_by_them(tmp_path, monkeypatch, on_val, on_test, turns, right) -> None:
    """Two exhibits, of which the wrong one is more similar, and what geometry says of it and the other, by turn."""
    paths = {"database": ("0.jpg", "1.jpg"), "val": ("v.jpg",), "test": ("t.jpg",)}
    labels = {"database": np.array([0, 1]), "val": np.array([0]), "test": np.array([0])}
    museum = GroundTruth(tmp_path, "full", paths, labels, np.array([7, 8]), {split: split for split in labels})
    matches = Matches(np.array([[1, 0]]), np.array([[0.9, 0.8]]))
    answer = Predictions(np.array([1]), np.array([-0.1]), np.array([0.9]), np.array([1]))
    counts = {"val": on_val, "test": on_test}
    plain = Recognition(dict.fromkeys(counts, answer), None, 1, 10.0, None, dict.fromkeys(counts, matches), {})
    of_file = {"v.jpg": on_val, "t.jpg": on_test}
    monkeypatch.setattr(
        "metilr.geometry.check.count_inliers", lambda check, queries, *others: np.array([of_file[queries[0].name]])
    )
    check = GeometricCheck(None, tmp_path, None, candidates=2, reorder=True, turns=2)
    checked, tuned = check_recognition(plain, museum, check)
    assert tuned.turns == turns
    assert {split for split in counts if checked.answers[split].labels[0] == 0} == right
    for split, of_split in counts.items():
        assert checked.checked[split].inliers.tolist() == [[max(of[:turns]) for of in of_split]]
