"""The database as it is searched: unit rows, what each shows, and the search with all that the method asks for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from metilr.data.ground_truth import GroundTruth
from metilr.evaluation.options import Method
from metilr.extraction.descriptors import Descriptors
from metilr.extraction.store import row_chunks
from metilr.progress import counted
from metilr.retrieval.approximate import ApproximateIndex
from metilr.retrieval.knn import NO_ROW, Matches, top_matches
from metilr.retrieval.search import Neighbours, SearchDevice, device_for, search
from metilr.retrieval.whitening import PCAWhitening


@dataclass(frozen=True, eq=False)
class Searchable:
    """What queries are compared with.

    Attributes:
        rows: Float32 ``(M, D)``, unit length.
        labels: What each shows, int64 ``(M,)``.
        images: Row of the ground truth's database that each was made from, int64 ``(M,)``.
        approximate: Searches ``rows`` in place of an exact search; None: exactly.
    """

    rows: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    approximate: ApproximateIndex | None = None

    def nearest(
        self,
        queries: np.ndarray,
        k: int,
        device: SearchDevice = "cpu",
        done: Callable[[int], None] = lambda n: None,
    ) -> Neighbours:
        """Find the k rows most similar to each query, exactly unless ``approximate`` says otherwise.

        A query is as similar to a row as its most similar view.

        Args:
            queries: All views of each query, float32 ``(Q, V, D)``.
            k: Neighbours of a query.
            device: See ``search``.
            done: Told the number of views that were searched since the last time.

        Returns:
            Similarities and rows, ``(Q, k)``; equal similarities: smaller row first.
        """
        n_views, width = queries.shape[1:]
        views = queries.reshape(-1, width)
        if self.approximate is None:
            found = search(self.rows, views, k, device_for(device, k), done)
        else:
            found = self.approximate.search(views, k, done)
        if n_views == 1:
            return found
        return _best_of_views(found, n_views, k)

    def matches(self, queries: np.ndarray, neighbours: Neighbours, n: int, device: SearchDevice = "cpu") -> Matches:
        """The nearest row of each of the n nearest exhibits, or of all; looks further where neighbours show fewer.

        Args:
            queries: As for ``nearest``.
            neighbours: What that found for them.
            n: Exhibits of each query.
            device: See ``search``.
        """
        n = min(n, len(np.unique(self.labels)))
        found = top_matches(neighbours, self.labels, n)
        width = neighbours.rows.shape[1]
        while len(short := np.flatnonzero((found.rows == NO_ROW).any(axis=1))):
            width = min(len(self.rows), 4 * width)
            wider = top_matches(self.nearest(queries[short], width, device), self.labels, n)
            found.rows[short], found.similarities[short] = wider.rows, wider.similarities
        return found


def build_searchable(
    descriptors: Descriptors,
    ground_truth: GroundTruth,
    method: Method,
    transform: PCAWhitening | None,
    quiet: bool = True,
) -> Searchable:
    """Put the database together: whitened rows, with their visits.

    Args:
        descriptors: Rows of the database, and of its visits if the method has them.
        ground_truth: Labels of the database.
        method: Which elements are on.
        transform: The whitening; None for none.
        quiet: Show no progress.
    """
    made = descriptors.made["database"]
    images = np.flatnonzero(made)
    splits = ["database", "visits"] if method.database_views == "rows" else ["database"]
    rows = _unit_rows(descriptors, splits, transform, quiet)
    if method.database_views == "rows":
        images = np.concatenate([images, np.repeat(images, method.visits)])
    return Searchable(rows, ground_truth.labels["database"][images], images)


def query_views(
    descriptors: Descriptors, split: str, method: Method, transform: PCAWhitening | None, quiet: bool = True
) -> np.ndarray:
    """Descriptors of the queries that have one and of their crops, as they are searched: ``(n made, V, D)``."""
    whole = _unit_rows(descriptors, [split], transform, quiet)[:, None]
    if not method.query_crops:
        return whole
    crops = _unit_rows(descriptors, [f"{split}_crops"], transform, quiet)
    return np.concatenate([whole, crops.reshape(len(whole), len(method.query_crops), whole.shape[2])], axis=1)


def _unit_rows(
    descriptors: Descriptors, splits: Sequence[str], transform: PCAWhitening | None, quiet: bool
) -> np.ndarray:
    """Rows of splits under each other as they are compared, float32 ``(n made, D)``, of unit length."""
    width = descriptors.width if transform is None else transform.dim
    ready = np.empty((sum(int(descriptors.made[split].sum()) for split in splits), width), dtype=np.float32)
    start = 0
    with counted(f"whitening {' and '.join(splits)}", len(ready), "rows", quiet) as done:
        for split in splits:
            for chunk in row_chunks(descriptors.parts[split], descriptors.made[split]):
                ready[start : start + len(chunk)] = as_compared(chunk, transform)
                start += len(chunk)
                done(len(chunk))
    return ready


def as_compared(rows: np.ndarray, transform: PCAWhitening | None) -> np.ndarray:
    """Whiten rows ``(n, D)`` if asked for, and give them unit length."""
    if transform is None:
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return transform.transform(rows)


def _best_of_views(found: Neighbours, n_views: int, k: int) -> Neighbours:
    """Of the k nearest rows of each view, ``(Q * V, k)``, the k nearest of each query by its most similar view.

    A row among those is among the k nearest of the view that it is most similar to, so none is missed.
    """
    rows = found.rows.reshape(-1, n_views * k)
    similarities = found.similarities.reshape(-1, n_views * k)
    order = np.lexsort((-similarities, rows), axis=1)  # each row's greatest similarity first
    rows, similarities = (np.take_along_axis(values, order, axis=1) for values in (rows, similarities))
    is_repeated = np.zeros(rows.shape, dtype=bool)
    is_repeated[:, 1:] = rows[:, 1:] == rows[:, :-1]
    similarities = np.where(is_repeated, -np.inf, similarities)
    order = np.lexsort((rows, -similarities), axis=1)[:, :k]
    return Neighbours(np.take_along_axis(similarities, order, axis=1), np.take_along_axis(rows, order, axis=1))
