"""From descriptors to answers and figures: whitening, search, kNN, metrics. Knows no images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.markup import escape

from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.errors import UserError
from metilr.evaluation.database import Searchable, build_searchable, query_views
from metilr.evaluation.options import Method, load_whitening
from metilr.evaluation.whitening import learn_whitening
from metilr.extraction.descriptors import Descriptors
from metilr.geometry.evidence import Checked
from metilr.metrics.functional import acc, gap, gap_bounds, gap_minus
from metilr.progress import counted
from metilr.retrieval.knn import (
    K_GRID,
    N_MATCHES,
    N_NEIGHBOURS,
    NO_ROW,
    TAU_GRID,
    Matches,
    Predictions,
    Tuning,
    check_tau,
    classify,
    tune,
    with_skipped,
)
from metilr.retrieval.search import Neighbours, SearchDevice, check_device
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


def recognise(
    descriptors: Descriptors,
    ground_truth: GroundTruth,
    method: Method = Method(),  # noqa: B008  (it cannot be changed)
    *,
    k: int | None = None,
    tau: float | None = None,
    n_matches: int = N_MATCHES,
    search_device: SearchDevice = "cpu",
    say: Callable[[str], None] = lambda step: None,
    quiet: bool = True,
) -> Recognition:
    """Whiten, search once per split, choose k and tau by GAP on val, answer and score val and test.

    Test takes no part in any choice.

    Args:
        descriptors: Rows of all splits, and of the views that the method needs.
        ground_truth: Labels of all splits.
        method: How descriptors are compared.
        k: Number of neighbours; None: chosen on val.
        tau: Inverse temperature; None: chosen on val.
        n_matches: Exhibits in each query's matches.
        search_device: Where FAISS searches.
        say: Told what is done, a line a step; at full size some take minutes.
        quiet: Show no progress.

    Raises:
        UserError: If an option does not fit the data.
    """
    made = descriptors.made
    n_database = int(made["database"].sum())
    if n_database == 0:
        raise UserError("no database image has a descriptor: there is nothing to search; mend the images")
    method.check(n_database, descriptors.width, ground_truth.n_classes)
    check_search(n_database, k, tau, search_device, method.rows_per_image)
    say(f"[bold]whitening[/]    {escape(method.whitening)}, database {n_database:,} x {descriptors.width}")
    transform = whitening_of(descriptors, ground_truth, method, quiet)
    database = build_searchable(descriptors, ground_truth, method, transform, quiet)

    n_rows = len(database.rows)
    n_neighbours = min(max(N_NEIGHBOURS, 2 * n_matches) * method.rows_per_image, n_rows)

    def searched(split: str, queries: np.ndarray, k: int) -> Neighbours:
        with counted(f"searching {split}", queries.shape[0] * queries.shape[1], "queries", quiet) as done:
            return database.nearest(queries, k, search_device, done)

    # k counts rows: where an image has several, the grid reaches as many images as without.
    k_grid = sorted({*K_GRID, *(i * method.rows_per_image for i in K_GRID)}) if k is None else [k]
    tau_grid = TAU_GRID if tau is None else (tau,)
    k_search = max(n_neighbours, *(i for i in k_grid if i <= n_rows))
    say(f"[bold]search[/]       exact, {search_device}: val, {k_search} neighbours among {n_rows:,} rows")
    queries = {split: query_views(descriptors, split, method, transform, quiet) for split in QUERY_FILES}
    neighbours = {"val": searched("val", queries["val"], k_search)}
    target = ground_truth.labels["val"]
    tuning = tune(
        neighbours["val"], database.labels, ground_truth.n_classes, target, k_grid, tau_grid, skipped=~made["val"]
    )
    was_tuned = k is None or tau is None
    k, tau = tuning.k, tuning.tau
    k_search = max(n_neighbours, k)
    say(f"[bold]search[/]       test, {k_search} neighbours")
    neighbours["test"] = searched("test", queries["test"], k_search)

    answers = {
        split: _answer(neighbours[split], database, ground_truth.n_classes, k, tau, made[split])
        for split in QUERY_FILES
    }
    figures = {split: figures_of(answers[split], ground_truth.labels[split], made[split]) for split in QUERY_FILES}
    matches = {}
    for split in QUERY_FILES:
        found_matches = database.matches(queries[split], neighbours[split], n_matches, search_device)
        matches[split] = _matches(found_matches, database, made[split])
    return Recognition(answers, figures, transform, k, tau, tuning if was_tuned else None, matches)


def check_search(
    n_database: int, k: int | None, tau: float | None, search_device: SearchDevice, rows_per_image: int = 1
) -> None:
    """Refuse numbers out of range, before hours go into describing images.

    Args:
        n_database: Images in the database.
        k: Refused beyond their rows.
        tau: Refused out of range.
        search_device: Refused where FAISS does not see it.
        rows_per_image: Searched rows of each image.

    Raises:
        UserError: If one is not usable; names it.
    """
    check_device(search_device, k or max(K_GRID))
    n_rows = n_database * rows_per_image
    if k is not None and not 1 <= k <= n_rows:
        rows = f" and {n_rows:,} rows" if rows_per_image > 1 else ""
        raise UserError(f"--k {k}: the database has {n_database:,} images{rows}; choose k from 1 to {n_rows}")
    if tau is not None:
        check_tau(tau)


def whitening_of(
    descriptors: Descriptors, ground_truth: GroundTruth, method: Method, quiet: bool = True
) -> PCAWhitening | None:
    """Learn or load the whitening that the method asks for; None for none.

    Raises:
        UserError: If it cannot be learned on this data, or its file cannot be read.
    """
    if method.whitening == "none":
        return None
    if method.whitening in ("pca", "learned"):
        return learn_whitening(descriptors, ground_truth, method, quiet)
    return load_whitening(method.whitening)


def _answer(
    neighbours: Neighbours, database: Searchable, n_classes: int, k: int, tau: float, made: np.ndarray
) -> Predictions:
    answers = with_skipped(classify(neighbours, database.labels, n_classes, k, tau), ~made)
    nearest = _as_images(answers.nearest, database)
    return Predictions(answers.labels, answers.log_confidence, answers.similarity, nearest)


def _matches(found: Matches, database: Searchable, made: np.ndarray) -> Matches:
    """The same for all queries, made or not, and in rows of the ground truth's database."""
    shape = (len(made), found.rows.shape[1])
    matches = Matches(np.full(shape, NO_ROW, dtype=np.int64), np.full(shape, np.nan))
    matches.rows[made] = _as_images(found.rows, database)
    matches.similarities[made] = found.similarities
    return matches


def _as_images(rows: np.ndarray, database: Searchable) -> np.ndarray:
    """The database images that searched rows were made from."""
    return np.where(rows == NO_ROW, NO_ROW, database.images[rows])


def figures_of(answers: Predictions, labels: np.ndarray, made: np.ndarray) -> dict[str, Any]:
    """GAP, GAP⁻, ACC in [0, 1], bounds of GAP, and counts, of one split.

    Args:
        answers: To all queries.
        labels: What each shows, ``(Q,)``.
        made: Whether each has a descriptor, ``(Q,)``.

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
        "n_skipped": int((~made).sum()),
    }
