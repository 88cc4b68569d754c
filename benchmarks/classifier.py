"""Training class weights at the Met's full size: seconds a step, hours an epoch, memory; all classes, or some a step.

    python benchmarks/classifier.py [--classes 224408] [--anchors 224408] [--batch_pairs 256] [--steps 3]

Made-up features of width 512, as a frozen backbone's are from the cache, through a projector of 512 x 512, and AdamW.
The same ArcFace three times: pytorch-metric-learning's, metilr's, and metilr's with --classes_per_step. An epoch of
--anchors pairs, as many as exhibits with `--data.balance true`, is not run: it is so many times the median step. Memory
is beyond that of the process before.
"""

import argparse
import statistics

import torch
from measuring import Clock, PeakMemory, show
from pytorch_metric_learning.losses import ArcFaceLoss
from torch import nn
from torch.nn import functional as F

from metilr.models.embedder import Projector
from metilr.training import FineTuningOptions
from metilr.training.classifier import Classifier

WIDTH = 512


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=224_408)
    parser.add_argument("--anchors", type=int, default=224_408)
    parser.add_argument("--batch_pairs", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--classes_per_step", type=int, default=8192)
    given = parser.parse_args()
    options = FineTuningOptions(classifier="arcface")
    some = FineTuningOptions(classifier="arcface", classes_per_step=given.classes_per_step)
    margin, scale = options.classifier_margin, options.classifier_scale
    steps_per_epoch = -(-given.anchors // given.batch_pairs)
    figures = {}
    for name, build in (
        ("pytorch-metric-learning", lambda: ArcFaceLoss(given.classes, WIDTH, margin=margin, scale=scale)),
        ("all classes", lambda: Classifier(options, given.classes, WIDTH)),
        ("some classes a step", lambda: Classifier(some, given.classes, WIDTH)),
    ):
        with PeakMemory() as memory:
            seconds = steps_of(build(), given.classes, 2 * given.batch_pairs, given.steps)
        figures[name] = {
            "seconds_a_step": round(seconds, 3),
            "hours_an_epoch": round(seconds * steps_per_epoch / 3600, 2),
            "gigabytes": round(memory.added / 1e9, 2),
        }
    show(
        f"ArcFace, {given.classes:,} x {WIDTH}, {given.batch_pairs} pairs a step",
        ("", "s a step", "hours an epoch", "GB"),
        [(name, *map(str, values.values())) for name, values in figures.items()],
        {"steps_per_epoch": steps_per_epoch, "classes_per_step": given.classes_per_step, **figures},
    )


def steps_of(classifier: nn.Module, n_classes: int, batch_size: int, n: int) -> float:
    """Median seconds of a step, the first, which makes the optimizer's state, left out."""
    projector, generator = Projector(WIDTH, WIDTH), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([*projector.parameters(), *classifier.parameters()], lr=1e-3)
    seconds = []
    for _ in range(n + 1):
        features = F.normalize(torch.randn(batch_size, WIDTH, generator=generator), dim=1)
        labels = torch.randint(n_classes, (batch_size,), generator=generator)
        clock = Clock()
        loss = classifier(projector(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(clock())
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
