"""Views: what else is described of an image besides the image itself, each a seeded or fixed map."""

import abc
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor
from torchvision.transforms.v2 import functional as F

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
