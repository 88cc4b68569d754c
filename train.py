"""Fine-tune a model on a museum's own images: ``python train.py --help``."""

from metilr.cli import run_main

if __name__ == "__main__":
    run_main("metilr.training.cli:train")
