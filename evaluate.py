"""Measure how well a model recognises exhibits: ``python evaluate.py --help``."""

from metilr.cli import run_command

if __name__ == "__main__":
    run_command("metilr.commands.evaluate:evaluate")
