"""Rows that two processes share, against one search over all of them."""

import itertools

import numpy as np
import pytest
import torch

from metilr import approximate_search, sharded_search
from metilr.approximate_search import ApproximateIndex, build_codes
from metilr.errors import UserError
from metilr.retrieval.search import search
from metilr.sharded_search import shard
from metilr.sharded_search import sharded_search as search_together
from tests.test_approximate_search import exhibits

SPLITS = {"halves": 200, "uneven": 37, "all in the first": 400, "all in the second": 0}  # rows of the first
CALLS = ((2**22, 1), (2**22, 60), (2**22, 400), (50, 7))  # similarities gathered at a time, and k


def shared():
    """Rows with copies on both sides of each split, in another order, and queries: some are those rows."""
    rng = np.random.default_rng(0)
    single = rng.standard_normal((100, 24)).astype(np.float32)
    rows = np.concatenate([single, rng.permutation(single), single[::-1], rng.permutation(single)])
    return rows, np.concatenate([single[:9], rng.standard_normal((9, 24)).astype(np.float32)])


def run_process(rank, n_processes, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n_processes
    )
    results = {}
    rows, queries = shared()
    for gathered, k in CALLS:
        sharded_search._GATHERED = gathered
        for name, first in SPLITS.items():
            own = rows[:first] if rank == 0 else rows[first:]
            results[name, gathered, k] = search_together(lambda q, k, own=own: search(own, q, k), len(own), queries, k)
    results["none"] = search_together(lambda q, k: search(own, q, k), len(own), queries[:0], 3)

    def failure(own, queries, k):
        with pytest.raises(UserError) as error:
            search_together(lambda q, k: search(own, q, k), len(own), queries, k)
        return str(error.value)

    own = rows[shard(len(rows), rank, 2)]
    broken = own.copy()
    broken[3, 3] = np.nan
    results["failures"] = [
        failure(own, queries, 401),
        failure(own, queries, 0),
        failure(own, queries[rank:], 2),
        failure(own, queries, 2 + rank),
        failure(broken if rank == 1 else own, queries, 2),  # one fails: both end
    ]

    approximate_search.MIN_ROWS = 1000  # all of their few lists are opened: the candidates cover the neighbours
    rows, queries = exhibits()
    own = rows[shard(len(rows), rank, 2)]
    index = ApproximateIndex(build_codes(own), own)
    results["approximate"] = search_together(index.search, len(own), queries, 4)
    torch.save({name: as_lists(found) for name, found in results.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def as_lists(found):
    return found if isinstance(found, list) else (found.similarities.tolist(), found.rows.tolist())


def test_two_processes_find_what_one_finds_to_the_last_bit(tmp_path):
    torch.multiprocessing.spawn(run_process, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    rows, queries = shared()
    for (name, gathered, k), found in ((key, value) for key, value in first.items() if isinstance(key, tuple)):
        assert found == as_lists(search(rows, queries, k)), (name, gathered, k)
    assert len(first) == len(CALLS) * len(SPLITS) + 3
    assert first["none"] == ([], [])
    assert first["approximate"] == as_lists(search(*exhibits(), 4))
    too_many, too_few, other_queries, other_k, broken = first["failures"]
    assert "--k 401: the processes hold 400 rows; choose k from 1 to 400" in too_many and "--k 0" in too_few
    assert "search other queries, or another k" in other_queries and other_k == other_queries
    assert "database descriptor 3 holds NaN" in broken


@pytest.mark.parametrize(("n", "n_processes"), [(10, 3), (2, 5), (0, 2), (100_000_001, 7)])
def test_shares_are_even_and_hold_every_row_once(n, n_processes):
    shares = [shard(n, rank, n_processes) for rank in range(n_processes)]
    assert shares[0].start == 0 and shares[-1].stop == n
    assert all(one.stop == other.start for one, other in itertools.pairwise(shares))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1
