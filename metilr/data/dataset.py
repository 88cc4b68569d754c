"""Batches of equally shaped images, decoded on demand."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from metilr.data.images import ImageRows
from metilr.data.transforms import BadImageError


class PlannedBatch(NamedTuple):
    """Rows whose images have one shape. Not decoded yet.

    Attributes:
        rows: Row of each image in the descriptors, int64 ``(B,)``.
        shape: Height and width of all, in px.
    """

    rows: np.ndarray
    shape: tuple[int, int]


class ImageBatch(NamedTuple):
    """Decoded images of one shape.

    Attributes:
        rows: Row of each image in the descriptors, int64 ``(B,)``.
        images: uint8 ``(B, 3, H, W)``.
        bad: Rows that could not be decoded, each with the reason.
        decode_seconds: That reading and decoding took.
    """

    rows: np.ndarray
    images: Tensor
    bad: list[tuple[int, str]]
    decode_seconds: float = 0.0


class BatchDataset(Dataset[ImageBatch]):
    """An item is a whole batch, so the loader must not batch again (``batch_size=None``).

    Args:
        images: What is decoded.
        batches: The plan: rows of equal image shape.
    """

    def __init__(self, images: ImageRows, batches: Sequence[PlannedBatch]) -> None:
        self.images = images
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> ImageBatch:
        planned, start = self.batches[i], time.perf_counter()
        rows, images, bad = [], [], []
        for row in planned.rows.tolist():
            try:
                image = self.images.load(row)
                if tuple(image.shape[1:]) != planned.shape:
                    raise BadImageError(f"{self.images.file(row)}: changed while the run was reading it; run again")
            except BadImageError as error:
                bad.append((row, str(error)))
            else:
                rows.append(row)
                images.append(image)
        stacked = torch.stack(images) if images else torch.empty((0, 3, *planned.shape), dtype=torch.uint8)
        return ImageBatch(np.array(rows, dtype=np.int64), stacked, bad, time.perf_counter() - start)
