"""What exchanging and merging neighbours costs, where four processes share the rows of a search.

    python benchmarks/merging.py

Each process finds the neighbours among its share beforehand and hands them over ready made, so that of `sharded_search`
only the exchange over gloo and the merging are timed: 1,000 queries of width 512, k = 10, all on this machine. Prints
the median over several times of the slowest process, and whether all got the neighbours of one search over all rows.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
from measuring import Clock, show

from metilr.retrieval.search import search
from metilr.sharded_search import shard, sharded_search

PROCESSES = 4
ROWS = 4000  # the neighbours are ready made: how many rows they come from does not matter
QUERIES = 1000
WIDTH = 512
K = 10
TIMES = 20


def made_up() -> tuple[np.ndarray, np.ndarray]:
    """Rows and queries, the same in every process."""
    rng = np.random.default_rng(0)
    rows, queries = (rng.standard_normal((n, WIDTH), dtype=np.float32) for n in (ROWS, QUERIES))
    return rows, queries


def run_process(rank: int, n_processes: int, folder: str) -> None:
    """Merge several times, and save what came out and the seconds of each time."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n_processes
    )
    rows, queries = made_up()
    own = rows[shard(len(rows), rank, n_processes)]
    ready = search(own, queries, K)
    seconds = []
    for _ in range(TIMES):
        torch.distributed.barrier()
        clock = Clock()
        found = sharded_search(lambda queries, k: ready, len(own), queries, K)
        seconds.append(clock())
    np.savez(f"{folder}/{rank}.npz", seconds=seconds, rows=found.rows, similarities=found.similarities)
    torch.distributed.destroy_process_group()


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_process, args=(PROCESSES, folder), nprocs=PROCESSES)
        found = [dict(np.load(Path(folder) / f"{rank}.npz")) for rank in range(PROCESSES)]
    expected = search(*made_up(), K)
    same = all(
        np.array_equal(each["rows"], expected.rows) and np.array_equal(each["similarities"], expected.similarities)
        for each in found
    )
    milliseconds = 1000 * float(np.median(np.max([each["seconds"] for each in found], axis=0))) / QUERIES
    show(
        f"merging among {PROCESSES} processes",
        ["what", "ms a query"],
        [[f"{QUERIES:,} queries, k = {K}", milliseconds]],
        {"ms_a_query": milliseconds, "same_as_one_search": same},
    )


if __name__ == "__main__":
    main()
