"""Who speaks for all: by torchrun's and SLURM's own variables, and nobody else's."""

import pytest

from metilr.launch import has_launcher, launched_as_first

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
