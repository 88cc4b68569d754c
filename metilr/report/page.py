"""``OUTPUT/report/index.html``, read from disk without a server: figures, curves, and a gallery of all queries."""

import io
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from metilr.data.decode import BadImageError, load_image
from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.evaluation.recognition import Recognition
from metilr.evaluation.results import FEW_ACCEPTED, Results
from metilr.files import named
from metilr.geometry.check import GeometricCheck, draw_matching
from metilr.metrics import DISTRACTOR
from metilr.progress import tracked
from metilr.report.tables import chosen
from metilr.retrieval.knn import N_MATCHES, NO_LABEL, NO_ROW

SIDE = 200  # px: sharp on a phone, and a thousand of them stay below 10 MB
THREADS = 4
PICTURES_PER_OUTCOME = 100
OUTCOMES = ("wrong", "false alarm", "right", "passed over")  # in the order in which a reader wants to see them


def jpeg_thumbnail(file: Path, side: int = SIDE) -> bytes:
    """Return an image file as a JPEG whose longest side has at most so many px.

    Raises:
        BadImageError: If the file is missing or cannot be decoded.
    """
    return jpeg_of(load_image(file), side)


def jpeg_of(image: Tensor, side: int = SIDE) -> bytes:
    """Return an image, uint8 ``(3, H, W)``, as a JPEG whose longest side has at most so many px."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((side, side))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80, optimize=True)
    return stream.getvalue()


def write_report(
    output: Path,
    results: Results,
    ground_truth: GroundTruth,
    recognition: Recognition,
    pictures_per_outcome: int = PICTURES_PER_OUTCOME,
    check: GeometricCheck | None = None,
    quiet: bool = False,
) -> Path:
    """Write the page of an evaluation; images that are missing are left out of it.

    Args:
        output: The run's folder.
        results: The figures.
        ground_truth: Names the images.
        recognition: Answers, matches and tuning.
        pictures_per_outcome: Queries of each split and outcome with pictures; the gallery lists all in any case.
        check: What was done, for pictures of the matching regions; None for none.
        quiet: Show no progress.
    """
    from metilr.report.plots import as_svg, draw_plots  # matplotlib, which a thumbnail does not need

    folder, templates = output / "report", Path(__file__).parent / "templates"
    folder.mkdir(exist_ok=True)
    galleries = {split: arrange(ground_truth, recognition, split, results.accepted_from) for split in QUERY_FILES}
    n_missing = write_gallery(folder, ground_truth, recognition, galleries, pictures_per_outcome, check, quiet)
    plots = draw_plots(results, ground_truth, recognition)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(templates), autoescape=True)
    page = environment.get_template("index.html").render(
        results=results,
        splits=list(QUERY_FILES),
        unit=results.unit,
        example_id=int(ground_truth.exhibit_ids[0]),
        plots={name: Markup(as_svg(plot, name)) for name, plot in plots.items()},
        n_missing=n_missing,
        few_accepted=FEW_ACCEPTED,
        chosen=chosen(results.knn),
        kinds=sorted({kind for figures in results.splits.values() for kind in figures.open_set["by_kind"]}),
    )
    for name in ("style.css", "gallery_page.js"):
        shutil.copy(templates / name, folder / name)
    (folder / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


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

    def first(self, n: int) -> list[int]:
        """Rows of the first n queries of each outcome, which get pictures."""
        outcomes = self.outcomes[self.order]
        return [row for i in range(len(OUTCOMES)) for row in self.order[outcomes == i][:n].tolist()]


def arrange(ground_truth: GroundTruth, recognition: Recognition, split: str, threshold: float | None) -> Gallery:
    """Sort a split's queries: wrong answers, false alarms, right answers, distractors that were passed over.

    Wrong answers and distractors come surest first, right ones least sure first. A distractor's answer is a false
    alarm from ``threshold``, a log-confidence, on; None: there are none.
    """
    answers, target = recognition.answers[split], ground_truth.labels[split]
    is_met = target != DISTRACTOR
    right = is_met & (answers.labels == target)
    alarm = ~is_met & (answers.log_confidence >= (np.inf if threshold is None else threshold))
    outcomes = np.select([is_met & ~right, alarm, right], [0, 1, 2], 3)
    order = np.lexsort((np.where(right, answers.log_confidence, -answers.log_confidence), outcomes))
    similarities = recognition.matches[split].similarities
    margins = similarities[:, 0] - similarities[:, 1] if similarities.shape[1] > 1 else np.full(len(target), np.nan)
    known = margins[is_met & np.isfinite(margins)]
    return Gallery(order, outcomes, margins, float(np.quantile(known, 0.25)) if len(known) else None)


def write_gallery(
    folder: Path,
    ground_truth: GroundTruth,
    recognition: Recognition,
    galleries: Mapping[str, Gallery],
    per_outcome: int,
    check: GeometricCheck | None,
    quiet: bool,
) -> int:
    """Write ``gallery.js`` and the pictures of each outcome's first queries and of their matches.

    Returns:
        Number of pictures whose image was missing or could not be decoded.
    """
    first_image, database = ground_truth.first_images(), ground_truth.paths["database"]
    chosen = [(split, query) for split, gallery in galleries.items() for query in gallery.first(per_outcome)]
    wanted: dict[str, Path] = {}
    for split, query in chosen:
        wanted[f"{split}{query}"] = ground_truth.image(ground_truth.paths[split][query])
        rows, label = recognition.matches[split].rows[query, :N_MATCHES], ground_truth.labels[split][query]
        shown = [*rows.tolist(), *([int(first_image[label])] if label != DISTRACTOR else [])]
        wanted |= {f"d{row}": ground_truth.image(database[row]) for row in shown if row != NO_ROW}
    (folder / "pictures").mkdir(exist_ok=True)

    def write(item: tuple[str, Path]) -> str | None:
        try:
            return _write_picture(folder, item[0], jpeg_thumbnail(item[1]))
        except BadImageError:
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        written = tracked(pool.map(write, wanted.items()), "pictures of the report", len(wanted), "pictures", quiet)
        pictures = {name for name in written if name is not None}
    regions = []  # what a query and the nearest image of its answer have in common
    for split, query in tracked(chosen, "matching regions", len(chosen), "pictures", quiet or check is None):
        nearest = int(recognition.answers[split].nearest[query])
        if check is not None and nearest != NO_ROW:
            photo = ground_truth.image(ground_truth.paths[split][query])
            picture = draw_matching(check, photo, ground_truth.image(database[nearest]))
            regions += [] if picture is None else [_write_picture(folder, f"m{split}{query}", picture)]
    content = {
        "outcomes": OUTCOMES,
        "exhibits": ground_truth.exhibit_ids.tolist(),
        "database": _database(ground_truth, recognition, first_image),
        "pictures": sorted([*pictures, *regions]),
        "splits": {split: _entries(ground_truth, recognition, split, galleries[split]) for split in QUERY_FILES},
        "low_margin": {split: galleries[split].low_margin for split in QUERY_FILES},
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    (folder / "gallery.js").write_text(f"window.GALLERY = {text};\n", encoding="utf-8")
    return len(wanted) - len(pictures)


def _write_picture(folder: Path, name: str, picture: bytes) -> str:
    with named(file := folder / "pictures" / f"{name}.jpg"):
        file.write_bytes(picture)
    return name


def _entries(ground_truth: GroundTruth, recognition: Recognition, split: str, gallery: Gallery) -> list[list[Any]]:
    """List each query as row, path, kind, label, answer, outcome, log-confidence, margin, and its matches.

    Of the matches rows, similarities, and inliers (none without a geometric check).
    """
    answers, matches = recognition.answers[split], recognition.matches[split]
    kinds, paths, labels = ground_truth.kinds(split), ground_truth.paths[split], ground_truth.labels[split]
    inliers = np.empty((len(paths), 0)) if recognition.checked is None else recognition.checked[split].inliers
    entries = []
    for i in gallery.order.tolist():
        is_match = matches.rows[i] != NO_ROW
        is_match[N_MATCHES:] = False
        answer = int(answers.labels[i])
        entries.append(
            [
                i, paths[i], kinds[i],
                None if labels[i] == DISTRACTOR else int(labels[i]),
                None if answer == NO_LABEL else answer,
                int(gallery.outcomes[i]),
                _number(answers.log_confidence[i]), _number(gallery.margins[i]),
                matches.rows[i][is_match].tolist(), [round(s, 4) for s in matches.similarities[i][is_match].tolist()],
                inliers[i, np.flatnonzero(is_match[: inliers.shape[1]])].tolist(),
            ]
        )  # fmt: skip
    return entries


def _database(
    ground_truth: GroundTruth, recognition: Recognition, first_image: np.ndarray
) -> dict[int, tuple[str, int]]:
    """Path and label of the database rows that the page can name."""
    labels = [ground_truth.labels[split] for split in QUERY_FILES]
    rows = [recognition.matches[split].rows[:, :N_MATCHES].ravel() for split in QUERY_FILES]
    rows += [first_image[of_split[of_split != DISTRACTOR]] for of_split in labels]
    paths, of_rows = ground_truth.paths["database"], ground_truth.labels["database"]
    return {row: (paths[row], int(of_rows[row])) for row in np.unique(np.concatenate(rows)).tolist() if row != NO_ROW}


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None
