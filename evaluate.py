"""Measure how well a model recognises exhibits: ``python evaluate.py --help``."""

import os

from metilr.cli import run_command

# Before PyTorch loads OpenMP: threads that wait by spinning slow down a busy machine many times over.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if __name__ == "__main__":
    run_command("metilr.evaluation:evaluate")
