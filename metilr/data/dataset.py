"""Batches of equally shaped images, decoded on demand."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from metilr.data.transforms import BadImageError, load_image


class PlannedBatch(NamedTuple):
    """Rows whose images have one shape. Not decoded yet."""

    rows: np.ndarray
    shape: tuple[int, int]


class ImageBatch(NamedTuple):
    """Decoded images of one shape.

    Attributes:
        rows: Row of each image in the descriptors, int64 ``(B,)``.
        images: uint8 ``(B, 3, H, W)``.
        bad: Rows that could not be decoded, each with the reason.
    """

    rows: np.ndarray
    images: Tensor
    bad: list[tuple[int, str]]


class BatchDataset(Dataset[ImageBatch]):
    """An item is a whole batch, so the loader must not batch again (``batch_size=None``).

    Args:
        files: Image file of every row.
        batches: The plan: rows of equal image shape.
        image_size: See ``load_image``.
    """

    def __init__(self, files: Sequence[Path], batches: Sequence[PlannedBatch], image_size: int | None) -> None:
        self.files = files
        self.batches = batches
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> ImageBatch:
        planned = self.batches[i]
        rows, images, bad = [], [], []
        for row in planned.rows.tolist():
            try:
                image = load_image(self.files[row], self.image_size)
                if tuple(image.shape[1:]) != planned.shape:
                    raise BadImageError(f"{self.files[row]}: changed while the run was reading it; run again")
            except BadImageError as error:
                bad.append((row, str(error)))
            else:
                rows.append(row)
                images.append(image)
        stacked = torch.stack(images) if images else torch.empty((0, 3, *planned.shape), dtype=torch.uint8)
        return ImageBatch(np.array(rows, dtype=np.int64), stacked, bad)
