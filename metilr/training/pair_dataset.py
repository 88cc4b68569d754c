"""Batches of training pairs, decoded and augmented on demand."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from metilr.data.decode import load_image, max_pixels
from metilr.data.visits import derive_seed
from metilr.training.augmentations import Augmentation
from metilr.training.pairs import Pairs


class PairBatch(NamedTuple):
    """Pairs of views.

    Attributes:
        first: uint8 ``(B, 3, H, W)``; or pooled vectors, float32 ``(B, width)``, where the backbone is frozen.
        second: The same form.
        positive: Whether both show the same exhibit, bool ``(B,)``.
        first_labels: Class of ``first``, int64 ``(B,)``.
        second_labels: Class of ``second``, int64 ``(B,)``.
    """

    first: Tensor
    second: Tensor
    positive: Tensor
    first_labels: Tensor
    second_labels: Tensor


class ViewMaker:
    """Views of database images: by row and number, the same in any process.

    Args:
        files: Image file of every database row.
        names: Path of every row in the ground truth: with seed and number it decides the view.
        seed: The run's.
    """

    def __init__(self, files: Sequence[Path], names: Sequence[str], seed: int) -> None:
        self.files, self.names, self.seed = files, names, seed
        self.max_pixels = max_pixels()  # of this process, taken along to its workers

    def view(self, row: int, number: int, augmentation: Augmentation) -> Tensor:
        """View ``number`` of a row, uint8 ``(3, size, size)``."""
        image = load_image(self.files[row], limit=self.max_pixels)
        return augmentation(image, derive_seed(self.seed, self.names[row], number))


class PairDataset(Dataset[PairBatch]):
    """An item is a whole batch, so the loader must not batch again (``batch_size=None``).

    Args:
        pairs: The epoch's.
        batches: This process's part: positions in ``pairs``.
        labels: Class of every database row.
        views: Makes the images.
        first_view: Augmentation of the first of each pair.
        second_view: Augmentation of the second.
    """

    def __init__(
        self,
        pairs: Pairs,
        batches: Sequence[np.ndarray],
        labels: np.ndarray,
        views: ViewMaker,
        first_view: Augmentation,
        second_view: Augmentation,
    ) -> None:
        self.pairs, self.batches, self.labels, self.views = pairs, batches, labels, views
        self.first_view, self.second_view = first_view, second_view

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> PairBatch:
        pairs = self.pairs.take(self.batches[i])
        return pair_batch(
            pairs,
            self.labels,
            self._images(pairs.first, pairs.first_view, self.first_view),
            self._images(pairs.second, pairs.second_view, self.second_view),
        )

    def _images(self, rows: np.ndarray, numbers: np.ndarray, augmentation: Augmentation) -> Tensor:
        return torch.stack(
            [
                self.views.view(row, number, augmentation)
                for row, number in zip(rows.tolist(), numbers.tolist(), strict=True)
            ]
        )


class CachedPairDataset(Dataset[PairBatch]):
    """As ``PairDataset``, with vectors from disk in place of images.

    Args:
        pairs: The epoch's.
        batches: This process's part: positions in ``pairs``.
        labels: Class of every database row.
        first: Vector of view v of row r at ``r * n_views + v``, ``(N * n_views, width)``, memory-mapped.
        second: The same of the second augmentation.
        n_views: Views per image.
    """

    def __init__(
        self,
        pairs: Pairs,
        batches: Sequence[np.ndarray],
        labels: np.ndarray,
        first: np.ndarray,
        second: np.ndarray,
        n_views: int,
    ) -> None:
        self.pairs, self.batches, self.labels = pairs, batches, labels
        self.first, self.second, self.n_views = first, second, n_views

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> PairBatch:
        pairs = self.pairs.take(self.batches[i])
        first = self.first[pairs.first * self.n_views + pairs.first_view]
        second = self.second[pairs.second * self.n_views + pairs.second_view]
        return pair_batch(pairs, self.labels, torch.from_numpy(first.copy()), torch.from_numpy(second.copy()))


def pair_batch(pairs: Pairs, labels: np.ndarray, first: Tensor, second: Tensor) -> PairBatch:
    """Put what the images or vectors show beside them."""
    return PairBatch(
        first,
        second,
        torch.from_numpy(pairs.positive),
        torch.from_numpy(labels[pairs.first]),
        torch.from_numpy(labels[pairs.second]),
    )
