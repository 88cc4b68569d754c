"""The walk through docs/own_systems.md, from a IIIF collection to answers that say a title, against a local server."""

import contextlib
import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from metilr.cli import main
from metilr.collection import PhotoOptions
from metilr.collection.index_schema import Index
from metilr.collection.open_collection import open_with_threshold
from metilr.collection.photos import Decoder
from metilr.onnx_embedder import OnnxEmbedder
from tests.iiif import Institution, picture
from tests.milvus import running
from tests.server import Server

DOCUMENT = (Path(__file__).parents[1] / "docs" / "own_systems.md").read_text()
MODEL = ["--backbone", "timm/test_efficientnet", "--weights", "random", "--accelerator", "cpu", "--num_workers", "0"]
MODEL += ["--scales", "1"]
LOCAL = ["--allow_private", "true", "--requests_per_second", "1000"]


@pytest.fixture(scope="module")
def museum():
    server = Server()
    yield Institution(server, {f"o{i}": [i] for i in range(12)})
    server.stop()


@pytest.fixture
def decoder():
    with contextlib.closing(Decoder()) as decoder:
        yield decoder


def commands(museum: Institution, begins: str, milvus: str = "") -> list[list[str]]:
    """The commands of the document's block that begins so, for local servers; without those of other programs."""
    [block] = re.findall(rf"```\n({begins}.*?)```", DOCUMENT, re.DOTALL)
    block = block.replace("https://museum.example/iiif/collection", museum.address)
    lines = block.replace("http://localhost:19530", milvus).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("metilr")]


def test_from_a_collection_to_answers_and_back_to_date(museum, decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_index, audit, identify, serve = commands(museum, "metilr index https")
    make_index += [*MODEL, *LOCAL, "--image_size", "96"]
    main(make_index)
    assert "12 images of 12 exhibits" in " ".join(capsys.readouterr().out.split())
    assert set(museum.asked) == {f"{i}/full/96,/0/default.jpg" for i in range(12)}

    main([*audit, "--copy_neighbours", "1"])
    assert "database 12 images, 12 exhibits" in " ".join(capsys.readouterr().out.split())
    assert list(Path("runs/audits").glob("*/audit.html"))

    picture(7, 300, 225).save("photo.jpg")
    main([*identify, "--accelerator", "cpu"])
    printed = capsys.readouterr().out
    assert "most likely Object o7, Ann Painter, 1888" in printed and "https://museum.example/o7" in printed
    with Path("answers.csv").open(newline="") as stream:
        [row] = csv.DictReader(stream)
    assert (row["exhibit"], row["title"]) == (f"{museum.server.url}object/o7", "Object o7")
    assert "Object o7" in Path("answers.html").read_text()

    assert serve == ["serve", "--store", "INDEX"]
    assert ask("photo.jpg", decoder)["about"]["title"] == "Object o7"

    for name in ("o3", "o7"):
        del museum.pictures[name]
    museum.pictures |= {f"new{i}": [i] for i in range(50, 55)}
    museum.asked.clear()
    main(make_index)
    assert "12 images of 12 exhibits" not in capsys.readouterr().out
    made = Index.load(Path("INDEX"))
    assert len(made.images) == 15 and not any(image.exhibit.endswith("/o7") for image in made.images)
    picture(52, 300, 225).save("photo.jpg")
    assert ask("photo.jpg", decoder)["about"]["title"] == "Object new52"
    main(make_index)
    assert "finished already" in capsys.readouterr().out


def test_an_index_goes_to_where_there_is_no_pytorch(museum, tmp_path, monkeypatch):
    """Of squares, which are exported in a third of the time; tests/commands/test_export.py exports any shape."""
    monkeypatch.chdir(tmp_path)
    make_index = commands(museum, "metilr index https")[0]
    main([*make_index, *MODEL, *LOCAL, "--image_size", "96", "--image_shape", "square"])
    main(commands(museum, "metilr export")[1])
    picture(11, 300, 225).save("photo.jpg")
    embedder = OnnxEmbedder("model.onnx")
    [(name, _)] = embedder.search(embedder.describe("photo.jpg"), "model.npz", 1)
    names = np.load("model.npz")["names"].tolist()
    assert name == f"{museum.server.url}object/o11" and len(names) == len(museum.pictures)


def test_an_index_goes_into_a_database_and_is_searched_there(museum, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with running(tmp_path / "milvus") as address:
        make_index, identify = commands(museum, "pip install 'metilr\\[milvus\\]'", address)
        make_index[1] = museum.address
        main([*make_index, *MODEL, *LOCAL, "--image_size", "96"])
        picture(11, 300, 225).save("photo.jpg")
        main([*identify, "--accelerator", "cpu"])
    printed = capsys.readouterr().out
    assert f"search       Milvus at {address}" in printed and "most likely Object o11, Ann Painter, 1888" in printed


def ask(photo: str, decoder: Decoder) -> dict:
    """What the server of the index answers."""
    testclient = pytest.importorskip("fastapi.testclient", reason="needs metilr[serve] and httpx")
    from metilr.collection.app import Limits, build_app

    opened = open_with_threshold(PhotoOptions(store=Path("INDEX"), accelerator="cpu"))
    app = build_app(*opened, Limits(10**6, 10**7, ["127.0.0.1"]), decoder)
    client = testclient.TestClient(app, base_url="http://127.0.0.1")
    answer = client.post("/identify", files={"photo": Path(photo).read_bytes()}).json()
    exhibit = client.get(f"/exhibits/{answer['exhibit']}").json()
    assert exhibit["about"]["title"] == answer["about"]["title"]
    return answer
