"""Fine-tune a model on a museum's own images: ``python train.py --help``."""

import os

from metilr.cli import run_main

# Before PyTorch loads OpenMP: threads that wait by spinning slow down a busy machine many times over.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if __name__ == "__main__":
    run_main("metilr.train_command:train")
