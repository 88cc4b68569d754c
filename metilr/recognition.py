"""From descriptors to answers and figures: whitening, search, kNN, metrics. Knows no images."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.markup import escape

from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.descriptors import SPLITS, row_chunks
from metilr.errors import UserError
from metilr.knn import K_GRID, NO_ROW, TAU_GRID, Predictions, Tuning, check_tau, classify, tune, with_skipped
from metilr.matches import N_NEIGHBOURS, Matches, top_matches
from metilr.metrics.functional import acc, gap, gap_bounds, gap_minus
from metilr.progress import counted
from metilr.search import Neighbours, check_device, search
from metilr.sources import Descriptors
from metilr.whitening import PCAWhitening, fit_pca_whitening

SearchDevice = Literal["cpu", "gpu"]


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
    """

    answers: Mapping[str, Predictions]
    figures: Mapping[str, Mapping[str, Any]]
    whitening: PCAWhitening | None
    k: int
    tau: float
    tuning: Tuning | None
    matches: Mapping[str, Matches]


def recognise(
    descriptors: Descriptors,
    ground_truth: GroundTruth,
    *,
    whitening: str = "pca",
    whitening_dim: int | None = None,
    whitening_shrinkage: float = 1.0,
    k: int | None = None,
    tau: float | None = None,
    search_device: SearchDevice = "cpu",
    say: Callable[[str], None] = lambda step: None,
    quiet: bool = True,
) -> Recognition:
    """Whiten, search once per split, choose k and tau by GAP on val, answer and score val and test.

    Test takes no part in any choice.

    Args:
        descriptors: Rows of all splits.
        ground_truth: Labels of all splits.
        whitening: ``"pca"`` learns it on the database, ``"none"`` goes without, else a file that was saved.
        whitening_dim: Dimensions to keep; None: 512, or as many as the data supports.
        whitening_shrinkage: 1 is whitening, 0 plain PCA.
        k: Number of neighbours; None: chosen on val.
        tau: Inverse temperature; None: chosen on val.
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
    check_options(n_database, descriptors.width, whitening, whitening_dim, whitening_shrinkage, k, tau, search_device)
    say(f"[bold]whitening[/]    {escape(whitening)}, database {n_database:,} x {descriptors.width}")
    transform = _whitening(descriptors, whitening, whitening_dim, whitening_shrinkage, quiet)
    ready = {split: unit_rows(descriptors, split, transform, quiet) for split in SPLITS}

    labels = {split: ground_truth.labels[split] for split in QUERY_FILES}
    database_labels = ground_truth.labels["database"][made["database"]]
    n_classes = ground_truth.n_classes
    k_grid = K_GRID if k is None else (k,)
    tau_grid = TAU_GRID if tau is None else (tau,)
    n_neighbours = min(N_NEIGHBOURS, n_database)
    k_search = max(n_neighbours, *(i for i in k_grid if i <= n_database))

    say(f"[bold]search[/]       exact, {search_device}: val, {k_search} neighbours among {n_database:,} rows")
    neighbours = {"val": _searched(ready, "val", k_search, search_device, quiet)}
    tuning = None
    if k is None or tau is None:
        tuning = tune(
            neighbours["val"],
            database_labels,
            n_classes,
            labels["val"],
            k_grid,
            tau_grid,
            skipped=~made["val"],
        )
        k, tau = tuning.k, tuning.tau
    k_search = max(n_neighbours, k)
    say(f"[bold]search[/]       test, {k_search} neighbours")
    neighbours["test"] = _searched(ready, "test", k_search, search_device, quiet)

    answers = {
        split: _answer(neighbours[split], database_labels, n_classes, k, tau, made, split) for split in QUERY_FILES
    }
    figures = {split: _figures(answers[split], labels[split], made[split]) for split in QUERY_FILES}
    matches = {split: _matches(neighbours[split], database_labels, made, split) for split in QUERY_FILES}
    return Recognition(answers, figures, transform, k, tau, tuning, matches)


def check_options(
    n_database: int,
    width: int,
    whitening: str,
    whitening_dim: int | None,
    whitening_shrinkage: float,
    k: int | None,
    tau: float | None,
    search_device: SearchDevice,
) -> None:
    """Refuse what cannot work with such a database, before hours go into describing it.

    Args:
        n_database: Images in the database.
        width: Dimensions of the descriptors.
        whitening: As in ``recognise``, like the rest.
        whitening_dim: Refused beyond what ``n_database`` and ``width`` can support at most.
        whitening_shrinkage: Refused where no whitening is learned.
        k: Refused beyond the database.
        tau: Refused out of range.
        search_device: Refused where FAISS does not see it.

    Raises:
        UserError: If one is not usable; names it.
    """
    check_device(search_device, k or max(K_GRID))
    if k is not None and not 1 <= k <= n_database:
        raise UserError(f"--k {k}: the database has {n_database:,} images; choose k from 1 to {n_database}")
    if tau is not None:
        check_tau(tau)
    if whitening not in ("pca", "none") and not Path(whitening).is_file():
        raise UserError(f"--whitening {whitening}: no such file; choose pca, none or a saved whitening")
    if whitening_dim is not None and whitening != "pca":
        raise UserError("--whitening_dim: has no effect unless --whitening pca learns one; leave it out")
    if whitening_shrinkage != 1 and whitening != "pca":
        raise UserError("--whitening_shrinkage: has no effect unless --whitening pca learns one; leave it out")
    if not 0 <= whitening_shrinkage <= 1:
        raise UserError(f"--whitening_shrinkage {whitening_shrinkage}: choose a number from 0 (PCA) to 1 (whitening)")
    largest = min(n_database - 1, width)
    if whitening_dim is not None and not 1 <= whitening_dim <= largest:
        raise UserError(
            f"--whitening_dim {whitening_dim}: {n_database:,} database images of width {width} support 1 to {largest}; "
            "choose one of these, or leave it out for the default"
        )
    if whitening not in ("pca", "none"):
        learned_on = len(PCAWhitening.load(whitening).mean)
        if learned_on != width:
            raise UserError(f"--whitening {whitening}: is for descriptors of width {learned_on}, these have {width}")


def _whitening(
    descriptors: Descriptors, whitening: str, dim: int | None, shrinkage: float, quiet: bool
) -> PCAWhitening | None:
    if whitening == "none":
        return None
    if whitening != "pca":
        return PCAWhitening.load(whitening)
    made = descriptors.made["database"]
    with counted("learning whitening", int(made.sum()), "rows", quiet) as done:

        def chunks() -> Iterator[np.ndarray]:
            for chunk in row_chunks(descriptors.parts["database"], made):
                yield chunk
                done(len(chunk))

        return fit_pca_whitening(chunks(), dim=dim, shrinkage=shrinkage)


def _searched(ready: Mapping[str, np.ndarray], split: str, k: int, device: SearchDevice, quiet: bool) -> Neighbours:
    with counted(f"searching {split}", len(ready[split]), "queries", quiet) as done:
        return search(ready["database"], ready[split], k, device, done)


def unit_rows(descriptors: Descriptors, split: str, transform: PCAWhitening | None, quiet: bool = True) -> np.ndarray:
    """Rows as they are compared, float32 ``(n made, D)``: whitened if asked for, of unit length in any case."""
    made = descriptors.made[split]
    width = descriptors.width if transform is None else transform.dim
    ready = np.empty((int(made.sum()), width), dtype=np.float32)
    start = 0
    with counted(f"whitening {split}", len(ready), "rows", quiet) as done:
        for chunk in row_chunks(descriptors.parts[split], made):
            ready[start : start + len(chunk)] = as_compared(chunk, transform)
            start += len(chunk)
            done(len(chunk))
    return ready


def as_compared(rows: np.ndarray, transform: PCAWhitening | None) -> np.ndarray:
    """Whiten rows ``(n, D)`` if asked for, and give them unit length."""
    if transform is None:
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return transform.transform(rows)


def _answer(
    neighbours: Neighbours,
    database_labels: np.ndarray,
    n_classes: int,
    k: int,
    tau: float,
    made: Mapping[str, np.ndarray],
    split: str,
) -> Predictions:
    answers = with_skipped(classify(neighbours, database_labels, n_classes, k, tau), ~made[split])
    nearest = _in_whole_database(answers.nearest, made)
    return Predictions(answers.labels, answers.log_confidence, answers.similarity, nearest)


def _matches(
    neighbours: Neighbours, database_labels: np.ndarray, made: Mapping[str, np.ndarray], split: str
) -> Matches:
    found = top_matches(neighbours, database_labels)
    shape = (len(made[split]), found.rows.shape[1])
    matches = Matches(np.full(shape, NO_ROW, dtype=np.int64), np.full(shape, np.nan))
    matches.rows[made[split]] = _in_whole_database(found.rows, made)
    matches.similarities[made[split]] = found.similarities
    return matches


def _in_whole_database(rows: np.ndarray, made: Mapping[str, np.ndarray]) -> np.ndarray:
    """Rows among those that were made, as rows of all: those left out shift the others."""
    return np.where(rows == NO_ROW, NO_ROW, np.flatnonzero(made["database"])[rows])


def _figures(answers: Predictions, labels: np.ndarray, made: np.ndarray) -> dict[str, Any]:
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
