"""What ``import metilr`` offers to a script: folders by their names, answers as values, and silence."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl

import metilr
from metilr.collection import open_collection
from metilr.data.folder import find_images
from tests.collection.conftest import write_images
from tests.museum import write_museum

SMALL = metilr.ModelOptions(backbone="timm/test_resnet", weights="random", scales=(1.0,))
SILENT = metilr.ExtractionOptions(image_size=40, accelerator="cpu", num_workers=0, quiet=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder of images, an index of it, a museum and an evaluation."""
    folder = tmp_path_factory.mktemp("face")
    write_images(folder)
    write_museum(folder / "root")
    metilr.index(str(folder / "museum"), str(folder / "index"), model=SMALL, extraction=SILENT)
    metilr.evaluate(
        root=str(folder / "root"), model=SMALL, extraction=SILENT, store=str(folder / "store"),
        output=str(folder / "run"), report=metilr.ReportOptions(report=False, wandb="off"),
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", metilr.__all__)
def test_every_name_of_the_face_is_there(name):
    assert getattr(metilr, name) is not None and name in dir(metilr)


def test_an_index_answers_a_photo_in_two_lines(place):
    photo = find_images(place / "museum").files[0]
    answer = metilr.open_collection(str(place / "index"), accelerator="cpu").answer(str(photo))
    assert answer.exhibit == photo.parent.name and answer.matches[0].similarity == pytest.approx(1, abs=1e-4)
    assert answer == metilr.open_collection(place / "index", accelerator="cpu").identify(photo)


def test_an_index_says_its_path_alone_where_asked_and_nothing_gets_past_a_redirection(place, forks):
    program = f"""
import contextlib, io
import metilr
from dataclasses import replace
from tests.test_face import SILENT, SMALL
metilr.index("museum", "quiet", model=SMALL, extraction=SILENT)
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    metilr.index("museum", "silent", model=SMALL, extraction=replace(SILENT, quiet=False))
    answer = metilr.open_collection("silent", accelerator="cpu").answer({str(find_images(place / "museum").files[0])!r})
print(answer.exhibit)
import atexit; atexit._run_exitfuncs()  # a fork leaves without
"""
    (place / "program.py").write_text(program)
    errors = "import os; os.dup2(os.open('errors', os.O_WRONLY | os.O_CREAT), 2)"
    run = forks.run(place, ["python", "program.py"], errors)
    assert (run.status, (place / "errors").read_text()) == (0, ""), run.printed
    assert forks.errors() == ""  # what libraries say when they are imported
    lines = [line for line in run.printed.splitlines() if not line.startswith("note:")]
    assert lines == [
        "wrote quiet; now: metilr identify PHOTO --store quiet",
        find_images(place / "museum").files[0].parent.name,
    ]


def test_identify_returns_what_it_printed(place, capsys):
    photos = [str(file) for file in find_images(place / "museum").files[:2]]
    options = metilr.PhotoOptions(store=str(place / "index"), accelerator="cpu")
    answered = metilr.identify(photos, options)
    printed = capsys.readouterr().out
    assert [photo.name for photo in answered] == photos
    for photo in answered:
        assert photo.answer is not None and photo.decision and photo.answer.matches
        assert photo.name in printed and photo.headline in printed


def test_what_a_call_leaves_behind_its_docstring_says(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metilr.evaluate(
        root=str(place / "root"), model=SMALL, extraction=SILENT, method=metilr.MethodOptions(geometric_check=2),
        report=metilr.ReportOptions(report=False, wandb="off"),
    )  # fmt: skip
    assert {file.name for file in Path.cwd().iterdir()} == {"runs"}
    [dated] = {file.name for file in Path("runs").iterdir()} - {"descriptors", "local_features"}
    assert dated.endswith("test_resnet")
    said = metilr.evaluate.__doc__ or ""
    assert all(f"runs/{name}" in said for name in ("descriptors", "local_features", "demo"))
    assert "a new folder under runs/" in said and "Weights & Biases" in said and "wandb off" in said
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(
        open_collection, "index", lambda images, path, **_: metilr.index(images, path, None, SMALL, SILENT)
    )
    metilr.open_collection(place / "museum", accelerator="cpu")
    assert {str(file) for file in Path().glob("*/*")} == {"runs/indexes"}
    assert "writes ``runs/indexes``" in (metilr.open_collection.__doc__ or "")


def test_a_run_is_opened_with_its_options_results_and_answers(place):
    run = metilr.load_run(str(place / "run"))
    assert run.results.test.gap == metilr.gap(
        run.answers["test"].log_confidence, run.answers["test"].predicted_ids, run.answers["test"].exhibit_ids
    )
    assert run.config["backbone"] == "timm/test_resnet" and run.path == place / "run"


def test_a_folder_s_images_are_predicted_in_order(place):
    module = metilr.FineTuning(metilr.FineTuningOptions(backbone="timm/test_resnet", weights="random"))
    data = metilr.FolderData(str(place / "museum"), image_size=48)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    predicted = np.concatenate([batch.numpy() for batch in trainer.predict(module, datamodule=data)])
    assert data.files == find_images(place / "museum").files and len(data.files) == 8
    embedder = module.embedder
    embedder.image_size = 48
    np.testing.assert_allclose(predicted, embedder.embed(data.files), atol=1e-5)


def test_names_of_folders_and_files_may_be_text(place, tmp_path):
    truth = metilr.load_ground_truth(str(place / "root"))
    embedder = metilr.build_embedder("timm/test_resnet", "random", scales=(1.0,))
    store = metilr.describe_images(embedder, truth, str(tmp_path / "store"), SILENT)
    assert metilr.DescriptorStore(str(store.path)).is_complete
    whitening = metilr.fit_pca_whitening([store.descriptors("database")])
    whitening.save(str(tmp_path / "w.npz"))
    assert metilr.PCAWhitening.load(str(tmp_path / "w.npz")).sha256() == whitening.sha256()
