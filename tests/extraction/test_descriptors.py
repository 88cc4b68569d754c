import hashlib
import json
import pickle

import numpy as np
import pytest

from metilr.data.ground_truth import load_ground_truth
from metilr.errors import UserError
from metilr.extraction.descriptors import open_descriptors
from metilr.extraction.store import DescriptorStore
from tests.museum import write_ground_truth

COUNTS = {"database": 5, "val": 2, "test": 3}
KEYS = {"database": "train_descriptors", "val": "val_descriptors", "test": "test_descriptors"}


@pytest.fixture
def truth(tmp_path):
    database = [{"id": i, "path": f"MET/{i}.jpg"} for i in range(5)]
    val = [{"path": "v0.jpg", "MET_id": 0}, {"path": "v1.jpg"}]
    test = [{"path": f"t{i}.jpg", "MET_id": i} for i in range(3)]
    return load_ground_truth(write_ground_truth(tmp_path / "root", database, val, test, mini=database[:4]))


def unit_rows(width, seed):
    rng = np.random.default_rng(seed)
    rows = {split: rng.standard_normal((n, width)) for split, n in COUNTS.items()}
    return {split: (m / np.linalg.norm(m, axis=1, keepdims=True)).astype(np.float32) for split, m in rows.items()}


def make_store(path, truth, width=4, seed=0, bad=(), finish=True):
    store = DescriptorStore(path)
    store.prepare({"model": {"backbone": "b"}, "ground_truth": dict(truth.digests)}, COUNTS, width)
    writer = store.writer()
    for split, matrix in unit_rows(width, seed).items():
        for row, descriptor in enumerate(matrix):
            if (split, row) in bad:
                writer.mark_bad(split, row, 9)
            else:
                writer.write(split, row, descriptor, 9)
    writer.close()
    if finish:
        store.begin({"weights_from": {"source": "somewhere"}})
        store.finish()
    return path


def make_pickle(path, matrices):
    path.write_bytes(pickle.dumps({KEYS[split]: matrix for split, matrix in matrices.items()}))
    return path


def refused(paths, truth):
    with pytest.raises(UserError) as caught:
        open_descriptors(paths, truth)
    assert str(paths[0]) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_store_and_a_pickle_side_by_side(tmp_path, truth):
    store = make_store(tmp_path / "store", truth, width=4, seed=0, bad={("database", 1), ("test", 2)})
    file = make_pickle(tmp_path / "d.pkl", unit_rows(3, seed=1))
    opened = open_descriptors([store, file], truth)
    assert opened.width == 7
    for split in COUNTS:
        left, right = opened.parts[split]
        np.testing.assert_array_equal(right, unit_rows(3, 1)[split])
        np.testing.assert_array_equal(left[opened.is_valid[split]], unit_rows(4, 0)[split][opened.is_valid[split]])
    assert opened.is_valid["database"].tolist() == [True, False, True, True, True]
    assert opened.is_valid["val"].all() and opened.is_valid["test"].tolist() == [True, True, False]
    assert opened.origins[0]["model"] == {"backbone": "b"} and opened.origins[1] == {
        "pickle": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert opened.origins[0]["made_with"] == [{"weights_from": {"source": "somewhere"}}]


def test_a_row_must_be_made_in_every_source(tmp_path, truth):
    first = make_store(tmp_path / "first", truth, bad={("val", 0)})
    second = make_store(tmp_path / "second", truth, bad={("database", 4)})
    opened = open_descriptors([first, second], truth)
    assert opened.is_valid["val"].tolist() == [False, True] and opened.is_valid["database"].tolist() == [True] * 4 + [
        False
    ]


def test_wrong_number_of_rows(tmp_path, truth):
    matrices = unit_rows(4, 0)
    file = make_pickle(tmp_path / "d.pkl", {**matrices, "database": matrices["database"][:4]})
    message = refused([file], truth)
    assert "database has 4 rows, the ground truth 5 images" in message and "database" in message
    file = make_pickle(tmp_path / "d.pkl", {**matrices, "test": np.concatenate([matrices["test"]] * 2)})
    message = refused([file], truth)
    assert "test has 6 rows, the ground truth 3 images" in message and "give the database" not in message


def test_widths_must_agree_within_a_source(tmp_path, truth):
    file = make_pickle(tmp_path / "d.pkl", {**unit_rows(4, 0), "val": unit_rows(3, 0)["val"]})
    assert "val has shape (2, 3), but the database's width is 4" in refused([file], truth)


@pytest.mark.parametrize(("split", "shape"), [("database", (5, 0)), ("val", (0, 4)), ("test", ())])
def test_empty_matrices_are_refused_by_file_and_name(tmp_path, truth, split, shape):
    store = make_store(tmp_path / "store", truth)
    np.save(store / f"{split}.npy", np.zeros(shape, dtype=np.float32))
    expected = f"{split} has shape {shape}" if shape else f"{split}.npy: holds float32 of shape ()"
    assert expected in refused([store], truth)


@pytest.mark.parametrize(
    ("value", "said"),
    [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite"), (1e300, "infinite"), (0, "zeros"), (1e-60, "zeros")],
)
def test_a_row_of_a_pickle_without_a_direction_is_named(tmp_path, truth, value, said):
    matrices = {split: rows.astype(np.float64) for split, rows in unit_rows(4, 0).items()}
    matrices["test"][1] = value
    message = refused([make_pickle(tmp_path / "d.pkl", matrices)], truth)
    assert "test row 1 holds" in message and said in message


def test_damaged_rows_of_a_finished_store_are_named(tmp_path, truth):
    store = make_store(tmp_path / "store", truth)
    rows = np.load(store / "database.npy", mmap_mode="r+")
    rows[[0, 4]] = rows[[4, 0]]
    rows.flush()
    message = refused([store], truth)
    assert "2 database rows (0, 4) not as written" in message and f"store {store}" in message


def test_a_store_of_another_ground_truth(tmp_path, truth):
    store = make_store(tmp_path / "store", truth)
    message = refused([store], load_ground_truth(truth.root, "mini"))
    assert "was made for another database file" in message and "database" in message
    file = truth.root / "ground_truth" / "testset.json"
    file.write_text(json.dumps(json.loads(file.read_text())[::-1]))
    assert "was made for another test file" in refused([store], load_ground_truth(truth.root))


def test_what_is_no_finished_store(tmp_path, truth):
    assert "is not finished" in refused([make_store(tmp_path / "part", truth, finish=False)], truth)
    (tmp_path / "empty").mkdir()
    assert "not a descriptor store" in refused([tmp_path / "empty"], truth)
    with pytest.raises(FileNotFoundError):
        open_descriptors([tmp_path / "none"], truth)


def test_a_finished_store_with_nothing_known_about_its_making_is_read(tmp_path, truth):
    store = make_store(tmp_path / "store", truth, finish=False)
    DescriptorStore(store).finish()
    assert open_descriptors([store], truth).origins[0]["made_with"] == []
