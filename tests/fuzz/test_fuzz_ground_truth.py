"""Ground truth: JSON from elsewhere."""

import json

import numpy as np
from hypothesis import given, strategies as st

from metilr.data.ground_truth import load_ground_truth
from metilr.metrics import DISTRACTOR
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import PROPERTIES, cases, each_replaced, mutated, mutated_value
from tests.museum import write_ground_truth

DATABASE = [{"id": 7, "path": "MET/7/0.jpg"}, {"id": 9, "path": "MET/9/0.jpg"}, {"id": 7, "path": "MET/7/1.jpg"}]
VAL = [{"path": "test_met/a.jpg", "MET_id": 9, "photographer": "p"}, {"path": "test_other/b.jpg", "category": "x"}]
TEST = [{"path": "test_met/c.jpg", "MET_id": 7}, {"path": "d.jpg"}]
FILES = {"MET_database": DATABASE, "valset": VAL, "testset": TEST}
TOKENS = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"-1", b"1e999", b"../", b"\\u0000", b"\xff", b"[" * 3000)


def read(root):
    """Read a root, and check what must be true of whatever is read; returns the message of a refusal."""
    with refusal(root / "ground_truth") as said:
        truth = load_ground_truth(root)
        assert truth.exhibit_ids.dtype == np.int64 and (np.diff(truth.exhibit_ids) > 0).all()
        assert truth.exhibit_ids[0] >= 0 and (truth.class_sizes() > 0).all()
        paths = [path for split in truth.paths.values() for path in split]
        assert len(set(paths)) == len(paths)
        for path in paths:
            assert (root / "images").resolve() in truth.image(path).resolve().parents
        for split in ("val", "test"):
            labels = truth.labels[split]
            assert labels.shape == truth.photographers[split].shape == (len(truth.paths[split]),)
            assert labels.min() >= DISTRACTOR and labels.max() < truth.n_classes
            assert truth.n_met(split) >= 1 and len(truth.kinds(split)) == len(labels)
        assert len(truth.fingerprint()) == 64
    return said


def test_changed_values_are_read_rightly_or_refused(tmp_path):
    write_ground_truth(tmp_path, DATABASE, VAL, TEST)
    n_read = 0
    for name, whole in FILES.items():
        file = tmp_path / "ground_truth" / f"{name}.json"
        for changed in (*each_replaced(whole), *(mutated_value(whole, rng) for rng in cases(75))):
            file.write_text(json.dumps(changed))
            n_read += not read(tmp_path)
        file.write_text(json.dumps(whole))
    assert n_read > 30  # what means nothing may be anything


def test_changed_bytes_are_read_rightly_or_refused(tmp_path):
    write_ground_truth(tmp_path, DATABASE, VAL, TEST)
    for rng in cases(300):
        name = rng.choice([*FILES])
        file, whole = tmp_path / "ground_truth" / f"{name}.json", json.dumps(FILES[name]).encode()
        file.write_bytes(mutated(whole, rng, TOKENS))
        read(tmp_path)
        file.write_bytes(whole)
    assert not read(tmp_path)


@PROPERTIES
@given(
    st.lists(
        st.tuples(st.integers(0, 2**63 - 1), st.text("abc/é ", min_size=1, max_size=8)),
        min_size=1, max_size=6, unique_by=lambda entry: entry[1],
    )
)  # fmt: skip
def test_whatever_is_in_order_is_read_as_written(tmp_path, entries):
    database = [{"id": exhibit, "path": f"MET/{i}{name}x"} for i, (exhibit, name) in enumerate(entries)]
    queries = {split: [{"path": f"{split}{i}", "MET_id": e["id"]} for i, e in enumerate(database)] for split in "ab"}
    write_ground_truth(tmp_path, database, queries["a"], queries["b"])
    assert not read(tmp_path)
    truth = load_ground_truth(tmp_path)
    ids = [entry["id"] for entry in database]
    for split in truth.paths:
        assert truth.exhibit_ids[truth.labels[split]].tolist() == ids
    assert truth.paths["database"] == tuple(entry["path"] for entry in database)
