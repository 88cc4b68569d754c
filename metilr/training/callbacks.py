"""Lightning callbacks of the training: what is printed, pictures of the pairs, and checkpoints that appear whole."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torchvision.transforms.v2 import functional as F
from typing_extensions import override

from metilr.models.checkpoints import read_checkpoint, write_checkpoint


class TrainingProgress(TQDMProgressBar):
    """Lightning's bar, without the loggers' names."""

    @override
    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what the bar shows beside the progress."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class TrainingLines(Callback):
    """Say what is trained on and, where no bar does, how each epoch went; log how good the starting weights are.

    Those are validated by Lightning's sanity check, where ``num_sanity_val_steps`` asks for one.

    Args:
        each_epoch: Print a line an epoch: a bar would fill a log file.

    Attributes:
        before: Figures of the starting weights, those of a continued run too; None if they were not validated.
    """

    def __init__(self, each_epoch: bool) -> None:
        self.each_epoch = each_epoch
        self.before: dict[str, float] | None = None
        self.started = 0.0

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the figures of the starting weights, for a run that is continued."""
        return {"before": self.before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the figures of the starting weights."""
        self.before = state_dict["before"]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print a line about the data, in the first process."""
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        counts = data.ground_truth.counts()
        print(
            f"data: {data.ground_truth.root} ({data.ground_truth.database}): {counts['database_images']:,} images of "
            f"{counts['exhibits']:,} exhibits; val {counts['val_queries']:,} queries ({counts['val_met']:,} met); an "
            f"epoch is {data.n_pairs:,} pairs in {data.n_batches:,} batches",
            flush=True,
        )

    @override
    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the figures of the starting weights, at step 0: Lightning logs nothing of a sanity check."""
        self.before = {name: value.item() for name, value in trainer.callback_metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(self.before, step=0)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure the epoch's time."""
        self.started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch's loss and figures, in the first process."""
        if not self.each_epoch or not trainer.is_global_zero:
            return
        figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
        loss = f"loss {figures['train/epoch_loss']:.4g}, " if "train/epoch_loss" in figures else ""
        shown = ", ".join(f"{name} {100 * figures[name]:.2f}" for name in figures if name.startswith("val/"))
        seconds = time.perf_counter() - self.started
        print(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {loss}{shown} ({seconds:.0f} s)", flush=True)


class PairPictures(Callback):
    """Show some of the epoch's pairs, as the network gets them, as a table of pictures in W&B.

    Args:
        every_n_epochs: How often.
        n_pairs: How many pairs.
    """

    def __init__(self, every_n_epochs: int = 2, n_pairs: int = 16) -> None:
        self.every_n_epochs, self.n_pairs = every_n_epochs, n_pairs

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the table, in the first process and every so many epochs."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not trainer.is_global_zero or not loggers or trainer.current_epoch % self.every_n_epochs:
            return
        import wandb

        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        pairs, truth = data.pairs.take(np.arange(min(self.n_pairs, len(data.pairs)))), data.ground_truth
        paths = truth.paths["database"]
        rows = []
        for i in range(len(pairs)):
            pictures = [
                wandb.Image(F.to_pil_image(views.view(int(row[i]), int(number[i]))))
                for row, number, views in (
                    (pairs.first, pairs.first_view, data.first_views),
                    (pairs.second, pairs.second_view, data.second_views),
                )
            ]
            rows.append([*pictures, bool(pairs.positive[i]), paths[pairs.first[i]], paths[pairs.second[i]]])
        table = wandb.Table(["first", "second", "same exhibit", "first image", "second image"], rows)
        for logger in loggers:
            logger.experiment.log({"pairs": table}, commit=False)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, except that a file appears whole and runs no code."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write as ``write_checkpoint`` does."""
        write_checkpoint(Path(path), checkpoint)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, *_: Any, **__: Any) -> dict[str, Any]:
        """Read to the CPU, as ``read_checkpoint`` does."""
        return dict(read_checkpoint(Path(path)))


class MovableModelCheckpoint(ModelCheckpoint):
    """Lightning's, except that it remembers the best score of a run whose folder was moved or renamed."""

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score and the files that go with it, where they lie now."""

        def moved(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = {
            name: moved(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")
        }
        best = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})
