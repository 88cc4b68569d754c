"""Images, and views of them, by row."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from typing_extensions import override

from metilr.data.decode import image_shape, load_image, max_pixels
from metilr.data.ground_truth import GroundTruth
from metilr.data.pixels import ImageSize

if TYPE_CHECKING:  # torch and torchvision take seconds, and reading descriptors does without
    from torch import Tensor

    from metilr.data.visits import VisitStrengths

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
    def __call__(self, image: "Tensor", name: str, number: int) -> "Tensor":
        """View ``number`` of an image, uint8 ``(3, H, W)`` to uint8 ``(3, H', W')``."""

    @abc.abstractmethod
    def shape(self, height: int, width: int, name: str, number: int) -> tuple[int, int]:
        """H' and W', without making the view."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What determines a view besides image, name and number, as JSON types."""


@dataclass(frozen=True)
class SimulatedVisits(View):
    """``n`` visitors' photographs, simulated: a scene mildly, then medium, then severe, then the next scene.

    Edges are cut off to sides that are multiples of ``SIDE_STEP``.
    """

    of: ClassVar[Mapping[str, str]] = {"visits": "database"}
    n: int
    seed: int = 0

    @override
    def __call__(self, image: "Tensor", name: str, number: int) -> "Tensor":
        from metilr.data.visits import simulate_visit

        photograph = simulate_visit(image, *self._draw(name, number))
        return _middle(photograph, _stepped(photograph.shape[1], photograph.shape[2]))

    @override
    def shape(self, height: int, width: int, name: str, number: int) -> tuple[int, int]:
        from metilr.data.visits import visit_shape

        return _stepped(*visit_shape(height, width, *self._draw(name, number)))

    def _draw(self, name: str, number: int) -> tuple["VisitStrengths", int]:
        from metilr.data.visits import PRESETS, derive_seed

        scene, preset = divmod(number, len(PRESETS))
        return list(PRESETS.values())[preset], derive_seed(self.seed, name, scene)

    @override
    def settings(self) -> dict[str, Any]:
        from metilr.data.visits import PRESETS, RECIPE

        presets = {name: asdict(strengths) for name, strengths in PRESETS.items()}
        return {
            "kind": "simulated visits", "recipe": RECIPE, "n": self.n, "seed": self.seed, "presets": presets,
            "side_step": SIDE_STEP,
        }  # fmt: skip


@dataclass(frozen=True)
class CentreCrops(View):
    """The middle of an image at its own resolution: a zoom that drops wall and frame.

    ``shares`` of the image's height and width, in (0, 1), are what each crop keeps.
    """

    of: ClassVar[Mapping[str, str]] = {"val_crops": "val", "test_crops": "test"}
    shares: tuple[float, ...]

    @property
    @override
    def n(self) -> int:  # type: ignore[override]
        return len(self.shares)

    @override
    def __call__(self, image: "Tensor", name: str, number: int) -> "Tensor":
        return _middle(image, self.shape(image.shape[1], image.shape[2], name, number))

    @override
    def shape(self, height: int, width: int, name: str, number: int) -> tuple[int, int]:
        return max(1, round(height * self.shares[number])), max(1, round(width * self.shares[number]))

    @override
    def settings(self) -> dict[str, Any]:
        return {"kind": "centre crops", "shares": list(self.shares)}


def _middle(image: "Tensor", shape: tuple[int, int]) -> "Tensor":
    from torchvision.transforms.v2.functional import center_crop

    return center_crop(image, list(shape))


def _stepped(height: int, width: int) -> tuple[int, int]:
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
    image_size: ImageSize | None
    view: View | None = None
    max_pixels: int = field(default_factory=max_pixels)

    @property
    def n_views(self) -> int:
        """Rows of an image."""
        return 1 if self.view is None else self.view.n

    def __len__(self) -> int:
        return len(self.files) * self.n_views


class ImageRows:
    """One numbering over the images of several splits, in their order."""

    def __init__(self, images: Mapping[str, Images]) -> None:
        self.images = images
        ends = np.cumsum([0, *map(len, images.values())])
        self.starts: dict[str, int] = dict(zip(images, ends.tolist(), strict=False))

    def locate(self, row: int) -> tuple[str, int]:
        """Split of a row, and its position there."""
        split = next(split for split in reversed(list(self.starts)) if row >= self.starts[split])
        return split, row - self.starts[split]

    def _image(self, row: int) -> tuple[Images, int, int]:
        """The split's images, the image's position there, and the number of the view."""
        split, i = self.locate(row)
        return self.images[split], *divmod(i, self.images[split].n_views)

    def file(self, row: int) -> Path:
        """The file that a row is made from."""
        images, i, _ = self._image(row)
        return images.files[i]

    def shape(self, row: int) -> tuple[int, int]:
        """Height and width of a row's image, from the file's header; raises as ``image_shape`` does."""
        images, i, number = self._image(row)
        shape = image_shape(images.files[i], images.image_size, images.max_pixels)
        return shape if images.view is None else images.view.shape(*shape, images.names[i], number)

    def load(self, row: int) -> "Tensor":
        """Decode a row's image, uint8 ``(3, H, W)``; raises as ``load_image`` does."""
        images, i, number = self._image(row)
        image = load_image(images.files[i], images.image_size, images.max_pixels)
        return image if images.view is None else images.view(image, images.names[i], number)


def images_of(ground_truth: GroundTruth, image_size: ImageSize | None) -> dict[str, Images]:
    """The images of a ground truth, by split."""
    return {
        split: Images([ground_truth.image(path) for path in paths], paths, image_size)
        for split, paths in ground_truth.paths.items()
    }
