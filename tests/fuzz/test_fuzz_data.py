"""A museum from elsewhere: its archives, its ground truth, and somebody's index of its images."""

import gzip
import json
import shutil
import tarfile

import numpy as np
import pytest

from metilr.collection.index_schema import Index
from metilr.data.ground_truth import load_ground_truth
from metilr.data.pixels import resized_shape
from metilr.download.archives import MOST_GROWTH, Archive, unpack
from metilr.metrics import DISTRACTOR
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import cases, json_cases, mutated
from tests.museum import write_ground_truth
from tests.tarballs import header, tar_of, tarball, tree

MET = Archive("MET.tar.gz", "images/MET", depth=2)
MEMBERS = [("MET/1/a.jpg", b"a" * 700), ("MET/1/b.jpg", b"b"), ("MET/2/c.jpg", b""), ("MET/notes.txt", b"x" * 20)]
HOSTILE = [
    tar_of([*MEMBERS[:2], member])
    for member in (
        ("../../out.jpg", b"x"), ("/tmp/out.jpg", b"x"), header("MET/1/l.jpg", tarfile.SYMTYPE, link="/etc/passwd"),
        header("MET/1/h.jpg", tarfile.LNKTYPE, link="MET/1/a.jpg"), header("MET/1/p.jpg", tarfile.FIFOTYPE),
        header("MET/1/d.jpg", tarfile.CHRTYPE), ("MET/1/" + "n" * 300 + ".jpg", b"x"),
    )
]  # fmt: skip
HONEST = [tar_of(MEMBERS, form) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)]
TAR_TOKENS = (
    b"../", b"/", b"\0" * 512, b"ustar\x0000", b"77777777777\0", b"\x80" + b"\0" * 10 + b"\xff", b"1", b"2", b"5",
    b"x", b"g", b"L", b"S", b"30 path=../../../x.jpg\n", b"22 size=99999999999999\n", b"19 GNU.sparse.major=1\n",
    b".jpg",
)  # fmt: skip


def with_sums(tar, rng):
    """Make the headers' checksums right again: a reader then believes what they say."""
    content = bytearray(tar)
    for start in range(0, len(content) - 511, 512):
        block = content[start : start + 512]
        if block[257:262] == b"ustar" or rng.random() < 0.1:
            content[start + 148 : start + 156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    return bytes(content)


def extract(root, content):
    root.mkdir(exist_ok=True)
    archive, folder = root / "MET.tar.gz", root / "images"
    archive.write_bytes(content)
    with refusal(archive) as said:
        unpacked = unpack(archive, MET, folder)
        files = tree(folder)
        assert len(files) <= unpacked and not any(name.endswith(".member") for name in files)
        assert all(name.endswith(".jpg") and name.count("/") == 1 for name in files)
        assert sum(map(len, files.values())) <= MOST_GROWTH * archive.stat().st_size
    assert {file.name for file in root.iterdir()} <= {"MET.tar.gz", "images"}
    assert not any(path.is_symlink() or path.is_fifo() for path in folder.rglob("*"))
    shutil.rmtree(folder, ignore_errors=True)
    return said


def test_changed_archives(tmp_path):
    n_read, whole = 0, tarball(*MEMBERS)
    for rng in cases(250):
        tar = mutated(rng.choice(rng.choice((HOSTILE, HONEST))), rng, TAR_TOKENS)
        n_read += not extract(tmp_path / "root", gzip.compress(with_sums(tar, rng), 1, mtime=0))
    for rng in cases(100):
        extract(tmp_path / "root", mutated(whole, rng, (b"\x1f\x8b\x08\0", b"\0" * 8, b"\xff")))
    assert n_read > 10 and not extract(tmp_path / "root", whole)
    assert [file.name for file in tmp_path.iterdir()] == ["root"]


DATABASE = [{"id": 7, "path": "MET/7/0.jpg"}, {"id": 9, "path": "MET/9/0.jpg"}, {"id": 7, "path": "MET/7/1.jpg"}]
VAL = [{"path": "test_met/a.jpg", "MET_id": 9, "photographer": "p"}, {"path": "test_other/b.jpg", "category": "x"}]
TEST = [{"path": "test_met/c.jpg", "MET_id": 7}, {"path": "d.jpg"}]
JSON_TOKENS = (
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"-1", b"1e999", b"../", b"\\u0000", b"\xff", b"[" * 3000,
    b"9" * 5000,
)  # fmt: skip


def read_truth(root):
    with refusal(root / "ground_truth") as said:
        truth = load_ground_truth(root)
        assert truth.exhibit_ids.dtype == np.int64 and (np.diff(truth.exhibit_ids) > 0).all()
        assert truth.exhibit_ids[0] >= 0 and (truth.class_sizes() > 0).all()
        paths = [path for split in truth.paths.values() for path in split]
        assert len(set(paths)) == len(paths)
        assert all((root / "images").resolve() in truth.image(path).resolve().parents for path in paths)
        for split in ("val", "test"):
            labels = truth.labels[split]
            assert labels.shape == truth.photographers[split].shape == (len(truth.paths[split]),)
            assert labels.min() >= DISTRACTOR and labels.max() < truth.n_classes
            assert truth.n_met(split) >= 1 and len(truth.kinds(split)) == len(labels)
        assert len(truth.fingerprint()) == 64
    return said


def test_changed_ground_truth(tmp_path):
    write_ground_truth(tmp_path, DATABASE, VAL, TEST)
    n_read = 0
    for name, whole in {"MET_database": DATABASE, "valset": VAL, "testset": TEST}.items():
        file = tmp_path / "ground_truth" / f"{name}.json"
        for content in json_cases(whole, 75, JSON_TOKENS):
            file.write_bytes(content)
            n_read += not read_truth(tmp_path)
        file.write_text(json.dumps(whole))
    assert n_read > 30 and not read_truth(tmp_path)  # what means nothing may be anything


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


def read_index(folder):
    with refusal(folder / "index.json") as said:
        index = Index.load(folder)
        catalogue, method, scales = index.catalogue, index.method, index.model_options.scales
        truth = catalogue.ground_truth()
        assert len(catalogue.paths) == len(catalogue.exhibits)
        assert truth.labels["database"].max() < truth.n_classes == len(catalogue.names)
        for path, exhibit in zip(catalogue.paths, catalogue.exhibits, strict=True):
            assert type(path) is type(exhibit) is str and path and exhibit
            assert catalogue.folder.resolve() in truth.image(path).resolve().parents
        assert type(index.knn.k) is int and index.knn.k >= 1 and 0 < index.knn.tau < float("inf")
        assert all(type(side) is int and side >= 1 for side in resized_shape(1, 1, index.image_size))
        assert type(index.whitening) is bool and 0 <= index.model_options.seed < 2**63
        assert method.n_visits >= 0 and method.rows_per_image >= 1 and method.database_views in ("none", "rows")
        assert all(0 < share < 1 for share in method.query_crops)
        assert scales is None or all(0 < scale < float("inf") for scale in scales)
    return said


def test_changed_indices(tmp_path):
    n_read = 0
    for content in json_cases(INDEX, 75, JSON_TOKENS):
        (tmp_path / "index.json").write_bytes(content)
        n_read += not read_index(tmp_path)
    assert n_read > 30
    (tmp_path / "index.json").write_text(json.dumps(INDEX))
    assert not read_index(tmp_path)


@pytest.mark.parametrize("path", ["../x.jpg", "/etc/passwd", "a/../../x", "", ".", "a\0b", None, 3])
def test_an_index_names_no_image_elsewhere(tmp_path, path):
    content = {**INDEX, "images": [*INDEX["images"], {"path": path, "exhibit": "x"}]}
    (tmp_path / "index.json").write_text(json.dumps(content))
    assert "index.json" in read_index(tmp_path)[0]
