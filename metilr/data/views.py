"""Images, and views of them, by row."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from metilr.data.decode import image_shape, load_image, max_pixels
from metilr.data.ground_truth import GroundTruth
from metilr.data.visits import PRESETS, RECIPE, VisitStrengths, derive_seed, simulate_visit, visit_shape

SIDE_STEP = 16  # px: with sides in such steps views of different images share a shape, and so a batch


class View(abc.ABC):
    """A fixed number of views of any image: the same for an image's name and the view's number in any process.

    Attributes:
        of: Split of the ground truth that each split of views is made of.
        n: Views of an image.
    """

    of: ClassVar[Mapping[str, str]]
    n: int

    @abc.abstractmethod
    def __call__(self, image: Tensor, name: str, number: int) -> Tensor:
        """View ``number`` of an image, uint8 ``(3, H, W)`` to uint8 ``(3, H', W')``."""

    @abc.abstractmethod
    def shape(self, height: int, width: int, name: str, number: int) -> tuple[int, int]:
        """H' and W', without making the view."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What determines a view besides image, name and number, as JSON types."""


@dataclass(frozen=True)
class SimulatedVisits(View):
    """Visitors' photographs of an image, simulated: a scene mildly, then medium, then severe, then the next scene.

    Attributes:
        n: Visits of an image.
        seed: The run's.
    """

    of: ClassVar[Mapping[str, str]] = {"visits": "database"}
    n: int
    seed: int = 0

    def __call__(self, image: Tensor, name: str, number: int) -> Tensor:
        """Simulate a visit, and cut its edges off to sides that are multiples of ``SIDE_STEP``."""
        photograph = simulate_visit(image, *self._draw(name, number))
        return F.center_crop(photograph, list(_stepped(photograph.shape[1], photograph.shape[2])))

    def shape(self, height: int, width: int, name: str, number: int) -> tuple[int, int]:
        """Height and width of a visit."""
        return _stepped(*visit_shape(height, width, *self._draw(name, number)))

    def _draw(self, name: str, number: int) -> tuple[VisitStrengths, int]:
        scene, preset = divmod(number, len(PRESETS))
        return list(PRESETS.values())[preset], derive_seed(self.seed, name, scene)

    def settings(self) -> dict[str, Any]:
        """What determines a visit."""
        presets = {name: asdict(strengths) for name, strengths in PRESETS.items()}
        return {
            "kind": "simulated visits", "recipe": RECIPE, "n": self.n, "seed": self.seed, "presets": presets,
            "side_step": SIDE_STEP,
        }  # fmt: skip


@dataclass(frozen=True)
class CentreCrops(View):
    """The middle of an image at its own resolution: a zoom that drops wall and frame.

    Attributes:
        shares: Of the image's height and width that each crop keeps, in (0, 1).
    """

    of: ClassVar[Mapping[str, str]] = {"val_crops": "val", "test_crops": "test"}

    shares: tuple[float, ...]

    @property
    def n(self) -> int:  # type: ignore[override]
        """Crops of an image."""
        return len(self.shares)

    def __call__(self, image: Tensor, name: str, number: int) -> Tensor:
        """Crop."""
        return F.center_crop(image, list(self.shape(image.shape[1], image.shape[2], name, number)))

    def shape(self, height: int, width: int, name: str, number: int) -> tuple[int, int]:
        """Height and width of a crop, at least 1 px."""
        return max(1, round(height * self.shares[number])), max(1, round(width * self.shares[number]))

    def settings(self) -> dict[str, Any]:
        """What determines a crop."""
        return {"kind": "centre crops", "shares": list(self.shares)}


def _stepped(height: int, width: int) -> tuple[int, int]:
    """Each side cut to a multiple of ``SIDE_STEP``; a shorter one as it is."""
    cut_height, cut_width = (side - side % SIDE_STEP if side > SIDE_STEP else side for side in (height, width))
    return cut_height, cut_width


@dataclass(frozen=True)
class Images:
    """The images of a split as the backbone sees them, or all views of each.

    Attributes:
        files: The image files.
        names: Path of each in the ground truth.
        image_size: See ``load_image``.
        view: View v of image i is row ``i * view.n + v``; None: row i is image i.
        max_pixels: See ``load_image``; of the process that makes this, so that its workers have the same.
    """

    files: Sequence[Path]
    names: Sequence[str]
    image_size: int | None
    view: View | None = None
    max_pixels: int = field(default_factory=max_pixels)

    def __len__(self) -> int:
        return len(self.files) * self.n_views

    @property
    def n_views(self) -> int:
        """Rows of an image."""
        return 1 if self.view is None else self.view.n

    def file(self, row: int) -> Path:
        """The file that a row is made from."""
        return self.files[row // self.n_views]

    def shape(self, row: int) -> tuple[int, int]:
        """Height and width of a row's image, from the file's header.

        Raises:
            BadImageError: If the header cannot be read.
        """
        shape = image_shape(self.file(row), self.image_size, self.max_pixels)
        if self.view is None:
            return shape
        return self.view.shape(*shape, self.names[row // self.n_views], row % self.n_views)

    def load(self, row: int) -> Tensor:
        """Decode a row's image, uint8 ``(3, H, W)``.

        Raises:
            BadImageError: If it cannot be decoded.
            OSError: If the disk, not the file, is at fault.
        """
        image = load_image(self.file(row), self.image_size, self.max_pixels)
        if self.view is None:
            return image
        return self.view(image, self.names[row // self.n_views], row % self.n_views)


class ImageRows:
    """One numbering over the images of several splits, in their order.

    Args:
        images: By split.
    """

    def __init__(self, images: Mapping[str, Images]) -> None:
        self.images = images
        ends = np.cumsum([0, *map(len, images.values())])
        self.starts: dict[str, int] = dict(zip(images, ends.tolist(), strict=False))

    def locate(self, row: int) -> tuple[str, int]:
        """Split of a row, and its position there."""
        split = next(split for split in reversed(list(self.starts)) if row >= self.starts[split])
        return split, row - self.starts[split]

    def file(self, row: int) -> Path:
        """See ``Images.file``."""
        split, i = self.locate(row)
        return self.images[split].file(i)

    def shape(self, row: int) -> tuple[int, int]:
        """See ``Images.shape``."""
        split, i = self.locate(row)
        return self.images[split].shape(i)

    def load(self, row: int) -> Tensor:
        """See ``Images.load``."""
        split, i = self.locate(row)
        return self.images[split].load(i)


def images_of(ground_truth: GroundTruth, image_size: int | None) -> dict[str, Images]:
    """The images of a ground truth, by split."""
    return {
        split: Images([ground_truth.image(path) for path in paths], paths, image_size)
        for split, paths in ground_truth.paths.items()
    }
