"""What a database row's nearest rows in the database tell: augmentation, and how much it resembles everything."""

from collections.abc import Callable

import numpy as np

from metilr.extraction.store import CHUNK_ROWS, to_unit_length
from metilr.retrieval.search import SearchDevice, device_for, search

DBA_POWER = 3  # of the similarity that weighs a neighbour, as in Radenović et al., TPAMI 2019, section 4.3


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
    to_unit_length(result)
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
