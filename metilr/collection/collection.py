"""What identification needs: the database as it is searched, and the very model that described it."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor

from metilr.collection.labels import Labels
from metilr.collection.photos import MAX_PIXELS, BadPhotoError, Photo, load_photo
from metilr.data import decode
from metilr.data.exhibit import Exhibit
from metilr.data.ground_truth import GroundTruth
from metilr.data.pixels import ImageSize
from metilr.data.views import CentreCrops
from metilr.distributed import pool_of
from metilr.errors import UserError
from metilr.evaluation.calibration import gather_evidence
from metilr.evaluation.database import Searchable, as_compared
from metilr.evaluation.options import MethodOptions
from metilr.extraction.datamodule import same_shape_batches
from metilr.extraction.module import DescriptorModule
from metilr.extraction.options import ExtractionOptions
from metilr.extraction.store import has_unit_length
from metilr.geometry.check import GeometricCheck
from metilr.geometry.evidence import Checked, apply_evidence
from metilr.geometry.verify import LocalFeatures
from metilr.models import UnfitSizeError
from metilr.models.embedder import Embedder
from metilr.retrieval.confidence import NEAREST, Calibration, above_background, background_similarities
from metilr.retrieval.knn import N_MATCHES, N_NEIGHBOURS, Matches, classify
from metilr.retrieval.whitening import PCAWhitening

SIDE_OF_LOST_IMAGES = 1024  # px, where the images that tell are gone
MOST_AT_ONCE = 8  # photos of one shape in the network, large ones fewer; beyond, a CPU gains nothing and memory grows
MAX_HEADERS = 5000  # of images, read for the largest size: about a second


@dataclass(frozen=True)
class Match:
    """A database image that a photo resembles; ``row`` is the ground truth's, ``inliers`` of a geometric check."""

    row: int
    exhibit: str
    similarity: float
    inliers: int | None = None
    about: Exhibit = field(default_factory=Exhibit)


@dataclass(frozen=True)
class Answer:
    """Which exhibit a photo shows most likely."""

    exhibit: str
    log_confidence: float  # as in an evaluation's predictions
    similarity: float  # of the nearest image of that exhibit; 0 if none of the neighbours shows it
    matches: tuple[Match, ...]  # the nearest image of each of the nearest exhibits, most similar first
    above_background: float | None = None  # of similarity, see there; where an index has a background
    about: Exhibit = field(default_factory=Exhibit)  # what an index says of the exhibit
    regions: bytes | None = None  # what photo and answer have in common, a JPEG, where it is found and asked for


class Describer:
    """Describes photos as the extraction describes images."""

    def __init__(self, embedder: Embedder, options: ExtractionOptions) -> None:
        # Compiling takes a minute, a photo in plain PyTorch less than a second, with the same rows up to rounding.
        engine = "torch" if options.engine == "compile" else options.engine
        self.most_at_once = 1 if engine == "openvino" else MOST_AT_ONCE
        self.module = DescriptorModule(embedder, engine, options.precision).to(options.device).eval()
        self.module.on_predict_start()

    def describe(self, images: Sequence[Tensor]) -> list[np.ndarray | BadPhotoError]:
        """Describe images, uint8 ``(3, H, W)``, those of one shape together.

        Returns:
            For each a descriptor, float32 ``(D,)`` of unit length, or why there is none.
        """
        described: list[np.ndarray | BadPhotoError] = [BadPhotoError("")] * len(images)
        shapes = np.array([image.shape[1:] for image in images], dtype=np.int64).reshape(-1, 2)
        for some in same_shape_batches(shapes, self.most_at_once, MOST_AT_ONCE):
            batch = torch.stack([images[i] for i in some]).to(self.module.device)
            for i, made in zip(some, self._describe(batch), strict=True):
                described[i] = made
        return described

    def _describe(self, batch: Tensor) -> list[np.ndarray | BadPhotoError]:
        try:
            descriptors = self.module.describe(batch).float().cpu().numpy()
        except UnfitSizeError as error:
            return [BadPhotoError(f"cannot be described ({error}); take a larger one")] * len(batch)
        nothing = BadPhotoError("gives a descriptor that is not finite or all zero; take another photo")
        return [
            row if is_good else nothing for row, is_good in zip(descriptors, has_unit_length(descriptors), strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Collection:
    """A museum's exhibits, ready to be recognised."""

    name: str
    ground_truth: GroundTruth
    exhibits: Sequence[str]  # name of each label
    describer: Describer
    image_size: ImageSize | None  # that images were resized to; None if they kept their size
    method: MethodOptions
    whitening: PCAWhitening | None
    database: Searchable
    k: int
    tau: float
    check: GeometricCheck | None = None
    calibration: Calibration | None = None
    labels: Labels | None = None  # what an index says of its exhibits
    background: np.ndarray = field(default_factory=lambda: np.empty((0, 1)))  # photos of no exhibit, (C, D) as compared

    @property
    def search(self) -> str | None:
        """How the database is searched, in words, where it is not searched exactly."""
        return None if self.database.engine is None else str(self.database.engine)

    @functools.cached_property
    def images(self) -> frozenset[int]:
        """Rows of the ground truth's database that an answer can name; some images may have been left out."""
        return frozenset(self.database.images.tolist())

    @functools.cached_property
    def label_of(self) -> Mapping[str, int]:
        """The label of each exhibit's name."""
        return {name: label for label, name in enumerate(self.exhibits)}

    def about(self, exhibit: str) -> Exhibit:
        """What is said of an exhibit, of an evaluation's nothing; KeyError if there is none."""
        label = self.label_of[exhibit]
        return Exhibit() if self.labels is None else self.labels[label]

    def path(self, row: int) -> str:
        """Where a database image lies, relative to the museum's images."""
        return self.ground_truth.paths["database"][row]

    def image(self, row: int) -> Path:
        """The file of a database image."""
        return self.ground_truth.image(self.path(row))

    @functools.cached_property
    def largest_side(self) -> int | None:
        """Longest side in px of the images that were described at their own size; None if their size was set.

        A photo beyond it is to be reduced to it: no descriptor here was made at such a scale. Of more than
        ``MAX_HEADERS`` images as many are looked at, evenly spread.
        """
        if self.image_size is not None:
            return None
        files = [self.ground_truth.image(path) for paths in self.ground_truth.paths.values() for path in paths]
        with ThreadPoolExecutor(8) as pool:
            return max(pool.map(_longest_side, files[:: -(-len(files) // MAX_HEADERS)])) or SIDE_OF_LOST_IMAGES

    def identify(self, photo: str | Path) -> Answer:
        """Recognise what a photograph's file shows, whatever its size; a UserError names one that gives no answer."""
        return self.answer(Path(photo))

    def answer_file(
        self, file: Path | IO[bytes], max_pixels: int = MAX_PIXELS, n_matches: int = N_MATCHES, draw: bool = False
    ) -> tuple[Photo, Answer]:
        """Decode a photograph at the size that it is compared at, and ``answer`` it; BadPhotoError if that fails."""
        photo = load_photo(file, self.image_size, self.largest_side, max_pixels)
        return photo, self.answer(photo.image, n_matches, draw)

    def answer(self, image: Tensor | str | Path, n_matches: int = N_MATCHES, draw: bool = False) -> Answer:
        """Recognise what a photo, a file or uint8 ``(3, H, W)`` on any device, shows, as the evaluation does.

        A tensor is of the size that ``image_size`` or ``largest_side`` says. ``n_matches`` exhibits are listed;
        ``draw`` draws what the photo and the answer's image have in common, where geometry is checked.
        """
        if not isinstance(image, Tensor):
            try:
                return self.answer_file(Path(image), n_matches=n_matches, draw=draw)[1]
            except BadPhotoError as error:
                raise UserError(f"{image}: {error}") from None
        [answer] = self.answers([image], n_matches, draw)
        if isinstance(answer, BadPhotoError):
            raise answer
        return answer

    def answers(
        self, images: Sequence[Tensor], n_matches: int = N_MATCHES, draw: bool = False
    ) -> list[Answer | BadPhotoError]:
        """Recognise what several photos show, as ``answer`` does one: they go through the network together."""
        described = [self._compared(image) for image in self._described(images)]
        good = [i for i, each in enumerate(described) if not isinstance(each, BadPhotoError)]
        if not good:
            return cast(list[Answer | BadPhotoError], described)
        queries = np.stack([cast(np.ndarray, described[i]) for i in good])
        n_wanted = max(n_matches, self.check.candidates if self.check else 0)
        n_neighbours = max(self.k, N_NEIGHBOURS * self.method.rows_per_image)
        neighbours = self.database.nearest(queries, min(len(self.database.labels), n_neighbours))
        matches = self.database.matches(queries, neighbours, n_wanted)
        predictions = classify(neighbours, self.database.labels, len(self.exhibits), self.k, self.tau)
        matches = Matches(self.database.images[matches.rows], matches.similarities)
        features, checked = [], None
        if self.check is not None:
            features = [self.check.query_features(images[i]) for i in good]
            checked = self._checked(features, matches, self.check)
            predictions = apply_evidence(predictions, checked, self.check.boost, self.check.gate)
        if self.calibration is not None:
            labels, most_similar = self.ground_truth.labels["database"], neighbours.similarities[:, :NEAREST]
            similarities = background_similarities(queries, self.background)
            evidence = gather_evidence(predictions, matches, labels, most_similar, checked, similarities)
            predictions = self.calibration.apply(predictions, evidence)
        above: list[float | None] = [None] * len(good)
        if self.calibration is None and len(self.background):
            above = above_background(predictions.similarity, background_similarities(queries, self.background)).tolist()
        answers = cast(list[Answer | BadPhotoError], described)
        for q, i in enumerate(good):
            label = int(predictions.labels[q])
            exhibit = self.exhibits[label]
            answers[i] = Answer(
                exhibit=exhibit,
                log_confidence=float(predictions.log_confidence[q]),
                similarity=float(predictions.similarity[q]),
                matches=self._listed(matches, checked, q)[:n_matches],
                above_background=above[q],
                about=self.about(exhibit),
                regions=self._regions(images[i], features[q], matches.rows[q], label) if draw and features else None,
            )
        return answers

    def _described(self, images: Sequence[Tensor]) -> Iterator[list[np.ndarray | BadPhotoError]]:
        """Descriptors of each photo and of its crops."""
        view = CentreCrops(tuple(self.method.query_crops)) if self.method.query_crops else None
        n = 1 if view is None else 1 + view.n
        views = [image if i == 0 or view is None else view(image, "", i - 1) for image in images for i in range(n)]
        described = self.describer.describe(views)
        return (described[start : start + n] for start in range(0, len(views), n))

    def _compared(self, described: Sequence[np.ndarray | BadPhotoError]) -> np.ndarray | BadPhotoError:
        """The descriptors that a photo is searched by, ``(V, D)``, or why there are none."""
        rows = []
        for each in described:
            if isinstance(each, BadPhotoError):
                return each
            rows.append(each)
        return as_compared(np.stack(rows), self.whitening)

    def _listed(self, matches: Matches, checked: Checked | None, q: int) -> tuple[Match, ...]:
        labels = self.ground_truth.labels["database"]
        inliers = [] if checked is None else checked.inliers[q].tolist()
        names = [self.exhibits[label] for label in labels[matches.rows[q]]]
        listed = zip(matches.rows[q].tolist(), names, matches.similarities[q].tolist(), strict=True)
        return tuple(
            Match(row, name, similarity, n_inliers, self.about(name))
            for (row, name, similarity), n_inliers in zip_longest(listed, inliers)
        )

    def _checked(self, features: Sequence[Sequence[LocalFeatures]], matches: Matches, check: GeometricCheck) -> Checked:
        """Count the inliers of each candidate as the evaluation does."""
        files = [[self.image(row) for row in rows[: check.candidates].tolist()] for rows in matches.rows]
        with pool_of(torch.get_num_threads()) as pool:
            pairs = zip(features, files, strict=True)
            counts = [check.count(of, pool.map(check.features, some), pool.map) for of, some in pairs]
        labels = self.ground_truth.labels["database"]
        return Checked(matches, np.array(counts).max(axis=2), labels, len(self.exhibits), self.tau)

    def _regions(self, image: Tensor, features: Sequence[LocalFeatures], rows: np.ndarray, label: int) -> bytes | None:
        """Draw what the photo and the answer's nearest image have in common."""
        assert self.check is not None
        candidates = rows[: self.check.candidates]
        answered = candidates[self.ground_truth.labels["database"][candidates] == label]
        return self.check.draw(image, features, self.image(int(answered[0]))) if len(answered) else None


def _longest_side(file: Path) -> int:
    try:
        with decode.open_image(file, decode.max_pixels()) as image:
            return max(image.size)
    except Exception:  # as in load_image
        return 0
