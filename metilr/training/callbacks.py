"""Lightning callbacks of the training: what is printed, and pictures of the pairs."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger
from rich.console import Console
from rich.markup import escape
from torchvision.transforms.v2 import functional as F
from typing_extensions import override


class TrainingLines(Callback):
    """Say what is trained on and, where no bar does, how each epoch went; log how good the starting weights are.

    Those are validated by Lightning's sanity check, where ``num_sanity_val_steps`` asks for one.

    Args:
        each_epoch: Print a line an epoch: a bar would fill a log file.
        evaluate: The command that evaluates a checkpoint.

    Attributes:
        before: Figures of the starting weights, those of a continued run too; None if they were not validated.
    """

    def __init__(self, each_epoch: bool, evaluate: Sequence[str]) -> None:
        self.each_epoch, self.evaluate = each_epoch, evaluate
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

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print how good the best weights are, and how to evaluate them, in the first process."""
        if not trainer.is_global_zero:
            return
        checkpoints: Any = trainer.checkpoint_callback  # the first one, of the best weights
        module: Any = pl_module
        best, score, console = checkpoints.best_model_path, checkpoints.best_model_score, Console(highlight=False)
        if score is not None:
            start = "" if self.before is None else f", {100 * self.before['val/gap']:.2f} before training"
            console.print(f"val GAP {100 * score:.2f} at best{start} (single-scale, k = 1, τ = 1, no whitening)")
            if self.before is not None and score <= self.before["val/gap"]:
                note = "training did not improve GAP on val; the starting weights were no worse"
                console.print(f"[bold yellow]note:[/] {note}")
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        options = [] if data.root is None else ["--root", str(data.root)]
        options += [] if data.database == "full" else ["--database", data.database]
        # Whitening would undo a linear projector: it makes the database's covariance the identity, whatever was before.
        options += ["--whitening", "none"] if module.freeze_backbone else []
        checkpoint = best or str(Path(trainer.default_root_dir) / "last.ckpt")
        command = shlex.join([*self.evaluate, "--ckpt", checkpoint, *options])
        console.print(f"evaluate it with\n  {escape(command)}", soft_wrap=True)


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
