"""From descriptors to answers and figures: whitening, search, kNN, metrics, and a check of the answers by geometry."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape

from metilr.data.ground_truth import NOT_NAMED, QUERY_FILES, GroundTruth
from metilr.errors import UserError, amount
from metilr.evaluation.database import build_searchable, load_whitening, query_views, whitening_of
from metilr.evaluation.options import MethodOptions
from metilr.evaluation.results import LEVEL, MIN_PRECISION
from metilr.geometry.evidence import Checked, apply_evidence, tune_evidence
from metilr.metrics import DISTRACTOR, acc, gap, gap_minus
from metilr.metrics.bootstrap import N_RESAMPLES, intervals, resampling_units
from metilr.metrics.functional import gap_bounds, mean_average_precision, recall_at
from metilr.metrics.open_set import decision_point, open_set_figures
from metilr.models import is_on_hub
from metilr.progress import counted
from metilr.retrieval import knn
from metilr.retrieval.confidence import NEAREST, Calibration
from metilr.retrieval.search import Neighbours, check_device, class_ranks
from metilr.retrieval.whitening import PCAWhitening

if TYPE_CHECKING:
    from metilr.extraction.descriptors import Descriptors
    from metilr.geometry.check import GeometricCheck
    from metilr.models.checkpoints import ClassWeights

SEED = 0  # of the bootstrap


@dataclass(frozen=True, eq=False)
class Recognition:
    """Answers to the queries of val and test, and how they were reached; mappings are by split."""

    answers: Mapping[str, knn.Predictions]  # one per query; ``nearest`` counts rows of the whole database
    whitening: PCAWhitening | None
    k: int
    tau: float
    tuning: knn.Tuning | None  # the grid on val; None where both were given
    matches: Mapping[str, knn.Matches]  # what each query resembles most; rows of the whole database
    ranks: Mapping[str, np.ndarray]  # of the exhibit shown, among all by similarity, see ``metilr.metrics.functional``
    # Similarities of the ten nearest rows, (Q, 10); NaN if skipped.
    most_similar: Mapping[str, np.ndarray] = field(default_factory=dict)
    checked: Mapping[str, Checked] | None = None  # what a geometric check found
    calibration: Calibration | None = None  # what made the confidence a probability
    classifier: "ClassWeights | None" = None  # what was searched in place of images

    def cases(self, ground_truth: GroundTruth) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """What metrics take, by split: log-confidence, answered and true label of each query, ``(Q,)``."""
        return {split: (of.log_confidence, of.labels, ground_truth.labels[split]) for split, of in self.answers.items()}


def check_method(method: MethodOptions, n_database: int, width: int, n_classes: int) -> None:
    """Refuse what cannot work with ``n_database`` images of ``n_classes`` exhibits, before hours go into them."""
    if method.is_learned and not method.n_visits and n_database <= n_classes:
        reason = "with one image an exhibit whitening learned has no pairs to learn from; leave it out"
        raise UserError(f"0: {reason}", "visits")
    dim, largest = method.whitening_dim, min(n_database - 1, width)
    if dim is not None and not 1 <= dim <= largest:
        supported = f"{n_database:,} database images of width {width} support 1 to {largest}"
        raise UserError(f"{dim}: {supported}; choose one of these, or leave it out for the default", "whitening_dim")
    file = method.whitening
    if file not in ("pca", "learned", "none"):
        if not is_on_hub(file) and not Path(file).is_file():
            raise UserError(f"{file}: no such file; choose pca, learned, none or a saved whitening", "whitening")
        if (learned_on := len(load_whitening(file).mean)) != width:
            raise UserError(f"{file}: is for descriptors of width {learned_on}, these have {width}", "whitening")
    n_rows = n_database * method.rows_per_image
    if method.k is not None and not 1 <= method.k <= n_rows:
        rows = f" and {n_rows:,} rows" if method.rows_per_image > 1 else ""
        there = f"{amount(n_database, 'image')}{rows}"
        raise UserError(f"{method.k}: the database has {there}; choose k from 1 to {n_rows}", "k")
    check_device(method.search_device or "cpu", method.k or max(knn.K_GRID))


def recognise(
    descriptors: "Descriptors",
    ground_truth: GroundTruth,
    method: MethodOptions | None = None,
    say: Callable[[str], None] = lambda step: None,
    quiet: bool = True,
    classifier: "ClassWeights | None" = None,
) -> Recognition:
    """Whiten, search once per split, choose k and tau by GAP on val, answer and score val and test.

    Test takes no part in any choice. ``descriptors`` hold all splits, and the views that the method needs; ``say`` is
    told what is done, a line a step: at full size some take minutes. ``classifier`` has the class weights, if these
    are searched.
    """
    method = method or MethodOptions()
    is_valid, device, n_classes = descriptors.is_valid, method.search_device or "cpu", ground_truth.n_classes
    n_database = int(is_valid["database"].sum())
    if n_database == 0:
        raise UserError("no database image has a descriptor: there is nothing to search; mend the images")
    check_method(method, n_database, descriptors.width, n_classes)
    say(f"[bold]whitening[/]    {escape(method.whitening)}, database {n_database:,} x {descriptors.width}")
    whitening = whitening_of(descriptors, ground_truth, method, quiet)
    database = build_searchable(descriptors, ground_truth, method, whitening, quiet, classifier)
    queries = {split: query_views(descriptors, split, method, whitening, quiet) for split in QUERY_FILES}

    def nearest(split: str, k: int) -> Neighbours:
        n_queries, n_views, _ = queries[split].shape
        with counted(f"searching {split}", n_queries * n_views, "queries", quiet) as done:
            return database.nearest(queries[split], k, device, done)

    # k counts rows: where an image has several, the grid reaches as many images as without.
    k_grid = sorted({*knn.K_GRID, *(i * method.rows_per_image for i in knn.K_GRID)})
    if method.k is not None or method.database_rows != "images":  # one row an exhibit: nobody to vote with it
        k_grid = [method.k or 1]
    tau_grid = knn.TAU_GRID if method.tau is None else (method.tau,)
    n_rows, n_matches = len(database.rows), max(knn.N_MATCHES, method.geometric_check)
    n_neighbours = min(max(knn.N_NEIGHBOURS, 2 * n_matches) * method.rows_per_image, n_rows)
    k_search = max(n_neighbours, *(i for i in k_grid if i <= n_rows))
    say(f"[bold]search[/]       exact, {device}: val, {amount(k_search, 'neighbour')} among {amount(n_rows, 'row')}")
    neighbours = {"val": nearest("val", k_search)}
    target = ground_truth.labels["val"]
    tuning = knn.tune(neighbours["val"], database.labels, n_classes, target, k_grid, tau_grid, skipped=~is_valid["val"])
    k_search = max(n_neighbours, tuning.k)
    say(f"[bold]search[/]       test, {amount(k_search, 'neighbour')}")
    neighbours["test"] = nearest("test", k_search)

    answers, matches, ranks, most_similar = {}, {}, {}, {}
    for split, of_split in neighbours.items():
        predictions = knn.classify(of_split, database.labels, n_classes, tuning.k, tuning.tau)
        in_database = np.where(predictions.nearest == knn.NO_ROW, knn.NO_ROW, database.images[predictions.nearest])
        answers[split] = knn.with_skipped(replace(predictions, nearest=in_database), ~is_valid[split])
        exhibits = database.matches(queries[split], of_split, n_matches, device)
        rows = knn.spread(database.images[exhibits.rows], is_valid[split], knn.NO_ROW)
        matches[split] = knn.Matches(rows, knn.spread(exhibits.similarities, is_valid[split], np.nan))
        most_similar[split] = knn.spread(of_split.similarities[:, :NEAREST], is_valid[split], np.nan)
        ranks[split] = np.where(ground_truth.labels[split] == DISTRACTOR, np.nan, np.inf)
        target = ground_truth.labels[split][is_valid[split]]
        ranks[split][is_valid[split]] = class_ranks(database.rows, queries[split], database.labels, target)
    was_given = method.k is not None and method.tau is not None
    return Recognition(
        answers, whitening, tuning.k, tuning.tau, None if was_given else tuning, matches, ranks, most_similar,
        classifier=classifier,
    )  # fmt: skip


def check_recognition(
    recognition: Recognition, ground_truth: GroundTruth, check: "GeometricCheck", quiet: bool = True
) -> "tuple[Recognition, GeometricCheck]":
    """Let local features decide how far the answers to val and test are to be believed.

    Descriptors say what two images have in common, wherever it lies; the check asks whether it lies alike. The
    confidences change and, with ``reorder``, labels; the check returned has the turns, boost and gate that val chose.
    """
    from metilr.geometry.check import count_inliers

    files = {split: [ground_truth.image(path) for path in paths] for split, paths in ground_truth.paths.items()}
    labels, matches, counts = ground_truth.labels, recognition.matches, {}
    for split in QUERY_FILES:
        candidates = matches[split].rows[:, : check.candidates]
        counts[split] = count_inliers(check, files[split], candidates, files["database"], quiet)
    chosen, highest = (recognition, check), -1.0
    for turns in dict.fromkeys((1, check.turns)):  # of equal GAPs on val the first counts
        seen = {split: of[:, :, :turns].max(axis=2) for split, of in counts.items()}
        evidence = {
            split: Checked(matches[split], of, labels["database"], ground_truth.n_classes, recognition.tau)
            for split, of in seen.items()
        }
        boost, gate = tune_evidence(recognition.answers["val"], evidence["val"], labels["val"], check.reorder)
        answers = {split: apply_evidence(of, evidence[split], boost, gate) for split, of in recognition.answers.items()}
        reached = gap(answers["val"].log_confidence, answers["val"].labels, labels["val"])
        if reached > highest:
            tuned = replace(check, turns=turns, boost=boost, gate=gate)
            chosen, highest = (replace(recognition, answers=answers, checked=evidence), tuned), reached
    return chosen


def figures_of(recognition: Recognition, ground_truth: GroundTruth) -> dict[str, Any]:
    """The figures of val and test, with intervals and open-set figures, and the threshold chosen on val."""
    cases, figures = recognition.cases(ground_truth), {}
    for split, case in cases.items():
        _, predicted, target = case
        least, greatest = gap_bounds(*case)
        units = resampling_units(target, ground_truth.photographers.get(split, np.full(len(target), NOT_NAMED)))
        ranks = recognition.ranks[split]
        recalls = {f"recall@{k}": recall_at(ranks, k) for k in (1, 5, 10)}
        drawn = {name: intervals(*case, unit, seed=SEED, level=LEVEL) for name, unit in units.items()}
        figures[split] = {
            "gap": gap(*case), "gap_minus": gap_minus(*case), "acc": acc(*case),
            "ranking": {**recalls, "map": mean_average_precision(ranks)}, "gap_least": least, "gap_greatest": greatest,
            "n_queries": len(target), "n_met": ground_truth.n_met(split),
            "n_skipped": int((predicted == DISTRACTOR).sum()),
            "intervals": {name: {metric: [*ends] for metric, ends in of.items()} for name, of in drawn.items()},
            "open_set": open_set_figures(*case, ground_truth.kinds(split), ground_truth.class_sizes()),
        }  # fmt: skip
    point = decision_point(*cases["val"], MIN_PRECISION, recognition.calibration is not None)
    threshold = {
        "min_precision": MIN_PRECISION,
        "chosen_on": "val",
        "log_confidence": None if point is None else point.threshold,
        "splits": {split: None if point is None else _at(point.threshold, *cases[split]) for split in QUERY_FILES},
    }
    return {"bootstrap": {"resamples": N_RESAMPLES, "level": LEVEL, "seed": SEED}, "threshold": threshold, **figures}


def _at(threshold: float, log_confidence: np.ndarray, predicted: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """What the threshold gives on a split."""
    accepted, is_met = log_confidence >= threshold, target != DISTRACTOR
    right = accepted & is_met & (predicted == target)
    return {
        "n_accepted": int(accepted.sum()),
        "precision": float(right[accepted].mean()) if accepted.any() else None,
        "recall": float(right[is_met].mean()),
        "false_alarms": float(accepted[~is_met].mean()) if not is_met.all() else None,
    }
