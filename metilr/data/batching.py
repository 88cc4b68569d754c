"""Which images go through the backbone together."""

import heapq
from collections.abc import Sequence

import numpy as np

FULL_BATCH_PIXELS = 500 * 500  # the Met's images have at most 500 px a side


def same_shape_batches(shapes: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Group images of equal height and width, so that a batch needs neither padding nor cropping.

    The largest images come first: a batch that does not fit in memory fails at the start of a run.

    Args:
        shapes: Height and width of each image, int ``(n, 2)``.
        batch_size: Most images in a batch. Images of more than 500 x 500 px come in batches of fewer, in
            proportion: memory goes with pixels, and a museum's own photographs can have millions.

    Returns:
        Positions in ``shapes``, each once, in batches of one shape; ascending within a batch.
    """
    if not len(shapes):
        return []
    kinds, kind_of = np.unique(shapes, axis=0, return_inverse=True)
    members = np.split(np.argsort(kind_of.reshape(-1), kind="stable"), np.cumsum(np.bincount(kind_of.reshape(-1)))[:-1])
    by_area = np.argsort(-kinds.prod(axis=1), kind="stable")
    batches = []
    for kind in by_area:
        size = max(1, min(batch_size, batch_size * FULL_BATCH_PIXELS // int(kinds[kind].prod())))
        batches += [members[kind][i : i + size] for i in range(0, len(members[kind]), size)]
    return batches


def deal(work: Sequence[int], n_processes: int) -> list[list[int]]:
    """Share out batches so that each process has nearly the same work: the largest first, to whom has least.

    Args:
        work: Of each batch, in any unit.
        n_processes: That share it.

    Returns:
        By process, its batches as positions in ``work``, ascending; each batch once.
    """
    loads = [(0, process) for process in range(n_processes)]
    shares: list[list[int]] = [[] for _ in loads]
    for batch in sorted(range(len(work)), key=lambda batch: -work[batch]):
        load, process = loads[0]
        shares[process].append(batch)
        heapq.heapreplace(loads, (load + work[batch], process))
    return [sorted(share) for share in shares]
