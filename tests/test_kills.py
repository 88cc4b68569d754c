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

from tests.small_runs import assert_same_run

POINTS = {"evaluate": 10, "train": 8}


def point(operations: Sequence[str], i: int, n_points: int) -> int:
    """The i-th kill point of a run: an operation's number."""
    kinds = sorted({line.split()[0] for line in operations})
    of_kind = [number for number, line in enumerate(operations) if line.split()[0] == kinds[i % len(kinds)]]
    share = (i // len(kinds) + random.Random(i).random()) / (n_points / len(kinds))  # of the kind's operations
    return of_kind[min(int(share * len(of_kind)), len(of_kind) - 1)]


def go_on(place, name: str, folder: str) -> None:
    """Run it again, unless all was done: then everything is as without the kill."""
    ended = {"evaluate": "out/results.json", "train": "out/finished"}[name]  # comes last
    if not (place.folder / folder / ended).exists():
        again = place.run(name, folder)
        assert again.status == 0, again.printed
    assert_same_run(name, place.folder / folder, place.folder / f"clean_{name}")
    shutil.rmtree(place.folder / folder)


@pytest.mark.parametrize(("name", "i"), [(name, i) for name, n in POINTS.items() for i in range(n)])
def test_a_killed_run_is_continued_to_the_same_bytes(place, name, i):
    killed = place.run(name, "killed", at=point(place.clean[name].operations, i, POINTS[name]))
    assert killed.status == -signal.SIGKILL, killed.printed
    go_on(place, name, "killed")


WRITTEN = [("val.csv", 1), ("whitening.npz", 0), ("gallery.js", 1), ("index.html", 0), ("results.json", 0)]


@pytest.fixture(scope="module")
def reporting(place):
    """An evaluation with a report page, from the rows of the clean run; what it does undisturbed."""
    store = place.folder / "clean_evaluate/store"
    command = [*place.commands["evaluate"], "--report", "true", "--report_pictures", 1, "--store", store]
    clean = place.forks.run(place.folder / "clean_report", command, fault="kill", at=None)
    assert clean.status == 0, clean.printed
    return command, clean.operations


@pytest.mark.parametrize(("file", "later"), WRITTEN)
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


@pytest.mark.parametrize("name", POINTS)
def test_a_run_killed_before_its_first_file_has_a_name(place, name):
    """A folder with nothing but a temporary file is no folder of somebody else's."""
    operations = place.clean[name].operations
    at = next(i for i, line in enumerate(operations) if line.startswith("rename .config.yaml."))
    assert place.run(name, "first", at=at).status == -signal.SIGKILL
    again = place.run(name, "first", at=at + 10)  # past the check
    assert again.status == -signal.SIGKILL, again.printed
    shutil.rmtree(place.folder / "first")


@pytest.mark.parametrize("file", ["manifest.json", "database.npy"])
def test_a_training_killed_while_it_removes_old_descriptors(place, file):
    at = max(i for i, line in enumerate(place.clean["train"].operations) if line == f"remove {file}")
    assert place.run("train", "removing", at=at).status == -signal.SIGKILL
    go_on(place, "train", "removing")


@pytest.mark.parametrize("name", POINTS)
def test_a_run_killed_again_and_again_gets_on(place, name):
    """Each time after fewer operations than a whole run has."""
    kills = 0
    while (outcome := place.run(name, "again", at=len(place.clean[name].operations) * 4 // 5)).status:
        assert outcome.status == -signal.SIGKILL, outcome.printed
        kills += 1
        assert kills < 10
    assert kills > 0
    go_on(place, name, "again")
