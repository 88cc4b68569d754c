"""How much time and memory a step of fine-tuning takes, and how much by PyTorch's plain composition.

    python benchmarks/training.py --root DIR [--steps 4] [--pairs 24] [--size 320] [--threads N]

Trains ``lite0_in`` as configs/train/small_museum.yaml does, on pairs of a data root, with a constant learning rate, by
each way in turn in one run: plain (all maps of a batch kept, BatchNorm on its own) in float32, fused and in parts in
float32, and in bfloat16 where the processor has it. Making the pairs is not counted. Ratios are of wall time, with
PyTorch's own number of threads unless told otherwise. Memory is anonymous, beyond that before the first step, of the
first two ways alone: what comes later uses what the plain way leaves to malloc.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from measuring import PeakMemory, show

from metilr.data.ground_truth import load_ground_truth
from metilr.models.fused import in_parts
from metilr.provenance import has_bfloat16
from metilr.training import FineTuningOptions
from metilr.training.augmentations import RandomCrop, SimulatedVisit, Views
from metilr.training.module import FineTuning


def main() -> None:
    """Train each way, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ["fused", "plain", "fused, bfloat16"][: 3 if has_bfloat16() else 2]
    trainings = {name: Training() for name in names}
    for step, images in enumerate(batches(options)):
        for name, training in trainings.items():
            training.step(images, name)
        print(f"step {step + 1}: {', '.join(f'{name} {each.seconds[-1]:.1f} s' for name, each in trainings.items())}")
    plain, ours = trainings["plain"], trainings["fused"]
    figures = {
        name: {
            "seconds": round(statistics.median(each.seconds), 2),
            "processor_seconds": round(statistics.median(each.processor_seconds), 2),
            "ratio": round(statistics.median(plain.seconds) / statistics.median(each.seconds), 2),
            "peak_bytes": each.peak if name != "fused, bfloat16" else None,
            "loss": each.losses[-1],
        }
        for name, each in trainings.items()
    }
    difference = max(abs(a - b) for a, b in zip(plain.losses, ours.losses, strict=True))
    columns = ["a step of fine-tuning", "s", "s of a core", "ratio to plain", "GB", "last loss"]
    rows = []
    for name, each in figures.items():
        memory = "-" if each["peak_bytes"] is None else each["peak_bytes"] / 1e9
        rows.append([name, *(each[key] for key in ("seconds", "processor_seconds", "ratio")), memory, each["loss"]])
    show("fine-tuning on a CPU", columns, rows, {"ways": figures, "largest_loss_difference": difference})


class Training:
    """A model and its optimizer, with what its steps took."""

    def __init__(self) -> None:
        self.module = FineTuning(FineTuningOptions())
        self.module.embedder.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=2e-5, weight_decay=0.01)
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []
        self.losses: list[float] = []
        self.peak = 0

    def step(self, images: torch.Tensor, name: str) -> None:
        """Train on images of pairs, ``(2P, 3, H, W)``: all first views, then all second ones."""
        embedder, labels = self.module.embedder, torch.arange(len(images) // 2).repeat(2)
        normalised = embedder.normalise(images).contiguous(memory_format=torch.channels_last)
        with PeakMemory() as memory:
            begun, spent = time.perf_counter(), time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in name):
                embeddings = embedder(normalised) if name == "plain" else in_parts(embedder, normalised)
            assert self.module.loss is not None
            loss = self.module.loss(embeddings, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.seconds.append(time.perf_counter() - begun)
            self.processor_seconds.append(time.process_time() - spent)
        self.peak = max(self.peak, memory.added)
        self.losses.append(loss.item())


def batches(options: argparse.Namespace) -> list[torch.Tensor]:
    """Images of each step's pairs."""
    truth = load_ground_truth(options.root)
    names = truth.paths["database"]
    files = [truth.image(path) for path in names]
    kinds = [Views(files, names, 0, kind) for kind in (RandomCrop(options.size), SimulatedVisit(options.size))]
    rows = [np.arange(step, step + options.pairs) % len(files) for step in range(options.steps)]
    return [torch.cat([views(some, np.full_like(some, step)) for views in kinds]) for step, some in enumerate(rows)]


if __name__ == "__main__":
    main()
