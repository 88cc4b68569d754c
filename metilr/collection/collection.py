"""What identification needs: the database as it is searched, and the very model that described it."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import IO

import numpy as np
from torch import Tensor

from metilr.collection.labels import Labels
from metilr.collection.photos import MAX_PIXELS, BadPhotoError, Photo, load_photo
from metilr.data import decode
from metilr.data.exhibit import Exhibit
from metilr.data.ground_truth import GroundTruth
from metilr.data.pixels import ImageSize
from metilr.data.views import CentreCrops
from metilr.errors import UserError
from metilr.evaluation.calibration import gather_evidence
from metilr.evaluation.database import Searchable, as_compared
from metilr.evaluation.options import MethodOptions
from metilr.extraction.module import DescriptorModule
from metilr.extraction.options import ExtractionOptions
from metilr.extraction.store import DescriptorStore, has_unit_length
from metilr.files import map_array, replaced_file
from metilr.geometry.check import GeometricCheck
from metilr.geometry.evidence import Checked, apply_evidence
from metilr.geometry.verify import LocalFeatures
from metilr.models import UnfitSizeError
from metilr.models.embedder import Embedder
from metilr.retrieval.approximate import ApproximateIndex, build_approximate, check_size
from metilr.retrieval.confidence import NEAREST, Calibration, above_background, background_similarities
from metilr.retrieval.knn import N_MATCHES, N_NEIGHBOURS, Matches, Predictions, classify
from metilr.retrieval.whitening import PCAWhitening

SIDE_OF_LOST_IMAGES = 1024  # px, where the images that tell are gone
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
    """Describes one photo at a time as the extraction describes images."""

    def __init__(self, embedder: Embedder, options: ExtractionOptions) -> None:
        # Compiling takes a minute, a photo in plain PyTorch less than a second, with the same rows up to rounding.
        engine = "torch" if options.engine == "compile" else options.engine
        self.module = DescriptorModule(embedder, engine, options.precision).to(options.device).eval()
        self.module.on_predict_start()

    def describe(self, image: Tensor) -> np.ndarray:
        """Describe an image, uint8 ``(3, H, W)``: float32 ``(1, D)`` of unit length; BadPhotoError if it is not."""
        try:
            descriptor = self.module.describe(image[None].to(self.module.device)).float().cpu().numpy()
        except UnfitSizeError as error:
            raise BadPhotoError(f"cannot be described ({error}); take a larger one") from None
        if not has_unit_length(descriptor).all():
            raise BadPhotoError("gives a descriptor that is not finite or all zero; take another photo")
        return descriptor


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
        return None if self.database.approximate is None else str(self.database.approximate)

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
        query = self._compared(image)
        n_wanted = max(n_matches, self.check.candidates if self.check else 0)
        n_neighbours = max(self.k, N_NEIGHBOURS * self.method.rows_per_image)
        neighbours = self.database.nearest(query, min(len(self.database.rows), n_neighbours))
        matches = self.database.matches(query, neighbours, n_wanted)
        predictions = classify(neighbours, self.database.labels, len(self.exhibits), self.k, self.tau)
        matches = Matches(self.database.images[matches.rows], matches.similarities)
        features, checked = None, None
        if self.check is not None:
            features = self.check.query_features(image)
            checked = self._checked(features, matches, self.check)
            predictions = apply_evidence(predictions, checked, self.check.boost, self.check.gate)
        if self.calibration is not None:
            labels, most_similar = self.ground_truth.labels["database"], neighbours.similarities[:, :NEAREST]
            similarities = background_similarities(query, self.background)
            evidence = gather_evidence(predictions, matches, labels, most_similar, checked, similarities)
            predictions = self.calibration.apply(predictions, evidence)
        above = None
        if self.calibration is None and len(self.background):
            [above] = above_background(predictions.similarity, background_similarities(query, self.background)).tolist()
        labels = self.ground_truth.labels["database"]
        inliers = [] if checked is None else checked.inliers[0].tolist()
        listed = [*zip_longest(matches.rows[0].tolist(), matches.similarities[0].tolist(), inliers)][:n_matches]
        exhibit = self.exhibits[int(predictions.labels[0])]
        names = [self.exhibits[labels[row]] for row, _, _ in listed]
        described = [Match(row, name, similarity, n_inliers, self.about(name))
                     for (row, similarity, n_inliers), name in zip(listed, names, strict=True)]  # fmt: skip
        return Answer(
            exhibit=exhibit,
            log_confidence=float(predictions.log_confidence[0]),
            similarity=float(predictions.similarity[0]),
            matches=tuple(described),
            above_background=above,
            about=self.about(exhibit),
            regions=self._regions(image, features, matches, predictions) if draw and features is not None else None,
        )

    def _checked(self, features: Sequence[LocalFeatures], matches: Matches, check: GeometricCheck) -> Checked:
        """Count the inliers of each candidate as the evaluation does."""
        files = [self.image(row) for row in matches.rows[0, : check.candidates].tolist()]
        inliers = np.array([[max(check.count(features, file)) for file in files]])
        return Checked(matches, inliers, self.ground_truth.labels["database"], len(self.exhibits), self.tau)

    def _regions(
        self, image: Tensor, features: Sequence[LocalFeatures], matches: Matches, predictions: Predictions
    ) -> bytes | None:
        """Draw what the photo and the answer's nearest image have in common."""
        assert self.check is not None
        rows = matches.rows[0, : self.check.candidates]
        answered = rows[self.ground_truth.labels["database"][rows] == predictions.labels[0]]
        return self.check.draw(image, features, self.image(int(answered[0]))) if len(answered) else None

    def _compared(self, image: Tensor) -> np.ndarray:
        """The descriptors that a photo is searched by, ``(1, V, D)``."""
        whole = as_compared(self.describer.describe(image), self.whitening)[:, None]
        if not self.method.query_crops:
            return whole
        view = CentreCrops(tuple(self.method.query_crops))
        crops = [self.describer.describe(view(image, "", i)) for i in range(view.n)]
        return np.concatenate([whole, as_compared(np.concatenate(crops), self.whitening)[None]], axis=1)


def _longest_side(file: Path) -> int:
    try:
        with decode.open_image(file, decode.max_pixels()) as image:
            return max(image.size)
    except Exception:  # as in load_image
        return 0


def save_searchable(database: Searchable, folder: Path, made_from: str) -> None:
    """Write the searched rows, what each shows, and an approximate index; what is there already is kept."""
    check_size(len(database.rows))
    with contextlib.suppress(UserError):
        load_searchable(folder, made_from)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("rows", database.rows), ("columns", np.stack([database.labels, database.images]))):
        with replaced_file(folder / f"{name}.npy") as stream:
            np.save(stream, values)
    build_approximate(database.rows).save(folder, made_from)


def load_searchable(folder: Path, made_from: str) -> Searchable:
    """Open what ``save_searchable`` wrote, reading no row; UserError if it is damaged or made from something else."""
    index = ApproximateIndex.load(folder, folder / "rows.npy", made_from)
    again = f"delete {folder}, or make the index again"
    columns = map_array(folder / "columns.npy", again)
    if columns.shape != (2, len(index.rows)) or columns.dtype != np.int64:
        raise UserError(f"{folder / 'columns.npy'}: does not belong to {len(index.rows):,} rows; {again}")
    labels, images = np.array(columns)
    return Searchable(index.rows, labels, images, index)


def digest_of_database(store: DescriptorStore, method: MethodOptions, seed: int, whitening: PCAWhitening | None) -> str:
    """A digest of all that decides the searched rows: the store, its images, the visits, the whitening."""
    settings = {
        "store": store.manifest().settings,
        "files": hashlib.sha256(store.files("database").tobytes()).hexdigest(),
        "whitening": None if whitening is None else whitening.sha256(),
        "visits": [method.rows_per_image - 1, method.database_views, seed],
        **({} if method.database_rows == "images" else {"rows": method.database_rows}),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
