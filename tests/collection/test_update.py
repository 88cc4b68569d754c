"""An index that follows its images: what is new is described, what is gone is dropped, all else stays as it is."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metilr.cli import main
from metilr.collection import PhotoOptions
from metilr.collection.index_schema import Index
from metilr.collection.open_collection import open_with_threshold
from metilr.errors import UserError
from metilr.extraction.module import DescriptorModule
from metilr.extraction.store import DescriptorStore
from metilr.files import alone_in
from tests.collection.conftest import AS_OPTIONS, INDEXED, write_images
from tests.small_runs import index


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_images(tmp_path)


def open_index(path: Path):
    return open_with_threshold(PhotoOptions(store=path, accelerator="cpu"))[0]


def new_image(file: Path, seed: int) -> None:
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(255, size=(30, 40, 3), dtype=np.uint8)).save(file)


def rows_by_path(path: Path) -> dict[str, np.ndarray]:
    """The stored descriptor of each image."""
    made = Index.load(path)
    return dict(zip(made.catalogue.paths, DescriptorStore(path / made.store).descriptors("database"), strict=True))


@pytest.fixture
def described(monkeypatch) -> list[int]:
    """How many images went through the network, by batch."""
    counts: list[int] = []
    describe = DescriptorModule.describe

    def counting(self, images):
        counts.append(len(images))
        return describe(self, images)

    monkeypatch.setattr(DescriptorModule, "describe", counting)
    return counts


def change(folder: Path) -> None:
    """One image exchanged for another of the same name and size in bytes, one added, one exhibit removed."""
    new_image(folder / "new" / "1.png", 1)
    shutil.rmtree(folder / "12")
    size = (folder / "9" / "2.jpg").stat().st_size
    content = (folder / "33" / "7.jpg").read_bytes()
    (folder / "9" / "2.jpg").write_bytes((content + b"\0" * size)[: max(size, len(content))])


@pytest.mark.parametrize(
    ("options", "n_described"),
    [({}, 2), ({"whitening": "learned", "visits": 2, "database_views": "rows"}, 2 * (1 + 2))],
    ids=["recipe", "visits"],
)
def test_only_what_differs_is_described_and_the_whitening_stays(folder, tmp_path, described, options, n_described):
    index(folder, tmp_path / "index", **INDEXED | options)
    before, whitening = rows_by_path(tmp_path / "index"), (tmp_path / "index/whitening.npz").read_bytes()
    change(folder)
    described.clear()
    index(folder, tmp_path / "index", **INDEXED | options)
    assert sum(described) == n_described
    after = rows_by_path(tmp_path / "index")
    assert after.keys() == {path for path in before if not path.startswith("12/")} | {"new/1.png"}
    differing = {path for path in after if path not in before or not np.array_equal(before[path], after[path])}
    assert differing == {"9/2.jpg", "new/1.png"}
    assert (tmp_path / "index/whitening.npz").read_bytes() == whitening
    collection = open_index(tmp_path / "index")
    assert "12" not in collection.exhibits
    assert collection.answer(folder / "new/1.png").exhibit == "new"
    anew = tmp_path / "anew"
    index(folder, anew, **INDEXED | options)
    for path, row in rows_by_path(anew).items():
        np.testing.assert_allclose(row, after[path], atol=1e-5)


def test_visits_that_an_earlier_version_simulated_are_made_anew_by_the_same_command(
    folder, tmp_path, described, monkeypatch
):
    visited = INDEXED | {"whitening": "learned", "visits": 2, "database_views": "rows"}
    index(folder, tmp_path / "index", **visited)
    whitening = (tmp_path / "index/whitening.npz").read_bytes()
    monkeypatch.setattr("metilr.data.visits.RECIPE", 0)
    with pytest.raises(UserError, match=r"no descriptors of 2 simulated visits .+ or metilr index with"):
        open_index(tmp_path / "index")
    described.clear()
    index(folder, tmp_path / "index", **visited)
    n_images = len(rows_by_path(tmp_path / "index"))
    assert sum(described) == 2 * n_images
    assert (tmp_path / "index/whitening.npz").read_bytes() == whitening
    assert open_index(tmp_path / "index").answer(folder / "9/2.jpg").exhibit == "9"
    described.clear()
    index(folder, tmp_path / "index", **visited)
    assert not described


def test_relearn_gives_the_whitening_of_an_index_made_anew(folder, tmp_path):
    index(folder, tmp_path / "index", **INDEXED)
    change(folder)
    index(folder, tmp_path / "index", relearn=True, **INDEXED)
    index(folder, tmp_path / "anew", **INDEXED)
    updated, anew = (np.load(tmp_path / name / "whitening.npz") for name in ("index", "anew"))
    np.testing.assert_allclose(updated["mean"], anew["mean"], atol=1e-6)
    index(folder, tmp_path / "index", **INDEXED)  # finished: nothing is learned again
    assert (np.load(tmp_path / "index/whitening.npz")["mean"] == updated["mean"]).all()


def test_what_was_described_before_a_stop_is_kept(folder, tmp_path, described, monkeypatch):
    index(folder, tmp_path / "index", **INDEXED)
    written = (tmp_path / "index/index.json").read_bytes()
    change(folder)
    finish = DescriptorStore.finish
    monkeypatch.setattr(DescriptorStore, "finish", lambda self: sys.exit("killed"))
    with pytest.raises(SystemExit):
        index(folder, tmp_path / "index", **INDEXED)
    monkeypatch.setattr(DescriptorStore, "finish", finish)
    assert (tmp_path / "index/index.json").read_bytes() == written
    assert open_index(tmp_path / "index").answer(folder / "33/7.jpg").exhibit in ("33", "9")  # as it was
    new_image(folder / "newer" / "1.png", 2)  # and changes go on
    described.clear()
    index(folder, tmp_path / "index", **INDEXED)
    assert sum(described) == 1
    stores = [path.name for path in (tmp_path / "index").iterdir() if path.name.startswith("store")]
    assert stores == [Index.load(tmp_path / "index").store]


def test_a_changed_label_needs_no_description(folder, tmp_path, described):
    table = tmp_path / "labels.csv"
    table.write_text("id,title\n9,Vase\n12,Bust\n")
    index(folder, tmp_path / "index", csv=table, **INDEXED)
    assert open_index(tmp_path / "index").about("9").title == "Vase"
    table.write_text("id,title\n9,Jug\n12,Bust\n")
    described.clear()
    index(folder, tmp_path / "index", csv=table, **INDEXED)
    assert not described and open_index(tmp_path / "index").about("9").title == "Jug"


def test_two_at_once_are_refused(folder, tmp_path, failure):
    (tmp_path / "index").mkdir()
    with alone_in(tmp_path / "index", "a test", "wait"):
        line = failure("index", folder, tmp_path / "index", *AS_OPTIONS)
    assert "another metilr index is at work there" in line


def test_an_index_of_before_is_brought_up_to_date(folder, tmp_path):
    """Of metilr 0.1: a store without a digest in its name, images without digests, no labels."""
    index(folder, tmp_path / "index", **INDEXED)
    file = tmp_path / "index/index.json"
    content = json.loads(file.read_text())
    (tmp_path / "index" / content.pop("store")).rename(tmp_path / "index" / "store")
    del content["name"]
    for image in content["images"]:
        del image["sha256"]
    content["options"]["folder"] = content["options"].pop("source")
    (tmp_path / "index" / content.pop("labels")).unlink()
    file.write_text(json.dumps(content))
    assert open_index(tmp_path / "index").answer(folder / "33/7.jpg").exhibit == "33"
    index(folder, tmp_path / "index", **INDEXED)
    assert not (tmp_path / "index/store").exists()
    assert open_index(tmp_path / "index").answer(folder / "33/7.jpg").exhibit == "33"


def test_an_index_keeps_the_engine_that_auto_came_to(folder, tmp_path, described, monkeypatch):
    index(folder, tmp_path / "index", **INDEXED, engine="auto")
    before = Index.load(tmp_path / "index").model.engine
    monkeypatch.setattr(
        "metilr.models.engines.fastest_engine", lambda *_: "torch" if before == "openvino" else "openvino"
    )
    described.clear()
    new_image(folder / "new" / "1.png", 1)
    index(folder, tmp_path / "index", **INDEXED, engine="auto")
    assert Index.load(tmp_path / "index").model.engine == before and sum(described) == 1


def test_labels_of_another_index_are_refused(folder, tmp_path, failure):
    (tmp_path / "labels.csv").write_text("id,title\n9,Vase\n12,Bust\n")
    index(folder, tmp_path / "index", csv=tmp_path / "labels.csv", **INDEXED)
    [file] = (tmp_path / "index").glob("exhibits-*.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join(reversed(lines)) + "\n")
    assert f"{file}: is not of this index" in failure("identify", folder, "--store", tmp_path / "index")


def test_relearn_learns_from_what_was_added_before(folder, tmp_path):
    index(folder, tmp_path / "index", **INDEXED)
    change(folder)
    index(folder, tmp_path / "index", **INDEXED)
    kept = np.load(tmp_path / "index/whitening.npz")["mean"]
    index(folder, tmp_path / "index", relearn=True, **INDEXED)
    index(folder, tmp_path / "anew", **INDEXED)
    learned = np.load(tmp_path / "index/whitening.npz")["mean"]
    assert not np.allclose(kept, learned)
    np.testing.assert_allclose(learned, np.load(tmp_path / "anew/whitening.npz")["mean"], atol=1e-6)


def test_other_weights_at_the_same_place_are_refused(folder, tmp_path, failure):
    import timm
    import torch

    file = tmp_path / "weights.pth"
    command = ["index", folder, tmp_path / "index", *AS_OPTIONS, "--weights", file]
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_resnet").state_dict(), file)
        if seed == 0:
            main([str(part) for part in command])
    new_image(folder / "new" / "1.png", 1)
    assert "is finished, with other options (model_files" in failure(*command)
