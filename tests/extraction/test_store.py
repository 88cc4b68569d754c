import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from metilr.data.ground_truth import load_ground_truth
from metilr.errors import UserError
from metilr.extraction.describe import image_sizes
from metilr.extraction.store import SPLITS, DescriptorStore, row_chunks, settings_fingerprint
from tests.small_runs import evaluate

WIDTH = 5
COUNTS = {"database": 40, "val": 3, "test": 4}
SETTINGS = {"model": {"backbone": "b", "scales": [1.0, 0.5]}, "image_size": None}


def unit_rows(n, seed=0):
    rows = np.random.default_rng(seed).standard_normal((n, WIDTH)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


ROWS = {split: unit_rows(n, seed) for seed, (split, n) in enumerate(COUNTS.items())}
SIZES = {split: 100 + np.arange(n) for split, n in COUNTS.items()}


def prepared(path):
    store = DescriptorStore(path)
    store.prepare(SETTINGS, COUNTS, WIDTH)
    return store


def fill(store, split, rows):
    writer = store.writer()
    for row in rows:
        writer.write(split, row, ROWS[split][row], int(SIZES[split][row]))
    writer.close()


def refused(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_lie_in_ground_truth_order_whatever_the_order_of_writing(tmp_path):
    store = prepared(tmp_path / "new" / "store")
    assert store.is_complete is False
    for split, n in COUNTS.items():
        fill(store, split, np.random.default_rng(3).permutation(n).tolist())
    store.begin({"device": "here"})
    store.finish()
    reopened = DescriptorStore(tmp_path / "new" / "store")
    for split in COUNTS:
        np.testing.assert_array_equal(np.load(tmp_path / "new" / "store" / f"{split}.npy"), ROWS[split])
        np.testing.assert_array_equal(reopened.descriptors(split), ROWS[split])
        assert isinstance(reopened.descriptors(split), np.memmap) and reopened.descriptors(split).dtype == np.float32
        assert reopened.is_valid(split).all() and not reopened.pending(split, SIZES[split], retry_bad=True).any()
    manifest = json.loads((reopened.path / "manifest.json").read_text())
    assert manifest["complete"] is True and manifest["made_with"] == [{"device": "here"}]
    assert manifest["settings"] == SETTINGS and manifest["counts"] == COUNTS and manifest["width"] == WIDTH
    assert sorted(file.name for file in reopened.path.iterdir()) == sorted(
        ["manifest.json", *(f"{split}{kind}.npy" for split in COUNTS for kind in ("", ".files", ".crc32"))]
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {**SETTINGS, "image_size": 512}}, "image_size: null there, 512 now"),
        ({"settings": {**SETTINGS, "model": {"backbone": "c", "scales": [1.0, 0.5]}}}, 'backbone: "b" there, "c" now'),
        ({"counts": {**COUNTS, "val": 9}}, "val: 3 there, 9 now"),
        ({"width": 6}, "width: 5 there, 6 now"),
    ],
)
def test_other_settings_are_refused_by_key(tmp_path, change, said):
    fill(prepared(tmp_path), "val", [0])
    wanted = {"settings": SETTINGS, "counts": COUNTS, "width": WIDTH, **change}
    message = refused(DescriptorStore(tmp_path).prepare, wanted["settings"], wanted["counts"], wanted["width"])
    assert said in message and message.startswith(f"{tmp_path}: ")
    np.testing.assert_array_equal(DescriptorStore(tmp_path).descriptors("val")[0], ROWS["val"][0])


def test_tuples_and_lists_are_the_same_settings(tmp_path):
    prepared(tmp_path)
    as_tuple = {**SETTINGS, "model": {"backbone": "b", "scales": (1.0, 0.5)}}
    DescriptorStore(tmp_path).prepare(as_tuple, COUNTS, WIDTH)
    assert settings_fingerprint(as_tuple) == settings_fingerprint(SETTINGS)
    assert settings_fingerprint(SETTINGS) != settings_fingerprint({**SETTINGS, "image_size": 1})


@pytest.mark.parametrize("name", ["holiday.txt", "test.npy", "database_old.npy"])
def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_bytes(b"precious")
    assert "holds other files" in refused(prepared, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"precious"


def test_a_run_killed_while_it_prepared_is_continued(tmp_path):
    store = prepared(tmp_path)
    (tmp_path / "test.npy").unlink()
    (tmp_path / ".manifest.json.123").write_text("{")
    store = prepared(tmp_path)
    assert store.descriptors("test").shape == (4, WIDTH)
    assert all(store.pending(split, SIZES[split], retry_bad=True).all() for split in COUNTS)


def test_a_killed_run_leaves_exactly_the_rest_pending(tmp_path):
    store = prepared(tmp_path)
    writer = store.writer()  # never closed, as in a process that was killed
    done = [31, 2, 17]
    for row in done:
        writer.write("database", row, ROWS["database"][row], int(SIZES["database"][row]))
    pending = prepared(tmp_path).pending("database", SIZES["database"], retry_bad=True)
    assert np.flatnonzero(~pending).tolist() == sorted(done)
    assert DescriptorStore(tmp_path).is_complete is False
    writer.close()


def test_a_changed_file_is_pending(tmp_path):
    store = prepared(tmp_path)
    fill(store, "test", range(4))
    sizes = SIZES["test"].copy()
    sizes[2] += 1
    assert store.pending("test", sizes, retry_bad=False).tolist() == [False, False, True, False]
    sizes[2] = 0  # gone
    assert store.pending("test", sizes, retry_bad=False).tolist() == [False, False, True, False]


def test_bad_files_are_settled_only_for_those_who_skip_them(tmp_path):
    store = prepared(tmp_path)
    fill(store, "test", [0, 3])
    writer = store.writer()
    writer.mark_bad("test", 1, int(SIZES["test"][1]))
    writer.mark_bad("test", 2, 0)  # missing
    writer.close()
    sizes = SIZES["test"].copy()
    sizes[2] = 0
    assert store.is_valid("test").tolist() == [True, False, False, True]
    assert store.pending("test", sizes, retry_bad=False).tolist() == [False] * 4
    assert store.pending("test", sizes, retry_bad=True).tolist() == [False, True, True, False]
    mended = sizes + np.array([0, 5, 7, 0])
    assert store.pending("test", mended, retry_bad=False).tolist() == [False, True, True, False]


def test_a_marked_row_that_was_torn_is_pending(tmp_path):
    store = prepared(tmp_path)
    fill(store, "test", range(4))
    rows = np.load(tmp_path / "test.npy", mmap_mode="r+")
    rows[:3] = np.array([0, 0.3, np.nan])[:, None]
    rows.flush()
    assert store.pending("test", SIZES["test"], retry_bad=True).tolist() == [True, True, True, False]


def zeroed(rows, files):
    rows[[1, 3]] = 0


def multiplied(rows, files):
    rows[[1, 3]] *= 1000


def exchanged(rows, files):
    rows[[1, 3]] = rows[[3, 1]]


def a_bit_flipped(rows, files):
    rows.view(np.uint32)[[1, 3], 2] ^= 1


def unmarked(rows, files):
    files[[1, 3]] = 0


def marked_bad(rows, files):
    files[[1, 3]] = -files[[1, 3]] - 1


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("damage", [zeroed, multiplied, exchanged, a_bit_flipped, unmarked, marked_bad])
def test_rows_that_are_not_as_they_were_written_are_damaged_and_pending(tmp_path, damage, is_finished):
    store = prepared(tmp_path)
    fill(store, "test", range(4))
    if is_finished:
        store.finish()
    assert not store.damaged("test").any()
    arrays = [np.load(tmp_path / name, mmap_mode="r+") for name in ("test.npy", "test.files.npy")]
    damage(*arrays)
    for array in arrays:
        array.flush()
    is_known = is_finished or damage is not unmarked  # else it is how a killed run leaves a row
    assert store.damaged("test").tolist() == [False, is_known, False, is_known]
    assert store.pending("test", SIZES["test"], retry_bad=False).tolist() == [False, True, False, True]
    fill(store, "test", [1, 3])
    assert not store.damaged("test").any()


@pytest.mark.parametrize("lost", [None, 0])
def test_rows_whose_checksums_are_lost_are_damaged(tmp_path, lost):
    """They may have been exchanged, which their lengths do not tell."""
    store = prepared(tmp_path)
    fill(store, "test", range(4))
    store.finish()
    file = tmp_path / "test.crc32.npy"
    np.save(file, np.full(4, lost, np.uint32)) if lost == 0 else file.unlink()
    assert store.damaged("test").all() and store.pending("test", SIZES["test"], retry_bad=False).all()
    fill(store, "test", range(4))
    assert not store.damaged("test").any()


def test_a_bad_image_is_no_damage(tmp_path):
    store = prepared(tmp_path)
    fill(store, "test", range(3))
    writer = store.writer()
    writer.mark_bad("test", 2, 7)  # described before, and exchanged for a broken file
    writer.mark_bad("test", 3, 0)
    writer.close()
    store.finish()
    assert not store.damaged("test").any()


def test_a_row_of_another_width_is_a_defect_not_a_shifted_store(tmp_path):
    writer = prepared(tmp_path).writer()
    for wrong in (ROWS["val"][0].astype(np.float64), ROWS["val"][0][:-1]):
        with pytest.raises(AssertionError):
            writer.write("val", 0, wrong, 1)
    writer.close()


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "other"}', '{"schema": "metilr.descriptors/1"}', "\ufffd"])
def test_a_damaged_manifest_is_refused_with_the_remedy(tmp_path, content):
    prepared(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    message = refused(DescriptorStore(tmp_path).manifest)
    assert "manifest.json" in message and f"delete {tmp_path}" in message


@pytest.mark.parametrize("length", [0, 20, 200])
def test_a_truncated_array_is_refused(tmp_path, length):
    store = prepared(tmp_path)
    os.truncate(tmp_path / "database.npy", length)
    message = refused(store.descriptors, "database")
    assert "database.npy: cannot be read" in message and "delete" in message


def test_a_full_disk_shows_when_the_space_is_reserved(tmp_path, monkeypatch):
    def refuse(descriptor, offset, n_bytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    message = refused(prepared, tmp_path)
    assert "cannot reserve" in message and "No space left" in message and "another disk" in message
    monkeypatch.undo()
    fill(prepared(tmp_path), "val", [0])  # space was freed: the same folder goes on


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 100])
def test_row_chunks_are_the_kept_rows_side_by_side(chunk_rows):
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((23, 3)).astype(np.float32), rng.standard_normal((23, 2))
    keep = rng.random(23) < 0.5
    keep[8:16] = False  # chunks without a row
    chunks = list(row_chunks([left, right], keep, chunk_rows))
    assert all(1 <= len(chunk) <= chunk_rows and chunk.dtype == np.float32 for chunk in chunks)
    expected = [[*left[i], *right[i].astype(np.float32)] for i in range(23) if keep[i]]
    np.testing.assert_array_equal(np.concatenate(chunks), np.array(expected, dtype=np.float32))
    assert list(row_chunks([left], np.zeros(23, dtype=bool), chunk_rows)) == []


def test_a_store_of_the_first_edition_is_reused(tiny_museum, tmp_path, monkeypatch, capsys):
    """Of the museum that write_museum draws; nothing in it is made again."""
    path = Path(shutil.copytree(Path(__file__).parents[1] / "fixtures" / "first_edition_store", tmp_path / "store"))
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    store, truth = DescriptorStore(path), load_ground_truth(tiny_museum)
    for split, sizes in image_sizes(truth).items():  # another version of Pillow compresses to other sizes
        np.testing.assert_array_equal(np.abs(store.files(split)) > 0, sizes > 0)
        np.save(path / f"{split}.files.npy", sizes)
        assert not store.pending(split, sizes, retry_bad=True).any()
    monkeypatch.chdir(tmp_path)
    options = {"backbone": "timm/test_resnet", "weights": "random", "scales": [1], "accelerator": "cpu"}
    evaluate(tiny_museum, store=path, num_workers=0, report=False, output=Path("out"), **options)
    assert "reusing 22 rows" in capsys.readouterr().out
    now = {file.name: file.read_bytes() for file in path.iterdir()}
    assert {name for name in now if now[name] != before.get(name)} <= {f"{split}.files.npy" for split in SPLITS} | {
        ".lock"
    }
    rows = np.load(path / "database.npy")  # it has no checksums, so its rows must at least be of unit length
    rows[3] *= 1000
    np.save(path / "database.npy", rows)
    assert store.damaged("database").nonzero()[0].tolist() == [3]
    evaluate(tiny_museum, store=path, num_workers=0, report=False, output=Path("mended"), **options)
    assert "1 database row is not as written: made anew" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(path / "database.npy")[3], rows[3] / 1000, atol=1e-5)
