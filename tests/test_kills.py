"""Killed at any operation and run again: the same store, figures, weights and losses as without the kill.

Operations are what a run does to files (openings, rows, fsyncs, renamings, ...) and its optimizer steps; the kill comes
before one, or in the middle of a row's or a checkpoint's bytes. The points are drawn by a seed: of each kind of
operation equally many, from all parts of a clean run.
"""

import csv
import json
import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.forks import Forks, Outcome
from tests.museum import write_museum

POINTS = {"evaluate": 28, "train": 25}
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


@pytest.fixture(scope="module")
def place(forks, tmp_path_factory) -> Place:
    place = Place(forks, tmp_path_factory.mktemp("kills"))
    for outcome in place.clean.values():
        assert outcome.status == 0, outcome.printed
    return place


def point(operations: Sequence[str], i: int, n_points: int) -> int:
    """The i-th kill point of a run: an operation's number."""
    kinds = sorted({line.split()[0] for line in operations})
    of_kind = [number for number, line in enumerate(operations) if line.split()[0] == kinds[i % len(kinds)]]
    share = (i // len(kinds) + random.Random(i).random()) / (n_points / len(kinds))  # of the kind's operations
    return of_kind[min(int(share * len(of_kind)), len(of_kind) - 1)]


@pytest.mark.parametrize("i", range(POINTS["evaluate"]))
def test_a_killed_evaluation_is_continued_to_the_same_bytes(place, i):
    operations, name = place.clean["evaluate"].operations, f"evaluate_{i}"
    killed = place.run("evaluate", name, at=point(operations, i, POINTS["evaluate"]))
    assert killed.status == -signal.SIGKILL, killed.printed
    if not (place.folder / name / "out/results.json").exists():  # results come last: then all is there
        again = place.run("evaluate", name)
        assert again.status == 0, (killed.operations[-1], again.printed)
    assert_same_evaluation(place.folder / name, place.folder / "clean_evaluate")
    shutil.rmtree(place.folder / name)


@pytest.mark.parametrize("i", range(POINTS["train"]))
def test_a_killed_training_is_continued_to_the_same_weights_and_losses(place, i):
    operations, name = place.clean["train"].operations, f"train_{i}"
    killed = place.run("train", name, at=point(operations, i, POINTS["train"]))
    assert killed.status == -signal.SIGKILL, killed.printed
    if not (place.folder / name / "out/finished").exists():
        again = place.run("train", name)
        assert again.status == 0, (killed.operations[-1], again.printed)
    assert_same_training(place.folder / name / "out", place.folder / "clean_train/out")
    shutil.rmtree(place.folder / name)


@pytest.mark.parametrize("name", POINTS)
def test_a_run_killed_before_its_first_file_has_a_name(place, name):
    """A folder with nothing but a temporary file is no folder of somebody else's."""
    operations = place.clean[name].operations
    at = next(i for i, line in enumerate(operations) if line.startswith("rename .config.yaml."))
    assert place.run(name, "first", at=at).status == -signal.SIGKILL
    again = place.run(name, "first", at=at + 10)  # past the check
    assert again.status == -signal.SIGKILL, again.printed
    shutil.rmtree(place.folder / "first")


@pytest.mark.parametrize("name", POINTS)
def test_a_run_killed_again_and_again_gets_on(place, name):
    """Each time after fewer operations than a whole run has."""
    clean, kills = place.folder / f"clean_{name}", 0
    while (outcome := place.run(name, "again", at=len(place.clean[name].operations) * 4 // 5)).status:
        assert outcome.status == -signal.SIGKILL, outcome.printed
        kills += 1
        assert kills < 10
    assert kills > 0
    if name == "evaluate":
        assert_same_evaluation(place.folder / "again", clean)
    else:
        assert_same_training(place.folder / "again/out", clean / "out")
    shutil.rmtree(place.folder / "again")


@pytest.mark.parametrize("name", POINTS)
def test_what_gets_a_name_is_on_disk_before_and_the_name_soon_after(place, name):
    """A machine that goes down does what a kill does not: it forgets what was not flushed."""
    operations = [line.split() for line in place.clean[name].operations]
    moved = [i for i, (kind, *_) in enumerate(operations) if kind in ("rename", "link")]
    assert moved
    for i in moved:
        assert ["fsync", operations[i][1]] in operations[:i], operations[i]
        if operations[i][0] == "rename":
            assert operations[i + 1][0] == "open" and operations[i + 2] == ["fsync", operations[i + 1][1]]


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
