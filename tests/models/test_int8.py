"""The precision int8: a network that is rounded once, from a database's images, and stays with the descriptors."""

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from metilr.collection import PhotoOptions
from metilr.collection.index_schema import Index
from metilr.collection.open_collection import open_with_threshold
from metilr.data.decode import load_image
from metilr.data.ground_truth import load_ground_truth
from metilr.errors import UserError
from metilr.extraction.describe import describe_images
from metilr.extraction.options import ExtractionOptions
from metilr.extraction.store import DescriptorStore
from metilr.models.embedder import build_embedder
from tests.collection.conftest import UNTRAINED, write_images
from tests.collection.test_update import new_image
from tests.models.test_engines import enlarged
from tests.small_runs import index

pytest.importorskip("openvino", reason="needs metilr[openvino]")
pytest.importorskip("nncf", reason="needs metilr[int8]")
INT8 = ExtractionOptions(accelerator="cpu", engine="openvino", precision="int8", num_workers=0, quiet=True)


@pytest.fixture(scope="module")
def embedder():
    return build_embedder("timm/test_resnet", "random")


def describe(embedder, museum, store, options=INT8):
    return describe_images(embedder, load_ground_truth(museum), store, options, Console(file=io.StringIO()))


def test_rows_are_near_those_of_float32_and_made_by_one_network(embedder, tiny_museum, tmp_path):
    museum = enlarged(tiny_museum)
    made = describe(embedder, museum, tmp_path / "int8")
    rounded = np.array(made.descriptors("database"))
    exact = describe(embedder, museum, tmp_path / "32", ExtractionOptions(accelerator="cpu", num_workers=0, quiet=True))
    cosines = (rounded * exact.descriptors("database")).sum(axis=1)
    assert cosines.min() > 0.9 and not np.allclose(cosines, 1, atol=1e-6)
    network = made.network.read_bytes()
    [file, *_] = museum.glob("images/MET/**/*.jpg")
    Image.open(file).rotate(180).resize((171, 200)).save(file)  # another image: one row to make again
    again = describe(embedder, museum, tmp_path / "int8")
    assert made.network.read_bytes() == network and (again.descriptors("database") == rounded).all(axis=1).sum() > 1


def test_rows_of_two_networks_are_never_mixed(embedder, tiny_museum, tmp_path):
    museum = enlarged(tiny_museum)
    made = describe(embedder, museum, tmp_path / "store")
    made.network.unlink()
    [file, *_] = museum.glob("images/MET/**/*.jpg")
    Image.open(file).resize((171, 200)).save(file)
    with pytest.raises(UserError, match=r"int8.xml: is gone, and no other makes such rows"):
        describe(embedder, museum, tmp_path / "store")


def test_other_engines_are_refused():
    with pytest.raises(UserError, match="int8: needs the engine openvino"):
        ExtractionOptions(accelerator="cpu", engine="torch", precision="int8")


def test_an_index_keeps_its_network_and_describes_strangers_by_it(tmp_path):
    folder, strangers = write_images(tmp_path), tmp_path / "strangers"
    strangers.mkdir()
    for seed in range(5):
        new_image(strangers / f"{seed}.png", seed)
    options = {**UNTRAINED, "engine": "auto", "precision": "int8", "image_size": 160, "image_shape": "square"}
    path = index(folder, tmp_path / "index", background=strangers, **options)
    before = Index.load(path)
    new_image(folder / "new" / "1.png", 5)
    new_image(strangers / "5.png", 6)
    index(folder, path, background=strangers, **options)
    after = Index.load(path)
    stores = [made.store for made in (before, after)] + [after.background.store]
    assert len(set(stores)) == 3 and not (path / before.store).exists()  # described anew but for what was there
    collection, _ = open_with_threshold(PhotoOptions(store=path, accelerator="cpu"))
    for store in (after.store, after.background.store):
        assert DescriptorStore(path / store).network.read_bytes() == collection.describer.module.network.read_bytes()
    rows = DescriptorStore(path / after.store).descriptors("database")
    [answer] = collection.describer.describe([load_image(collection.image(0), (160, 160))])
    np.testing.assert_allclose(answer, rows[0], rtol=0, atol=1e-6)
