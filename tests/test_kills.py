"""Killed at any operation and run again: the same store, figures, weights and losses as without the kill.

Operations are what a run does to files (openings, rows, fsyncs, renamings, ...) and its optimizer steps; the kill comes
before one, or in the middle of a row's or a checkpoint's bytes. The points are drawn by a seed: of each kind of
operation equally many, from all parts of a clean run.
"""

import random
import shutil
import signal
from collections.abc import Sequence

import pytest

from tests.small_runs import assert_same_evaluation, assert_same_training

POINTS = {"evaluate": 28, "train": 22}


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


WRITTEN = ("val.csv", "whitening.npz", "gallery.js", "index.html", "results.json")


@pytest.fixture(scope="module")
def reporting(place):
    """An evaluation with a report page, from the rows of the clean run; what it does undisturbed."""
    store = place.folder / "clean_evaluate/store"
    command = [*place.commands["evaluate"], "--report", "true", "--report_pictures", 1, "--store", store]
    clean = place.forks.run(place.folder / "clean_report", command, fault="kill", at=None)
    assert clean.status == 0, clean.printed
    return command, clean.operations


@pytest.mark.parametrize("file", WRITTEN)
@pytest.mark.parametrize("later", [0, 1], ids=["before", "after"])
def test_an_evaluation_killed_while_it_writes_its_results(place, reporting, file, later):
    """With results.json all is there; without it the same command makes all of it."""
    command, operations = reporting
    at = max(i for i, line in enumerate(operations) if file in line) + later
    clean, folder = place.folder / "clean_report/out", place.folder / f"report_{file}_{later}"
    if at < len(operations):
        killed = place.forks.run(folder, command, fault="kill", at=at)
        assert killed.status == -signal.SIGKILL, killed.printed
    if not (folder / "out/results.json").exists():
        again = place.forks.run(folder, command)
        assert again.status == 0, again.printed
    files = [
        sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name != ".lock")
        for out in (folder / "out", clean)
    ]
    assert files[0] == files[1] and "report/index.html" in files[0]
    for name in ("predictions/val.csv", "predictions/test.csv", "report/gallery.js"):
        assert (folder / "out" / name).read_bytes() == (clean / name).read_bytes()
    assert "</html>" in (folder / "out/report/index.html").read_text()
    shutil.rmtree(folder)


def test_what_results_stand_for_is_on_disk_before_them(reporting):
    _, operations = reporting
    last = next(i for i, line in enumerate(operations) if line.startswith("rename .results.json."))
    for file in ("val.csv", "test.csv", "gallery.js", "index.html"):
        assert f"fsync {file}" in operations[:last], file


@pytest.mark.parametrize("name", POINTS)
def test_a_run_killed_before_its_first_file_has_a_name(place, name):
    """A folder with nothing but a temporary file is no folder of somebody else's."""
    operations = place.clean[name].operations
    at = next(i for i, line in enumerate(operations) if line.startswith("rename .config.yaml."))
    assert place.run(name, "first", at=at).status == -signal.SIGKILL
    again = place.run(name, "first", at=at + 10)  # past the check
    assert again.status == -signal.SIGKILL, again.printed
    shutil.rmtree(place.folder / "first")


@pytest.mark.parametrize("file", ["manifest.json", "database.npy", "val.files.npy"])
def test_a_training_killed_while_it_removes_old_descriptors(place, file):
    operations = place.clean["train"].operations
    at = max(i for i, line in enumerate(operations) if line == f"remove {file}")
    assert place.run("train", "removing", at=at).status == -signal.SIGKILL
    again = place.run("train", "removing")
    assert again.status == 0, again.printed
    assert_same_training(place.folder / "removing/out", place.folder / "clean_train/out")
    shutil.rmtree(place.folder / "removing")


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
