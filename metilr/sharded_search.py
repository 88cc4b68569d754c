"""One search over rows that several processes share, on one machine or many: each searches its own, answers are merged.

    torchrun --nnodes 4 --nproc_per_node 1 --node_rank RANK --master_addr HOST --master_port 29500 my_search.py

on each machine with its own RANK, from 0 to 3, and ``torch.distributed.init_process_group("gloo")`` before
``sharded_search(...)`` in ``my_search.py``.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from metilr.approximate_search import ranked
from metilr.errors import UserError
from metilr.retrieval.knn import NO_ROW
from metilr.retrieval.search import Neighbours

_GATHERED = 2**22  # similarities and rows of all processes at a time: 64 MiB

# Takes queries (Q, D) and k; returns the neighbours among this process's rows.
ShardSearch = Callable[[np.ndarray, int], Neighbours]


def shard(n_rows: int, rank: int, n_processes: int) -> slice:
    """The rows that a process holds: all of them in the processes' order, in shares that differ by one row at most."""
    return slice(n_rows * rank // n_processes, n_rows * (rank + 1) // n_processes)


def sharded_search(
    find: ShardSearch, n_rows: int, queries: np.ndarray, k: int, group: ProcessGroup | None = None
) -> Neighbours:
    """Find each query's k best rows among those of all processes. All of them call this, and all get the result.

    A row's number counts through the processes in the order of their ranks. Similarities of ``search`` depend on query
    and row alone, and merging keeps its order: (similarity descending, row ascending). So the result of exact searches
    is that of one ``search`` over all rows bit for bit, however many share them; that of approximate ones is so where
    each process's candidates hold those of its rows that belong to it.

    A process sends and gets ``16 * k`` bytes a query and process, and besides its own k neighbours of each query and
    the result holds 64 MiB of them at a time.

    Args:
        find: Searches this process's rows, such as ``lambda queries, k: search(rows, queries, k)`` or the method
            ``search`` of an ``ApproximateIndex``.
        n_rows: How many it holds; may differ from process to process, and be 0.
        queries: Descriptors, ``(Q, D)`` float32, the same in all processes.
        k: Neighbours of a query, 1 to the number of all rows.
        group: Processes that take part, over gloo; None: all.

    Returns:
        Similarities and rows, ``(Q, k)`` each; the rows of all processes counted through.

    Raises:
        UserError: In every process, if ``find`` raised one in any, the processes disagree about queries or k, or k does
            not fit the rows.
    """
    n_processes = torch.distributed.get_world_size(group)
    own, message = None, None
    try:
        if n_rows and k >= 1:
            own = find(queries, min(k, n_rows))
    except UserError as error:
        message = str(error)
    asked = hashlib.sha256(np.ascontiguousarray(queries).data)
    asked.update(f"{queries.shape} {queries.dtype} {k}".encode())
    states: list[tuple[int, str, str | None]] = [(0, "", None)] * n_processes
    # Before any of them stops: the others would wait for it in the next collective.
    torch.distributed.all_gather_object(states, (n_rows, asked.hexdigest(), message), group)
    _refuse_disagreement(states, k)
    counts = [count for count, _, _ in states]
    first = sum(counts[: torch.distributed.get_rank(group)])
    # Collectives take equal shapes: what a small share lacks is filled up, and loses against every row.
    similarities, rows = np.full((len(queries), k), -np.inf), np.full((len(queries), k), NO_ROW, dtype=np.int64)
    if own is not None:
        similarities[:, : own.rows.shape[1]], rows[:, : own.rows.shape[1]] = own.similarities, own.rows + first
    chunk_size = max(1, _GATHERED // (k * n_processes))
    for start in range(0, len(queries), chunk_size):
        chunk = slice(start, start + chunk_size)
        best = ranked(_side_by_side(similarities[chunk], group), _side_by_side(rows[chunk], group), k)
        similarities[chunk], rows[chunk] = best.similarities, best.rows
    return Neighbours(similarities, rows)


def _refuse_disagreement(states: list[tuple[int, str, str | None]], k: int) -> None:
    """Raise the same in all processes, which have the same states."""
    for message in (message for _, _, message in states if message is not None):
        raise UserError(message)
    if len({asked for _, asked, _ in states}) > 1:
        raise UserError("the processes search other queries, or another k: give all of them the same")
    n = sum(count for count, _, _ in states)
    if not 1 <= k <= n:
        raise UserError(f"--k {k}: the processes hold {n:,} rows; choose k from 1 to {n}")


def _side_by_side(own: np.ndarray, group: ProcessGroup | None) -> np.ndarray:
    """Gather ``(C, k)`` from all processes: ``(C, processes * k)``."""
    sent = torch.from_numpy(own)
    gathered: list[Tensor] = [torch.empty_like(sent) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, sent, group)
    return torch.cat(gathered, dim=1).numpy()
