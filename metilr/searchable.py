"""The database as it is searched: unit rows, what each shows, and the search with all that the method asks for."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from metilr.approximate_search import ApproximateIndex
from metilr.data.ground_truth import GroundTruth
from metilr.descriptors import CHUNK_ROWS, row_chunks
from metilr.knn import NO_ROW
from metilr.matches import Matches, top_matches
from metilr.method import Method
from metilr.progress import counted
from metilr.search import Neighbours, SearchDevice, device_for, search
from metilr.sources import Descriptors
from metilr.whitening import PCAWhitening, fit_learned_whitening, fit_pca_whitening

DBA_POWER = 3  # of the similarity that weighs a neighbour, as in Radenović et al., TPAMI 2019, section 4.3


@dataclass(frozen=True, eq=False)
class Searchable:
    """What queries are compared with.

    Attributes:
        rows: Float32 ``(M, D)``, unit length.
        labels: What each shows, int64 ``(M,)``.
        images: Row of the ground truth's database that each was made from, int64 ``(M,)``.
        background: How much more than the average row each resembles rows of other exhibits, ``(M,)``, see
            ``mean_background``; None where the method does not ask for it.
        has_offset: Whether the last column of ``rows`` is a number that is added to the row's similarities.
        approximate: Searches ``rows`` in place of an exact search; None: exactly.
    """

    rows: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    background: np.ndarray | None = None
    has_offset: bool = False
    approximate: ApproximateIndex | None = None

    def lowered(self, beta: float) -> "Searchable":
        """The same with similarities that are less by beta times the row's background."""
        if beta == 0:
            return self
        assert self.background is not None and not self.has_offset and self.approximate is None
        # One more dimension makes the subtraction a part of the inner product.
        rows = np.column_stack([self.rows, (-beta * self.background).astype(np.float32)])
        return dataclasses.replace(self, rows=rows, has_offset=True)

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
        if self.has_offset:
            views = np.column_stack([views, np.ones(len(views), dtype=np.float32)])
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
    device: SearchDevice = "cpu",
    quiet: bool = True,
) -> Searchable:
    """Put the database together: whitened rows, with their visits, augmented.

    Args:
        descriptors: Rows of the database, and of its visits if the method has them.
        ground_truth: Labels of the database.
        method: Which elements are on.
        transform: The whitening; None for none.
        device: Where neighbours within the database are searched.
        quiet: Show no progress.
    """
    made = descriptors.made["database"]
    images = np.flatnonzero(made)
    splits = ["database", "visits"] if method.database_views == "rows" else ["database"]
    rows = _unit_rows(descriptors, splits, transform, quiet)
    if method.database_views == "rows":
        images = np.concatenate([images, np.repeat(images, method.visits)])
    elif method.database_views == "mean":
        _add_visits(rows, descriptors, method.visits, transform, quiet)
    labels = ground_truth.labels["database"][images]
    if method.dba:
        with counted("augmenting the database", len(rows), "rows", quiet) as done:
            rows = augmented(rows, method.dba, device, done)
    background = None
    if method.hubness:
        with counted("looking for hubs", len(rows), "rows", quiet) as done:
            background = mean_background(rows, labels, method.hubness, device, done)
        # Similarities keep their scale, and so their place against classes without a neighbour, which have 0.
        background -= background.mean()
    return Searchable(rows, labels, images, background)


def query_views(
    descriptors: Descriptors, split: str, method: Method, transform: PCAWhitening | None, quiet: bool = True
) -> np.ndarray:
    """Descriptors of the queries that have one and of their crops, as they are searched: ``(n made, V, D)``."""
    whole = _unit_rows(descriptors, [split], transform, quiet)[:, None]
    if not method.query_crops:
        return whole
    crops = _unit_rows(descriptors, [f"{split}_crops"], transform, quiet)
    return joined_views(whole, crops.reshape(len(whole), len(method.query_crops), whole.shape[2]), method)


def joined_views(whole: np.ndarray, crops: np.ndarray, method: Method) -> np.ndarray:
    """Put crops ``(Q, C, D)`` beside whole queries ``(Q, 1, D)``, or average them: ``(Q, V, D)``."""
    views = np.concatenate([whole, crops], axis=1)
    if method.crop_similarity == "best":
        return views
    mean = views.sum(axis=1)
    _to_unit_length(mean)
    return mean[:, None]


def learn_whitening(descriptors: Descriptors, ground_truth: GroundTruth, method: Method, quiet: bool) -> PCAWhitening:
    """Learn the whitening that the method asks for, in one pass over the database and one over the visits.

    Raises:
        UserError: As ``metilr.whitening.fit_pca_whitening`` or ``metilr.whitening.fit_learned_whitening``.
    """
    made = descriptors.made["database"]
    with counted("learning whitening", int(made.sum()), "rows", quiet) as done:

        def database() -> Iterator[np.ndarray]:
            for chunk in row_chunks(descriptors.parts["database"], made):
                yield chunk
                done(len(chunk))

        if not method.is_learned:
            return fit_pca_whitening(database(), method.whitening_dim, method.whitening_shrinkage)
        return fit_learned_whitening(
            database(), pair_differences(descriptors, ground_truth), method.whitening_dim, method.pair_shrinkage
        )


def pair_differences(descriptors: Descriptors, ground_truth: GroundTruth) -> Iterator[np.ndarray]:
    """Differences of descriptors that show the same exhibit: of images and their visits, and of its images.

    Yields:
        float32 ``(m, D)``, a row a pair.
    """
    database, made = descriptors.parts["database"], descriptors.made["database"]
    if "visits" in descriptors.parts:
        yield from visit_differences(database, descriptors.parts["visits"], made)
    yield from exhibit_differences(database, np.where(made, ground_truth.labels["database"], -1))


def visit_differences(
    images: Sequence[np.ndarray], visits: Sequence[np.ndarray], made: np.ndarray
) -> Iterator[np.ndarray]:
    """Differences of each image and each of its visits, float32 ``(m, D)``, some at a time.

    Args:
        images: Side by side, each ``(n, D_i)``.
        visits: Of n visits an image, row ``i * n_visits + v``, each ``(n * n_visits, D_i)``.
        made: Which images count, ``(n,)``.
    """
    n_visits = len(visits[0]) // len(made)
    size = CHUNK_ROWS // n_visits + 1
    for start in range(0, len(made), size):
        kept = made[start : start + size]
        of_images = _side_by_side([part[start : start + size] for part in images])
        of_visits = _side_by_side([part[start * n_visits : (start + size) * n_visits] for part in visits])
        differences = of_images[:, None] - of_visits.reshape(len(of_images), n_visits, -1)
        yield differences[kept].reshape(-1, of_images.shape[1])


def exhibit_differences(images: Sequence[np.ndarray], labels: np.ndarray) -> Iterator[np.ndarray]:
    """Differences of each image and the next one of its exhibit, in a ring, float32 ``(m, D)``, some at a time.

    Args:
        images: Side by side, each ``(n, D_i)``.
        labels: What each shows, ``(n,)``; those below 0 are left out.
    """
    first, second = ring_pairs(labels)
    for start in range(0, len(first), CHUNK_ROWS):
        pairs = slice(start, start + CHUNK_ROWS)
        yield _side_by_side([part[first[pairs]] - part[second[pairs]] for part in images])


def ring_pairs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair each row with the next one of its label, and the last with the first; labels < 0 are left out.

    Returns:
        First and second row of each pair, int64 ``(P,)``: none for a label with one row, one for two, else as many as
        it has rows.
    """
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    following = np.arange(1, len(order) + 1)
    following[starts + counts - 1] = starts
    place_in_label = np.arange(len(order)) - np.repeat(starts, counts)
    n_pairs = np.where(counts > 2, counts, counts - 1)
    is_pair = place_in_label < np.repeat(n_pairs, counts)
    return order[is_pair], order[following[is_pair]]


def augmented(
    rows: np.ndarray, n: int, device: SearchDevice = "cpu", done: Callable[[int], None] = lambda n: None
) -> np.ndarray:
    """Database-side augmentation: each row becomes the sum of itself and its n nearest rows, of unit length.

    A neighbour counts by its similarity (0 if negative) to the power of ``DBA_POWER``; the row itself counts 1.

    Args:
        rows: Float32 ``(M, D)``, unit length.
        n: Neighbours, below M.
        device: See ``search``.
        done: See ``search``.

    Returns:
        Float32 ``(M, D)``.

    Source: Turcot and Lowe, Better matching with fewer features, ICCV workshops 2009; the weights of Radenović et al.,
    TPAMI 2019, section 4.3.
    """
    found = search(rows, rows, n + 1, device_for(device, n + 1), done)
    result = np.empty_like(rows)
    for start in range(0, len(rows), chunk := max(1, CHUNK_ROWS // (n + 1))):
        part = slice(start, start + chunk)
        own = np.arange(start, start + len(rows[part]))[:, None]
        is_own = found.rows[part] == own
        is_own[~is_own.any(axis=1), -1] = True  # n + 1 or more copies of the row: it is as good as any of them
        weights = np.where(is_own, 1.0, np.maximum(found.similarities[part], 0) ** DBA_POWER)
        result[part] = np.einsum("mn,mnd->md", weights.astype(np.float32), rows[found.rows[part]])
    _to_unit_length(result)
    return result


def mean_background(
    rows: np.ndarray,
    labels: np.ndarray,
    n: int,
    device: SearchDevice = "cpu",
    done: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Mean similarity of each row to its n nearest rows of other exhibits: high for hubs, which resemble everything.

    Args:
        rows: Float32 ``(M, D)``, unit length.
        labels: What each row shows, ``(M,)``.
        n: Rows that count; fewer where the other exhibits have fewer.
        device: See ``search``.
        done: See ``search``.

    Returns:
        ``(M,)`` float64; 0 where there is no other exhibit.

    Source: the query-independent half of cross-domain similarity local scaling, Conneau et al., Word Translation
    Without Parallel Data, ICLR 2018, section 2.3.
    """
    mean = np.zeros(len(rows))
    pending, width = np.arange(len(rows)), min(len(rows), n + 16)
    while len(pending):
        found = search(rows, rows[pending], width, device_for(device, width))
        is_other = labels[found.rows] != labels[pending, None]
        counts = is_other & (np.cumsum(is_other, axis=1) <= n)
        n_found = counts.sum(axis=1)
        mean[pending] = np.where(counts, found.similarities, 0).sum(axis=1) / np.maximum(n_found, 1)
        settled = (n_found == n) | (width == len(rows))
        done(int(settled.sum()))
        pending, width = pending[~settled], min(len(rows), 4 * width)  # rows of exhibits with many images
    return mean


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


def _add_visits(
    rows: np.ndarray, descriptors: Descriptors, n_visits: int, transform: PCAWhitening | None, quiet: bool
) -> None:
    """Make each row the mean of itself and its image's visits, of unit length; some images at a time."""
    start = 0
    with counted("averaging visits", len(rows), "images", quiet) as done:
        images_at_once = CHUNK_ROWS // n_visits + 1
        for chunk in row_chunks(descriptors.parts["visits"], descriptors.made["visits"], images_at_once * n_visits):
            visits = as_compared(chunk, transform).reshape(-1, n_visits, rows.shape[1])
            rows[start : start + len(visits)] += visits.sum(axis=1)
            start += len(visits)
            done(len(visits))
    _to_unit_length(rows)


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


def _to_unit_length(rows: np.ndarray) -> None:
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _side_by_side(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.float32) for part in parts], axis=1)
