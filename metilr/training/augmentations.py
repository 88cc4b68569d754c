"""Augmentations: from a database image, uint8 ``(3, H, W)``, to one of a pair's two views, uint8 ``(3, size, size)``.

Each is a class whose constructor is its configuration. It draws from the seed it is given and from nothing else, so a
view depends neither on the loader's workers nor on the number of processes.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from metilr.data.decode import load_image, max_pixels
from metilr.errors import UserError

if TYPE_CHECKING:  # seconds to import, and help needs none of it
    from torch import Tensor

Preset = Literal["mild", "medium", "severe"]


class Augmentation(abc.ABC):
    """A seeded map from an image to a view."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise UserError(f"{size}: choose 1 px or more", "size")
        self.size = size

    @abc.abstractmethod
    def __call__(self, image: "Tensor", seed: int) -> "Tensor":
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
    """

    def __init__(
        self, size: int = 320, scale: Sequence[float] = (0.7, 1.0), ratio: Sequence[float] = (0.9, 1 / 0.9)
    ) -> None:
        from torchvision.transforms import v2

        super().__init__(size)
        for name, limits, most in (("scale", scale, 1), ("ratio", ratio, math.inf)):
            if len(limits) != 2 or not 0 < limits[0] <= limits[1] <= most:
                raise UserError(f"{list(limits)}: give two numbers, ascending, above 0 and at most {most}", name)
        self.scale, self.ratio = tuple(scale), tuple(ratio)
        self.transform: Any = v2.RandomResizedCrop(size, scale=self.scale, ratio=self.ratio, antialias=True)

    def __call__(self, image: "Tensor", seed: int) -> "Tensor":
        """Crop with torchvision, whose transforms draw from the global generator: a forked one here."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            view: Tensor = self.transform(image)
        return view

    def settings(self) -> dict[str, Any]:
        """Return what determines a view."""
        return {**super().settings(), "scale": list(self.scale), "ratio": list(self.ratio)}


class PublishedAugmentation(RandomCrop):
    """The Met paper's: a random crop, colour jitter (0.4, 0.4, 0.4, 0.1) in 80% of views, grey in 20%.

    Source: Ypsilantis et al., The Met Dataset, NeurIPS 2021; its released training code.
    """

    def __init__(
        self, size: int = 500, scale: Sequence[float] = (0.7, 1.0), ratio: Sequence[float] = (0.99, 1 / 0.99)
    ) -> None:
        from torchvision.transforms import v2

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

    def __call__(self, image: "Tensor", seed: int) -> "Tensor":
        """Simulate a visit."""
        from torchvision.transforms.v2 import functional as F

        from metilr.data.visits import derive_seed, simulate_visit, strengths_between

        strengths = strengths_between(self.weakest, self.strongest, derive_seed(seed, "strength", 0) / 2**63)
        height, width = image.shape[1:]
        zoom = 2 * self.size / max(height, width)
        if zoom < 1:  # the view cannot show all its pixels, and a visit's cost goes with them
            # Two pixels wide at least: PyTorch (2.14) resizes uint8 to one wrongly.
            image = F.resize(image, [math.ceil(height * zoom), max(2, math.ceil(width * zoom))], antialias=True)
        photograph = simulate_visit(image, strengths, seed, longest_side=self.size)
        return F.resize(photograph, [self.size, self.size], antialias=True)

    def settings(self) -> dict[str, Any]:
        """Return what determines a view."""
        from metilr.data.visits import PRESETS, RECIPE

        presets = {"weakest": asdict(PRESETS[self.weakest]), "strongest": asdict(PRESETS[self.strongest])}
        return {**super().settings(), "recipe": RECIPE, **presets}


@dataclass(frozen=True, eq=False)
class Views:
    """Views of database images by one augmentation: by row and number, the same in any process.

    ``names`` are the rows' paths in the ground truth; with the run's seed and the number they decide a view.
    """

    files: Sequence[Path]
    names: Sequence[str]
    seed: int
    augmentation: Augmentation
    max_pixels: int = field(default_factory=max_pixels)  # of this process, taken along to its workers

    def __call__(self, rows: np.ndarray, numbers: np.ndarray) -> "Tensor":
        """View ``numbers[i]`` of ``rows[i]``, uint8 ``(B, 3, size, size)``."""
        import torch

        return torch.stack([self.view(row, n) for row, n in zip(rows.tolist(), numbers.tolist(), strict=True)])

    def view(self, row: int, number: int) -> "Tensor":
        """View ``number`` of a row, uint8 ``(3, size, size)``."""
        from metilr.data.visits import derive_seed

        image = load_image(self.files[row], limit=self.max_pixels)
        return self.augmentation(image, derive_seed(self.seed, self.names[row], number))
