"""Top matches: for each query the nearest database image of each of the nearest exhibits, to be looked at."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metilr.errors import UserError
from metilr.metrics.functional import DISTRACTOR, gap
from metilr.retrieval.search import Neighbours

K_GRID = (1, 2, 3, 5, 7, 10, 15, 20, 50)
"""The benchmark's grid."""
TAU_GRID = (0.01, 0.1, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 50.0, 100.0, 500.0)
"""The benchmark's grid."""
USUAL_TAU = 50.0
"""What the published rows chose on val, nearly all."""
MAX_TAU = 700.0
"""exp(-700) is still a normal float64: a lead of 1 does not saturate the log-confidence."""
NO_ROW = -1
"""Nearest row of an answer that no neighbour gave."""
NO_LABEL = DISTRACTOR
"""Label of a query that was not answered: right nowhere."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """One answer per query; all arrays ``(Q,)``.

    Attributes:
        labels: Best class, int64; NO_LABEL if the query was skipped.
        log_confidence: Logarithm of the softmax of the best class, float64; -inf if skipped.
        similarity: Similarity s_c of the best class, float64 (0 if no neighbour shows it); NaN if skipped.
        nearest: Database row that gave this similarity, int64; NO_ROW if none did.
    """

    labels: np.ndarray
    log_confidence: np.ndarray
    similarity: np.ndarray
    nearest: np.ndarray


@dataclass(frozen=True, eq=False)
class Tuning:
    """The grid point that was chosen, and GAP over the whole grid.

    Attributes:
        k: Chosen number of neighbours.
        tau: Chosen inverse temperature.
        surface: GAP in [0, 1] at each grid point, ``(len(k_grid), len(tau_grid))``.
        k_grid: Numbers of neighbours tried, ascending: those asked for that the database can serve.
        tau_grid: Inverse temperatures tried, ascending.
    """

    k: int
    tau: float
    surface: np.ndarray
    k_grid: tuple[int, ...]
    tau_grid: tuple[float, ...]


def classify(neighbours: Neighbours, database_labels: np.ndarray, n_classes: int, k: int, tau: float) -> Predictions:
    """Answer each query by its k nearest neighbours.

    s_c is the largest similarity to a neighbour of class c among the k nearest, 0 for a class that has none.
    The answer is the class of largest s_c, the smaller label if several are equal: where no neighbour is more
    than 0 similar, that can be a class without a neighbour. Its confidence is the softmax of tau * s over
    **all** classes, as a logarithm: -log1p(Σ exp(tau (s_c - s_best)) over the other classes). Unlike the
    softmax itself this keeps telling answers apart when the best class is far ahead: in float64 as long as
    tau times the lead over the second best class is at most 700, which a lead of at most 1 always meets here.

    Args:
        neighbours: Result of a search with at least k neighbours, ``(Q, >= k)``.
        database_labels: Class of each database row, ``(N,)`` int64, 0 to n_classes - 1.
        n_classes: Number of classes, those without a neighbour included.
        k: Neighbours that count.
        tau: Inverse temperature, above 0, at most 700.

    Returns:
        One answer per query.

    Raises:
        UserError: If ``k`` or ``tau`` is out of range.
        ValueError: If the labels do not fit the neighbours or the number of classes.

    Source: Ypsilantis et al., The Met Dataset, NeurIPS 2021.
    """
    check_tau(tau)
    _check_k(k, neighbours, database_labels)
    labels = _neighbour_labels(neighbours, database_labels, n_classes)
    ballot = _count(neighbours, labels, first_of_class(labels), n_classes, k)
    return Predictions(ballot.labels, _log_confidence(ballot, tau), ballot.similarity, ballot.nearest)


def with_skipped(predictions: Predictions, skipped: np.ndarray) -> Predictions:
    """Add the queries that have no descriptor: never right, less sure than all others.

    Args:
        predictions: Answers to the queries that were not skipped, in their order.
        skipped: Whether each of all queries was skipped, ``(Q_all,)`` bool.

    Returns:
        Predictions for all ``Q_all`` queries.

    Raises:
        ValueError: If the number of queries left differs from the number of answers.
    """
    answered = ~skipped
    if answered.sum() != len(predictions.labels):
        raise ValueError(f"{answered.sum()} queries were not skipped, but {len(predictions.labels)} answered")

    def spread(values: np.ndarray, fill: float) -> np.ndarray:
        everywhere = np.full(len(skipped), fill, dtype=values.dtype)
        everywhere[answered] = values
        return everywhere

    return Predictions(
        labels=spread(predictions.labels, NO_LABEL),
        log_confidence=spread(predictions.log_confidence, -np.inf),
        similarity=spread(predictions.similarity, np.nan),
        nearest=spread(predictions.nearest, NO_ROW),
    )


def tune(
    neighbours: Neighbours,
    database_labels: np.ndarray,
    n_classes: int,
    query_labels: np.ndarray,
    k_grid: Sequence[int] = K_GRID,
    tau_grid: Sequence[float] = TAU_GRID,
    skipped: np.ndarray | None = None,
) -> Tuning:
    """Choose k and tau by GAP over the full grid.

    Equal GAPs: the smaller k, then the tau nearest ``USUAL_TAU`` by ratio. (With k = 1 every tau ranks alike, and
    the confidence should still tell something.) A k larger than the database is left out of the grid;
    ``k_grid`` of the result says which were tried.

    Args:
        neighbours: Result of one search with the largest k that fits, for the queries not skipped.
        database_labels: Class of each database row, ``(N,)`` int64.
        n_classes: Number of classes, those without a neighbour included.
        query_labels: True label of each query, ``(Q,)``; DISTRACTOR where no exhibit is shown.
        k_grid: Numbers of neighbours to try.
        tau_grid: Inverse temperatures to try.
        skipped: Whether each query has no descriptor, ``(Q,)`` bool; ``neighbours`` holds the others in
            order. The skipped ones count as wrong and rank last. None: none was skipped.

    Returns:
        The best grid point and the surface it was taken from.

    Raises:
        UserError: If no grid point is valid, or no query shows an exhibit.
        ValueError: If arrays do not fit each other, or the search had fewer neighbours than the grid needs.
    """
    k_tried = tuple(sorted({k for k in k_grid if k <= len(database_labels)}))
    tau_tried = tuple(sorted(set(tau_grid)))
    if not k_tried or not tau_tried:
        raise UserError(
            f"--k, --tau: no grid point to try with k from {list(k_grid)}, tau from {list(tau_grid)} and "
            f"{len(database_labels)} database images; name a smaller k"
        )
    for tau in tau_tried:
        check_tau(tau)
    for k in k_tried:
        _check_k(k, neighbours, database_labels)
    skipped = np.zeros(len(query_labels), dtype=bool) if skipped is None else skipped
    labels = _neighbour_labels(neighbours, database_labels, n_classes)
    is_first = first_of_class(labels)

    surface = np.empty((len(k_tried), len(tau_tried)))
    for i, k in enumerate(k_tried):
        ballot = _count(neighbours, labels, is_first, n_classes, k)
        for j, tau in enumerate(tau_tried):
            answers = Predictions(ballot.labels, _log_confidence(ballot, tau), ballot.similarity, ballot.nearest)
            answers = with_skipped(answers, skipped)
            surface[i, j] = gap(answers.log_confidence, answers.labels, query_labels)
    i = int(surface.max(axis=1).argmax())  # argmax takes the first of equals
    best = np.flatnonzero(surface[i] == surface[i].max())
    j = int(best[np.abs(np.log(np.array(tau_tried)[best] / USUAL_TAU)).argmin()])
    return Tuning(k_tried[i], tau_tried[j], surface, k_tried, tau_tried)


@dataclass(frozen=True, eq=False)
class _Ballot:
    """What k decides and tau does not: the best class, and how far behind it the others are."""

    labels: np.ndarray  # (Q,)
    similarity: np.ndarray  # (Q,) s_best
    nearest: np.ndarray  # (Q,)
    behind: np.ndarray  # (Q, k) s_c - s_best where a neighbour is the first of another class, else -inf
    n_absent: np.ndarray  # (Q,) other classes without a neighbour, each with s = 0


def _count(neighbours: Neighbours, labels: np.ndarray, is_first: np.ndarray, n_classes: int, k: int) -> _Ballot:
    similarities, labels, is_first = neighbours.similarities[:, :k], labels[:, :k], is_first[:, :k]
    n_absent = n_classes - is_first.sum(axis=1)

    # The best class that has a neighbour: similarities descend, so it is among those equal to the first.
    is_best = is_first & (similarities == similarities[:, :1])
    place = np.where(is_best, labels, n_classes).argmin(axis=1)[:, None]  # (Q, 1)
    best_label = np.take_along_axis(labels, place, axis=1)[:, 0]
    nearest = np.take_along_axis(neighbours.rows[:, :k], place, axis=1)[:, 0]
    best = similarities[:, 0]

    # A class without a neighbour has s = 0: it wins against less than 0, and against 0 by a smaller label.
    absent_label = _smallest_absent(labels, is_first, n_classes)
    absent_wins = (n_absent > 0) & ((best < 0) | ((best == 0) & (absent_label < best_label)))
    best = np.where(absent_wins, 0.0, best)

    is_other = is_first.copy()
    np.put_along_axis(is_other, place, absent_wins[:, None], axis=1)
    return _Ballot(
        labels=np.where(absent_wins, absent_label, best_label),
        similarity=best,
        nearest=np.where(absent_wins, NO_ROW, nearest),
        behind=np.where(is_other, similarities - best[:, None], -np.inf),
        n_absent=n_absent - absent_wins,
    )


def _log_confidence(ballot: _Ballot, tau: float) -> np.ndarray:
    """Return -log1p of the other classes' summed odds, ``(Q,)`` float64."""
    odds = np.exp(tau * ballot.behind).sum(axis=1)
    # Where a class is absent, s_best >= 0. Elsewhere the factor is 0, and the maximum avoids 0 * inf.
    odds += ballot.n_absent * np.exp(-tau * np.maximum(ballot.similarity, 0))
    return 0.0 - np.log1p(odds)  # not -log1p, which would print -0.0 for a single class


def first_of_class(labels: np.ndarray) -> np.ndarray:
    """Return which neighbours are the nearest of their class, for every k at once: bool ``(Q, K)``.

    Args:
        labels: Class of each neighbour, nearest first, ``(Q, K)``.
    """
    order = np.argsort(labels, axis=1, kind="stable")
    ordered = np.take_along_axis(labels, order, axis=1)
    starts = np.ones(labels.shape, dtype=bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    is_first = np.empty_like(starts)
    np.put_along_axis(is_first, order, starts, axis=1)
    return is_first


def _smallest_absent(labels: np.ndarray, is_first: np.ndarray, n_classes: int) -> np.ndarray:
    """Return the smallest label that no neighbour has, ``(Q,)``; n_classes if all have one."""
    present = np.sort(np.where(is_first, labels, n_classes), axis=1)
    # Distinct and ascending: as long as label i stands at place i, none is missing.
    in_place = present == np.arange(labels.shape[1])
    return np.where(in_place.all(axis=1), labels.shape[1], in_place.argmin(axis=1))


def _neighbour_labels(neighbours: Neighbours, database_labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Return the class of each neighbour, ``(Q, K)``."""
    database_labels = np.asarray(database_labels)
    if database_labels.ndim != 1 or not np.issubdtype(database_labels.dtype, np.integer):
        raise ValueError("database_labels must be a 1-D array of integers")
    if len(database_labels) and not 0 <= database_labels.min() <= database_labels.max() < n_classes:
        raise ValueError(f"database_labels must lie between 0 and n_classes - 1 = {n_classes - 1}")
    if neighbours.rows.size and neighbours.rows.max() >= len(database_labels):
        raise ValueError(
            f"neighbours name row {neighbours.rows.max()}, database_labels has {len(database_labels)} rows"
        )
    return database_labels[neighbours.rows]


def _check_k(k: int, neighbours: Neighbours, database_labels: np.ndarray) -> None:
    if not 1 <= k <= len(database_labels):
        n = len(database_labels)
        raise UserError(f"--k {k}: the database has {n} images; choose k from 1 to {n}")
    if k > neighbours.rows.shape[1]:
        raise ValueError(f"k = {k}, but the search kept {neighbours.rows.shape[1]} neighbours: search with k")


def check_tau(tau: float) -> None:
    """Refuse an inverse temperature that is no number in (0, MAX_TAU].

    Raises:
        UserError: If it is not.
    """
    if not 0 < tau <= MAX_TAU:  # NaN fails too
        raise UserError(f"--tau {tau}: choose a number above 0, at most {MAX_TAU:g}")


N_MATCHES = 5
N_NEIGHBOURS = 20  # looked through for matches: an exhibit has up to a dozen images, as a rule one to three


@dataclass(frozen=True, eq=False)
class Matches:
    """Database images of different exhibits, most similar first; all arrays ``(Q, M)``.

    Attributes:
        rows: Database rows, int64; NO_ROW where the neighbours hold no further exhibit, or the query was skipped.
        similarities: Inner products, float64; NaN where there is no row.
    """

    rows: np.ndarray
    similarities: np.ndarray


def top_matches(neighbours: Neighbours, database_labels: np.ndarray, n: int = N_MATCHES) -> Matches:
    """Take each query's nearest image of each exhibit, for the n nearest exhibits that its neighbours show.

    Args:
        neighbours: Result of a search, ``(Q, K)``.
        database_labels: Class of each database row, ``(N,)`` int64.
        n: Exhibits wanted.

    Returns:
        Rows and similarities, ``(Q, n)`` each.
    """
    is_first = first_of_class(database_labels[neighbours.rows])
    places = np.argsort(~is_first, axis=1, kind="stable")[:, :n]  # the nearest of each exhibit first, in their order
    found = np.take_along_axis(is_first, places, axis=1)
    rows = np.full((len(found), n), NO_ROW, dtype=np.int64)
    similarities = np.full((len(found), n), np.nan)
    width = places.shape[1]
    rows[:, :width] = np.where(found, np.take_along_axis(neighbours.rows, places, axis=1), NO_ROW)
    similarities[:, :width] = np.where(found, np.take_along_axis(neighbours.similarities, places, axis=1), np.nan)
    return Matches(rows, similarities)
