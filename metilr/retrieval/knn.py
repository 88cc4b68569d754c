"""The kNN classifier: which class the nearest neighbours speak for, and how sure that is.

Everything comes from one search with the largest k: a smaller k reads fewer columns of its result.
Arrays of one number per query are ``(Q,)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metilr.errors import UserError, amount
from metilr.metrics.functional import DISTRACTOR, gap
from metilr.retrieval.search import Neighbours

K_GRID = (1, 2, 3, 5, 7, 10, 15, 20, 50)  # the benchmark's
TAU_GRID = (0.01, 0.1, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 50.0, 100.0, 500.0)  # the benchmark's
USUAL_TAU = 50.0  # what the published rows chose on val, nearly all
MAX_TAU = 700.0  # exp(-700) is still a normal float64: a lead of 1 does not saturate the log-confidence
NO_ROW = -1  # nearest row of a prediction that no neighbour gave
NO_LABEL = DISTRACTOR  # of a query that was not answered: right nowhere
N_MATCHES = 5
N_NEIGHBOURS = 20  # looked through for matches: an exhibit has up to a dozen images, as a rule one to three


@dataclass(frozen=True, eq=False)
class Predictions:
    """One prediction per query."""

    labels: np.ndarray  # best class, int64; NO_LABEL if the query was skipped
    log_confidence: np.ndarray  # logarithm of the softmax of the best class, float64; -inf if skipped
    similarity: np.ndarray  # s_c of the best class, float64 (0 if no neighbour shows it); NaN if skipped
    nearest: np.ndarray  # database row that gave this similarity, int64; NO_ROW if none did


@dataclass(frozen=True, eq=False)
class Tuning:
    """The grid point that was chosen, and GAP over the whole grid."""

    k: int
    tau: float
    surface: np.ndarray  # GAP in [0, 1] at each grid point, (len(k_grid), len(tau_grid))
    k_grid: tuple[int, ...]  # tried, ascending: those asked for that the database can serve
    tau_grid: tuple[float, ...]  # tried, ascending


@dataclass(frozen=True, eq=False)
class Matches:
    """Database images of different exhibits, most similar first; both arrays ``(Q, M)``."""

    rows: np.ndarray  # int64; NO_ROW where the neighbours hold no further exhibit, or the query was skipped
    similarities: np.ndarray  # inner products, float64; NaN where there is no row


def classify(neighbours: Neighbours, database_labels: np.ndarray, n_classes: int, k: int, tau: float) -> Predictions:
    """Answer each query by its k nearest of at least k neighbours, whose classes are ``database_labels``, ``(N,)``.

    s_c is the largest similarity to a neighbour of class c among the k nearest, 0 for a class that has none.
    The answer is the class of largest s_c, the smaller label if several are equal: where no neighbour is more
    than 0 similar, that can be a class without a neighbour. Its confidence is the softmax of tau * s over
    **all** classes, as a logarithm: -log1p(Σ exp(tau (s_c - s_best)) over the other classes). Unlike the
    softmax itself this keeps telling answers apart when the best class is far ahead: in float64 as long as
    tau times the lead over the second best class is at most 700, which a lead of at most 1 always meets here.

    Source: Ypsilantis et al., The Met Dataset, NeurIPS 2021.
    """
    check_tau(tau)
    labels = _neighbour_labels(neighbours, database_labels, n_classes, k)
    return _vote(neighbours, labels, _first_of_class(labels), n_classes, k).predictions(tau)


def with_skipped(predictions: Predictions, skipped: np.ndarray) -> Predictions:
    """Add the queries that have no descriptor (``skipped``, bool, of all queries): never right, less sure than all."""
    if (~skipped).sum() != len(predictions.labels):
        raise ValueError(f"{(~skipped).sum()} queries were not skipped, but {len(predictions.labels)} answered")
    fills = {"labels": NO_LABEL, "log_confidence": -np.inf, "similarity": np.nan, "nearest": NO_ROW}
    return Predictions(**{name: spread(getattr(predictions, name), ~skipped, fill) for name, fill in fills.items()})


def spread(rows: np.ndarray, is_there: np.ndarray, fill: float) -> np.ndarray:
    """Put rows ``(n, ...)`` where ``is_there``, bool ``(Q,)``, says so, and ``fill`` elsewhere: ``(Q, ...)``."""
    whole = np.full((len(is_there), *rows.shape[1:]), fill, dtype=rows.dtype)
    whole[is_there] = rows
    return whole


def tune(
    neighbours: Neighbours, database_labels: np.ndarray, n_classes: int, query_labels: np.ndarray,
    k_grid: Sequence[int] = K_GRID, tau_grid: Sequence[float] = TAU_GRID, skipped: np.ndarray | None = None,
) -> Tuning:  # fmt: skip
    """Choose k and tau by GAP over the full grid.

    Equal GAPs: the smaller k, then the tau nearest ``USUAL_TAU`` by ratio. (With k = 1 every tau ranks alike, and
    the confidence should still tell something.) A k larger than the database is left out of the grid;
    ``k_grid`` of the result says which were tried.

    ``neighbours`` are of one search with the largest k that fits, for the queries not ``skipped``, in order;
    ``query_labels`` are of all, DISTRACTOR where no exhibit is shown. Skipped ones count as wrong and rank last.
    """
    k_tried = tuple(sorted({k for k in k_grid if k <= len(database_labels)}))
    tau_tried = tuple(sorted(set(tau_grid)))
    if not k_tried or not tau_tried:
        where = f"with tau from {list(tau_grid)} and {len(database_labels)} database images"
        raise UserError(f"{list(k_grid)}: no grid point to try {where}; name a smaller k", "k")
    for tau in tau_tried:
        check_tau(tau)
    for k in (k_tried[0], k_tried[-1]):
        labels = _neighbour_labels(neighbours, database_labels, n_classes, k)
    skipped = np.zeros(len(query_labels), dtype=bool) if skipped is None else skipped
    is_first = _first_of_class(labels)
    surface = np.empty((len(k_tried), len(tau_tried)))
    for i, k in enumerate(k_tried):
        vote = _vote(neighbours, labels, is_first, n_classes, k)
        for j, tau in enumerate(tau_tried):
            predictions = with_skipped(vote.predictions(tau), skipped)
            surface[i, j] = gap(predictions.log_confidence, predictions.labels, query_labels)
    i = int(surface.max(axis=1).argmax())  # argmax takes the first of equals
    best = np.flatnonzero(surface[i] == surface[i].max())
    j = int(best[np.abs(np.log(np.array(tau_tried)[best] / USUAL_TAU)).argmin()])
    return Tuning(k_tried[i], tau_tried[j], surface, k_tried, tau_tried)


def top_matches(neighbours: Neighbours, database_labels: np.ndarray, n: int = N_MATCHES) -> Matches:
    """Take each query's nearest image of each exhibit, for the n nearest exhibits that its neighbours show."""
    is_first = _first_of_class(database_labels[neighbours.rows])
    places = np.argsort(~is_first, axis=1, kind="stable")[:, :n]  # the nearest of each exhibit first, in their order
    is_match = np.take_along_axis(is_first, places, axis=1)
    rows = np.where(is_match, np.take_along_axis(neighbours.rows, places, axis=1), NO_ROW)
    similarities = np.where(is_match, np.take_along_axis(neighbours.similarities, places, axis=1), np.nan)
    beyond = ((0, 0), (0, n - places.shape[1]))  # where there are fewer neighbours
    return Matches(np.pad(rows, beyond, constant_values=NO_ROW), np.pad(similarities, beyond, constant_values=np.nan))


def log_confidence(behind: np.ndarray, n_absent: np.ndarray, best: np.ndarray, tau: float) -> np.ndarray:
    """Log of the softmax of the best class's similarity, ``(Q,)``: -log1p of the other classes' summed odds.

    ``behind``, ``(Q, k)``, is how far each other class is behind ``best``, ``(Q,)`` (-inf where there is none);
    ``n_absent`` more have similarity 0. Source: the Met paper's classifier (Ypsilantis et al., 2021).
    """
    odds = np.exp(tau * behind).sum(axis=1)
    odds += n_absent * np.exp(-tau * best)
    return -np.log1p(odds)


@dataclass(frozen=True, eq=False)
class _Vote:
    """What k decides and tau does not: the best class, and how far behind it the others are."""

    labels: np.ndarray
    similarity: np.ndarray  # s_best
    nearest: np.ndarray
    behind: np.ndarray  # (Q, k) s_c - s_best where a neighbour is the first of another class, else -inf
    n_absent: np.ndarray  # other classes without a neighbour, each with s = 0

    def predictions(self, tau: float) -> Predictions:
        """Add the confidence: -log1p of the other classes' summed odds."""
        # Where a class is absent, s_best >= 0. Elsewhere the factor is 0, and the maximum avoids 0 * inf.
        sure = log_confidence(self.behind, self.n_absent, np.maximum(self.similarity, 0), tau)
        return Predictions(self.labels, 0.0 + sure, self.similarity, self.nearest)  # 0, not -0, for a single class


def _vote(neighbours: Neighbours, labels: np.ndarray, is_first: np.ndarray, n_classes: int, k: int) -> _Vote:
    similarities, labels, is_first = neighbours.similarities[:, :k], labels[:, :k], is_first[:, :k]
    n_absent = n_classes - is_first.sum(axis=1)

    # The best class that has a neighbour: similarities descend, so it is among those equal to the first.
    is_best = is_first & (similarities == similarities[:, :1])
    place = np.where(is_best, labels, n_classes).argmin(axis=1)[:, None]  # (Q, 1)
    best_label = np.take_along_axis(labels, place, axis=1)[:, 0]
    nearest = np.take_along_axis(neighbours.rows[:, :k], place, axis=1)[:, 0]
    best = similarities[:, 0]

    # A class without a neighbour has s = 0: it wins against less than 0, and against 0 by a smaller label.
    present = np.sort(np.where(is_first, labels, n_classes), axis=1)
    # Distinct and ascending: as long as label i stands at place i, none is missing.
    in_place = present == np.arange(labels.shape[1])
    absent_label = np.where(in_place.all(axis=1), labels.shape[1], in_place.argmin(axis=1))
    absent_wins = (n_absent > 0) & ((best < 0) | ((best == 0) & (absent_label < best_label)))
    best = np.where(absent_wins, 0.0, best)

    is_other = is_first.copy()
    np.put_along_axis(is_other, place, absent_wins[:, None], axis=1)
    return _Vote(
        labels=np.where(absent_wins, absent_label, best_label),
        similarity=best,
        nearest=np.where(absent_wins, NO_ROW, nearest),
        behind=np.where(is_other, similarities - best[:, None], -np.inf),
        n_absent=n_absent - absent_wins,
    )


def _first_of_class(labels: np.ndarray) -> np.ndarray:
    """Return which neighbours are the nearest of their class, for every k at once: bool ``(Q, K)``, as labels."""
    order = np.argsort(labels, axis=1, kind="stable")
    ordered = np.take_along_axis(labels, order, axis=1)
    starts = np.ones(labels.shape, dtype=bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    is_first = np.empty_like(starts)
    np.put_along_axis(is_first, order, starts, axis=1)
    return is_first


def _neighbour_labels(neighbours: Neighbours, database_labels: np.ndarray, n_classes: int, k: int) -> np.ndarray:
    """Return the class of each neighbour, ``(Q, K)``, of which the first k will be used."""
    n = len(database_labels)
    if not 1 <= k <= n:
        raise UserError(f"{k}: the database has {amount(n, 'image')}; choose k from 1 to {n}", "k")
    if k > neighbours.rows.shape[1]:
        raise ValueError(f"k = {k}, but the search kept {neighbours.rows.shape[1]} neighbours: search with k")
    is_whole = database_labels.ndim == 1 and np.issubdtype(database_labels.dtype, np.integer)
    if not is_whole or not 0 <= database_labels.min() <= database_labels.max() < n_classes:
        raise ValueError(f"database_labels must be whole numbers from 0 to n_classes - 1 = {n_classes - 1}")
    if neighbours.rows.max(initial=NO_ROW) >= n:
        raise ValueError(f"neighbours name row {neighbours.rows.max()}, database_labels has {n} rows")
    return database_labels[neighbours.rows]


def check_tau(tau: float) -> None:
    """Refuse an inverse temperature that is no number in (0, MAX_TAU]."""
    if not 0 < tau <= MAX_TAU:  # NaN fails too
        raise UserError(f"{tau}: choose a number above 0, at most {MAX_TAU:g}", "tau")
