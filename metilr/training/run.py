"""A training from its options to its checkpoints: the folder, Lightning's trainer, what is printed and logged."""

import contextlib
import inspect
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import DDPStrategy
from rich.markup import escape

from metilr.distributed import faults_in_one_line, has_launcher, is_first_process
from metilr.errors import UserError, one_line
from metilr.evaluation.runs import make_output, refuse_other_options
from metilr.extraction.describe import PLAN_TIMEOUT
from metilr.extraction.store import differing_settings
from metilr.files import LOCK, alone_in, check_config, remove_leftovers, write_atomically
from metilr.progress import make_console
from metilr.provenance import has_bfloat16
from metilr.report.wandb import finishing, open_wandb, staging_beside, where_logged
from metilr.training import FineTuningOptions, PairOptions, RunOptions
from metilr.training.callbacks import AtomicCheckpointIO, MovableModelCheckpoint, PairPictures, TrainingLines
from metilr.training.datamodule import PairDataModule
from metilr.training.module import FineTuning

OUTPUT_VARIABLE = "METILR_TRAINING_OUTPUT"  # tells the processes that Lightning starts which folder the first chose
FINISHED = "finished"  # file of a run with all its epochs
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


def usual_precision(accelerator: str) -> str:
    """The precision of a training that names none: bfloat16 saves nothing where a device only emulates it."""
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    return "bf16-mixed" if (torch.cuda.is_bf16_supported() if on_gpu else has_bfloat16()) else "32"


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
    """Train, or go on with the unfinished run in the output folder; one that is finished is left as it is.

    ``recorded`` are all options as plain values; ``evaluate`` is the command that evaluates a checkpoint.
    """
    console = make_console(quiet=not is_first_process())
    trainer, wandb_run = None, None
    with contextlib.ExitStack() as held:
        output, resume_from = open_run(options.output, recorded, held)
        if (output / FINISHED).exists():
            console.print(f"finished already: {escape(str(output))}")
            return
        try:
            data = PairDataModule(pair_options, options.seed_everything, output)
            model = FineTuning(model_options, options.seed_everything, recorded)
            if is_first_process() and "wandb" in options.logger:
                wandb_run = open_wandb(options.wandb, options.wandb_project, output, recorded)
            loggers: list[Logger] = [] if wandb_run is None else [WandbLogger(experiment=wandb_run)]
            if "tensorboard" in options.logger:  # a continued run adds a file, of another name within a second too
                loggers.append(TensorBoardLogger(output, "", "tensorboard", filename_suffix=f".{datetime.now():%f}"))
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
            write_atomically(output / FINISHED, f"{datetime.now().astimezone().isoformat(timespec='seconds')}\n")
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
        remove_leftovers(output)
        if (output / FINISHED).exists():
            refuse_other_options(output, check_config(str(config)), options)
        elif not config.exists() or not last.exists():  # what failed before its first epoch is tried anew
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
