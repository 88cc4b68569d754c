"""``OUTPUT/report/index.html``, read from disk without a server: figures, curves, and a gallery of all queries."""

import io
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from metilr.data.decode import BadImageError, load_image
from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.evaluation.results import FEW_ACCEPTED, Results
from metilr.files import named
from metilr.metrics import DISTRACTOR
from metilr.progress import tracked
from metilr.report.tables import RANKING, calibrated, chosen, interval_in_words
from metilr.retrieval.knn import N_MATCHES

if TYPE_CHECKING:
    from torch import Tensor

    from metilr.evaluation.recognition import Recognition
    from metilr.geometry.check import GeometricCheck

SIDE = 200  # px: sharp on a phone, and a thousand of them stay below 10 MB
THREADS = 4
PICTURES_PER_OUTCOME = 100
FEATURES = {  # of a calibrated confidence, in words
    "similarity": "similarity to the answer",
    "lead": "lead over the next exhibit",
    "mean_10": "mean similarity to the ten nearest images",
    "inliers": "matching regions of the answer",
    "inlier_lead": "their lead over the next exhibit",
    "background_1": "similarity to the nearest background photograph",
    "background_5": "mean of the 5 nearest of them",
    "background_20": "mean of the 20 nearest of them",
}
OUTCOMES = ("wrong", "false alarm", "right", "passed over")  # in the order in which a reader wants to see them


def jpeg_thumbnail(file: Path, side: int = SIDE) -> bytes:
    """Return an image file as a JPEG whose longest side has at most so many px; raises BadImageError if it is none."""
    return jpeg_of(load_image(file), side)


def jpeg_of(image: "Tensor", side: int = SIDE) -> bytes:
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
    recognition: "Recognition",
    pictures_per_outcome: int = PICTURES_PER_OUTCOME,
    check: "GeometricCheck | None" = None,
    quiet: bool = False,
) -> Path:
    """Write the page of an evaluation into its folder ``output``.

    The gallery lists all queries, the first ``pictures_per_outcome`` of each split and outcome with pictures, with
    ``check`` also of the matching regions; images that are missing are left out.
    """
    import jinja2
    from markupsafe import Markup

    from metilr.report.plots import as_svg, draw_plots  # matplotlib, which a thumbnail does not need

    folder, templates = output / "report", Path(__file__).parent / "templates"
    folder.mkdir(exist_ok=True)
    galleries = {split: arrange(ground_truth, recognition, split, results.accepted_from) for split in QUERY_FILES}
    n_missing = write_gallery(folder, ground_truth, recognition, galleries, pictures_per_outcome, check, quiet)
    plots = draw_plots(results, ground_truth, recognition)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(templates), autoescape=True)
    page = environment.get_template("index.html").render(
        results=results, splits=list(QUERY_FILES), unit=results.unit, example_id=int(ground_truth.exhibit_ids[0]),
        plots={name: Markup(as_svg(plot, name)) for name, plot in plots.items()}, n_missing=n_missing,
        few_accepted=FEW_ACCEPTED, chosen=chosen(results.knn), interval=interval_in_words(results),
        calibrated=results.confidence and calibrated(results.confidence).removeprefix("confidence: "),
        features=FEATURES, ranking={name: label for name, label in RANKING.items() if name in results.test.ranking},
        kinds=sorted({kind for figures in results.splits.values() for kind in figures.open_set["by_kind"]}),
    )  # fmt: skip
    for name in ("style.css", "gallery_page.js"):
        shutil.copy(templates / name, folder / name)
    (folder / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


class Gallery(NamedTuple):
    """The queries of one split, in the order in which they are shown."""

    order: np.ndarray  # query rows, int64 (Q,)
    outcomes: np.ndarray  # place in OUTCOMES of each query row, int64 (Q,)
    margins: np.ndarray  # similarity of the best exhibit less that of the second best, float64 (Q,); NaN without one
    low_margin: float | None  # below it, their lower quartile, margins of met queries are called low

    def first(self, n: int) -> list[int]:
        """Rows of the first n queries of each outcome, which get pictures."""
        outcomes = self.outcomes[self.order]
        return [row for i in range(len(OUTCOMES)) for row in self.order[outcomes == i][:n].tolist()]


def arrange(ground_truth: GroundTruth, recognition: "Recognition", split: str, threshold: float | None) -> Gallery:
    """Sort a split's queries: wrong answers, false alarms, right answers, distractors that were passed over.

    Wrong answers and distractors come surest first, right ones least sure first. A distractor's answer is a false
    alarm from ``threshold``, a log-confidence, on; None: there are none.
    """
    log_confidence, labels, target = recognition.cases(ground_truth)[split]
    is_met = target != DISTRACTOR
    right = is_met & (labels == target)
    alarm = ~is_met & (log_confidence >= (np.inf if threshold is None else threshold))
    outcomes = np.select([is_met & ~right, alarm, right], [0, 1, 2], 3)
    order = np.lexsort((np.where(right, log_confidence, -log_confidence), outcomes))
    similarities = recognition.matches[split].similarities
    margins = similarities[:, 0] - similarities[:, 1] if similarities.shape[1] > 1 else np.full(len(target), np.nan)
    known = margins[is_met & np.isfinite(margins)]
    return Gallery(order, outcomes, margins, float(np.quantile(known, 0.25)) if len(known) else None)


def write_gallery(
    folder: Path,
    ground_truth: GroundTruth,
    recognition: "Recognition",
    galleries: Mapping[str, Gallery],
    per_outcome: int,
    check: "GeometricCheck | None",
    quiet: bool,
) -> int:
    """Write ``gallery.js`` and the pictures; return the number of those whose image is missing or cannot be decoded."""
    paths, labels, matches = ground_truth.paths, ground_truth.labels, recognition.matches
    first_image = ground_truth.first_images()
    illustrated = [(split, query) for split, gallery in galleries.items() for query in gallery.first(per_outcome)]
    wanted: dict[str, Path] = {}
    for split, query in illustrated:
        wanted[f"{split}{query}"] = ground_truth.image(paths[split][query])
        label, rows = labels[split][query], matches[split].rows[query, :N_MATCHES].tolist()
        rows += [int(first_image[label])] if label != DISTRACTOR else []
        wanted |= {f"d{row}": ground_truth.image(paths["database"][row]) for row in rows if row >= 0}
    (folder / "pictures").mkdir(exist_ok=True)

    def write(name: str, picture: bytes) -> str:
        with named(file := folder / "pictures" / f"{name}.jpg"):
            file.write_bytes(picture)
        return name

    def write_thumbnail(item: tuple[str, Path]) -> str | None:
        try:
            return write(item[0], jpeg_thumbnail(item[1]))
        except BadImageError:
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        done = pool.map(write_thumbnail, wanted.items())
        tried = tracked(done, "pictures of the report", len(wanted), "pictures", quiet)
        pictures = {name for name in tried if name is not None}
    n_missing = len(wanted) - len(pictures)
    if check is not None:  # what a query and the nearest image of its answer have in common
        for split, query in tracked(illustrated, "matching regions", len(illustrated), "pictures", quiet):
            nearest = int(recognition.answers[split].nearest[query])
            images = [ground_truth.image(path) for path in (paths[split][query], paths["database"][nearest])]
            if nearest >= 0 and (picture := check.draw(images[0], check.query_features(images[0]), images[1])):
                pictures.add(write(f"m{split}{query}", picture))

    named_rows = [matches[split].rows[:, :N_MATCHES].ravel() for split in QUERY_FILES]
    named_rows += [first_image[labels[split][labels[split] != DISTRACTOR]] for split in QUERY_FILES]
    rows = [row for row in np.unique(np.concatenate(named_rows)).tolist() if row >= 0]
    content = {
        "outcomes": OUTCOMES,
        "exhibits": ground_truth.exhibit_ids.tolist(),
        "database": {row: (paths["database"][row], int(labels["database"][row])) for row in rows},
        "pictures": sorted(pictures),
        "splits": {split: _entries(ground_truth, recognition, split, galleries[split]) for split in QUERY_FILES},
        "low_margin": {split: galleries[split].low_margin for split in QUERY_FILES},
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    (folder / "gallery.js").write_text(f"window.GALLERY = {text};\n", encoding="utf-8")
    return n_missing


def _entries(ground_truth: GroundTruth, recognition: "Recognition", split: str, gallery: Gallery) -> list[list[Any]]:
    """List each query as row, path, kind, label, answer, outcome, log-confidence, margin, and its matches.

    Of the matches rows, similarities, and inliers (none without a geometric check).
    """
    log_confidence, answers, labels = recognition.cases(ground_truth)[split]
    matches, kinds, paths = recognition.matches[split], ground_truth.kinds(split), ground_truth.paths[split]
    inliers = recognition.checked[split].inliers if recognition.checked else np.empty((len(paths), 0))
    entries = []
    for i in gallery.order.tolist():
        places = np.flatnonzero(matches.rows[i, :N_MATCHES] >= 0)
        numbers = [float(f"{x:.4g}") if np.isfinite(x) else None for x in (log_confidence[i], gallery.margins[i])]
        found = [matches.rows[i, places].tolist(), [round(s, 4) for s in matches.similarities[i, places].tolist()]]
        label, answer = (int(of[i]) if of[i] >= 0 else None for of in (labels, answers))
        counts = inliers[i, places[places < inliers.shape[1]]].tolist()
        entries.append([i, paths[i], kinds[i], label, answer, int(gallery.outcomes[i]), *numbers, *found, counts])
    return entries
