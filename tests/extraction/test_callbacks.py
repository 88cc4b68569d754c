"""The bar of the extraction, whose first process knows its own share alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metilr.extraction.datamodule import NOTHING, ImageBatch, ImageDataModule, PlannedBatch
from metilr.extraction.module import ImageProgress

# One batch of few large images has the work of two of many small ones: shares are uneven in images.
SHAPES = [(3, (400, 400)), (32, (90, 90)), (32, (90, 90)), (7, (60, 90))]


def described(n_processes: int) -> tuple[list[int], int]:
    """What the bar shows after each batch of the first process and at the end, and the bar's total."""
    data = ImageDataModule({"val": ()}, {"val": np.zeros(0)}, None, 32, 0, "skip", quiet=True)
    data.plan = [PlannedBatch(np.arange(n), shape) for n, shape in SHAPES]
    trainer = SimpleNamespace(is_global_zero=True, global_rank=0, world_size=n_processes, datamodule=data)
    bar = ImageProgress()
    bar.on_predict_start(trainer, None)
    shown = []
    try:
        for batch in data.share(0, n_processes) or [NOTHING]:
            rows, bad = batch.rows[1:], [(int(row), "bad") for row in batch.rows[:1]]
            found = ImageBatch(rows, torch.zeros(len(rows), 3, 1, 1), bad)
            bar.on_predict_batch_end(trainer, None, None, found, 0)
            shown.append(int(bar.bar.tasks[0].completed))
        bar.on_predict_end(trainer, None)
        return [*shown, int(bar.bar.tasks[0].completed)], int(bar.bar.tasks[0].total)
    finally:
        bar.teardown(trainer, None, "predict")


@pytest.mark.parametrize("n_processes", [1, 2, 3, 4])
def test_the_bar_ends_at_the_number_of_images(n_processes):
    n_images = sum(n for n, _ in SHAPES)
    shown, total = described(n_processes)
    assert total == n_images and shown == sorted(shown) and shown[-2:] == [n_images, n_images]


def test_a_first_process_without_images_shows_the_end_at_the_end(monkeypatch):
    monkeypatch.setattr(ImageDataModule, "share", lambda *_: [])
    shown, total = described(2)
    assert shown == [0, total]
