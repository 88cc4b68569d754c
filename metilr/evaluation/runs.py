"""The folder of an evaluation: made, locked while the evaluation runs, and filled."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from metilr.data.decode import BadImageError, load_image
from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.data.tables import as_csv
from metilr.errors import UserError, amount
from metilr.evaluation.options import MethodOptions, elements_of
from metilr.evaluation.results import PREDICTION_COLUMNS, SCHEMA_VERSION, SIZES, Results
from metilr.extraction.store import differing_settings
from metilr.files import alone_in, named, remove_leftovers, write_atomically
from metilr.metrics import DISTRACTOR
from metilr.metrics.open_set import calibration_error
from metilr.provenance import command, commit, library_versions, machine, peak_memory_gb
from metilr.retrieval.whitening import DEFAULT_DIM, LearnedWhitening, PCAWhitening

if TYPE_CHECKING:
    from metilr.evaluation.recognition import Recognition
    from metilr.extraction.descriptors import Descriptors
    from metilr.geometry.check import GeometricCheck
    from metilr.retrieval.confidence import Fit

RUNS = Path("runs")
LEFT_BEHIND = ("predictions/val.csv", "predictions/test.csv", "whitening.npz", "report/index.html")
FILES_OR_WORDS = ("weights", "whitening", "ckpt")  # options that are a file's path, or a word such as "random" or "pca"
CHECK_COLUMNS = ("inliers", "inlier_lead")  # after the others, where geometry was checked


def make_output(output: Path | None, name: str) -> Path:
    """Make the folder that a command writes into: ``output``, or a new one under ``runs/``, the date and ``name``."""
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        return output
    dated, i = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}", 1
    while True:  # two runs that start in one second get two
        folder = RUNS / (dated if i == 1 else f"{dated}_{i}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        i += 1


@contextlib.contextmanager
def output_folder(output: Path | None, name: str, options: Mapping[str, Any]) -> Iterator[Path]:
    """Open the output folder of a run, locked against other runs, and write ``config.yaml``, which repeats the run.

    What a run left that did not get to its ``results.json`` goes first, and a dated folder if the run fails.
    """
    folder = make_output(output, name)
    try:
        with alone_in(folder, "another run", "name another output"):
            if (folder / "results.json").exists():
                raise UserError(f"{output}: holds results already; name another folder, or delete it", "output")
            remove_leftovers(folder)
            if (folder / "config.yaml").exists():  # of a run that was killed: its options may have been others
                for left in LEFT_BEHIND:
                    (folder / left).unlink(missing_ok=True)
            write_atomically(folder / "config.yaml", yaml.safe_dump(plain_options(options), sort_keys=False))
            yield folder
    except BaseException:
        if output is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def refuse_other_options(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a finished folder that stands for something else than the same command would make now."""
    if other := differing_settings(before, now):
        made = f"is finished, with other options ({'; '.join(other[:4])})"
        raise UserError(f"{folder}: {made}; name another folder, or delete it", "output")


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """All options but the output folder, as YAML and JSON say them; paths absolute, to repeat the run from anywhere."""

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(name, part) for part in value]
        is_file = isinstance(value, Path) or (name in FILES_OR_WORDS and value is not None and Path(value).is_file())
        return str(Path(value).absolute()) if is_file else value

    return {name: plain(name, value) for name, value in options.items() if name != "output"}


def summarise(
    ground_truth: GroundTruth,
    recognition: "Recognition",
    opened: "Descriptors",
    method: MethodOptions,
    check: "GeometricCheck | None",
    fit: "Fit | None" = None,
    *,
    options: Mapping[str, Any],
    synthetic: bool,
    seconds: float,
    n_made: int,
) -> Results:
    """Put together what ``results.json`` says of an evaluation with such a method and, once tuned, such a check.

    ``options`` are the command's, flat; ``synthetic`` says that the museum is the demo's; ``n_made`` counts
    the descriptors that were not there before.
    """
    from metilr.evaluation.recognition import figures_of  # FAISS, which making a folder needs not

    tuning, geometry, n_rows = recognition.tuning, None, sum(map(len, opened.is_valid.values()))
    weights = recognition.classifier
    grid = tuning and {"k": [*tuning.k_grid], "tau": [*tuning.tau_grid], "val_gap": tuning.surface.tolist()}
    if check is not None:
        geometry = {name: getattr(check, name) for name in ("candidates", "reorder", "turns", "boost")}
        geometry |= {"gate": dataclasses.asdict(check.gate), "tuned_on": "val", "features": check.extractor.settings()}
    return Results.model_validate(
        {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": command(),
            "directory": str(Path.cwd()),
            "options": plain_options(options),
            "seconds": round(seconds, 1),
            "rows": {"all": n_rows, "reused": n_rows - n_made},
            "peak_memory_gb": peak_memory_gb(),
            "notes": _notes(opened, recognition, synthetic, method.whitening_dim),
            "data": {
                "root": ground_truth.root.resolve().name,
                "database": ground_truth.database,
                "synthetic": synthetic,
                "counts": {size: ground_truth.counts()[size] for size in SIZES},
                "fingerprint": ground_truth.fingerprint(),
            },
            "model": _model(opened.origins),
            "whitening": _whitening(recognition.whitening, method.whitening),
            "elements": elements_of(method),
            "geometric_check": geometry,
            **_confidence(method, fit, recognition, ground_truth),
            **({} if weights is None else {"classifier": {"sha256": weights.sha256(), "rows": len(weights.rows)}}),
            "search": {"device": method.search_device or "cpu", "exact": True},
            "knn": {"k": recognition.k, "tau": recognition.tau, "tuned_on": grid and "val", "grid": grid},
            **figures_of(recognition, ground_truth),
            "skipped_images": skipped_images(opened, ground_truth),
            "versions": {**library_versions(), "commit": commit()},
            "machine": machine(),
        }
    )


def _confidence(
    method: MethodOptions, fit: "Fit | None", recognition: "Recognition", ground_truth: GroundTruth
) -> dict[str, Any]:
    """What became of the wish for a calibrated confidence; nothing without it."""
    if method.confidence != "calibrated":
        return {}
    if fit is None:
        return {"confidence": {"is_used": False, "plain_gap": None, "calibrated_gap": None}}
    said: dict[str, Any] = {"is_used": fit.gains, "n_background": fit.n_background}
    said |= {"plain_gap": fit.plain_gap, "calibrated_gap": fit.calibrated_gap}
    if fit.gains:
        cases = recognition.cases(ground_truth)
        said["calibration"] = dataclasses.asdict(fit.calibration)
        said["calibration_error"] = {split: calibration_error(*case) for split, case in cases.items()}
    return {"confidence": said}


def _notes(opened: "Descriptors", recognition: "Recognition", synthetic: bool, dim: int | None) -> list[str]:
    """What a reader must know so as not to misread the figures; ``dim`` is the width asked of the whitening."""
    from metilr.retrieval.knn import K_GRID

    notes = ["the demo museum is synthetic: its figures say nothing about real exhibits"] if synthetic else []
    sessions = [session for origin in opened.origins for session in origin.get("made_with", [])]
    if any(session.get("weights_from", {}).get("source") == "random" for session in sessions):
        notes.append("RANDOM WEIGHTS: the backbone was not trained, its figures mean nothing")
    parts = [part for origin in opened.origins for part in (origin, *origin.get("views", []))]
    if any(len(part.get("made_with", [])) > 1 for part in parts):
        notes.append("the descriptors were made in several goes with different devices or library versions")
    whitening = recognition.whitening
    if dim is None and whitening is not None and not isinstance(whitening, LearnedWhitening):
        support = f"instead of {DEFAULT_DIM}: {whitening.n:,} database images support no more"
        is_narrow = whitening.dim == whitening.supported_dim < min(DEFAULT_DIM, opened.width)
        notes += [f"whitened to {amount(whitening.dim, 'dimension')} {support}"] if is_narrow else []
    k_grid = recognition.tuning.k_grid if recognition.tuning else ()
    if len(k_grid) > 1 and k_grid[-1] < K_GRID[-1]:
        notes.append(f"the grid of k ends at {k_grid[-1]}: a larger k passes the database's rows")
    skipped = {split: int((~opened.is_valid[split]).sum()) for split in ("database", *QUERY_FILES)}
    if any(skipped.values()):
        parts = [f"{n:,} of {len(opened.is_valid[split]):,} in {split}" for split, n in skipped.items() if n]
        left_out = f"were left out: {', '.join(parts)} (see skipped_images)"
        notes.append(f"images that are missing, cannot be decoded or are too small {left_out}")
    return notes


def _model(origins: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What made the descriptors: the model's settings, or several sources' where they were concatenated."""
    if len(origins) > 1:
        return {"concatenated": [dict(origin) for origin in origins]}
    [origin] = origins
    return {**origin.get("model", {}), **{k: v for k, v in origin.items() if k not in ("model", "ground_truth")}}


def _whitening(whitening: PCAWhitening | None, source: str) -> dict[str, Any] | None:
    if whitening is None:
        return None
    return {
        "source": {"pca": "learned on the database", "learned": "learned from pairs"}.get(source, Path(source).name),
        "sha256": whitening.sha256(),
        "dim": whitening.dim,
        "shrinkage": whitening.shrinkage,
        "learned_on": whitening.n,
        **({"pairs": whitening.n_pairs} if isinstance(whitening, LearnedWhitening) else {}),
        "supported_dim": whitening.supported_dim,
    }


def skipped_images(opened: "Descriptors", ground_truth: GroundTruth) -> list[dict[str, str]]:
    """Each image that is missing, cannot be decoded or is too small for the model: its split, path and reason."""
    skipped = []
    for split, paths in ground_truth.paths.items():
        for i in np.flatnonzero(~opened.is_valid[split]):
            file = ground_truth.image(paths[i])
            reason = f"{file}: was too small for the model, or could not be decoded, when its descriptor was to be made"
            try:
                load_image(file)
            except BadImageError as error:
                reason = f"{file}: cannot be decoded ({error.reason})"
            skipped.append({"split": split, "path": paths[i], "reason": reason})
    return skipped


def write_answers(output: Path, ground_truth: GroundTruth, recognition: "Recognition") -> list[Path]:
    """Write the predictions and the whitening; return the files of the run so far."""
    files = [output / "predictions" / f"{split}.csv" for split in QUERY_FILES]
    (output / "predictions").mkdir(exist_ok=True)
    for file in files:
        with named(file), file.open("w", newline="", encoding="utf-8") as stream:
            stream.write(as_csv(_predictions(file.stem, ground_truth, recognition)))
    if recognition.whitening is not None:
        files.append(output / "whitening.npz")
        recognition.whitening.save(files[-1])
    return [*files, output / "config.yaml"]


def _predictions(split: str, ground_truth: GroundTruth, recognition: "Recognition") -> list[Sequence[object]]:
    """Header and lines of a split's predictions; what there is not, such as a distractor's exhibit, is empty."""
    from metilr.geometry.evidence import inlier_lead, inliers_of_answers

    answers, target, paths = recognition.answers[split], ground_truth.labels[split], ground_truth.paths
    exhibits, images = ["", *ground_truth.exhibit_ids.tolist()], ["", *paths["database"]]  # the first of number -1
    columns: list[Sequence[object]] = [
        paths[split],
        [exhibits[label + 1] for label in target.tolist()],
        [exhibits[label + 1] for label in answers.labels.tolist()],
        answers.log_confidence.tolist(),
        np.exp(answers.log_confidence).tolist(),
        ["" if np.isnan(similarity) else similarity for similarity in answers.similarity.tolist()],
        [images[row + 1] for row in answers.nearest.tolist()],
        ((target != DISTRACTOR) & (answers.labels == target)).astype(int).tolist(),
    ]
    if recognition.checked is None:
        return [PREDICTION_COLUMNS, *zip(*columns, strict=True)]
    checked = answers, recognition.checked[split]
    columns += [inliers_of_answers(*checked).tolist(), inlier_lead(*checked).tolist()]
    return [(*PREDICTION_COLUMNS, *CHECK_COLUMNS), *zip(*columns, strict=True)]
