"""Small runs of both commands, clean ones to compare with, and what it means to be the same."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metilr.cli import call
from metilr.collection.index import index as index_command
from metilr.commands import evaluate as command
from metilr.evaluation.results import Results
from metilr.retrieval.confidence import Calibration, Fit, feature_names
from tests.forks import Forks, Outcome
from tests.museum import write_museum

EVALUATE = [
    "evaluate", "--backbone", "timm/test_resnet", "--weights", "random", "--accelerator", "cpu", "--num_workers", 0,
    "--batch_size", 4, "--scales", 1, "--store", "store", "--output", "out", "--report", "false", "--wandb", "off",
]  # fmt: skip
TRAIN = [
    "train", "--model.backbone", "timm/test_resnet", "--model.weights", "random", "--model.projector_dim", 4,
    "--data.pairing", "syn+neg", "--data.first_view", "RandomCrop", "--data.first_view.size", 32,
    "--data.second_view", "RandomCrop", "--data.second_view.size", 32, "--data.batch_pairs", 8,
    "--data.num_workers", 0, "--trainer.accelerator", "cpu", "--trainer.precision", 32, "--trainer.max_epochs", 2,
    "--trainer.enable_progress_bar", "false", "--validate_first", "false", "--wandb", "off", "--output", "out",
]  # fmt: skip


def index(folder: Path, output: Path, **options: Any) -> Path | None:
    """Index a folder with flat options, as the command takes them."""
    return call(index_command, {"source": folder, "output": output, **options})


def evaluate(root: Path | None = None, **options: Any) -> Results | None:
    """An evaluation with options as the command line has them."""
    return call(command.evaluate, {"root": root, **options})


def pretend_fit(monkeypatch: pytest.MonkeyPatch, gains: bool = True, n_background: int = 0) -> Calibration:
    """Let a calibrated confidence be this one; a tiny museum's val has too few queries to fit any."""
    mean, coefficients = [0.5, 0.1, 0.4, 0.5, 0.4, 0.3], [1.25, 0.5, -0.75, -1.5, -0.5, 0.25]
    names = feature_names(False, n_background)
    n = len(names)
    calibration = Calibration(names, mean[:n], [0.2] * n, coefficients[:n], -0.3, 0.1)
    fit = Fit(calibration, 0.4, 0.4567 if gains else 0.3, n_background)
    monkeypatch.setattr("metilr.evaluation.calibration.fit_calibration", lambda *_: fit)
    return calibration


class Place:
    """A museum, and clean runs in it to compare with."""

    def __init__(self, forks: Forks, folder: Path) -> None:
        self.forks, self.folder = forks, folder
        museum = write_museum(folder / "museum")
        self.commands: dict[str, Sequence[object]] = {
            "evaluate": [*EVALUATE, "--root", museum], "train": [*TRAIN, "--data.root", museum],
        }  # fmt: skip
        self.clean = {name: self.run(name, f"clean_{name}", at=None) for name in self.commands}

    def run(self, name: str, folder: str, **fault: Any) -> Outcome:
        fault = {"fault": "kill", **fault} if fault else {}
        return self.forks.run(self.folder / folder, self.commands[name], **fault)


def assert_same_run(name: str, found: Path, clean: Path) -> None:
    """Whether a run of a command in one folder left what a clean one left in another."""
    if name == "evaluate":
        assert_same_evaluation(found, clean)
    else:
        assert_same_training(found / "out", clean / "out")


def assert_same_evaluation(found: Path, clean: Path) -> None:
    assert_same_store(found / "store", clean / "store")
    for file in ("predictions/val.csv", "predictions/test.csv", "config.yaml"):
        assert (found / "out" / file).read_text() == (clean / "out" / file).read_text().replace(str(clean), str(found))
    results = [json.loads((folder / "out/results.json").read_text()) for folder in (found, clean)]
    for part in ("val", "test", "knn", "whitening", "data"):
        assert results[0][part] == results[1][part]
    assert no_leftovers(found)


def assert_same_store(found: Path, clean: Path) -> None:
    files = sorted(file.name for file in clean.iterdir() if file.name != ".lock")
    assert sorted(file.name for file in found.iterdir() if file.name != ".lock") == files
    for file in files:
        assert (found / file).read_bytes() == (clean / file).read_bytes(), file


def assert_same_training(found: Path, clean: Path) -> None:
    for file in ("last.ckpt", "best.ckpt"):
        ours, theirs = (torch.load(folder / file, weights_only=True) for folder in (found, clean))
        assert (ours["epoch"], ours["global_step"]) == (theirs["epoch"], theirs["global_step"])
        assert_close(ours["state_dict"], theirs["state_dict"])
        assert_close(ours["optimizer_states"], theirs["optimizer_states"])
    assert losses(found) == pytest.approx(losses(clean), abs=1e-6)
    assert_same_store(found / "descriptors", clean / "descriptors")
    assert (found / "config.yaml").read_bytes() == (clean / "config.yaml").read_bytes()
    assert no_leftovers(found)


def assert_close(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    else:
        assert ours == theirs


def losses(folder: Path) -> dict[str, float]:
    """Loss by step; of a step that was taken again the later one."""
    found = {}
    for file in sorted(folder.glob("csv*/metrics.csv"), key=lambda file: (len(file.parent.name), file)):
        with file.open(newline="") as stream:
            found.update({row["step"]: float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]})
    assert found and all(np.isfinite(list(found.values())))
    return found


def no_leftovers(folder: Path) -> bool:
    """Whether no temporary file is left."""
    return not [file for file in folder.rglob(".*") if file.name != ".lock"]
