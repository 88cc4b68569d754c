"""``metilr export``: an index, a checkpoint or a backbone in one file, read without PyTorch."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import metilr
from metilr.cli import main
from metilr.collection.photos import load_photo
from metilr.data.folder import find_images
from metilr.errors import UserError
from metilr.evaluation.database import as_compared
from metilr.models import onnx as onnx_export
from tests.collection.conftest import write_images
from tests.conftest import SHARED
from tests.museum import write_museum
from tests.small_runs import evaluate

pytest.importorskip("onnxscript", reason="needs metilr[onnx]")
pytest.importorskip("onnxruntime", reason="needs metilr[onnx]")

from metilr.onnx_embedder import OnnxEmbedder

VIT = metilr.ModelOptions(backbone="timm/test_vit", weights="random", pooling="cls", scales=(1.0, 0.5))
SILENT = metilr.ExtractionOptions(image_size=160, accelerator="cpu", num_workers=0, quiet=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder of images, an index of it, and what is exported of that."""
    folder = tmp_path_factory.mktemp("export")
    write_images(folder)
    metilr.index(folder / "museum", folder / "index", model=VIT, extraction=SILENT)
    main(["export", str(folder / "index"), str(folder / "model.onnx")])
    return folder


def photos(folder: Path) -> list[Path]:
    """The museum's images, and real photographs where they are at hand."""
    real = SHARED / "museum/images/test_met"
    return [*find_images(folder / "museum").files[:4], *(find_images(real).files[:4] if real.is_dir() else [])]


def test_a_photo_is_described_and_found_as_by_the_index(exported):
    collection = metilr.open_collection(exported / "index", accelerator="cpu")
    embedder = OnnxEmbedder(exported / "model.onnx")
    assert embedder.notes["whitened"] and embedder.notes["image_size"] == 160
    expected = []
    for photo in photos(exported):
        image = load_photo(photo, collection.image_size).image
        expected.append(as_compared(np.stack(collection.describer.describe([image])), collection.whitening)[0])
        found = embedder.describe(photo)
        assert found.shape == (embedder.notes["dim"],) and found @ expected[-1] >= 0.99999
        np.testing.assert_allclose(found, expected[-1], atol=1e-3)
        [(name, similarity), *_] = nearest = embedder.search(found, exported / "model.npz")
        neighbours = collection.database.nearest(expected[-1][None, None], 5)
        np.testing.assert_allclose([each for _, each in nearest], neighbours.similarities[0], atol=1e-4)
        assert name == collection.exhibits[collection.database.labels[neighbours.rows[0, 0]]]
        if photo.is_relative_to(exported):
            assert name == photo.parent.name and similarity == pytest.approx(1, abs=1e-4)
    likeness = np.stack(expected) @ np.stack(expected).T - np.eye(len(expected))
    assert likeness.max() < 0.999


def test_the_embedder_runs_without_pytorch_and_metilr(exported, tmp_path):
    photo = photos(exported)[0]
    program = f"""
import sys
sys.modules["torch"] = None
from metilr.onnx_embedder import OnnxEmbedder
embedder = OnnxEmbedder({str(exported / "model.onnx")!r})
print(embedder.search(embedder.describe({str(photo)!r}), {str(exported / "model.npz")!r}, 1)[0][0])
print(*sorted(name for name in sys.modules if name.startswith("metilr")))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout.splitlines() == [photo.parent.name, "metilr metilr.onnx_embedder"], run.stderr


def test_the_example_of_the_docs_names_the_photo_s_exhibit(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo = photos(exported)[0]
    for name, file in (("model.onnx", "model.onnx"), ("model.npz", "model.npz"), ("photo.jpg", photo)):
        Path(name).symlink_to(exported / file)
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    [code] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "OnnxEmbedder" in block]
    exec(code, {})
    assert capsys.readouterr().out.startswith(f"[({photo.parent.name!r}, ")


def test_descriptors_of_another_model_and_unfit_sizes_are_refused(exported, tmp_path):
    embedder = OnnxEmbedder(exported / "model.onnx")
    with np.load(exported / "model.npz") as arrays:
        np.savez(tmp_path / "other.npz", **{**arrays, "model": "0" * 64})
    with pytest.raises(ValueError, match="holds descriptors of another model"):
        embedder.search(np.zeros(embedder.notes["dim"]), tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"10x160 px: the model takes sides of 64 to 16384 px"):
        embedder.describe(Image.new("RGB", (1600, 100)))


def test_a_packed_checkpoint_keeps_its_whitening_and_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = write_museum(tmp_path / "root")
    evaluate(
        root, output=Path("run"), backbone="timm/test_resnet", weights="random", image_size=64, image_shape="square",
        accelerator="cpu", num_workers=0, report=False,
    )  # fmt: skip
    main(["pack", "run", "museum.ckpt"])
    capsys.readouterr()
    main(["export", "museum.ckpt", "model.onnx"])
    printed = capsys.readouterr().out
    assert "wrote model.onnx: timm/test_resnet, descriptors of width" in " ".join(printed.split())
    assert not Path("model.npz").exists()
    embedder, collection = OnnxEmbedder("model.onnx"), metilr.open_collection("run", accelerator="cpu")
    assert embedder.notes["image_size"] == [64, 64] and embedder.notes["whitened"]
    for photo in find_images(root / "images/test_met").files[:3]:
        image = load_photo(photo, collection.image_size).image
        [expected] = as_compared(np.stack(collection.describer.describe([image])), collection.whitening)
        assert embedder.describe(photo) @ expected >= 0.99999


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("lite0_in model.ckpt", "error: output model.ckpt: name a file that ends in .onnx"),
        ("lite0_in there.onnx", "error: output there.onnx: is there already; name another file, or delete it"),
        ("index new.onnx", "error: output new.npz: is there already"),
        ("lite0_in nowhere/model.onnx", "error: output nowhere: no such folder"),
        ("lite0 model.onnx", "error: model lite0: is no backbone's name, checkpoint or index"),
        ("empty model.onnx", "empty: not an index (it has no index.json)"),
        ("lite0_in model.onnx --backbone r18_in", "--backbone r18_in: is said by the model lite0_in; leave it out"),
        ("lite0_in model.onnx --ckpt there.ckpt", "--ckpt there.ckpt: is said by the model lite0_in; leave it out"),
        ("there.ckpt model.onnx --pooling mac", "--pooling has no effect with ckpt, which carries its model"),
        ("lite0_in model.onnx --image_shape square", "--image_shape square: needs image_size"),
        ("index model.onnx --scales 1", "--scales has no effect on the index index, which carries its own"),
        ("index model.onnx --image_size 100", "--image_size has no effect on the index index"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused_in_one_line(exported, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("index").symlink_to(exported / "index")
    Path("empty").mkdir()
    for file in ("there.onnx", "there.ckpt", "new.npz"):
        Path(file).touch()
    with pytest.raises(SystemExit) as stop:
        main(["export", *arguments.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("part", ["query_crops", "precision"])
def test_an_index_that_compares_otherwise_than_the_file_is_refused(exported, tmp_path, part):
    method = metilr.ComparisonOptions(query_crops=(0.7,)) if part == "query_crops" else None
    extraction = metilr.ExtractionOptions(
        image_size=160, accelerator="cpu", num_workers=0, quiet=True,
        precision="bf16-mixed" if part == "precision" else "32",
    )  # fmt: skip
    metilr.index(exported / "museum", tmp_path / "index", model=VIT, extraction=extraction, method=method)
    with pytest.raises(UserError, match=f"{tmp_path}/index: .*; index (without query_crops|in 32)"):
        metilr.export(str(tmp_path / "index"), tmp_path / "model.onnx")


def test_options_make_the_model(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(onnx_export, "export_onnx", lambda *arguments: asked.append(arguments) or STAND_IN)
    parts = metilr.ModelOptions(weights="random", pooling="mac", scales=(1.0,), stage=2)
    metilr.export("timm/test_resnet", tmp_path / "model.onnx", parts, image_size=96, image_shape="square")
    [(embedder, output, size, whitening)] = asked
    assert (output, size, whitening) == (tmp_path / "model.onnx", (96, 96), None)
    assert (embedder.pooling.kind, embedder.scales, embedder.backbone.stage) == ("mac", (1.0,), 2)


STAND_IN = {
    "least_side": 1, "most_side": 2, "dim": 3, "model": {"backbone": "x", "provenance": {"licence": None}},
}  # fmt: skip


def test_an_index_as_a_table_has_what_is_searched(exported, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs metilr[parquet]")
    (tmp_path / "labels.csv").write_text("id,title,medium\n9,Vase,Clay\n")
    metilr.index(exported / "museum", tmp_path / "index", tmp_path / "labels.csv", model=VIT, extraction=SILENT)
    main(["export", str(tmp_path / "index"), str(tmp_path / "rows.parquet")])
    assert "8 rows" in capsys.readouterr().out
    collection = metilr.open_collection(tmp_path / "index", accelerator="cpu")
    rows = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    for row, path in zip(rows, collection.ground_truth.paths["database"], strict=True):
        expected = collection.describer.describe([load_photo(exported / "museum" / path, 160).image])[0]
        [compared] = as_compared(expected[None], collection.whitening)
        np.testing.assert_allclose(row["vector"], compared, atol=1e-4)
        assert (row["path"], row["exhibit"]) == (path, path.split("/")[0])
        assert (row["title"], row["more"]) == (
            ("Vase", '{"medium": "Clay"}') if row["exhibit"] == "9" else (None, "{}")
        )
    notes = parquet.read_schema(tmp_path / "rows.parquet").metadata
    assert notes[b"metilr"].decode() == metilr.__version__ and b"test_vit" in notes[b"model"]
    with pytest.raises(UserError, match="is there already"):
        metilr.export(str(tmp_path / "index"), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"ends in \.onnx, or in \.parquet of an index"):
        metilr.export("lite0_in", tmp_path / "model.parquet")
