"""The whitening that a method asks for, learned from a database and pairs of descriptors that show one exhibit."""

from collections.abc import Iterator, Sequence

import numpy as np

from metilr.data.ground_truth import GroundTruth
from metilr.errors import UserError
from metilr.evaluation.options import Method
from metilr.extraction.descriptors import Descriptors
from metilr.extraction.store import CHUNK_ROWS, row_chunks
from metilr.progress import counted
from metilr.retrieval.whitening import PCAWhitening, fit_learned_whitening, fit_pca_whitening


def learn_whitening(descriptors: Descriptors, ground_truth: GroundTruth, method: Method, quiet: bool) -> PCAWhitening:
    """Learn the whitening that the method asks for, in one pass over the database and one over the visits.

    Raises:
        UserError: As ``fit_pca_whitening`` or ``fit_learned_whitening``.
    """
    made = descriptors.made["database"]
    with counted("learning whitening", int(made.sum()), "rows", quiet) as done:

        def database() -> Iterator[np.ndarray]:
            for chunk in row_chunks(descriptors.parts["database"], made):
                yield chunk
                done(len(chunk))

        try:
            if not method.is_learned:
                return fit_pca_whitening(database(), method.whitening_dim, method.whitening_shrinkage)
            pairs = pair_differences(descriptors, ground_truth)
            return fit_learned_whitening(database(), pairs, method.whitening_dim, method.pair_shrinkage)
        except UserError as error:
            raise UserError(error.message, "whitening_dim" if error.parameter == "dim" else error.parameter) from None


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


def _side_by_side(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.float32) for part in parts], axis=1)
