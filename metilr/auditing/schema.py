"""What ``audit.json`` says, written and read by one model."""

from typing import Any, Literal, get_args

import pydantic

from metilr.evaluation.results import Count, Part

Group = Literal["leak", "two_exhibits", "placeholder", "duplicate"]
Doubt = Literal["label", "unlabelled", "unlike"]
Look = Literal["unreadable", "tiny", "blank", "uniform", "dark", "shape", "turned"]
Same = Literal["bytes", "pixels", "picture"]
Kind = Literal[Group, Doubt, Look, "photographer"]
MEANINGS: dict[Kind, str] = {
    "leak": "copies of one picture on two sides of the evaluation: database, val, test",
    "two_exhibits": "copies of one picture under two exhibits, or under one and none",
    "placeholder": "copies of one picture under three exhibits or more: a screen, “image not available”",
    "duplicate": "copies of one picture within an exhibit, or among the photos of a split",
    "label": "a photo that lies on an image of another exhibit, or is much more similar to one",
    "unlabelled": "a photo labelled as showing no exhibit that lies on an image of one",
    "unlike": "an image more similar to another exhibit than to any other image of its own",
    "unreadable": "an image that cannot be read",
    "tiny": "an image with a side below 64 px",
    "blank": "an image of one colour",
    "uniform": "an image that is nearly of one colour",
    "dark": "a very dark image",
    "shape": "an image more than five times as long as wide",
    "turned": "an image that stands otherwise than its copies",
    "photographer": "somebody whose photos are in val and in test",
}
KINDS: tuple[Kind, ...] = get_args(Kind)
ERRORS: tuple[Kind, ...] = ("leak", "two_exhibits", "placeholder", "unreadable")


class Image(Part):
    """Which image: its split, its path, and the exhibit that it is labelled with, None for none."""

    split: str
    path: str
    exhibit: str | None


class Member(Image):
    """An image of a group, and how it lies to the group's first, if those two were compared."""

    mirrored: bool = False
    quarter_turns: int = 0


class Copies(Part):
    """Images that are copies of one picture."""

    kind: Group
    same: Same  # what all of them have in common
    score: float  # of the least alike of the pairs that link them, from ``CopyOptions.copy_score`` to 1
    images: list[Member] = pydantic.Field(min_length=2)


class Threshold(Part):
    """How much would be found at another score."""

    score: float
    pairs: Count
    leaked: Count  # queries


class Figures(Part):
    """GAP, GAP⁻ and ACC, from 0 to 1."""

    gap: float
    gap_minus: float
    acc: float


class Leakage(Part):
    """Figures of a split with and without the queries that have a copy elsewhere."""

    n_queries: Count
    n_leaked: Count
    with_leaked: Figures
    without: Figures | None  # None if no query that shows an exhibit is left
    difference: dict[str, tuple[float, float, float]] | None  # with less without: value, and 95% interval


class Label(Part):
    """A label that the pictures speak against."""

    kind: Doubt
    image: Image
    seen: str  # exhibit that it seems to show
    nearest: Image  # the image of that exhibit that it lies on, or is most similar to
    similarity: float
    inliers: Count | None = None  # points that lie on ``nearest``, and on an image of the labelled exhibit
    own_inliers: Count | None = None
    confidence: float  # from 0 to 1, by which they are listed


class Looked(Part):
    """An image that somebody should look at."""

    kind: Look
    image: Image
    said: str


class Coverage(Part):
    """An exhibit that will be confused with another."""

    exhibit: str
    n_images: Count
    own: float | None  # similarity of its images to each other, of the least similar; None with one image
    other: float  # greatest similarity to an image of another exhibit
    nearest_exhibit: str
    images: tuple[Image, Image]  # the two that are so similar


class Audit(Part):
    """All that was found."""

    schema_: Literal["metilr.audit/1"] = pydantic.Field(alias="schema")
    metilr: str
    source: str
    images: dict[str, Count]  # by split
    exhibits: Count
    settings: dict[str, Any]
    counts: dict[Kind, Count]
    fail_on: list[Kind]
    copies: list[Copies]
    thresholds: list[Threshold]
    leakage: dict[str, Leakage]
    labels: list[Label]
    looks: list[Looked]
    photographers: list[str]  # who have photos in val and in test
    single_image: Count  # exhibits with one image
    coverage: list[Coverage]

    @property
    def errors(self) -> dict[Kind, int]:
        """What was found of the kinds that count as errors."""
        return {kind: self.counts[kind] for kind in self.fail_on if self.counts[kind]}
