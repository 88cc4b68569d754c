"""From descriptors to answers and figures: whitening, search, kNN, metrics. Knows no images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.errors import UserError
from metilr.evaluation.database import Searchable, build_searchable, load_whitening, query_views, whitening_of
from metilr.evaluation.options import MethodOptions
from metilr.extraction.descriptors import Descriptors
from metilr.geometry.evidence import Checked
from metilr.metrics.functional import acc, gap, gap_bounds, gap_minus
from metilr.progress import counted
from metilr.retrieval.knn import (
    K_GRID,
    N_MATCHES,
    N_NEIGHBOURS,
    NO_LABEL,
    NO_ROW,
    TAU_GRID,
    Matches,
    Predictions,
    Tuning,
    classify,
    tune,
    with_skipped,
)
from metilr.retrieval.search import Neighbours, check_device
from metilr.retrieval.whitening import PCAWhitening


@dataclass(frozen=True, eq=False)
class Recognition:
    """Answers to the queries of val and test, and how they were reached.

    Attributes:
        answers: By split, one answer per query; ``nearest`` counts rows of the whole database.
        figures: By split: gap, gap_minus, acc in [0, 1], bounds of GAP, counts.
        whitening: What was applied, or None.
        k: Number of neighbours.
        tau: Inverse temperature.
        tuning: The grid on val, or None where both were given.
        matches: By split, what each query resembles most; rows of the whole database.
        checked: By split, what a geometric check found; None without one.
    """

    answers: Mapping[str, Predictions]
    figures: Mapping[str, Mapping[str, Any]]
    whitening: PCAWhitening | None
    k: int
    tau: float
    tuning: Tuning | None
    matches: Mapping[str, Matches]
    checked: Mapping[str, Checked] | None = None


def check_method(method: MethodOptions, n_database: int, width: int, n_classes: int) -> None:
    """Refuse what cannot work with such a database, before hours go into describing it.

    Args:
        method: How descriptors will be compared.
        n_database: Images in the database.
        width: Dimensions of the descriptors.
        n_classes: Exhibits in the database.

    Raises:
        UserError: If an option is not usable; names it.
    """
    if method.is_learned and not method.n_visits and n_database <= n_classes:
        raise UserError(
            "0: with one image an exhibit whitening learned has no pairs to learn from; leave it out", "visits"
        )
    largest = min(n_database - 1, width)
    if method.whitening_dim is not None and not 1 <= method.whitening_dim <= largest:
        raise UserError(
            f"{method.whitening_dim}: {n_database:,} database images of width {width} support 1 to {largest}; choose "
            "one of these, or leave it out for the default",
            "whitening_dim",
        )
    if method.whitening not in ("pca", "learned", "none"):
        if not Path(method.whitening).is_file():
            raise UserError(
                f"{method.whitening}: no such file; choose pca, learned, none or a saved whitening", "whitening"
            )
        learned_on = len(load_whitening(method.whitening).mean)
        if learned_on != width:
            raise UserError(
                f"{method.whitening}: is for descriptors of width {learned_on}, these have {width}", "whitening"
            )
    n_rows = n_database * method.rows_per_image
    if method.k is not None and not 1 <= method.k <= n_rows:
        rows = f" and {n_rows:,} rows" if method.rows_per_image > 1 else ""
        raise UserError(f"{method.k}: the database has {n_database:,} images{rows}; choose k from 1 to {n_rows}", "k")
    check_device(method.search_device or "cpu", method.k or max(K_GRID))


def recognise(
    descriptors: Descriptors,
    ground_truth: GroundTruth,
    method: MethodOptions | None = None,
    say: Callable[[str], None] = lambda step: None,
    quiet: bool = True,
) -> Recognition:
    """Whiten, search once per split, choose k and tau by GAP on val, answer and score val and test.

    Test takes no part in any choice.

    Args:
        descriptors: Rows of all splits, and of the views that the method needs.
        ground_truth: Labels of all splits.
        method: How descriptors are compared.
        say: Told what is done, a line a step; at full size some take minutes.
        quiet: Show no progress.

    Raises:
        UserError: If an option does not fit the data.
    """
    method = method or MethodOptions()
    made, device, n_classes = descriptors.made, method.search_device or "cpu", ground_truth.n_classes
    n_database = int(made["database"].sum())
    if n_database == 0:
        raise UserError("no database image has a descriptor: there is nothing to search; mend the images")
    check_method(method, n_database, descriptors.width, n_classes)
    say(f"[bold]whitening[/]    {escape(method.whitening)}, database {n_database:,} x {descriptors.width}")
    whitening = whitening_of(descriptors, ground_truth, method, quiet)
    database = build_searchable(descriptors, ground_truth, method, whitening, quiet)
    queries = {split: query_views(descriptors, split, method, whitening, quiet) for split in QUERY_FILES}

    def nearest(split: str, k: int) -> Neighbours:
        n_queries, n_views, _ = queries[split].shape
        with counted(f"searching {split}", n_queries * n_views, "queries", quiet) as done:
            return database.nearest(queries[split], k, device, done)

    # k counts rows: where an image has several, the grid reaches as many images as without.
    k_grid = [method.k] if method.k is not None else sorted({*K_GRID, *(i * method.rows_per_image for i in K_GRID)})
    tau_grid = TAU_GRID if method.tau is None else (method.tau,)
    n_rows, n_matches = len(database.rows), max(N_MATCHES, method.geometric_check)
    n_neighbours = min(max(N_NEIGHBOURS, 2 * n_matches) * method.rows_per_image, n_rows)
    k_search = max(n_neighbours, *(i for i in k_grid if i <= n_rows))
    say(f"[bold]search[/]       exact, {device}: val, {k_search} neighbours among {n_rows:,} rows")
    neighbours = {"val": nearest("val", k_search)}
    target = ground_truth.labels["val"]
    tuning = tune(neighbours["val"], database.labels, n_classes, target, k_grid, tau_grid, skipped=~made["val"])
    k_search = max(n_neighbours, tuning.k)
    say(f"[bold]search[/]       test, {k_search} neighbours")
    neighbours["test"] = nearest("test", k_search)

    answers, matches = {}, {}
    for split, of_split in neighbours.items():
        predictions = with_skipped(classify(of_split, database.labels, n_classes, tuning.k, tuning.tau), ~made[split])
        answers[split] = replace(predictions, nearest=_as_images(predictions.nearest, database))
        of_made = database.matches(queries[split], of_split, n_matches, device)
        matches[split] = _of_all_queries(of_made, database, made[split])
    figures = {split: figures_of(of_split, ground_truth.labels[split]) for split, of_split in answers.items()}
    was_tuned = method.k is None or method.tau is None
    return Recognition(answers, figures, whitening, tuning.k, tuning.tau, tuning if was_tuned else None, matches)


def _of_all_queries(matches: Matches, database: Searchable, is_made: np.ndarray) -> Matches:
    """The same for all queries, made or not, and in rows of the ground truth's database."""
    shape = (len(is_made), matches.rows.shape[1])
    of_all = Matches(np.full(shape, NO_ROW, dtype=np.int64), np.full(shape, np.nan))
    of_all.rows[is_made] = _as_images(matches.rows, database)
    of_all.similarities[is_made] = matches.similarities
    return of_all


def _as_images(rows: np.ndarray, database: Searchable) -> np.ndarray:
    """The database images that searched rows were made from."""
    return np.where(rows == NO_ROW, NO_ROW, database.images[rows])


def figures_of(answers: Predictions, labels: np.ndarray) -> dict[str, Any]:
    """GAP, GAP⁻, ACC in [0, 1], bounds of GAP, and counts, of one split.

    Args:
        answers: To all queries; NO_LABEL to those without a descriptor.
        labels: What each shows, ``(Q,)``.

    Raises:
        UserError: If no query shows an exhibit.
    """
    arguments = (answers.log_confidence, answers.labels, labels)
    least, greatest = gap_bounds(*arguments)
    return {
        "gap": gap(*arguments),
        "gap_minus": gap_minus(*arguments),
        "acc": acc(*arguments),
        "gap_least": least,
        "gap_greatest": greatest,
        "n_queries": len(labels),
        "n_met": int((labels >= 0).sum()),
        "n_skipped": int((answers.labels == NO_LABEL).sum()),
    }
