import numpy as np
import torch
from PIL import Image

from metilr.data.views import ImageRows, Images
from metilr.extraction.datamodule import BatchDataset, PlannedBatch


def files_of(tmp_path, shapes):
    files = []
    for i, (height, width) in enumerate(shapes):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(np.full((height, width, 3), 10 * i, np.uint8)).save(files[-1])
    return files


def dataset_of(files, batches, image_size=None):
    return BatchDataset(ImageRows({"val": Images(files, [file.name for file in files], image_size)}), batches)


def test_an_item_is_a_batch_with_its_rows(tmp_path):
    files = files_of(tmp_path, [(4, 6), (5, 5), (4, 6)])
    dataset = dataset_of(files, [PlannedBatch(np.array([0, 2]), (4, 6)), PlannedBatch(np.array([1]), (5, 5))])
    assert len(dataset) == 2
    batch = dataset[0]
    assert batch.rows.tolist() == [0, 2] and batch.bad == [] and batch.images.dtype == torch.uint8
    assert batch.images.shape == (2, 3, 4, 6)
    assert (batch.images[0] == 0).all() and (batch.images[1] == 20).all()
    assert dataset[1].images.shape == (1, 3, 5, 5)


def test_bad_files_are_reported_and_the_others_kept(tmp_path):
    files = files_of(tmp_path, [(4, 6), (4, 6), (4, 6)])
    files[0].write_bytes(b"broken")
    Image.new("RGB", (9, 9)).save(files[2])  # another shape than planned
    batch = dataset_of(files, [PlannedBatch(np.array([0, 1, 2]), (4, 6))])[0]
    assert batch.rows.tolist() == [1] and batch.images.shape == (1, 3, 4, 6)
    assert [row for row, _ in batch.bad] == [0, 2]
    assert "0.png" in batch.bad[0][1] and "changed while" in batch.bad[1][1]


def test_a_batch_of_bad_files_alone_is_empty(tmp_path):
    batch = dataset_of([tmp_path / "none.jpg"], [PlannedBatch(np.array([0]), (4, 6))])[0]
    assert batch.images.shape == (0, 3, 4, 6) and batch.rows.shape == (0,) and len(batch.bad) == 1


def test_image_size_is_applied(tmp_path):
    files = files_of(tmp_path, [(4, 8)])
    assert dataset_of(files, [PlannedBatch(np.array([0]), (8, 16))], 16)[0].images.shape == (1, 3, 8, 16)
