"""What W&B is told of an evaluation."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.data.transforms import BadImageError
from metilr.knn import NO_LABEL
from metilr.metrics import DISTRACTOR
from metilr.metrics.open_set import precision_recall
from metilr.recognition import Recognition
from metilr.report.gallery import OUTCOMES, arrange
from metilr.report.page import draw_plots
from metilr.report.plots import as_png, gap_steps
from metilr.scoring import headline_unit
from metilr.thumbnails import jpeg_thumbnail

FAILURES = 50  # a split: each has three pictures


def log_evaluation(
    run: Any,
    results: Mapping[str, Any],
    ground_truth: GroundTruth,
    recognition: Recognition,
    report: Path | None,
) -> None:
    """Log figures, curves, the tuning surface, failures and the report.

    Args:
        run: An open wandb run.
        results: What ``results.json`` says.
        ground_truth: Names the images.
        recognition: Answers, matches and tuning.
        report: The report's folder, to be kept as an artifact; None: there is none.
    """
    import wandb

    run.summary.update(_summary(results))
    log: dict[str, Any] = {"precision_recall": _curve(ground_truth, recognition)}
    for name, plot in draw_plots(results, ground_truth, recognition).items():
        log[f"plots/{name}"] = wandb.Image(Image.open(io.BytesIO(as_png(plot))))
    tuning = recognition.tuning
    if tuning is not None:
        rows = [
            [k, tau, float(tuning.surface[i, j])]
            for i, k in enumerate(tuning.k_grid)
            for j, tau in enumerate(tuning.tau_grid)
        ]
        log["tuning"] = wandb.Table(["k", "tau", "val/gap"], rows)
    for split in QUERY_FILES:
        log[f"{split}/failures"] = _failures(ground_truth, recognition, split, results["threshold"]["log_confidence"])
    run.log(log)
    if report is not None:
        artifact = wandb.Artifact(f"report-{run.id}", "report")
        with contextlib.redirect_stderr(io.StringIO()):  # it says so, even if it is to be silent
            artifact.add_dir(str(report))
        run.log_artifact(artifact)


def _summary(results: Mapping[str, Any]) -> dict[str, Any]:
    unit = headline_unit(results)
    summary = {"k": results["knn"]["k"], "tau": results["knn"]["tau"]}
    for split in QUERY_FILES:
        for metric in ("gap", "gap_minus", "acc"):
            summary[f"{split}/{metric}"] = results[split][metric]
            if unit is not None:
                low, high = results[split]["intervals"][unit][metric]
                summary |= {f"{split}/{metric}_low": low, f"{split}/{metric}_high": high}
        summary |= {f"{split}/{name}": results[split]["open_set"][name] for name in ("auroc", "fpr95", "aurc")}
    return summary


def _curve(ground_truth: GroundTruth, recognition: Recognition) -> Any:
    import wandb

    xs, ys = [], []
    for split in QUERY_FILES:
        answers = recognition.answers[split]
        precision, recall = precision_recall(answers.log_confidence, answers.labels, ground_truth.labels[split])
        corners, heights = gap_steps(precision, recall)
        xs.append(corners.tolist())
        ys.append(heights.tolist())
    return wandb.plot.line_series(xs, ys, keys=list(QUERY_FILES), title="precision and recall", xname="recall")


def _failures(ground_truth: GroundTruth, recognition: Recognition, split: str, threshold: float | None) -> Any:
    import wandb

    gallery = arrange(ground_truth, recognition, split, threshold)
    failed = [i for i in gallery.order.tolist() if OUTCOMES[gallery.outcomes[i]] in ("wrong", "false alarm")]
    ids, answers, first = ground_truth.exhibit_ids, recognition.answers[split], ground_truth.first_images()

    def picture(of: str, row: int) -> Any:
        if row < 0:
            return None
        try:
            content = jpeg_thumbnail(ground_truth.image(ground_truth.paths[of][row]))
        except BadImageError:
            return None
        return wandb.Image(Image.open(io.BytesIO(content)))

    rows = []
    for i in failed[:FAILURES]:
        label, answer = int(ground_truth.labels[split][i]), int(answers.labels[i])
        is_met = label != DISTRACTOR
        rows.append(
            [
                picture(split, i), picture("database", int(recognition.matches[split].rows[i, 0])),
                picture("database", int(first[label])) if is_met else None,
                OUTCOMES[gallery.outcomes[i]], ground_truth.paths[split][i],
                str(ids[label]) if is_met else "none", "none" if answer == NO_LABEL else str(ids[answer]),
                float(max(answers.log_confidence[i], -1e9)),
            ]
        )  # fmt: skip
    columns: list[str | int] = [
        "query",
        "nearest",
        "shown exhibit",
        "outcome",
        "path",
        "shows",
        "answer",
        "log_confidence",
    ]
    return wandb.Table(columns, rows)
