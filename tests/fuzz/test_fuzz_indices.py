"""An index of a museum's images, as somebody else made it."""

import json

import pytest

from metilr.collection.index import Index
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import cases, each_replaced, mutated, mutated_value

JSON_TOKENS = (b"[" * 3000, b"{", b"}", b"../", b"9" * 5000, b"\xff", b"null")
INDEX = {
    "schema": "metilr.index/2", "folder": "/museum",
    "images": [{"path": "a/1.jpg", "exhibit": "Vase"}, {"path": "b.jpg", "exhibit": "Mask"}],
    "model": {
        "ckpt": None, "backbone": "lite0_in", "weights": None, "pooling": "gem", "p": 3.0, "scales": None,
        "precision": "32", "engine": "torch",
    },
    "image_size": 500, "whitening": True,
    "elements": {
        "visits": 0, "database_views": "none", "query_crops": [], "crop_similarity": "best", "seed": 0
    },
    "knn": {"k": 2, "tau": 50.0}, "versions": {},
}  # fmt: skip


def check_catalogue(catalogue, folder):
    assert len(catalogue.paths) == len(catalogue.exhibits) and len(catalogue.names) >= 1
    truth = catalogue.ground_truth()
    assert truth.labels["database"].max() < truth.n_classes == len(catalogue.names)
    for path, exhibit in zip(catalogue.paths, catalogue.exhibits, strict=True):
        assert type(path) is type(exhibit) is str and path and exhibit
        assert folder.resolve() in truth.image(path).resolve().parents


def read_index(folder):
    file = folder / "index.json"
    with refusal(file) as said:
        index = Index.load(folder)
        check_catalogue(index.catalogue, index.catalogue.folder)
        assert type(index.knn.k) is int and index.knn.k >= 1 and 0 < index.knn.tau < float("inf")
        assert index.image_size is None or (type(index.image_size) is int and index.image_size >= 1)
        assert type(index.whitening) is bool and 0 <= index.model_options.seed < 2**63
        method = index.method
        assert method.n_visits >= 0 and method.rows_per_image >= 1
        assert method.database_views in ("none", "rows")
        assert all(0 < share < 1 for share in method.query_crops)
        scales = index.model_options.scales
        assert scales is None or all(0 < scale < float("inf") for scale in scales)
    return said


def test_changed_indices(tmp_path):
    file, whole, n_read = tmp_path / "index.json", json.dumps(INDEX).encode(), 0
    contents = [json.dumps(changed).encode() for changed in each_replaced(INDEX)]
    contents += [json.dumps(mutated_value(INDEX, rng)).encode() for rng in cases(75)]
    contents += [mutated(whole, rng, JSON_TOKENS) for rng in cases(125)]
    for content in contents:
        file.write_bytes(content)
        n_read += not read_index(tmp_path)
    assert n_read > 30
    file.write_bytes(whole)
    assert not read_index(tmp_path)


@pytest.mark.parametrize("path", ["../x.jpg", "/etc/passwd", "a/../../x", "", ".", "a\0b", None, 3])
def test_an_index_names_no_image_elsewhere(tmp_path, path):
    content = {**INDEX, "images": [*INDEX["images"], {"path": path, "exhibit": "x"}]}
    (tmp_path / "index.json").write_text(json.dumps(content))
    assert "index.json" in read_index(tmp_path)[0]
