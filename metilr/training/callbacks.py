"""Lightning callbacks of the training: validation by kNN, and pictures of the pairs."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torchmetrics import MetricCollection
from torchvision.transforms.v2 import functional as F
from typing_extensions import override

from metilr.distributed import agree
from metilr.metrics import ACC, GAP, GAPMinus
from metilr.models.checkpoints import read_checkpoint, write_checkpoint
from metilr.retrieval.knn import classify
from metilr.retrieval.search import search

METRICS = {"val/gap": GAP, "val/gap_minus": GAPMinus, "val/acc": ACC}


class KNNValidation(Callback):
    """Validate after each epoch: nearest neighbour on val, single-scale, k = 1, tau = 1, no whitening.

    The processes share out the queries.

    Args:
        before_training: Validate the starting weights too.
    """

    def __init__(self, before_training: bool) -> None:
        self.before_training = before_training
        self.before: dict[str, float] | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the starting weights, where that is asked for."""
        if self.before_training and trainer.current_epoch == 0:
            self.before = {name: value.item() for name, value in self._validate(trainer, pl_module).items()}
            for logger in trainer.loggers:
                logger.log_metrics(self.before, step=0)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log ``val/gap``, ``val/gap_minus`` and ``val/acc``, each in [0, 1]."""
        pl_module.log_dict(self._validate(trainer, pl_module), prog_bar=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the figures of the starting weights, for a run that is continued."""
        return {"before": self.before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the figures of the starting weights."""
        self.before = state_dict["before"]

    @torch.no_grad()
    def _validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, torch.Tensor]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        truth = data.ground_truth
        store = data.current.describe(trainer, pl_module.embedder)
        rows, mine = np.flatnonzero(store.made("database")), np.flatnonzero(store.made("val"))
        mine = mine[trainer.global_rank :: trainer.world_size]
        metrics = MetricCollection({name: metric(no_met="nan") for name, metric in METRICS.items()})
        metrics.to(trainer.strategy.root_device)
        with agree(trainer):
            database = store.rows("database")
            database = database if len(rows) == len(database) else database[rows]
            if len(mine):
                neighbours = search(database, store.rows("val")[mine], 1)
                answers = classify(neighbours, truth.labels["database"][rows], truth.n_classes, k=1, tau=1.0)
                found = (answers.log_confidence, answers.labels, truth.labels["val"][mine], mine)
                metrics.update(*(torch.from_numpy(values) for values in found))
            if trainer.is_global_zero:  # a query whose image is bad counts as wrong
                left_out = np.flatnonzero(~store.made("val"))
                target = torch.from_numpy(truth.labels["val"][left_out])
                none = torch.full(target.shape, -1)
                metrics.update(torch.full(target.shape, -torch.inf), none, target, torch.from_numpy(left_out))
        return dict(metrics.compute())


class Announcement(Callback):
    """Say what is trained on."""

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


class TrainingProgress(TQDMProgressBar):
    """Lightning's bar, without the loggers' names."""

    @override
    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what the bar shows beside the progress."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class EpochLines(Callback):
    """A line an epoch, where the output is no terminal: a bar would fill a log file."""

    def __init__(self) -> None:
        self.started = 0.0

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure the epoch's time."""
        self.started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch's loss and figures, in the first process."""
        if not trainer.is_global_zero:
            return
        figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
        shown = ", ".join(f"{name} {100 * figures[name]:.2f}" for name in METRICS if name in figures)
        loss = f"loss {figures['train/epoch_loss']:.4g}, " if "train/epoch_loss" in figures else ""
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
                wandb.Image(F.to_pil_image(data.views.view(int(row[i]), int(number[i]), augmentation)))
                for row, number, augmentation in (
                    (pairs.first, pairs.first_view, data.first_view),
                    (pairs.second, pairs.second_view, data.second_view),
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
