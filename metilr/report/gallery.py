"""The gallery's data: every query with its answer and its top matches, failures first, and some of the pictures."""

import io
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from metilr.data.decode import BadImageError, load_image
from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.evaluation.recognition import Recognition
from metilr.files import named
from metilr.geometry.check import GeometricCheck, draw_matching
from metilr.metrics import DISTRACTOR
from metilr.progress import tracked
from metilr.retrieval.knn import N_MATCHES, NO_LABEL, NO_ROW

SIDE = 200  # px: sharp on a phone, and a thousand of them stay below 10 MB


def jpeg_thumbnail(file: Path, side: int = SIDE) -> bytes:
    """Return an image file as a JPEG whose longest side has at most so many px.

    Raises:
        BadImageError: If the file is missing or cannot be decoded.
    """
    return jpeg_of(load_image(file), side)


def jpeg_of(image: Tensor, side: int = SIDE) -> bytes:
    """Return an image, uint8 ``(3, H, W)``, as a JPEG whose longest side has at most so many px."""
    picture: Image.Image = F.to_pil_image(image)
    picture.thumbnail((side, side))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80, optimize=True)
    return stream.getvalue()


# What can become of a query, in the order in which a reader wants to see it.
OUTCOMES = ("wrong", "false alarm", "right", "passed over")
THREADS = 4


@dataclass(frozen=True, eq=False)
class Gallery:
    """The queries of one split, in the order in which they are shown.

    Attributes:
        order: Query rows, int64 ``(Q,)``.
        outcomes: Place in OUTCOMES of each query row, int64 ``(Q,)``.
        margins: Similarity of the best exhibit less that of the second best, float64 ``(Q,)``; NaN without one.
        low_margin: Margins of met queries below this, their lower quartile, are called low; None without any.
    """

    order: np.ndarray
    outcomes: np.ndarray
    margins: np.ndarray
    low_margin: float | None


def arrange(ground_truth: GroundTruth, recognition: Recognition, split: str, threshold: float | None) -> Gallery:
    """Sort a split's queries: wrong answers, false alarms, right answers, distractors that were passed over.

    Wrong answers and distractors come surest first, right ones least sure first.

    Args:
        ground_truth: Knows what each query shows.
        recognition: Knows what was answered.
        split: val or test.
        threshold: Log-confidence from which on a distractor's answer is a false alarm; None: there are none.
    """
    answers, target = recognition.answers[split], ground_truth.labels[split]
    is_met = target != DISTRACTOR
    right = is_met & (answers.labels == target)
    alarm = ~is_met & (answers.log_confidence >= (np.inf if threshold is None else threshold))
    outcomes = np.select([is_met & ~right, alarm, right], [0, 1, 2], 3)
    sureness = np.where(right, answers.log_confidence, -answers.log_confidence)
    order = np.lexsort((sureness, outcomes))
    similarities = recognition.matches[split].similarities
    margins = similarities[:, 0] - similarities[:, 1] if similarities.shape[1] > 1 else np.full(len(target), np.nan)
    known = margins[is_met & np.isfinite(margins)]
    return Gallery(order, outcomes, margins, float(np.quantile(known, 0.25)) if len(known) else None)


def queries_with_pictures(gallery: Gallery, per_outcome: int) -> np.ndarray:
    """Rows of the first queries of each outcome, in the order in which they are shown."""
    outcomes = gallery.outcomes[gallery.order]
    chosen = [gallery.order[outcomes == outcome][:per_outcome] for outcome in range(len(OUTCOMES))]
    return np.concatenate(chosen)


def write_gallery(
    folder: Path,
    ground_truth: GroundTruth,
    recognition: Recognition,
    galleries: Mapping[str, Gallery],
    per_outcome: int,
    check: GeometricCheck | None,
    quiet: bool,
) -> int:
    """Write ``gallery.js`` and the pictures of the chosen queries and of their matches.

    Args:
        folder: The page's folder.
        ground_truth: Names the images.
        recognition: Answers and matches.
        galleries: By split.
        per_outcome: Queries of each outcome and split that get pictures.
        check: What was done, for pictures of the matching regions; None for none.
        quiet: Show no progress.

    Returns:
        Number of pictures whose image was missing or could not be decoded.
    """
    first_image = ground_truth.first_images()
    wanted: dict[str, Path] = {}
    for split, gallery in galleries.items():
        for query in queries_with_pictures(gallery, per_outcome).tolist():
            wanted[f"{split}{query}"] = ground_truth.image(ground_truth.paths[split][query])
            rows = [*recognition.matches[split].rows[query, :N_MATCHES].tolist()]
            label = int(ground_truth.labels[split][query])
            rows += [int(first_image[label])] if label != DISTRACTOR else []
            for row in rows:
                if row != NO_ROW:
                    wanted[f"d{row}"] = ground_truth.image(ground_truth.paths["database"][row])
    written = set(_write_pictures(folder / "pictures", wanted, quiet))
    regions = []
    if check is not None:
        chosen = {split: queries_with_pictures(gallery, per_outcome) for split, gallery in galleries.items()}
        regions = _write_matching(folder / "pictures", ground_truth, recognition, chosen, check, quiet)
    content = {
        "outcomes": OUTCOMES,
        "exhibits": ground_truth.exhibit_ids.tolist(),
        "database": _database(ground_truth, recognition, first_image),
        "pictures": sorted([*written, *regions]),
        "splits": {split: _entries(ground_truth, recognition, split, galleries[split]) for split in QUERY_FILES},
        "low_margin": {split: galleries[split].low_margin for split in QUERY_FILES},
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    (folder / "gallery.js").write_text(f"window.GALLERY = {text};\n", encoding="utf-8")
    return len(wanted) - len(written)


def _entries(ground_truth: GroundTruth, recognition: Recognition, split: str, gallery: Gallery) -> list[list[Any]]:
    """List each query as row, path, kind, label, answer, outcome, log-confidence, margin, and its matches.

    Of the matches rows, similarities, and inliers (none without a geometric check).
    """
    answers, matches = recognition.answers[split], recognition.matches[split]
    kinds, paths, labels = ground_truth.kinds(split), ground_truth.paths[split], ground_truth.labels[split]
    inliers = np.empty((len(paths), 0)) if recognition.checked is None else recognition.checked[split].inliers
    entries = []
    for i in gallery.order.tolist():
        found = matches.rows[i] != NO_ROW
        found[N_MATCHES:] = False
        answer = int(answers.labels[i])
        entries.append(
            [
                i, paths[i], kinds[i],
                None if labels[i] == DISTRACTOR else int(labels[i]),
                None if answer == NO_LABEL else answer,
                int(gallery.outcomes[i]),
                _number(answers.log_confidence[i]), _number(gallery.margins[i]),
                matches.rows[i][found].tolist(), [round(s, 4) for s in matches.similarities[i][found].tolist()],
                inliers[i, np.flatnonzero(found[: inliers.shape[1]])].tolist(),
            ]
        )  # fmt: skip
    return entries


def _database(
    ground_truth: GroundTruth, recognition: Recognition, first_image: np.ndarray
) -> dict[int, tuple[str, int]]:
    """Path and label of the database rows that the page can name."""
    labels = [ground_truth.labels[split] for split in QUERY_FILES]
    rows = [recognition.matches[split].rows[:, :N_MATCHES].ravel() for split in QUERY_FILES]
    rows += [first_image[met[met != DISTRACTOR]] for met in labels]
    paths, database_labels = ground_truth.paths["database"], ground_truth.labels["database"]
    return {
        row: (paths[row], int(database_labels[row]))
        for row in np.unique(np.concatenate(rows)).tolist()
        if row != NO_ROW
    }


def _write_pictures(folder: Path, wanted: Mapping[str, Path], quiet: bool) -> Iterable[str]:
    folder.mkdir(exist_ok=True)

    def write(item: tuple[str, Path]) -> str | None:
        name, file = item
        try:
            picture = jpeg_thumbnail(file)
        except BadImageError:
            return None
        _write_picture(folder / f"{name}.jpg", picture)
        return name

    with ThreadPoolExecutor(THREADS) as pool:
        done = pool.map(write, wanted.items())
        names = [*tracked(done, "pictures of the report", len(wanted), "pictures", quiet)]
    return [name for name in names if name is not None]


def _write_picture(file: Path, picture: bytes) -> None:
    with named(file):
        file.write_bytes(picture)


def _write_matching(
    folder: Path,
    ground_truth: GroundTruth,
    recognition: Recognition,
    chosen: Mapping[str, np.ndarray],
    check: GeometricCheck,
    quiet: bool,
) -> list[str]:
    """Write what each chosen query and the nearest image of its answer have in common."""
    pairs = [
        (f"m{split}{query}", ground_truth.paths[split][query], ground_truth.paths["database"][nearest])
        for split, queries in chosen.items()
        for query in queries.tolist()
        if (nearest := recognition.answers[split].nearest[query]) != NO_ROW
    ]
    written = []
    for name, query, image in tracked(pairs, "matching regions", len(pairs), "pictures", quiet):
        picture = draw_matching(check, ground_truth.image(query), ground_truth.image(image))
        if picture is not None:
            _write_picture(folder / f"{name}.jpg", picture)
            written.append(name)
    return written


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None
