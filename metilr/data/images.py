"""What is described: images, or views of them, by row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from metilr.data.ground_truth import GroundTruth
from metilr.data.image_limits import max_pixels
from metilr.data.transforms import image_shape, load_image
from metilr.data.views import View


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
