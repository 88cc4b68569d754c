"""A run that is killed, fails with its disk or its processes, or meets another: it says so in one line, and goes on.

Killed at any operation and run again, it leaves the same store, figures, weights and losses as without the kill.
Operations are what a run does to files (openings, rows, fsyncs, renamings, ...) and its optimizer steps; the kill comes
before one, or in the middle of a row's or a checkpoint's bytes. The points are drawn by a seed: of each kind of
operation equally many, from all parts of a clean run.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from metilr.files import alone_in
from tests.small_runs import assert_same_run, assert_same_store

POINTS = {"evaluate": 8, "train": 6}
MINUTE = 60  # seconds after which at the latest a run says that one of its processes has died
FAULTS = [  # one that goes on, and one that passes, of each command
    ("evaluate", "row", "ENOSPC", True), ("evaluate", "rename", "EIO", False), ("evaluate", "fsync", "ESTALE", True),
    ("train", "save", "ENOSPC", False),
]  # fmt: skip


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


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


WRITTEN = [("whitening.npz", 0), ("gallery.js", 1), ("results.json", 0)]


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


def test_a_training_killed_while_it_removes_old_descriptors(place):
    at = max(i for i, line in enumerate(place.clean["train"].operations) if line == "remove database.npy")
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


@pytest.mark.parametrize(("name", "kind", "error", "lasting"), FAULTS)
def test_a_disk_that_fails_once_or_from_then_on(place, name, kind, error, lasting):
    numbers = [i for i, line in enumerate(place.clean[name].operations) if line.startswith(f"{kind} ")]
    failed = place.run(name, "failed", at=random.Random(kind).choice(numbers), fault=error, lasting=lasting)
    assert failed.error.startswith(f"{name}.py: error: ")  # one line, no traceback
    again = place.run(name, "failed")
    assert again.status == 0, again.printed
    assert_same_run(name, place.folder / "failed", place.folder / f"clean_{name}")
    shutil.rmtree(place.folder / "failed")


VANISHES = """
from pathlib import Path
from metilr.data import views as images
load, loaded = images.load_image, []

def vanish(path, *arguments, **options):
    loaded.append(path)
    if len(loaded) == 6:
        Path("museum/images").rename("museum/gone")
    return load(path, *arguments, **options)

images.load_image = vanish
"""


def test_a_disk_of_images_that_goes_is_no_reason_to_leave_them_out(place):
    folder = place.folder / "vanishing"
    shutil.copytree(place.folder / "museum", folder / "museum")
    command = [*place.commands["evaluate"], "--root", "museum", "--bad_images", "skip"]
    gone = place.forks.run(folder, command, VANISHES)
    assert ".jpg: has vanished during the run" in gone.error
    assert "museum/images: not one of the images is there" in place.forks.run(folder, command).error
    (folder / "museum/gone").rename(folder / "museum/images")
    assert place.forks.run(folder, command).status == 0
    assert_same_store(folder / "store", place.folder / "clean_evaluate/store")
    shutil.rmtree(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here ({mounted.stderr.decode().strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_with_more_room_each_time(place, small_disk):
    """The disk ends in the middle of one file after another; what is done stays, and in the end all is there."""
    said = []
    while (outcome := place.forks.run(small_disk / "run", place.commands["evaluate"])).status:
        assert "No space left on device" in outcome.error
        said.append(outcome.error)
        kilobytes = shutil.disk_usage(small_disk).used // 1024 + 8 * len(said)
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", small_disk], check=True)
        assert len(said) < 12
    assert any("cannot reserve" in line for line in said) and "store" not in said[-1]
    assert_same_run("evaluate", small_disk / "run", place.folder / "clean_evaluate")


WORKER_DIES = """
import os, signal
from torch.utils.data import get_worker_info
from metilr.data import views as images
from metilr.training import augmentations
load = images.load_image

def die(path, *arguments, **options):
    if get_worker_info() is not None and {where}:
        open("died", "w").close()
        {how}
    return load(path, *arguments, **options)

images.load_image = augmentations.load_image = die
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
FAILS = "raise OSError(5, 'Input/output error', str(path))"


@pytest.mark.parametrize(
    ("name", "where", "option", "how"),
    [
        ("evaluate", '"val" in path.name', "--num_workers", KILLED),
        ("evaluate", '"val" in path.name', "--num_workers", FAILS),
        ("train", "not arguments", "--data.num_workers", KILLED),  # while it trains
    ],
)
def test_a_decoding_process_that_fails(place, name, where, option, how):
    command = [*place.commands[name], option, 1]
    started = place.forks.start(place.folder / "failed", command, setup=WORKER_DIES.format(where=where, how=how))
    failed = place.forks.wait(started, since=place.folder / "failed/died")
    assert 0 < failed.seconds < MINUTE
    if how == KILLED:
        assert "a decoding process" in failed.error and "num_workers" in failed.error
    else:
        assert ".jpg" in failed.error and "Input/output error" in failed.error
    assert "continue" in failed.error
    shutil.rmtree(place.folder / "failed")


RANK_DIES = """
import os, signal
import metilr.extraction.describe as extraction
from metilr.extraction.module import DescriptorWriter
from pytorch_lightning.strategies import DDPStrategy
extraction.DDPStrategy = lambda **options: DDPStrategy(**{**options, "start_method": "fork"})
write = DescriptorWriter.write_on_batch_end

def die(self, trainer, *arguments):
    if trainer.global_rank == 1:
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, trainer, *arguments)

DescriptorWriter.write_on_batch_end = die
"""


def test_one_of_two_describing_processes_is_killed(place):
    command = [*place.commands["evaluate"], "--devices", 2]
    started = place.forks.start(place.folder / "failed", command, setup=RANK_DIES)
    failed = place.forks.wait(started, since=place.folder / "failed/died")
    assert 0 < failed.seconds < MINUTE
    assert "a process of this run was ended from outside" in failed.error
    again = place.run("evaluate", "failed")
    assert again.status == 0, again.printed
    shutil.rmtree(place.folder / "failed")


WAITS_FOR_EVER = RANK_DIES.replace(
    "os.kill(os.getpid(), signal.SIGKILL)",
    """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a collective, which no signal reaches
        open("pid", "w").write(str(os.getpid()))
        import time
        time.sleep(600)
""",
)


def test_a_describing_process_does_not_outlive_its_command(place):
    folder = place.folder / "failed"
    command = [*place.commands["evaluate"], "--devices", 2]
    started = place.forks.start(folder, command, WAITS_FOR_EVER)
    wait_for(lambda: (folder / "pid").exists() and (folder / "pid").read_text())
    status = Path(f"/proc/{(folder / 'pid').read_text()}/status")
    os.kill(started[0], signal.SIGKILL)
    assert place.forks.wait(started).status == -signal.SIGKILL
    wait_for(lambda: not status.exists() or "zombie" in status.read_text(), 60)
    shutil.rmtree(folder)


DIES_IN_ITS_SECOND_STEP = """
import os, signal
from torch.optim.optimizer import register_optimizer_step_pre_hook
steps = []

def die(*_):
    steps.append(1)
    if len(steps) == 2:
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

register_optimizer_step_pre_hook(die)
"""


def test_one_of_two_training_processes_is_killed(place):
    """As torchrun starts them; the second one dies in its second step."""
    folder = place.folder / "failed"
    command = [*place.commands["train"], "--trainer.devices", 2]
    started = place.forks.start_as_torchrun(folder, command, ["", DIES_IN_ITS_SECOND_STEP])
    first, second = (place.forks.wait(one, since=folder / "died") for one in started)
    assert 0 < first.seconds < MINUTE
    assert second.status == -signal.SIGKILL, second.printed
    assert "a process of this run was ended from outside" in first.error
    shutil.rmtree(folder)


WAITS = """
import time
from pathlib import Path
from metilr.extraction.module import DescriptorWriter
from metilr.training.module import FineTuning
write, step = DescriptorWriter.write_on_batch_end, FineTuning.training_step

def wait():
    Path("waits").touch()
    while not Path("go").exists():
        time.sleep(0.01)

DescriptorWriter.write_on_batch_end = lambda *arguments: (wait(), write(*arguments))
FineTuning.training_step = lambda *arguments: (wait(), step(*arguments))[1]
"""


def started(place, name: str, folder: Path):
    """A run that waits in its first batch for a file called go."""
    run = place.forks.start(folder, place.commands[name], WAITS)
    wait_for((folder / "waits").exists)
    return run


@pytest.mark.parametrize(
    ("name", "other", "held"),
    [("evaluate", ["--output", "other"], "store"), ("evaluate", ["--store", "other", "--k", 3], "out"),
     ("train", ["--model.lr", "0.5"], "out")],
    ids=["one store", "one output", "one training"],
)  # fmt: skip
def test_two_commands_at_once(place, name, other, held):
    folder = place.folder / "two"
    first = started(place, name, folder)
    second = place.forks.run(folder, [*place.commands[name], *other])
    assert f"{held}: another run is at work there" in second.error
    assert held == "store" or ("name another output" in second.error and not (folder / "other").exists())
    (folder / "go").touch()
    assert place.forks.wait(first).status == 0
    if held == "store":  # whole now, it is read by any number
        after = place.forks.run(folder, [*place.commands[name], *other])
        assert after.status == 0 and "reusing 22 rows" in after.printed
    assert_same_run(name, folder, place.folder / f"clean_{name}")
    shutil.rmtree(folder)


def test_trainings_that_want_one_cache_of_views(place):
    folder = place.folder / "two"
    frozen = ["--model.freeze_backbone", "true", "--data.n_views", 1, "--data.cache_views", "true"]
    command = [*place.commands["train"], *frozen, "--trainer.max_epochs", 1]
    made = place.forks.run(folder, command)
    assert made.status == 0, made.printed
    store = next((folder / "runs/views").iterdir())
    with alone_in(store, "another run", "stop it"):
        assert place.forks.run(folder, [*command, "--output", "finished"]).status == 0  # nothing is to be made
        manifest = (store / "manifest.json").read_text()
        (store / "manifest.json").write_text(manifest.replace('"complete": true', '"complete": false'))
        second = place.forks.run(folder, [*command, "--output", "unfinished"])
    assert f"runs/views/{store.name}: another run is at work there" in second.error
    shutil.rmtree(folder)
