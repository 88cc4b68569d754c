"""Top matches: for each query the nearest database image of each of the nearest exhibits, to be looked at."""

from dataclasses import dataclass

import numpy as np

from metilr.knn import NO_ROW, first_of_class
from metilr.search import Neighbours

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
