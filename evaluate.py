"""Measure how well a model recognises exhibits: ``python evaluate.py --help``."""

import os

# Before PyTorch loads OpenMP: threads that wait by spinning slow down a busy machine many times over.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from metilr.cli import run_command
from metilr.evaluation import evaluate

if __name__ == "__main__":
    run_command(evaluate)
