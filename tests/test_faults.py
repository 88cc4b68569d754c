"""Disks and processes that fail in the middle of a run: one line that says so, and going on as if nothing had been."""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small_runs import assert_same_run, assert_same_store

ERRORS = ("EIO", "ENOSPC", "ESTALE")
MINUTE = 60  # seconds after which at the latest a run says that one of its processes has died
KINDS = {"evaluate": ("row", "fsync", "allocate", "rename", "open"), "train": ("save", "rmdir", "open")}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in KINDS.items() for kind in kinds])
def test_a_disk_that_fails_once_or_from_then_on(place, name, kind):
    rng = random.Random(kind + name)
    numbers = [i for i, line in enumerate(place.clean[name].operations) if line.startswith(f"{kind} ")]
    fault = {"at": rng.choice(numbers), "fault": rng.choice(ERRORS), "lasting": rng.random() < 0.5}
    failed = place.run(name, "failed", **fault)
    assert failed.error.startswith(f"{name}.py: error: "), fault  # one line, no traceback
    again = place.run(name, "failed")
    assert again.status == 0, again.printed
    assert_same_run(name, place.folder / "failed", place.folder / f"clean_{name}")
    shutil.rmtree(place.folder / "failed")


VANISHES = """
from pathlib import Path
from metilr.data import views as images
load, loaded = images.{function}, []

def vanish(path, *arguments, **options):
    loaded.append(path)
    if len(loaded) == 6:
        Path("museum/images").rename("museum/gone")
    return load(path, *arguments, **options)

images.{function} = vanish
"""


@pytest.mark.parametrize("function", ["load_image", "image_shape"])
def test_a_disk_of_images_that_goes_is_no_reason_to_leave_them_out(place, function):
    folder = place.folder / "vanishing"
    shutil.copytree(place.folder / "museum", folder / "museum")
    command = [*place.commands["evaluate"], "--root", "museum", "--bad_images", "skip"]
    gone = place.forks.run(folder, command, VANISHES.format(function=function))
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


def test_a_full_disk_with_a_little_more_room_each_time(place, small_disk):
    """The disk ends in the middle of one file after another; what is done stays, and in the end all is there."""
    run, said = small_disk / "run", []
    for _ in range(12):
        outcome = place.forks.run(run, place.commands["evaluate"])
        if outcome.status == 0:
            break
        assert "No space left on device" in outcome.error
        assert not (run / "out/results.json").exists()
        said.append(outcome.error)
        leave_free(small_disk, 4 + 4 * len(said))
    assert outcome.status == 0 and len(set(said)) > 2, said
    assert any("cannot reserve" in line for line in said) and "store" not in said[-1]
    assert_same_run("evaluate", run, place.folder / "clean_evaluate")


def leave_free(disk: Path, kilobytes: int) -> None:
    usage = shutil.disk_usage(disk)
    size = f"size={usage.used // 1024 + kilobytes}k"
    subprocess.run(["mount", "-o", f"remount,{size}", disk], check=True)


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
        ("train", '"val" in path.name', "--data.num_workers", KILLED),  # while it describes
        ("train", "not arguments", "--data.num_workers", KILLED),  # while it trains
        ("train", "not arguments", "--data.num_workers", FAILS),
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
extraction._strategy = lambda options: DDPStrategy(start_method="fork", timeout=extraction.PLAN_TIMEOUT)
write = DescriptorWriter.write_on_batch_end

def die(self, trainer, *arguments):
    if trainer.global_rank == {rank}:
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, trainer, *arguments)

DescriptorWriter.write_on_batch_end = die
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_describing_processes_is_killed(place, rank):
    command = [*place.commands["evaluate"], "--devices", 2]
    started = place.forks.start(place.folder / "failed", command, setup=RANK_DIES.format(rank=rank))
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
    started = place.forks.start(folder, command, WAITS_FOR_EVER.format(rank=1))
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        time.sleep(0.01)
    status = Path(f"/proc/{(folder / 'pid').read_text()}/status")
    os.kill(started[0], signal.SIGKILL)
    assert place.forks.wait(started).status == -signal.SIGKILL
    end = time.monotonic() + 60
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.05)
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
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    folder = place.folder / "failed"
    command = [*place.commands["train"], "--trainer.devices", 2]
    started = []
    for rank in (0, 1):
        launched = {
            "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
        }  # fmt: skip
        setup = DIES_IN_ITS_SECOND_STEP if rank else ""
        env = {key: str(value) for key, value in launched.items()}
        started.append(place.forks.start(folder, command, setup, env=env))
    first, second = (place.forks.wait(one, since=folder / "died") for one in started)
    assert 0 < first.seconds < MINUTE
    assert second.status == -signal.SIGKILL, second.printed
    assert "a process of this run was ended from outside" in first.error
    shutil.rmtree(folder)
