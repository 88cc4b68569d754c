import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from metilr.data.views import ImageRows, Images
from metilr.extraction.datamodule import (
    NOTHING,
    ImageBatch,
    ImageDataModule,
    PlannedBatch,
    deal,
    decode_batch,
    same_shape_batches,
)
from metilr.extraction.module import DescriptorWriter


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_every_position_once_in_batches_of_one_shape_largest_area_first(batch_size):
    shapes = np.random.default_rng(batch_size).choice([20, 30, 40, 60], (200, 2))
    batches = same_shape_batches(shapes, batch_size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    kinds = [tuple(shape) for shape in shapes.tolist()]
    for batch in batches:
        assert len(batch) <= batch_size and batch.tolist() == sorted(batch.tolist())
        assert len({kinds[i] for i in batch}) == 1
    areas = [int(shapes[batch[0]].prod()) for batch in batches]
    assert areas == sorted(areas, reverse=True)
    assert len(batches) == sum(-(-kinds.count(kind) // batch_size) for kind in set(kinds))


def test_transposed_shapes_do_not_mix_and_nothing_gives_no_batches():
    assert [b.tolist() for b in same_shape_batches(np.array([[2, 3], [3, 2], [2, 3]]), 8)] == [[0, 2], [1]]
    assert same_shape_batches(np.zeros((0, 2), dtype=np.int64), 4) == []


def test_photographs_of_millions_of_pixels_come_in_smaller_batches():
    shapes = np.array([[500, 500]] * 8 + [[1000, 500]] * 8 + [[3000, 4000]] * 2)
    sizes = {tuple(shapes[batch[0]]): len(batch) for batch in same_shape_batches(shapes, batch_size=8)}
    assert sizes == {(500, 500): 8, (1000, 500): 4, (3000, 4000): 1}


def test_convolutions_on_a_cpu_get_few_pixels_at_once():
    shapes = np.array([[500, 500]] * 3 + [[512, 512]] * 3 + [[250, 250]] * 9 + [[50, 50]] * 9)
    batches = same_shape_batches(shapes, batch_size=8, n_full=1)
    largest = {(512, 512): 1, (500, 500): 1, (250, 250): 4, (50, 50): 8}
    for shape, size in largest.items():
        assert max(len(batch) for batch in batches if tuple(shapes[batch[0]]) == shape) == size


@pytest.mark.parametrize("n_processes", [1, 3, 50])
def test_each_batch_is_dealt_once_and_work_is_even(n_processes):
    work = np.random.default_rng(0).integers(1, 100, 40).tolist()
    shares = deal(work, n_processes)
    assert len(shares) == n_processes and all(share == sorted(share) for share in shares)
    assert sorted(batch for share in shares for batch in share) == list(range(40))
    loads = [sum(work[batch] for batch in share) for share in shares]
    # Whoever has most got its last batch when it had least.
    smallest = [min((work[batch] for batch in share), default=0) for share in shares]
    busiest = int(np.argmax(loads))
    assert loads[busiest] - smallest[busiest] <= min(loads)


def rows_of(folder, shapes, image_size=None):
    files = [folder / f"{i}.png" for i in range(len(shapes))]
    for i, (height, width) in enumerate(shapes):
        Image.fromarray(np.full((height, width, 3), 10 * i, np.uint8)).save(files[i])
    return ImageRows({"val": Images(files, [file.name for file in files], image_size)})


def test_a_batch_is_decoded_with_its_rows_at_the_size_asked_for(tmp_path):
    batch = decode_batch(rows_of(tmp_path, [(4, 6), (5, 5), (4, 6)]), PlannedBatch(np.array([0, 2]), (4, 6)))
    assert batch.rows.tolist() == [0, 2] and batch.bad == [] and batch.images.dtype == torch.uint8
    assert batch.images.shape == (2, 3, 4, 6)
    assert (batch.images[0] == 0).all() and (batch.images[1] == 20).all()
    larger = decode_batch(rows_of(tmp_path, [(4, 8)], 16), PlannedBatch(np.array([0]), (8, 16)))
    assert larger.images.shape == (1, 3, 8, 16)


def test_bad_files_are_reported_and_the_others_kept(tmp_path):
    rows = rows_of(tmp_path, [(4, 6), (4, 6), (4, 6)])
    (tmp_path / "0.png").write_bytes(b"broken")
    Image.new("RGB", (9, 9)).save(tmp_path / "2.png")  # another shape than planned
    batch = decode_batch(rows, PlannedBatch(np.array([0, 1, 2]), (4, 6)))
    assert batch.rows.tolist() == [1] and batch.images.shape == (1, 3, 4, 6)
    assert [row for row, _ in batch.bad] == [0, 2]
    assert "0.png" in batch.bad[0][1] and "changed while" in batch.bad[1][1]
    empty = decode_batch(rows, PlannedBatch(np.array([0]), (4, 6)))
    assert empty.images.shape == (0, 3, 4, 6) and empty.rows.shape == (0,) and len(empty.bad) == 1


# One batch of few large images has the work of two of many small ones: shares are uneven in images.
SHAPES = [(3, (400, 400)), (32, (90, 90)), (32, (90, 90)), (7, (60, 90))]


@pytest.mark.parametrize("n_processes", [1, 2, 4, 9])
def test_the_bar_of_the_first_process_ends_at_the_number_of_all_images(n_processes, monkeypatch):
    monkeypatch.setattr("metilr.extraction.module.has_launcher", lambda: True)
    store = SimpleNamespace(writer=lambda: SimpleNamespace(close=lambda: None))
    data = ImageDataModule({"val": ()}, {"val": np.zeros(0)}, store, 32, 0, "skip", lambda *_: None)
    data.plan = [PlannedBatch(np.arange(n), shape) for n, shape in SHAPES]
    data.write = lambda *_: None
    profiler = SimpleNamespace(profile=lambda name: torch.no_grad())
    trainer = SimpleNamespace(is_global_zero=True, global_rank=0, world_size=n_processes, profiler=profiler)
    totals, steps = [], []

    @contextlib.contextmanager
    def recorded(description, total, unit):
        totals.append(total)
        yield steps.append

    monkeypatch.setattr("metilr.extraction.module.counted", recorded)
    writer = DescriptorWriter(data)
    writer.on_predict_start(trainer, None)
    for batch in data.share(0, n_processes) or [NOTHING]:
        found = ImageBatch(batch.rows[1:], torch.zeros(0), [(int(row), "bad") for row in batch.rows[:1]])
        writer.write_on_batch_end(trainer, None, torch.zeros(0), None, found, 0, 0)
    writer.on_exception(trainer, None, KeyboardInterrupt())
    assert totals == [sum(n for n, _ in SHAPES)] == [sum(steps)] and min(steps) >= 0
    assert writer.writer is None
