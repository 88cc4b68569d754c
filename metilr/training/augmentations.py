"""Augmentations: from a database image to one of the two views of a pair.

Each is a class whose constructor is its configuration. It draws from the seed it is given and from nothing
else, so a view depends neither on the loader's workers nor on the number of processes.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from metilr.data.visits import PRESETS, RECIPE, derive_seed, simulate_visit, strengths_between
from metilr.errors import UserError

Preset = Literal["mild", "medium", "severe"]


class Augmentation(abc.ABC):
    """A seeded map from an image of any size, uint8 ``(3, H, W)``, to a square view, uint8 ``(3, size, size)``."""

    @abc.abstractmethod
    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Return a view, uint8 ``(3, size, size)``, of an image, uint8 ``(3, H, W)``."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what determines a view besides image and seed, as JSON types."""


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
        self,
        size: int = 320,
        scale: Sequence[float] = (0.7, 1.0),
        ratio: Sequence[float] = (0.9, 1 / 0.9),
    ) -> None:
        if len(scale) != 2 or len(ratio) != 2:
            raise UserError(f"RandomCrop: scale {list(scale)} and ratio {list(ratio)} need two numbers each")
        if size < 1 or not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"RandomCrop: size {size}, scale {list(scale)} or ratio {list(ratio)} is out of range")
        self.size, self.scale, self.ratio = size, tuple(scale), tuple(ratio)
        self.crop = v2.RandomResizedCrop(size, scale=self.scale, ratio=self.ratio, antialias=True)

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Crop with torchvision, whose transforms draw from the global generator: a forked one here."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            view: Tensor = self.transform(image)
        return view

    def transform(self, image: Tensor) -> Tensor:
        """Apply the random transform."""
        cropped: Tensor = self.crop(image)
        return cropped

    def settings(self) -> dict[str, Any]:
        """Return what determines a view."""
        kind = type(self).__name__
        return {"kind": kind, "size": self.size, "scale": list(self.scale), "ratio": list(self.ratio)}


class PublishedAugmentation(RandomCrop):
    """The Met paper's: a random crop, colour jitter (0.4, 0.4, 0.4, 0.1) in 80% of views, grey in 20%.

    Args:
        size: Side of the view in px.
        scale: Least and largest share of the image's area.
        ratio: Least and largest ratio of the part's sides, width to height.

    Raises:
        UserError: If a number is out of range.

    Source: Ypsilantis et al., The Met Dataset, NeurIPS 2021; its released training code.
    """

    def __init__(
        self,
        size: int = 500,
        scale: Sequence[float] = (0.7, 1.0),
        ratio: Sequence[float] = (0.99, 1 / 0.99),
    ) -> None:
        super().__init__(size, scale, ratio)
        self.colour = v2.Compose(
            [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2)]
        )

    def transform(self, image: Tensor) -> Tensor:
        """Apply the random transform."""
        view: Tensor = self.colour(self.crop(image))
        return view


class SimulatedVisit(Augmentation):
    """A visitor's photograph of the image, simulated, at a strength drawn between two presets.

    Args:
        size: Side of the view in px.
        weakest: mild, medium or severe: the preset at the lower end.
        strongest: The preset at the upper end.

    Raises:
        UserError: If ``size`` is below 1 or a preset is unknown.
    """

    def __init__(self, size: int = 320, weakest: Preset = "mild", strongest: Preset = "severe") -> None:
        for name in (weakest, strongest):
            if name not in PRESETS:
                raise UserError(f"SimulatedVisit: no preset {name!r}; choose one of {', '.join(PRESETS)}")
        if size < 1:
            raise UserError(f"SimulatedVisit: size {size} is out of range; choose 1 px or more")
        self.size, self.weakest, self.strongest = size, weakest, strongest

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Simulate a visit."""
        share = derive_seed(seed, "strength", 0) / 2**63
        strengths = strengths_between(self.weakest, self.strongest, share)
        photograph = simulate_visit(_at_most(image, 2 * self.size), strengths, seed, longest_side=self.size)
        return F.resize(photograph, [self.size, self.size], antialias=True)

    def settings(self) -> dict[str, Any]:
        """Return what determines a view."""
        presets = {"weakest": asdict(PRESETS[self.weakest]), "strongest": asdict(PRESETS[self.strongest])}
        return {"kind": "SimulatedVisit", "recipe": RECIPE, "size": self.size, **presets}


def _at_most(image: Tensor, longest: int) -> Tensor:
    """Shrink an image whose pixels the view cannot show: a visit's cost goes with its picture's size."""
    height, width = image.shape[1:]
    if max(height, width) <= longest:
        return image
    zoom = longest / max(height, width)
    return F.resize(image, [math.ceil(height * zoom), math.ceil(width * zoom)], antialias=True)
