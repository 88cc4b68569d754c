"""What a training does beside the steps: whole checkpoints, lines on the terminal, pictures of pairs."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from rich.markup import escape
from torchvision.transforms.v2 import functional as F
from typing_extensions import override

from metilr.errors import UserError, amount
from metilr.models.checkpoints import read_checkpoint, write_checkpoint
from metilr.progress import MinuteLines, make_console

print_rank_zero = rank_zero_only(print)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, except that a file appears whole and runs no code."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write_checkpoint(Path(path), checkpoint)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, *_: Any, **__: Any) -> dict[str, Any]:
        try:
            return dict(read_checkpoint(Path(path)))
        except UserError as error:
            raise UserError(f"{error}; to begin anew, delete {Path(path).parent} or name another output") from None


class MovableModelCheckpoint(ModelCheckpoint):
    """Lightning's, except that it remembers the best score of a run whose folder was moved or renamed."""

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def moved(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        state: dict[str, Any] = {
            name: moved(value) if name.endswith("_path") else value for name, value in state_dict.items()
        }
        state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict({**state, "dirpath": self.dirpath})


class TrainingLines(Callback):
    """Print what is trained on, how each epoch went (where no bar does), and how to evaluate the checkpoint.

    Lightning's sanity check, where asked for, gives the figures of the starting weights, which a continued run keeps.
    """

    def __init__(self, each_epoch: bool, evaluate: Sequence[str]) -> None:
        self.each_epoch, self.evaluate, self.started = each_epoch, evaluate, 0.0
        self.before: dict[str, float] | None = None
        self.line = ""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        data, counts = pl_module.data, pl_module.data.ground_truth.counts()
        print_rank_zero(
            f"data: {data.ground_truth.root} ({data.options.database}): {counts['database_images']:,} images of "
            f"{counts['exhibits']:,} exhibits; val {counts['val_queries']:,} queries ({counts['val_met']:,} met); an "
            f"epoch is {amount(data.n_pairs, 'pair')} in {amount(data.n_batches, 'batch', 'es')}", flush=True,
        )  # fmt: skip
        if data.options.image_size is not None:
            note = "image_size is that of mining and validation; views have sizes of their own"
            print_rank_zero(f"note: {note}", flush=True)

    @override
    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the figures of the starting weights, at step 0: Lightning logs nothing of a sanity check."""
        self.before = {name: value.item() for name, value in trainer.callback_metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(self.before, step=0)

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._say()
        self.started = time.perf_counter()
        n_batches, epoch = trainer.num_training_batches, f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        self.lines = MinuteLines(epoch, n_batches, "batches", quiet=not (self.each_epoch and trainer.is_global_zero))

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.lines.advance(1)

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
        shown = [f"loss {figures['train/epoch_loss']:.4g}"] if "train/epoch_loss" in figures else []
        shown += [f"{name} {100 * figures[name]:.2f}" for name in figures if name.startswith("val/")]
        if self.each_epoch:
            done = f"{', '.join(shown)} ({time.perf_counter() - self.started:.0f} s)"
            self.line = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {done}"

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._say()

    def _say(self) -> None:
        """Print the last epoch's line: by now its checkpoint is on the disk."""
        if self.line:
            print_rank_zero(self.line, flush=True)
            self.line = ""

    @override
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        best, data = trainer.checkpoint_callback, pl_module.data.options  # the first one, of the best weights
        console = make_console(quiet=not trainer.is_global_zero)
        if (score := best.best_model_score) is not None:
            start = "" if self.before is None else f", {100 * self.before['val/gap']:.2f} before training"
            console.print(f"val GAP {100 * score:.2f} at best{start} (single-scale, k = 1, τ = 1, no whitening)")
            if self.before is not None and score <= self.before["val/gap"]:
                note = "training did not improve GAP on val; the starting weights were no worse"
                console.print(f"[bold yellow]note:[/] {note}")
        command = [*self.evaluate, "--ckpt", best.best_model_path or str(Path(trainer.default_root_dir) / "last.ckpt")]
        command += [] if data.root is None else ["--root", str(data.root)]
        command += [] if data.database == "full" else ["--database", data.database]
        # Whitening would undo a linear projector: it makes the database's covariance the identity, whatever was before.
        command += ["--database_rows", "classifier"] if pl_module.classifier else []
        command += ["--whitening", "none"] if pl_module.options.freeze_backbone or pl_module.classifier else []
        console.print(f"evaluate it with\n  {escape(shlex.join(command))}")


class PairPictures(Callback):
    """Show some of the epoch's pairs, as the network gets them, as a table of pictures in W&B."""

    def __init__(self, every_n_epochs: int) -> None:
        self.every_n_epochs = every_n_epochs

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not loggers or trainer.current_epoch % self.every_n_epochs:
            return
        import wandb

        data, table = pl_module.data, []
        for pair in data.pairs[:16]:
            first = data.first_views.view(pair.first, pair.first_view)
            second = data.second_views.view(pair.second, pair.second_view)
            pictures = [wandb.Image(F.to_pil_image(view)) for view in (first, second)]
            paths = [data.paths["database"][row] for row in (pair.first, pair.second)]
            table.append([*pictures, bool(pair.positive), *paths])
        for logger in loggers:
            logger.log_table("pairs", ["first", "second", "same exhibit", "first image", "second image"], table)
