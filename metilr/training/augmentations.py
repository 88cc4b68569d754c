"""Augmentations: from a database image to one of the two views of a pair.

Each is a class whose constructor is its configuration, and maps an image of any size, uint8 ``(3, H, W)``, to a square
view, uint8 ``(3, size, size)``. It draws from the seed it is given and from nothing else, so a view depends neither on
the loader's workers nor on the number of processes.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from metilr.data.decode import load_image, max_pixels
from metilr.data.visits import PRESETS, RECIPE, derive_seed, simulate_visit, strengths_between
from metilr.errors import UserError

Preset = Literal["mild", "medium", "severe"]


class Augmentation(abc.ABC):
    """A seeded map from an image to a view."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise UserError(f"{size}: choose 1 px or more", "size")
        self.size = size

    @abc.abstractmethod
    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Return a view of an image."""

    def settings(self) -> dict[str, Any]:
        """Return what determines a view besides image and seed, as JSON types."""
        return {"kind": type(self).__name__, "size": self.size}


class RandomCrop(Augmentation):
    """A random part of the image, resized to a square.

    Args:
        size: Side of the view in px.
        scale: Least and largest share of the image's area.
        ratio: Least and largest ratio of the part's sides, width to height.

    Raises:
        UserError: If a number is out of range.
    """

    def __init__(
        self, size: int = 320, scale: Sequence[float] = (0.7, 1.0), ratio: Sequence[float] = (0.9, 1 / 0.9)
    ) -> None:
        super().__init__(size)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"{list(scale)}: give two numbers, ascending, above 0 and at most 1", "scale")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"{list(ratio)}: give two numbers, ascending, above 0", "ratio")
        self.scale, self.ratio = tuple(scale), tuple(ratio)
        self.transform: Any = v2.RandomResizedCrop(size, scale=self.scale, ratio=self.ratio, antialias=True)

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Crop with torchvision, whose transforms draw from the global generator: a forked one here."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            view: Tensor = self.transform(image)
        return view

    def settings(self) -> dict[str, Any]:
        """Return what determines a view."""
        return {**super().settings(), "scale": list(self.scale), "ratio": list(self.ratio)}


class PublishedAugmentation(RandomCrop):
    """The Met paper's: a random crop, colour jitter (0.4, 0.4, 0.4, 0.1) in 80% of views, grey in 20%.

    Args:
        size: Side of the view in px.
        scale: Least and largest share of the image's area.
        ratio: Least and largest ratio of the part's sides, width to height.

    Source: Ypsilantis et al., The Met Dataset, NeurIPS 2021; its released training code.
    """

    def __init__(
        self, size: int = 500, scale: Sequence[float] = (0.7, 1.0), ratio: Sequence[float] = (0.99, 1 / 0.99)
    ) -> None:
        super().__init__(size, scale, ratio)
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        self.transform = v2.Compose([self.transform, jitter, v2.RandomGrayscale(p=0.2)])


class SimulatedVisit(Augmentation):
    """A visitor's photograph of the image, simulated, at a strength drawn between two presets.

    Args:
        size: Side of the view in px.
        weakest: mild, medium or severe: the preset at the lower end.
        strongest: The preset at the upper end.
    """

    def __init__(self, size: int = 320, weakest: Preset = "mild", strongest: Preset = "severe") -> None:
        super().__init__(size)
        self.weakest, self.strongest = weakest, strongest

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Simulate a visit."""
        share = derive_seed(seed, "strength", 0) / 2**63
        strengths = strengths_between(self.weakest, self.strongest, share)
        height, width = image.shape[1:]
        zoom = 2 * self.size / max(height, width)
        if zoom < 1:  # the view cannot show all its pixels, and a visit's cost goes with them
            image = F.resize(image, [math.ceil(height * zoom), math.ceil(width * zoom)], antialias=True)
        photograph = simulate_visit(image, strengths, seed, longest_side=self.size)
        return F.resize(photograph, [self.size, self.size], antialias=True)

    def settings(self) -> dict[str, Any]:
        """Return what determines a view."""
        presets = {"weakest": asdict(PRESETS[self.weakest]), "strongest": asdict(PRESETS[self.strongest])}
        return {**super().settings(), "recipe": RECIPE, **presets}


class Views:
    """Views of database images by one augmentation: by row and number, the same in any process.

    Args:
        files: Image file of every database row.
        names: Path of every row in the ground truth: with seed and number it decides the view.
        seed: The run's.
        augmentation: Makes a view of an image.
    """

    def __init__(self, files: Sequence[Path], names: Sequence[str], seed: int, augmentation: Augmentation) -> None:
        self.files, self.names, self.seed, self.augmentation = files, names, seed, augmentation
        self.max_pixels = max_pixels()  # of this process, taken along to its workers

    def __call__(self, rows: np.ndarray, numbers: np.ndarray) -> Tensor:
        """View ``numbers[i]`` of ``rows[i]``, uint8 ``(B, 3, size, size)``."""
        return torch.stack([self.view(row, n) for row, n in zip(rows.tolist(), numbers.tolist(), strict=True)])

    def view(self, row: int, number: int) -> Tensor:
        """View ``number`` of a row, uint8 ``(3, size, size)``."""
        image = load_image(self.files[row], limit=self.max_pixels)
        return self.augmentation(image, derive_seed(self.seed, self.names[row], number))
