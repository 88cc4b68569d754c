"""Fine-tune on pairs of your own making, in your own Trainer: ``python examples/own_training_loop.py``.

The pictures are drawn here, so that the script runs anywhere; put your own data set in the place of ``Pairs``.
"""

import argparse

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import metilr


class Pairs(Dataset):
    """Two noisy views of each of some coloured patterns, and which one it is."""

    def __init__(self, n: int = 32, side: int = 96) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(n, 3, 6, 6, generator=generator)
        self.patterns = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")

    def __len__(self) -> int:
        return len(self.patterns)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        """Return two images, float from 0 to 1, and their label."""
        first, second = ((self.patterns[i] + 0.2 * torch.randn(3, 1, 1)).clamp(0, 1) for _ in range(2))
        return first, second, i


def main() -> None:
    """Train, save, load again and describe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="lite0_in", help="lite0_in, r18_swsl, timm/NAME, ...")
    parser.add_argument("--weights", help="a file; random for a try without any")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    tuned = metilr.FineTuning(metilr.FineTuningOptions(options.backbone, options.weights, lr=1e-4, warmup_steps=0))
    trainer = pl.Trainer(max_epochs=options.epochs, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(tuned, DataLoader(Pairs(), batch_size=8, shuffle=True))
    trainer.save_checkpoint("own.ckpt")
    print(f"loss {trainer.callback_metrics['train/epoch_loss']:.4f}")

    again = metilr.FineTuning.load_from_checkpoint("own.ckpt")  # to go on training
    embedder = metilr.load("own.ckpt")  # to describe with; metilr evaluate --ckpt takes it too
    images = Pairs(4).patterns
    print((again.embedder.embed(images) == embedder.embed(images)).all(), embedder.embed(images).shape)


if __name__ == "__main__":
    main()
