"""How a search in a Milvus server compares with the exact search in memory, at 100,000 rows of width 512.

    make milvus                                            # in another terminal
    python benchmarks/milvus_search.py [--uri http://localhost:19530] [--rows 100000] [--queries 200]

Writes the rows to the server as `metilr index --milvus` does, opens them, and answers queries there and by the exact
search, in one run. The rows are those of `approximate_search.py`, which says what they are like. Prints a table and a
JSON line; the collection is dropped at the end.
"""

import argparse
from pathlib import Path

import numpy as np
from approximate_search import WIDTH, K, make_queries, make_rows
from measuring import Clock, show

from metilr.files import map_array
from metilr.retrieval.milvus import MilvusSearch, drop, write_rows
from metilr.retrieval.search import search

NAME = "metilr_benchmark"


def main() -> None:
    """Write, open, search both ways, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--uri", default="http://localhost:19530")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs/approximate_search"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = np.array(map_array(make_rows(options.folder, options.rows, options.seed), "delete it"))
    queries, _ = make_queries(rows, options.queries, options.seed)
    drop(options.uri, [NAME])
    clock = Clock()
    write_rows(options.uri, NAME, rows, lambda row: {"path": f"{row}.jpg", "exhibit": str(row), "about": {}}, False)
    write_seconds = clock()
    clock = Clock()
    there = MilvusSearch.open(options.uri, NAME, *rows.shape)
    there.search(queries[:1], K)
    open_seconds = clock()
    seconds = {}
    for name, searched in (
        ("exact", lambda some: search(rows, some, K)),
        ("Milvus", lambda some: there.search(some, K)),
    ):
        clock = Clock()
        found = searched(queries)
        together = clock()
        clock = Clock()
        for query in queries[:50]:
            searched(query[None])
        seconds[name] = (1000 * together / len(queries), 1000 * clock() / len(queries[:50]), found)
    exact, milvus = seconds["exact"][2], seconds["Milvus"][2]
    was_found = (milvus.rows[:, :, None] == exact.rows[:, None]).any(axis=1)
    same = milvus.rows == exact.rows
    figures = {
        "rows": len(rows),
        "queries": len(queries),
        "recall_at_1": float(same[:, 0].mean()),
        "recall_at_10": round(float(was_found.mean()), 4),
        "similarities_equal": bool((milvus.similarities[same] == exact.similarities[same]).all()),
        "exact_ms": round(seconds["exact"][0], 2),
        "exact_alone_ms": round(seconds["exact"][1], 2),
        "milvus_ms": round(seconds["Milvus"][0], 2),
        "milvus_alone_ms": round(seconds["Milvus"][1], 2),
        "write_seconds": round(write_seconds, 1),
        "open_seconds": round(open_seconds, 1),
    }
    show(
        f"search in Milvus, {len(rows):,} x {WIDTH}, {len(queries):,} queries",
        ["search", "ms a query", "ms, one at a time", "recall@1", "recall@10", "written in s"],
        [
            ["exact", *seconds["exact"][:2], "", "", ""],
            ["Milvus", *seconds["Milvus"][:2], figures["recall_at_1"], figures["recall_at_10"], write_seconds],
        ],
        figures,
    )


if __name__ == "__main__":
    main()
