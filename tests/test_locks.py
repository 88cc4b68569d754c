"""One run at a time in a store or an output folder, and no trace of one that was killed."""

import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metilr.errors import UserError
from metilr.files import alone_in
from tests.small_runs import assert_same_run

HOLDER = """
import sys, time
from pathlib import Path
from metilr.files import alone_in
with alone_in(Path(sys.argv[1]), "another run", "stop it"):
    print("held", flush=True)
    time.sleep(600)
"""


def lock(folder: Path):
    return alone_in(folder, "another run", "stop it")


def test_the_second_process_is_told_of_the_first_and_a_killed_one_holds_nothing(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    repository = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=repository) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            with pytest.raises(UserError) as refused, lock(tmp_path):
                pass
            assert str(refused.value) == f"{tmp_path}: another run is at work there; wait for it, or stop it"
        finally:
            holder.kill()
    with lock(tmp_path):
        pass


def test_it_ends_with_the_block_and_with_an_error_in_it(tmp_path):
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    with lock(tmp_path), pytest.raises(UserError), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


def test_a_fork_does_not_hold_it(tmp_path):
    """Workers of a loader live on for seconds when their parent is killed."""
    context = multiprocessing.get_context("fork")
    runs, goes_on = context.Event(), context.Event()
    with lock(tmp_path):
        worker = context.Process(target=lambda: (runs.set(), goes_on.wait()))
        worker.start()
        runs.wait()
    try:
        with lock(tmp_path):
            pass
    finally:
        worker.kill()
        worker.join()


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
    while not (folder / "waits").exists():
        time.sleep(0.01)
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
    with lock(store):
        assert place.forks.run(folder, [*command, "--output", "finished"]).status == 0  # nothing is to be made
        manifest = (store / "manifest.json").read_text()
        (store / "manifest.json").write_text(manifest.replace('"complete": true', '"complete": false'))
        second = place.forks.run(folder, [*command, "--output", "unfinished"])
    assert f"runs/views/{store.name}: another run is at work there" in second.error
    shutil.rmtree(folder)
