"""Search in a Milvus server, where a database ends to fit one machine: Milvus proposes, float64 decides.

A collection holds the rows of one index, with path, exhibit and what is said of it beside each. It is named after all
that decides them, so that no index can be searched through another's. The 2 k + 32 candidates come back as vectors and
are scored as ``search`` does: what is found has its exact similarity. Of fewer than 100,000 rows Milvus
compares all; of more, by the index of its own choice (a graph, HNSW), it can miss some.

Source: Wang et al., Milvus: A Purpose-Built Vector Data Management System, SIGMOD 2021.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from metilr.errors import UserError, amount, one_line
from metilr.progress import counted
from metilr.retrieval.search import Neighbours, check_queries, exact_similarities, norms, ranked

if TYPE_CHECKING:
    from pymilvus import MilvusClient

PREFIX = "metilr_"  # of collections
MOST = 16_384  # rows that Milvus gives for a query
_SECONDS = 30  # for an answer
_BATCH = 1000  # rows inserted at a time: 2 MB of width 512; Milvus takes 64 MB
_CANDIDATES = 2**13  # vectors fetched at a time: 16 MB of width 512


@dataclass(frozen=True, eq=False)
class MilvusSearch:
    """A collection's rows, ``n_rows`` of width ``width``."""

    client: "MilvusClient"
    uri: str
    name: str
    n_rows: int
    width: int

    @classmethod
    def open(cls, uri: str, name: str, n_rows: int, width: int) -> "MilvusSearch":
        """Open a collection; UserError if the server cannot be asked, or has not all of its rows."""
        client = connect(uri)
        with _asking(uri):
            is_there = client.has_collection(name) and _width(client, name) == width
            if not is_there or _count(client, name) != n_rows:
                reason = f"has no collection {name} of {amount(n_rows, 'row')} of width {width}, or not all of it"
                raise UserError(f"{uri}: {reason}: run metilr index with this address again", "milvus")
            client.load_collection(name)
        return cls(client, uri, name, n_rows, width)

    def __str__(self) -> str:
        return f"Milvus at {self.uri}, candidates scored exactly"

    def search(self, queries: np.ndarray, k: int, done: Callable[[int], None] = lambda n: None) -> Neighbours:
        """Find k rows with large inner products with each query, most of them the largest.

        Takes, returns and refuses what ``metilr.retrieval.search.search`` does, and refuses k above ``MOST``.
        """
        norms(queries, "query")
        check_queries(queries, (self.n_rows, self.width), k)
        if k > MOST:
            raise UserError(f"{k}: Milvus gives at most {MOST:,} rows; choose a smaller one, or search without it", "k")
        n_candidates = min(2 * k + 32, MOST, self.n_rows)
        similarities, rows = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
        for part in np.array_split(np.arange(len(queries)), 1 + len(queries) * n_candidates // _CANDIDATES):
            chunk = np.ascontiguousarray(queries[part], dtype=np.float32)
            with _asking(self.uri):
                found = self._found(chunk, n_candidates)
            for q, query, hits in zip(part.tolist(), chunk, found, strict=True):
                if len(hits) < k:
                    reason = f"gave {amount(len(hits), 'row')} of the {k} that were asked for"
                    raise UserError(f"{self.uri}: {reason}; see how the collection {self.name} is", "milvus")
                vectors = np.array([hit["entity"]["vector"] for hit in hits], np.float32)
                exact = exact_similarities(vectors, query[None], np.arange(len(hits))[None])
                best = ranked(exact, np.array([[hit["row"] for hit in hits]]), k)
                similarities[q], rows[q] = best.similarities[0], best.rows[0]
            done(len(part))
        return Neighbours(similarities, rows)

    def _found(self, queries: np.ndarray, n: int) -> Any:
        from pymilvus import MilvusException

        search = functools.partial(self.client.search, self.name, list(queries), limit=n, output_fields=["vector"])
        try:
            return search(timeout=_SECONDS)
        except MilvusException:  # a server that was started anew has not loaded it
            self.client.load_collection(self.name, timeout=_SECONDS)
            return search(timeout=_SECONDS)


def check_uri(uri: str) -> None:
    """Refuse what names no server."""
    parts = urlsplit(uri)
    try:
        is_server = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:  # of a port beyond 65535
        is_server = False
    if not is_server:
        raise UserError(f"{uri}: name a server, such as http://localhost:19530", "milvus")
    if "@" in parts.netloc:
        where = uri.replace(parts.netloc, parts.netloc.split("@")[-1])
        raise UserError(f"{where}: leave the password out, and set the environment's MILVUS_TOKEN", "milvus")


def connect(uri: str) -> "MilvusClient":
    """Reach a server, with the environment's ``MILVUS_TOKEN`` (user:password, or a key) if it is set."""
    check_uri(uri)
    try:
        from pymilvus import MilvusClient
    except ModuleNotFoundError:
        raise UserError(f"{uri}: needs pymilvus: pip install 'metilr[milvus]'", "milvus") from None
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # a traceback for each error, which is told below
    with _asking(uri):
        return MilvusClient(uri=uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=_SECONDS)


def write_rows(
    uri: str, name: str, rows: np.ndarray, said: Callable[[int], Mapping[str, Any]], quiet: bool = True
) -> None:
    """Write rows ``(N, D)`` as a collection; one that was interrupted is continued, and a whole one is left as it is.

    ``said`` gives what a row has beside its vector: path, exhibit, about (JSON).
    """
    client = connect(uri)
    with _asking(uri):
        if not client.has_collection(name):
            _create(client, name, *rows.shape)
        n_there = _count(client, name)
        if n_there > len(rows) or _width(client, name) != rows.shape[1]:
            raise UserError(f"{uri}: its collection {name} is not metilr's; drop it", "milvus")
        # Rows come in their order, so what is there is a beginning; a batch that was cut short is written again.
        start = n_there // _BATCH * _BATCH
        with counted(f"writing to {uri}", len(rows), "rows", quiet) as done:
            done(start)
            for first in range(start, len(rows), _BATCH):
                numbers = range(first, min(first + _BATCH, len(rows)))
                batch = [{"row": row, **said(row), "vector": rows[row]} for row in numbers]
                (client.upsert if first == start else client.insert)(name, batch, timeout=_SECONDS)
                done(len(batch))
        client.flush(name)
        if (n_there := _count(client, name)) != len(rows):
            reason = f"has {amount(n_there, 'row')} of {len(rows):,} in its collection {name}"
            raise UserError(f"{uri}: {reason}; drop the collection, and run this again", "milvus")


def drop(uri: str, names: Sequence[str]) -> None:
    """Remove collections, those that are there."""
    client = connect(uri)
    with _asking(uri):
        for name in names:
            client.drop_collection(name)


def _create(client: "MilvusClient", name: str, n_rows: int, width: int) -> None:
    from pymilvus import DataType

    from metilr.retrieval.approximate import MIN_ROWS  # faiss

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("row", DataType.INT64, is_primary=True)
    for text in ("path", "exhibit"):
        schema.add_field(text, DataType.VARCHAR, max_length=65_535)  # bytes, the most
    schema.add_field("about", DataType.JSON)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=width)
    index = client.prepare_index_params()
    # A graph may lead to fewer rows than it is asked for where there are few.
    index.add_index("vector", index_type="FLAT" if n_rows < MIN_ROWS else "AUTOINDEX", metric_type="IP")
    client.create_collection(name, schema=schema, index_params=index)


def _count(client: "MilvusClient", name: str) -> int:
    client.load_collection(name)
    return int(client.query(name, output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"])


def _width(client: "MilvusClient", name: str) -> int | None:
    fields = client.describe_collection(name)["fields"]
    return next((field["params"].get("dim") for field in fields if field["name"] == "vector"), None)


@contextlib.contextmanager
def _asking(uri: str) -> Iterator[None]:
    """Name the server where something is wrong with it."""
    from pymilvus import MilvusException

    try:
        yield
    except MilvusException as error:
        reason = f"Milvus does not answer as it should ({one_line(Exception(error.message))})"
        raise UserError(f"{uri}: {reason}; see that it runs there", "milvus") from None
