"""What W&B is told of an evaluation."""

import contextlib
import io
import netrc
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from PIL import Image

from metilr.data.decode import BadImageError
from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.errors import UserError
from metilr.evaluation.recognition import Recognition
from metilr.evaluation.results import Results
from metilr.files import write_atomically
from metilr.metrics import DISTRACTOR
from metilr.metrics.open_set import precision_recall
from metilr.report.gallery import OUTCOMES, arrange, jpeg_thumbnail
from metilr.report.page import draw_plots
from metilr.report.plots import as_png, gap_steps
from metilr.retrieval.knn import NO_LABEL

WandbMode = Literal["auto", "online", "offline", "off"]
PROJECT = "metilr"
TIMEOUT = 30  # seconds for the first contact; then the run goes on offline


def open_wandb(mode: WandbMode, project: str, folder: Path, options: Mapping[str, Any]) -> Any | None:
    """Start a run whose files lie beside the folder's own.

    Args:
        mode: auto is online if there is a key, else offline; off, or the variable WANDB_MODE=disabled: no run.
        project: Its name in W&B.
        folder: Of the run here; ``wandb_id`` in it lets a continued run go on under the same name.
        options: Shown as the run's configuration.

    Returns:
        The wandb run; None without one. Where W&B cannot start, a line on stderr says so.

    Raises:
        UserError: If ``mode`` is online and there is no key.
    """
    if mode == "off" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    check_key(mode)
    import wandb

    id_file = folder / "wandb_id"
    if not id_file.exists():
        write_atomically(id_file, uuid.uuid4().hex[:8])
    arguments: dict[str, Any] = {
        "project": project, "name": folder.name, "id": id_file.read_text(), "dir": str(folder), "config": dict(options),
    }  # fmt: skip
    online = mode == "online" or (mode == "auto" and _has_key() and os.environ.get("WANDB_MODE") != "offline")
    if online:
        try:
            settings = wandb.Settings(silent=True, init_timeout=TIMEOUT)
            return wandb.init(mode="online", resume="allow", settings=settings, **arguments)
        except Exception as error:  # whatever keeps W&B from being reached must not stop the work
            print(f"W&B cannot be reached ({short(error)}); logging offline", file=sys.stderr)
    try:
        return wandb.init(mode="offline", settings=wandb.Settings(silent=True), **arguments)
    except Exception as error:  # its service cannot start here
        print(f"W&B cannot start ({short(error)}); going on without it", file=sys.stderr)
        return None


def check_key(mode: WandbMode) -> None:
    """Refuse to log online without a key, before hours of work.

    Raises:
        UserError: If ``mode`` is online and there is none.
    """
    if mode == "online" and not _has_key():
        raise UserError("--wandb online: no key; run wandb login, set WANDB_API_KEY, or use --wandb offline")


@contextlib.contextmanager
def staged_in(folder: Path) -> Iterator[None]:
    """Let pictures of an offline run wait for ``wandb sync`` beside the run, and not in the user's home."""
    before = os.environ.get("WANDB_DATA_DIR")
    if before is None:
        os.environ["WANDB_DATA_DIR"] = str((folder / "wandb").absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]


@contextlib.contextmanager
def unharmed(run: Any) -> Iterator[None]:
    """Log to a run and end it: the work is done, whatever W&B's service or network does now."""
    try:
        yield
        run.finish()
    except Exception as error:
        print(f"W&B could not be finished ({short(error)}); see wandb sync", file=sys.stderr)


def where_logged(run: Any, folder: Path) -> str:
    """Say where the run can be looked at."""
    if run.offline:
        return f"W&B: offline; wandb sync {folder}/wandb/offline-run-* sends it"
    return f"W&B: {run.url}"


def short(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(host) is not None
    return False


FAILURES = 50  # a split: each has three pictures


def log_evaluation(
    run: Any,
    results: Results,
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
    assert results.threshold is not None
    for split in QUERY_FILES:
        log[f"{split}/failures"] = _failures(ground_truth, recognition, split, results.threshold.log_confidence)
    run.log(log)
    if report is not None:
        artifact = wandb.Artifact(f"report-{run.id}", "report")
        with contextlib.redirect_stderr(io.StringIO()):  # it says so, even if it is to be silent
            artifact.add_dir(str(report))
        run.log_artifact(artifact)


def _summary(results: Results) -> dict[str, Any]:
    unit = results.unit
    summary: dict[str, Any] = {"k": results.knn.k, "tau": results.knn.tau}
    for split, figures in results.splits.items():
        for metric in ("gap", "gap_minus", "acc"):
            summary[f"{split}/{metric}"] = getattr(figures, metric)
            if unit is not None:
                low, high = getattr(figures.intervals[unit], metric)
                summary |= {f"{split}/{metric}_low": low, f"{split}/{metric}_high": high}
        summary |= {f"{split}/{name}": figures.open_set[name] for name in ("auroc", "fpr95", "aurc")}
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
