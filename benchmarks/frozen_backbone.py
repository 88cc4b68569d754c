"""How much time the fast path of a frozen backbone saves: the same projector trained with and without it.

    python benchmarks/frozen_backbone.py --root DIR [--epochs 5] [--views 2]

Both runs draw the same pairs of the same views. Prints a table and a JSON line: seconds of each (whole processes, the
caching included), their ratio, the largest difference of the losses at any step and of the last val GAP, and the
largest difference of the projector's weights beside the largest move that training made.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measuring import Clock, show

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--projector_dim", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds, weights, losses, gaps = {}, {}, {}, {}
        # The last trains with a learning rate of 0: where the weights started.
        for name, cached, rate in (("plain", "false", []), ("fast", "true", []), ("start", "true", ["0"])):
            command = [
                sys.executable, str(REPOSITORY / "train.py"), "--wandb", "off", "--output", name,
                "--config", str(REPOSITORY / "configs/train/projector_only.yaml"),
                "--data.root", str(options.root.resolve()), "--data.cache_views", cached,
                "--data.n_views", str(options.views), "--model.projector_dim", str(options.projector_dim),
                "--trainer.max_epochs", str(options.epochs), "--trainer.enable_progress_bar", "false",
                *(["--model.lr", *rate] if rate else []),
            ]  # fmt: skip
            clock = Clock()
            subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
            seconds[name] = clock()
            state = torch.load(Path(folder) / name / "last.ckpt", weights_only=True)["state_dict"]
            weights[name] = state["embedder.projector.linear.weight"]
            losses[name] = _column(Path(folder) / name, "train/loss")
            gaps[name] = _column(Path(folder) / name, "val/gap")[-1]
    figures = {
        "plain_seconds": round(seconds["plain"], 1),
        "fast_seconds": round(seconds["fast"], 1),
        "ratio": round(seconds["plain"] / seconds["fast"], 2),
        "loss_difference": max(abs(a - b) for a, b in zip(losses["plain"], losses["fast"], strict=True)),
        "val_gap_difference": abs(gaps["plain"] - gaps["fast"]),
        "weight_difference": (weights["plain"] - weights["fast"]).abs().max().item(),
        "weight_move": (weights["plain"] - weights["start"]).abs().max().item(),
    }
    show(
        "a projector behind a frozen backbone",
        ["way", "seconds", "last val GAP"],
        [[name, seconds[name], 100 * gaps[name]] for name in ("plain", "fast")],
        figures,
    )


def _column(run: Path, name: str) -> list[float]:
    with (run / "csv" / "metrics.csv").open(newline="") as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row[name]]


if __name__ == "__main__":
    main()
