"""Search in a Milvus server, beside the exact search in memory; an index written there, and what is made of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from metilr.cli import main
from metilr.collection import PhotoOptions
from metilr.collection.collection import load_photo
from metilr.collection.open_collection import open_with_threshold
from metilr.errors import UserError
from metilr.retrieval import milvus
from metilr.retrieval.milvus import MilvusSearch, write_rows
from metilr.retrieval.search import search
from metilr.retrieval.whitening import PCAWhitening
from tests.collection.conftest import AS_OPTIONS, INDEXED, write_images
from tests.milvus import running
from tests.small_runs import index

rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("milvus")) as uri:
        yield uri


@pytest.fixture
def client(server):
    """Asks the server, and leaves it empty."""
    client = milvus.connect(server)
    yield client
    for name in client.list_collections():
        client.drop_collection(name)


@pytest.fixture
def batches(monkeypatch) -> list[list[int]]:
    """The rows of each batch that is sent, of 50 at most."""
    from pymilvus import MilvusClient

    sent: list[list[int]] = []
    for name in ("insert", "upsert"):
        send = getattr(MilvusClient, name)
        monkeypatch.setattr(
            MilvusClient, name, lambda self, where, data, send=send, **how: (
                sent.append([each["row"] for each in data]), send(self, where, data, **how))[1],
        )  # fmt: skip
    monkeypatch.setattr(milvus, "_BATCH", 50)
    return sent


def unit_rows(n: int, width: int = 16) -> np.ndarray:
    rows = rng.standard_normal((n, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def said(row: int) -> dict:
    return {"path": f"{row}.jpg", "exhibit": f"exhibit {row}", "about": {"title": f"Nº {row}"}}


def write(server: str, name: str, rows: np.ndarray) -> MilvusSearch:
    write_rows(server, name, rows, said)
    return MilvusSearch.open(server, name, *rows.shape)


def test_what_is_found_has_the_similarities_and_the_order_of_an_exact_search(server, client):
    rows = unit_rows(300)
    rows[7] = rows[250]  # equal ones: the smaller row first
    queries = unit_rows(40)
    queries[0] = rows[7]
    opened = write(server, "metilr_a", rows)
    for k in (1, 20, 300):
        found, exact = opened.search(queries, k), search(rows, queries, k)
        np.testing.assert_array_equal(found.rows, exact.rows)
        np.testing.assert_array_equal(found.similarities, exact.similarities)
    [there] = client.query("metilr_a", filter="row == 7", output_fields=["*"])
    assert {name: there[name] for name in ("path", "exhibit", "about")} == said(7)


def test_an_interrupted_write_continues_where_it_was(server, client, batches):
    rows = unit_rows(230)

    def stops(row: int) -> dict:
        if row == 170:
            raise KeyboardInterrupt
        return said(row)

    with pytest.raises(KeyboardInterrupt):
        write_rows(server, "metilr_a", rows, stops)
    with pytest.raises(UserError, match="no collection metilr_a of 230 rows of width 16, or not all of it"):
        MilvusSearch.open(server, "metilr_a", 230, 16)
    client.delete("metilr_a", filter="row >= 140")  # as if the last batch had been cut short
    batches.clear()
    opened = write(server, "metilr_a", rows)
    assert [(batch[0], batch[-1]) for batch in batches] == [(100, 149), (150, 199), (200, 229)]
    np.testing.assert_array_equal(opened.search(rows, 1).rows[:, 0], np.arange(230))
    batches.clear()
    write(server, "metilr_a", rows)
    assert sum(map(len, batches)) <= 50


def test_a_collection_that_lacks_rows_is_refused(server, client, batches):
    rows = unit_rows(120)
    write(server, "metilr_a", rows)
    client.delete("metilr_a", filter="row == 10")
    with pytest.raises(UserError, match="not all of it"):
        MilvusSearch.open(server, "metilr_a", 120, 16)
    with pytest.raises(UserError, match=r"has 119 rows of 120 in its collection metilr_a; drop the collection"):
        write_rows(server, "metilr_a", rows, said)
    for other in (unit_rows(100), unit_rows(120, 8)):
        with pytest.raises(UserError, match="its collection metilr_a is not metilr's"):
            write_rows(server, "metilr_a", other, said)


def test_an_answer_of_too_few_rows_is_an_error(server, client):
    opened = write(server, "metilr_a", unit_rows(60))
    client.delete("metilr_a", filter="row < 50")
    with pytest.raises(UserError, match="gave 10 rows of the 20 that were asked for"):
        opened.search(unit_rows(1), 20)


def test_more_than_milvus_gives_is_refused():
    opened = MilvusSearch(None, "http://nowhere", "metilr_a", 20_000, 16)
    with pytest.raises(UserError, match="20000: Milvus gives at most 16,384 rows"):
        opened.search(unit_rows(1), 20_000)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://localhost:99999", "--milvus http://localhost:99999: name a server, such as"),
        ("milvus.db", "--milvus milvus.db: name a server, such as http://localhost:19530"),
        (
            "http://a:secret@b:1/",
            "--milvus http://b:1/: leave the password out, and set the environment's MILVUS_TOKEN",
        ),
    ],
)
def test_what_is_no_address_is_refused_at_once(uri, said, tmp_path, failure, indexed):
    assert said in failure("index", indexed / "museum", tmp_path / "index", "--milvus", uri)
    assert said in failure("identify", indexed / "museum", "--store", indexed / "index", "--milvus", uri)


def test_a_server_that_is_not_there_is_named(indexed, failure, tmp_path, monkeypatch):
    pytest.importorskip("pymilvus", reason="needs metilr[milvus]")
    monkeypatch.setattr(milvus, "_SECONDS", 1)
    line = failure("index", indexed / "museum", tmp_path / "index", "--milvus", "http://127.0.0.1:9", *AS_OPTIONS)
    assert "http://127.0.0.1:9: Milvus does not answer as it should (" in line and line.endswith(
        "see that it runs there"
    )


@pytest.fixture
def made(tmp_path, server, client) -> Path:
    """A museum's images, and an index of it that is also in Milvus."""
    write_images(tmp_path)
    index(tmp_path / "museum", tmp_path / "index", milvus=server, **INDEXED)
    return tmp_path


def opened(made: Path, server: str | None = None):
    return open_with_threshold(PhotoOptions(store=made / "index", accelerator="cpu", milvus=server))[0]


def test_answers_are_those_of_the_search_in_memory(made, server, capsys):
    there, here = opened(made, server), opened(made)
    assert there.search == f"Milvus at {server}, candidates scored exactly" and here.search is None
    assert len(there.database.rows) == 0
    for file in sorted((made / "museum").rglob("[0-9].jpg")):
        image = load_photo(file, 40).image
        assert there.answer(image) == here.answer(image)
    main(["identify", str(made / "museum"), "--store", str(made / "index"), "--milvus", server, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["collection"]["search"] == there.search and len(document["photos"]) == 8


def test_an_update_makes_another_collection_and_drops_those_before_the_last(made, server, client, capsys):
    before = client.list_collections()
    index(made / "museum", made / "index", milvus=server, **INDEXED)
    assert "finished already" in capsys.readouterr().out and client.list_collections() == before
    extra = made / "museum" / "99"
    extra.mkdir()
    shutil.copy(next((made / "museum").rglob("1.jpg")), extra / "new.jpg")
    index(made / "museum", made / "index", **INDEXED)
    assert "what Milvus has is of the index as it was" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="as it is now, with this model and this whitening, it was never written"):
        opened(made, server)
    index(made / "museum", made / "index", milvus=server, **INDEXED)
    after = client.list_collections()
    assert len(after) == 2 and set(before) < set(after)  # who began before still searches what was there then
    assert len(opened(made, server).database.labels) == 9
    client.drop_collection(*({*after} - {*before}))
    index(made / "museum", made / "index", milvus=server, **INDEXED)
    assert client.list_collections() == after
    (extra / "new.jpg").unlink()
    shutil.copy(next((made / "museum").rglob("2.jpg")), extra / "newer.jpg")
    index(made / "museum", made / "index", milvus=server, **INDEXED)
    assert len(client.list_collections()) == 2 and not set(before) & set(client.list_collections())


def test_a_server_that_was_started_anew_is_searched_again(server, client):
    rows = unit_rows(60)
    opened = write(server, "metilr_a", rows)
    client.release_collection("metilr_a")
    np.testing.assert_array_equal(opened.search(rows, 1).rows[:, 0], np.arange(60))


def test_what_is_said_of_exhibits_travels_and_is_renewed(made, server, client):
    table = made / "titles.csv"
    for title in ("Old", "New"):
        table.write_text(f"exhibit,title\n500,{title}\n")
        shutil.rmtree(made / "index", ignore_errors=True) if title == "Old" else None
        index(made / "museum", made / "index", csv=table, milvus=server, **INDEXED)
        newest = max((made / "index" / "milvus").glob("*.npy"), key=lambda file: file.stat().st_mtime_ns)
        name = newest.stem
        rows = client.query(name, filter="exhibit == '500'", output_fields=["about"])
        assert rows and all(row["about"] == {"title": title} for row in rows)


def test_another_whitening_is_refused(made, server):
    whitening = PCAWhitening.load(made / "index" / "whitening.npz")
    whitening.mean[0] += 1
    whitening.save(made / "index" / "whitening.npz")
    with pytest.raises(UserError, match="with this model and this whitening, it was never written to Milvus"):
        opened(made, server)


def test_a_run_has_no_rows_there(run, failure):
    line = failure("identify", run, "--run", run, "--milvus", "http://localhost:19530")
    assert "has the rows of an index; give its store" in line
