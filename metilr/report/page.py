"""``OUTPUT/report/index.html``: the figures, the curves, the gallery, and how all of it was made."""

import shutil
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.evaluation.recognition import Recognition
from metilr.evaluation.results import FEW_ACCEPTED, Results
from metilr.geometry.check import GeometricCheck
from metilr.metrics.open_set import precision_recall, risk_coverage
from metilr.report.gallery import arrange, write_gallery
from metilr.report.plots import as_svg, confidence_plot, precision_recall_plot, risk_coverage_plot, tuning_plot
from metilr.report.tables import chosen

PICTURES_PER_OUTCOME = 100


def write_report(
    output: Path,
    results: Results,
    ground_truth: GroundTruth,
    recognition: Recognition,
    pictures_per_outcome: int = PICTURES_PER_OUTCOME,
    check: GeometricCheck | None = None,
    quiet: bool = False,
) -> Path:
    """Write the page of an evaluation.

    Args:
        output: The run's folder.
        results: What ``results.json`` says.
        ground_truth: Names the images; those that are missing are left out of the page.
        recognition: Answers, matches and tuning.
        pictures_per_outcome: Queries of each split and outcome (wrong, false alarm, right, passed over) with
            pictures; the gallery lists all queries in any case.
        check: What was done, for pictures of the matching regions; None for none.
        quiet: Show no progress.

    Returns:
        The page.
    """
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    assert results.threshold is not None
    threshold = results.threshold.log_confidence
    galleries = {split: arrange(ground_truth, recognition, split, threshold) for split in QUERY_FILES}
    n_missing = write_gallery(folder, ground_truth, recognition, galleries, pictures_per_outcome, check, quiet)
    plots = draw_plots(results, ground_truth, recognition)
    templates = jinja2.Environment(loader=jinja2.PackageLoader("metilr.report"), autoescape=True)
    page = templates.get_template("index.html").render(
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
        shutil.copy(Path(__file__).parent / "templates" / name, folder / name)
    (folder / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


def draw_plots(results: Results, ground_truth: GroundTruth, recognition: Recognition) -> dict[str, Figure]:
    """Draw the plots of an evaluation, by name."""
    arguments = {
        split: (answers.log_confidence, answers.labels, ground_truth.labels[split])
        for split, answers in recognition.answers.items()
    }
    assert results.threshold is not None
    points = {
        split: (point.recall, point.precision)
        for split, point in results.threshold.splits.items()
        if point is not None and point.precision is not None
    }
    plots = {
        "precision_recall": precision_recall_plot(
            {split: precision_recall(*arguments[split]) for split in QUERY_FILES},
            {split: figures.gap for split, figures in results.splits.items()},
            points,
        ),
        "risk_coverage": risk_coverage_plot({split: risk_coverage(*arguments[split]) for split in QUERY_FILES}),
    }
    for split in QUERY_FILES:
        confidence, kinds = recognition.answers[split].log_confidence, ground_truth.kinds(split)
        plots[f"confidence_{split}"] = confidence_plot(confidence, kinds, results.threshold.log_confidence)
    tuning = recognition.tuning
    if tuning is not None and tuning.surface.size > 1:
        plots["tuning"] = tuning_plot(tuning.k_grid, tuning.tau_grid, tuning.surface, tuning.k, tuning.tau)
    return plots
