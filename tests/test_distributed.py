"""Decoding processes that can hardly pass on what they decode, and scripts that processes run once more."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from metilr.distributed import faults_in_one_line, start_worker

BATCHES: list[int] = [0, 1, 2, 3]


def decoded(number):
    return torch.full((2, 3), number)


class Full:
    def __reduce__(self):
        raise OSError(28, "No space left on device", "/dev/shm/torch_1")


def never_arrives(number):
    return Full() if number == 2 else decoded(number)


def batches(collate):
    loader = DataLoader(BATCHES, batch_size=None, collate_fn=collate, num_workers=2, worker_init_fn=start_worker)
    with faults_in_one_line():
        return list(loader)


@pytest.mark.parametrize(("free", "is_shared"), [(2**40, True), (64 * 2**20, False)])
def test_batches_arrive_whole_however_little_memory_can_be_shared(monkeypatch, free, is_shared):
    monkeypatch.setattr("metilr.distributed.free_shared_memory", lambda: free)
    arrived = batches(decoded)
    assert [batch.tolist() for batch in arrived] == [[[number] * 3] * 2 for number in BATCHES]
    assert [batch.is_shared() for batch in arrived] == [is_shared] * 4


def test_a_decoding_process_that_cannot_pass_a_batch_on_ends_the_run():
    command = [sys.executable, "-c", "from tests.test_distributed import *; batches(never_arrives)"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("metilr.errors.UserError: ")]
    assert "No space left on device" in line and "is shared memory (/dev/shm) full? Then take fewer num_workers" in line


SCRIPT = """
from metilr import ExtractionOptions, ModelOptions, evaluate

print("begins")
model = ModelOptions(backbone="timm/test_resnet", weights="random", scales=[1.0])
evaluate("museum", model=model, extraction=ExtractionOptions(accelerator="cpu", devices=2, num_workers=0))
"""


RUNS_THE_SCRIPT = "import os, runpy; runpy.run_path(os.path.abspath('script.py'), run_name='__main__')"


def test_a_script_that_its_processes_would_run_again_is_told_to_guard_its_main_part(tiny_museum, tmp_path, forks):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = forks.run(tmp_path, ["evaluate"], RUNS_THE_SCRIPT)
    assert done.status == 1 and done.printed.count("Traceback") == 1, done.printed
    assert done.printed.count("begins") >= 2  # a process that began is ended with the other
    assert 'if __name__ == "__main__":' in done.printed.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="where loaders fork")
def test_a_worker_begins_after_opencv_has_run_in_its_parent():
    """Its threads are not there after a fork: OpenCV may not wait for them."""
    cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (1500, 1500), interpolation=cv2.INTER_AREA)
    worker = multiprocessing.get_context("fork").Process(target=start_worker, args=(0,))
    worker.start()
    worker.join(60)
    is_stuck = worker.is_alive()
    worker.kill()
    assert not is_stuck and worker.exitcode == 0
