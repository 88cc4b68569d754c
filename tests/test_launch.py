"""Who speaks for all, by torchrun's and SLURM's own variables; and what a command leaves in its process."""

import os
import signal
from typing import Any

import pytest
import torch
from lightning_utilities.core.rank_zero import rank_zero_only

from metilr.cli import run_main
from metilr.distributed import has_launcher, launched_as_first
from metilr.training.module import FineTuning
from tests.small_runs import TRAIN

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}
SRUN = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "evaluate"}


@pytest.mark.parametrize(
    ("variables", "has", "first"),
    [
        ({}, False, True),
        ({"RANK": "1"}, False, True),  # a variable that others use too
        ({**TORCHRUN, "RANK": "0"}, True, True),
        ({**TORCHRUN, "RANK": "1"}, True, False),
        ({**SRUN, "SLURM_PROCID": "0"}, True, True),
        ({**SRUN, "SLURM_PROCID": "1"}, True, False),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash", "SLURM_PROCID": "0"}, False, True),  # an interactive job
    ],
)
def test_first_process(monkeypatch, variables, has, first):
    for name in ("RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_NAME", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (has_launcher(), launched_as_first()) == (has, first)


def state_of_process() -> dict[str, Any]:
    return {
        "variables": dict(os.environ),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "rank": getattr(rank_zero_only, "rank", None),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
    }


def test_an_interrupted_training_leaves_nothing_to_the_next_command(tiny_museum, tmp_path, monkeypatch):
    def interrupt(module):
        rank_zero_only.rank, torch.backends.cudnn.benchmark = 1, True
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FineTuning, "on_train_epoch_start", interrupt)
    options = [*TRAIN[1:], "--data.root", tiny_museum, "--trainer.deterministic", "true"]
    before = state_of_process()
    with pytest.raises(SystemExit):
        run_main("metilr.training.cli:train", [*map(str, options)], "train.py")
    assert state_of_process() == before
