"""What Weights & Biases is told of an evaluation; whatever its service or network does, the work goes on."""

import contextlib
import io
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metilr.data.decode import BadImageError
from metilr.data.ground_truth import GroundTruth
from metilr.errors import UserError
from metilr.evaluation.options import WandbMode
from metilr.evaluation.results import FIGURES, Results
from metilr.files import write_atomically
from metilr.metrics.open_set import precision_recall

if TYPE_CHECKING:
    from metilr.evaluation.recognition import Recognition

TIMEOUT = 30  # seconds for the first contact; then the run goes on offline
FAILURES = 50  # a split: each has three pictures
COLUMNS: list[str | int] = [
    "query", "nearest", "shown exhibit", "outcome", "path", "shows", "answer", "log_confidence",
]  # fmt: skip


def check_key(mode: WandbMode) -> None:
    """Refuse to log online without a key, before hours of work."""
    if mode == "online" and not _has_key():
        raise UserError("online: no key; run wandb login, set WANDB_API_KEY, or take offline", "wandb")


def _has_key() -> bool:
    import requests

    service = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY")) or requests.utils.get_netrc_auth(service) is not None


def open_wandb(mode: WandbMode, project: str, folder: Path, options: Mapping[str, Any]) -> Any | None:
    """Start a wandb run, with ``options`` as its configuration, whose files lie in the folder of the run here.

    ``wandb_id`` in it lets a continued run go on under the same name. Mode auto is online if there is a key, else
    offline; None is returned with off, with the variable WANDB_MODE=disabled, and, after a line on stderr, where W&B
    cannot start.
    """
    if mode == "off" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    check_key(mode)
    _keep_its_log(folder)
    import wandb

    id_file = folder / "wandb_id"
    if not id_file.exists():
        write_atomically(id_file, uuid.uuid4().hex[:8])
    is_online = mode == "online" or (mode == "auto" and _has_key() and os.environ.get("WANDB_MODE") != "offline")
    for how in ("online", "offline") if is_online else ("offline",):
        try:
            settings = wandb.Settings(silent=True, init_timeout=TIMEOUT)
            run: dict[str, Any] = {"mode": how, "resume": "allow"} if how == "online" else {"mode": how}
            run |= {"project": project, "name": folder.name, "id": id_file.read_text(), "config": dict(options)}
            # absolute, since the service that writes keeps the working folder it was started in
            return wandb.init(dir=str(folder.absolute()), settings=settings, **run)
        except Exception as error:  # whatever keeps W&B from its work must not stop ours
            fate = "be reached ({}); logging offline" if how == "online" else "start ({}); going on without it"
            print(f"W&B cannot {fate.format(_short(error))}", file=sys.stderr)
    return None


def _keep_its_log(folder: Path) -> None:
    """Let W&B keep its own log beside the run where the home, its usual place, cannot be written."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wandb"
    try:
        usual.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(usual, os.W_OK)
    except OSError:
        is_writable = False
    if not is_writable and "WANDB_CACHE_DIR" not in os.environ:
        os.environ["WANDB_CACHE_DIR"] = str(folder.absolute() / "wandb")
        print(f"W&B cannot write {usual}; its own log is in {folder}/wandb", file=sys.stderr)


@contextlib.contextmanager
def staging_beside(folder: Path) -> Iterator[None]:
    """Let pictures of an offline run wait for ``wandb sync`` beside the run, and not in the user's home."""
    given = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = given or str((folder / "wandb").absolute())
    try:
        yield
    finally:
        if given is None:
            del os.environ["WANDB_DATA_DIR"]


@contextlib.contextmanager
def finishing(run: Any) -> Iterator[None]:
    """Log to a run and end it; what fails is said and not raised, since the work is done."""
    try:
        yield
        run.finish()
    except Exception as error:
        print(f"W&B could not be finished ({_short(error)}); see wandb sync", file=sys.stderr)


def where_logged(run: Any, folder: Path) -> str:
    """Say where the run can be looked at."""
    return f"W&B: offline; wandb sync {folder}/wandb/offline-run-* sends it" if run.offline else f"W&B: {run.url}"


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def log_evaluation(
    run: Any, results: Results, ground_truth: GroundTruth, recognition: "Recognition", report: Path | None
) -> None:
    """Log figures, curves, the tuning surface and failures to an open run, and the report's folder, if there is one."""
    import wandb

    from metilr.report.plots import draw_plots, gap_steps

    summary: dict[str, Any] = {"k": results.knn.k, "tau": results.knn.tau}
    for split, figures in results.splits.items():
        for metric in FIGURES:
            summary[f"{split}/{metric}"] = getattr(figures, metric)
            if results.unit is not None:
                low, high = figures.intervals[results.unit][metric]
                summary |= {f"{split}/{metric}_low": low, f"{split}/{metric}_high": high}
        summary |= {f"{split}/{name}": value for name, value in figures.ranking.items()}
        summary |= {f"{split}/{name}": figures.open_set[name] for name in ("auroc", "fpr95", "aurc")}
    if (confidence := results.confidence) is not None:
        summary["is_calibrated"] = confidence.is_used
        summary |= {f"{split}/calibration_error": error for split, error in confidence.calibration_error.items()}
    run.summary.update(summary)

    cases, tuning = recognition.cases(ground_truth), recognition.tuning
    steps = [[part.tolist() for part in gap_steps(*precision_recall(*case))] for case in cases.values()]
    xs, ys = (list(of) for of in zip(*steps, strict=True))
    curves = wandb.plot.line_series(xs, ys, list(cases), "precision and recall", "recall")
    log: dict[str, Any] = {"precision_recall": curves}
    for name, plot in draw_plots(results, ground_truth, recognition).items():
        stream = io.BytesIO()
        plot.savefig(stream, format="png", dpi=160, facecolor="white")
        log[f"plots/{name}"] = _picture(stream.getvalue())
    if tuning is not None:
        ks, taus = tuning.k_grid, tuning.tau_grid
        rows = [[k, tau, float(tuning.surface[i, j])] for i, k in enumerate(ks) for j, tau in enumerate(taus)]
        log["tuning"] = wandb.Table(["k", "tau", "val/gap"], rows)
    for split in cases:
        failures = _failures(ground_truth, recognition, split, results.accepted_from)
        log[f"{split}/failures"] = wandb.Table(COLUMNS, failures)
    run.log(log)
    if report is not None:
        artifact = wandb.Artifact(f"report-{run.id}", "report")
        with contextlib.redirect_stderr(io.StringIO()):  # it says so, even if it is to be silent
            artifact.add_dir(str(report))
        run.log_artifact(artifact)


def _picture(content: bytes) -> Any:
    import wandb
    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(content)))


def _failures(
    ground_truth: GroundTruth, recognition: "Recognition", split: str, threshold: float | None
) -> list[list[Any]]:
    """Rows of COLUMNS: the first wrong answers and false alarms."""
    from metilr.report.page import OUTCOMES, arrange, jpeg_thumbnail

    exhibits = ["none", *map(str, ground_truth.exhibit_ids.tolist())]  # the first of label -1
    first_image, paths = ground_truth.first_images(), ground_truth.paths
    log_confidence, answers, labels = recognition.cases(ground_truth)[split]

    def picture(of: str, row: int) -> Any:
        with contextlib.suppress(BadImageError):
            return _picture(jpeg_thumbnail(ground_truth.image(paths[of][row]))) if row >= 0 else None

    gallery = arrange(ground_truth, recognition, split, threshold)
    failed = [i for i in gallery.order.tolist() if OUTCOMES[gallery.outcomes[i]] in ("wrong", "false alarm")]
    rows: list[list[Any]] = []
    for i in failed[:FAILURES]:
        shown = int(first_image[labels[i]]) if labels[i] >= 0 else -1
        pictures = [picture(split, i), picture("database", int(recognition.matches[split].rows[i, 0]))]
        pictures.append(picture("database", shown))
        said = [OUTCOMES[gallery.outcomes[i]], paths[split][i], exhibits[labels[i] + 1], exhibits[answers[i] + 1]]
        rows.append([*pictures, *said, float(max(log_confidence[i], -1e9))])
    return rows
