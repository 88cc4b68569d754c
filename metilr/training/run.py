"""A training from its options to its checkpoints: the folder, Lightning's trainer, what is printed and logged."""

import contextlib
import inspect
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from rich.console import Console
from rich.markup import escape
from torchvision.transforms.v2 import functional as F
from typing_extensions import override

from metilr.distributed import faults_in_one_line, has_launcher, is_first_process
from metilr.errors import UserError, one_line
from metilr.evaluation.runs import make_output
from metilr.extraction.describe import PLAN_TIMEOUT
from metilr.extraction.store import differing_settings
from metilr.files import LOCK, alone_in, check_config, remove_leftovers, write_atomically
from metilr.models.checkpoints import read_checkpoint, write_checkpoint
from metilr.report.wandb import finishing, open_wandb, staging_beside, where_logged
from metilr.training import FineTuningOptions, PairOptions, RunOptions
from metilr.training.datamodule import PairDataModule
from metilr.training.module import FineTuning

print_rank_zero = rank_zero_only(print)
OUTPUT_VARIABLE = "METILR_TRAINING_OUTPUT"  # tells the processes that Lightning starts which folder the first chose
PRECISIONS = ("32", "32-true", "bf16-mixed", "16-mixed")  # mining and validation are float32 in any case
FIXED = {  # of the trainer
    "use_distributed_sampler": False,  # the pairs are dealt out already, without padding
    "reload_dataloaders_every_n_epochs": 1,  # new pairs each epoch
    "inference_mode": False,  # the weights that describe val are trained on
    "enable_model_summary": False,
    # An epoch is what is drawn, validated, all of val, and resumed.
    "limit_val_batches": None, "check_val_every_n_epoch": 1, "val_check_interval": None, "overfit_batches": 0.0,
    "fast_dev_run": False,
}  # fmt: skip


def check_trainer_options(options: Mapping[str, Any]) -> None:
    """Refuse options of Lightning's trainer that a training does not go with."""
    for name in (*FIXED, "logger", "plugins", "default_root_dir", "num_sanity_val_steps"):
        if options[name] not in (None, inspect.signature(Trainer).parameters[name].default):
            raise UserError(f"{options[name]}: is decided by this command; leave it out", f"trainer.{name}")
    precision, max_epochs = options["precision"], options["max_epochs"]
    if str(precision) not in PRECISIONS:
        raise UserError(f"{precision}: choose one of {', '.join(PRECISIONS)}", "trainer.precision")
    if precision == "16-mixed" and not torch.cuda.is_available():
        raise UserError("16-mixed: needs an NVIDIA GPU; elsewhere use 32 or bf16-mixed", "trainer.precision")
    if (max_epochs or 0) < 1:
        raise UserError(f"{max_epochs}: give a number from 1 up; an epoch is what is resumed", "trainer.max_epochs")


def run(
    options: RunOptions, model_options: FineTuningOptions, pair_options: PairOptions,
    trainer_options: Mapping[str, Any], recorded: Mapping[str, Any], evaluate: Sequence[str],
) -> None:  # fmt: skip
    """Train, or go on with the unfinished run in the output folder.

    ``recorded`` are all options as plain values; ``evaluate`` is the command that evaluates a checkpoint.
    """
    console = Console(highlight=False, quiet=not is_first_process(), soft_wrap=True)
    trainer, wandb_run = None, None
    with contextlib.ExitStack() as held:
        output, resume_from = open_run(options.output, recorded, held)
        try:
            data = PairDataModule(pair_options, options.seed_everything, output)
            model = FineTuning(model_options, options.seed_everything, recorded)
            if is_first_process():
                wandb_run = open_wandb(options.wandb, options.wandb_project, output, recorded)
            loggers = [] if wandb_run is None else [WandbLogger(experiment=wandb_run)]
            trainer = make_trainer(options, trainer_options, output, resume_from is not None, loggers, evaluate)
            device = f"{trainer.world_size} x {trainer.strategy.root_device.type.upper()}"
            doing = f"continuing after {resume_from}" if resume_from else "training"
            console.print(f"[bold]{doing}[/] into {escape(str(output))}, on {device}, precision {trainer.precision}")
            if wandb_run is not None:
                console.print(escape(where_logged(wandb_run, output)))
            less_memory = "fewer batch_pairs, smaller views, or gradient_checkpointing true"
            with staging_beside(output), faults_in_one_line(less_memory):
                trainer.fit(model, datamodule=data, ckpt_path=resume_from)
        except BaseException as error:
            for process in getattr(trainer and trainer.strategy.launcher, "procs", None) or []:
                process.kill()
            has_epochs = (output / "last.ckpt").exists()
            if options.output is None and not has_epochs and is_first_process():
                shutil.rmtree(output, ignore_errors=True)
            if isinstance(error, SystemExit):  # what Lightning turns Ctrl-C into
                kept = f"with --output {output} the command continues" if has_epochs else "no epoch was finished"
                raise KeyboardInterrupt(kept) from None
            raise
        if trainer.is_global_zero:
            write_atomically(output / "finished", f"{datetime.now().astimezone().isoformat(timespec='seconds')}\n")
        if wandb_run is not None:
            best: Any = trainer.checkpoint_callback
            with staging_beside(output), finishing(wandb_run):
                if options.wandb_checkpoint and best.best_model_path:
                    wandb_run.log_artifact(best.best_model_path, f"model-{wandb_run.id}", "model", ["best"])


def open_run(output: Path | None, options: Mapping[str, Any], held: contextlib.ExitStack) -> tuple[Path, Path | None]:
    """Make the run's folder, or find the unfinished run in it and the checkpoint to continue from.

    The first process holds it against other runs.
    """
    if not has_launcher() and not is_first_process():  # started by Lightning in the first one's environment
        output = Path(os.environ[OUTPUT_VARIABLE])
    elif output is None and has_launcher():
        raise UserError("name a folder: processes that a launcher starts cannot agree on a dated one", "output")
    output = make_output(output, "train")
    os.environ[OUTPUT_VARIABLE] = str(output)
    config, last = output / "config.yaml", output / "last.ckpt"
    if is_first_process():
        ours = (LOCK, f".{config.name}.")  # where a killed process got no further
        if not config.exists() and any(not file.name.startswith(ours) for file in output.iterdir()):
            raise UserError(f"{output}: holds other files; name an empty or new folder", "output")
        held.enter_context(alone_in(output, "another run", "name another output"))
        if (output / "finished").exists():
            raise UserError(f"{output}: holds a finished run; name another folder", "output")
        remove_leftovers(output)
        if not config.exists() or not last.exists():  # what failed before its first epoch is tried anew
            write_atomically(config, yaml.safe_dump(dict(options), sort_keys=False))
        elif other := differing_settings(check_config(str(config)), options):
            remedy = f"name another folder, or continue that run with --config {config} --output {output}"
            raise UserError(f"{output}: holds a run with other options ({'; '.join(other[:4])}); {remedy}", "output")
    return output, last if last.exists() else None


def make_trainer(
    options: RunOptions, trainer_options: Mapping[str, Any], output: Path, continues: bool, loggers: Sequence[Logger],
    evaluate: Sequence[str],
) -> Trainer:  # fmt: skip
    """Make Lightning's trainer with the callbacks of a run; a CSV file comes before other loggers."""
    shows_bar = trainer_options["enable_progress_bar"] is not False and sys.stdout.isatty()
    each_epoch: Any = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    best = MovableModelCheckpoint(
        output, filename="best", monitor="val/gap", mode="max", auto_insert_metric_name=False, **each_epoch
    )
    # After the best: it is what a killed run continues from, and has the best's state in it.
    last = MovableModelCheckpoint(output, filename="last", **each_epoch)
    lines, pictures = TrainingLines(not shows_bar, evaluate), PairPictures(options.pictures_every)
    # A continued run gets a file of its own: the logger would overwrite the first one's.
    taken = len(list(output.glob("csv*"))) if continues else 0
    csv = CSVLogger(str(output), name="", version=f"csv_{taken + 1}" if taken else "csv")
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        # Its requeue would save in the middle of an epoch; the same command continues at the last whole one.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    own = {
        "callbacks": [*(trainer_options["callbacks"] or []), lines, pictures, LearningRateMonitor("step"), best, last],
        "logger": [csv, *loggers], "plugins": plugins, "default_root_dir": str(output),
        "enable_progress_bar": shows_bar,
        "num_sanity_val_steps": -1 if options.validate_first else 0,  # all of val, which is one batch
    }  # fmt: skip
    try:
        trainer = Trainer(**{**trainer_options, **FIXED, **own})
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"the trainer's options do not go together: {one_line(error)}") from error
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy._timeout = PLAN_TIMEOUT  # the others wait while the first one mines
    return trainer


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
            f"epoch is {data.n_pairs:,} pairs in {data.n_batches:,} batches", flush=True,
        )  # fmt: skip

    @override
    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the figures of the starting weights, at step 0: Lightning logs nothing of a sanity check."""
        self.before = {name: value.item() for name, value in trainer.callback_metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(self.before, step=0)

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
        shown = [f"loss {figures['train/epoch_loss']:.4g}"] if "train/epoch_loss" in figures else []
        shown += [f"{name} {100 * figures[name]:.2f}" for name in figures if name.startswith("val/")]
        if self.each_epoch:
            done = f"{', '.join(shown)} ({time.perf_counter() - self.started:.0f} s)"
            print_rank_zero(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {done}", flush=True)

    @override
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        best, data = trainer.checkpoint_callback, pl_module.data.options  # the first one, of the best weights
        console = Console(highlight=False, quiet=not trainer.is_global_zero, soft_wrap=True)
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
        command += ["--whitening", "none"] if pl_module.options.freeze_backbone else []
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
