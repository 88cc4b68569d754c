"""``metilr train``: a Lightning CLI around FineTuning and PairDataModule, with one-line errors.

In the repository it is ``python train.py`` too.
"""

import contextlib
import inspect
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.strategies import DDPStrategy
from rich.console import Console
from rich.markup import escape
from typing_extensions import override

from metilr.cli import OneLineErrors, check_config, refuse_unknown
from metilr.distributed import (
    end_with_parent,
    faults_in_one_line,
    has_launcher,
    is_first_process,
    process_as_before,
    quieten_lightning,
)
from metilr.errors import UserError
from metilr.evaluation.options import PROJECT, WandbMode
from metilr.extraction.describe import PLAN_TIMEOUT
from metilr.extraction.module import ExactFloat32
from metilr.files import write_atomically
from metilr.report.wandb import finishing, open_wandb, staging_beside, where_logged
from metilr.training.callbacks import PairPictures, TrainingLines
from metilr.training.datamodule import PairDataModule
from metilr.training.module import FineTuning
from metilr.training.runs import BEST, LAST, AtomicCheckpointIO, MovableModelCheckpoint, open_run

PRECISIONS = ("32", "32-true", "bf16-mixed", "16-mixed")  # mining and validation are float32 in any case
# What this command gives the trainer: an epoch is what is drawn, validated and resumed.
SET_HERE = (
    "logger", "plugins", "limit_val_batches", "num_sanity_val_steps", "reload_dataloaders_every_n_epochs",
    "default_root_dir", "use_distributed_sampler", "enable_model_summary", "check_val_every_n_epoch",
    "val_check_interval", "enable_checkpointing", "fast_dev_run", "overfit_batches", "barebones",
)  # fmt: skip
OWN = {  # options that are neither trainer's, model's nor data's: type, default, help
    "output": (
        Path | None, None,
        "Folder of the run; without it a dated one under runs/. With an unfinished run of the same options in it, that "
        "run is continued from its last epoch. Needed under torchrun and SLURM.",
    ),
    "validate_first": (bool, True, "Validate the starting weights too, before training."),
    "wandb": (
        WandbMode, "auto",
        "Log to Weights & Biases: auto is online if there is a key (WANDB_API_KEY or netrc), else offline.",
    ),
    "wandb_project": (str, PROJECT, "Project in Weights & Biases."),
    "wandb_checkpoint": (bool, False, "Store the best checkpoint as an artifact there."),
    "pictures_every": (int, 2, "Epochs between tables of pairs as pictures in W&B."),
}  # fmt: skip


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, whose errors are one line."""


class TrainingCLI(LightningCLI):
    """Options of the trainer, the model and the data, as ``--trainer.x``, ``--model.x`` and ``--data.x``."""

    def __init__(self, args: Sequence[str], prog: str, held: contextlib.ExitStack) -> None:
        self.held = held  # gets what is left when the run ends: the lock of its folder
        super().__init__(
            FineTuning,
            PairDataModule,
            save_config_callback=None,  # written before the training, by open_run
            trainer_defaults={"max_epochs": 2, "log_every_n_steps": 1, "precision": "bf16-mixed"},
            seed_everything_default=0,
            parser_kwargs={
                "prog": prog,
                "description": (FineTuning.__doc__ or "").splitlines()[0] + " Without options: on the demo museum.",
            },
            parser_class=TrainingParser,
            args=list(args),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add this command's own options."""
        parser.allow_abbrev = False  # a config or a script with half a name would break with the next option
        for name, (kind, default, help_) in OWN.items():
            parser.add_argument(f"--{name}", type=kind, default=default, help=help_)
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the command line, refusing what Lightning lets through."""
        refuse_unknown(parser, args)
        for option, following in zip(args, [*args[1:], ""], strict=True):
            name, _, file = option.partition("=")
            if name in ("--config", "-c") and (file or following):
                check_config(file or following)
        self.config = parser.parse_args(args)
        seed, trainer = self.config.seed_everything, self.config.trainer
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise UserError(f"{seed}: give a number from 0 to 2**32 - 1", "seed_everything")
        if self.config.pictures_every < 1:
            raise UserError(f"{self.config.pictures_every}: must be at least 1", "pictures_every")
        for name in SET_HERE:
            if trainer.get(name) not in (None, inspect.signature(Trainer).parameters[name].default):
                raise UserError(f"{trainer.get(name)}: is decided by this command; leave it out", name)
        if str(trainer.precision) not in PRECISIONS:
            raise UserError(f"{trainer.precision}: choose one of {', '.join(PRECISIONS)}", "precision")
        if trainer.precision == "16-mixed" and not torch.cuda.is_available():
            raise UserError("16-mixed: needs an NVIDIA GPU; elsewhere use 32 or bf16-mixed", "precision")
        if (trainer.max_epochs or 0) < 1:
            reason = "give a number from 1 up; an epoch is what is validated and resumed"
            raise UserError(f"{trainer.max_epochs}: {reason}", "max_epochs")

    @override
    def instantiate_classes(self) -> None:
        """Build model, data and trainer; what they or a class that an option names refuse is a user's error."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except (MisconfigurationException, TypeError, ValueError) as error:  # Lightning's and jsonargparse's
            hint = "a loss with weights of its own needs num_classes and embedding_size"
            self.parser.error(f"the options do not go together ({hint}): {error}", error)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Open the run's folder, and make the trainer with its callbacks and loggers."""
        options = yaml.safe_load(self.parser.dump(self.config, skip_unset=False, skip_link_targets=True))
        self.options = {name: value for name, value in options.items() if name not in ("config", "output")}
        self.output, self.resume_from = open_run(self.config.output, self.options, self.held)
        with self.kept_if_of_use():
            return self._trainer(**kwargs)

    @contextlib.contextmanager
    def kept_if_of_use(self) -> Iterator[None]:
        """Remove a dated folder again if the block fails before an epoch was finished."""
        try:
            yield
        except BaseException:
            if self.config.output is None and is_first_process() and not self.has_epochs:
                shutil.rmtree(self.output, ignore_errors=True)
            raise

    @property
    def has_epochs(self) -> bool:
        """Whether a finished epoch is kept."""
        return (self.output / f"{LAST}.ckpt").exists()

    def _trainer(self, **kwargs: Any) -> Trainer:
        self.datamodule.folder = self.output
        self.model.run_config = self.options
        shows_bar = self.config.trainer.enable_progress_bar is not False and sys.stdout.isatty()
        evaluate = ("python", "evaluate.py") if self.parser.prog == "train.py" else ("metilr", "evaluate")
        lines = TrainingLines(not shows_bar, evaluate)
        self.best = MovableModelCheckpoint(
            self.output, filename=BEST, monitor="val/gap", mode="max", save_on_train_epoch_end=True,
            auto_insert_metric_name=False, enable_version_counter=False,
        )  # fmt: skip
        # After the best: it is what a killed run continues from, and has the best's state in it.
        last = MovableModelCheckpoint(
            self.output, filename=LAST, save_on_train_epoch_end=True, enable_version_counter=False
        )
        pictures, rates = PairPictures(self.config.pictures_every), LearningRateMonitor("step")
        self.trainer_defaults["callbacks"] = [
            lines, pictures, rates, ExactFloat32(), self.best, last,
        ]  # fmt: skip
        plugins: list[Any] = [AtomicCheckpointIO()]
        if SLURMEnvironment.detect():
            # Its requeue would save in the middle of an epoch; the same command continues at the last whole one.
            plugins.append(SLURMEnvironment(auto_requeue=False))
        if self.config.trainer.strategy in ("auto", "ddp") and _several_processes(self.config.trainer):
            kwargs["strategy"] = DDPStrategy(timeout=PLAN_TIMEOUT)  # the others wait while the first one mines
        return super().instantiate_trainer(
            logger=self._loggers(),
            plugins=plugins,
            default_root_dir=str(self.output),
            use_distributed_sampler=False,  # the pairs are dealt out already, without padding
            reload_dataloaders_every_n_epochs=1,  # new pairs each epoch
            num_sanity_val_steps=-1 if self.config.validate_first else 0,  # all of val, which is one batch
            inference_mode=False,  # the weights that describe val are trained on
            enable_progress_bar=shows_bar,
            enable_model_summary=False,
            **kwargs,
        )

    def _loggers(self) -> list[Logger]:
        # A continued run gets a file of its own: the logger would overwrite the first one's.
        taken, config = len(list(self.output.glob("csv*"))) if self.resume_from else 0, self.config
        loggers: list[Logger] = [CSVLogger(str(self.output), name="", version=f"csv_{taken + 1}" if taken else "csv")]
        if config.wandb == "off" or os.environ.get("WANDB_MODE") == "disabled":
            return loggers
        if not is_first_process():
            return [*loggers, WandbLogger(project=config.wandb_project, offline=True, save_dir=self.output)]
        run = open_wandb(config.wandb, config.wandb_project, self.output, self.options)
        return loggers if run is None else [*loggers, WandbLogger(experiment=run)]


def _several_processes(trainer: Namespace) -> bool:
    devices = trainer.devices
    if devices in ("auto", -1, "-1"):
        on_gpu = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
        devices = torch.cuda.device_count() if on_gpu else 1
    several = len(devices) > 1 if isinstance(devices, list) else str(devices) != "1"
    return has_launcher() or trainer.num_nodes > 1 or several


def train(args: Sequence[str] | None = None, prog: str = "metilr train") -> None:
    """Fine-tune a model, also on a museum's own catalogue images alone.

    Args:
        args: Command line without the program; default: the process's own.
        prog: The command's name in messages.

    Raises:
        UserError: If an option, a file or the data is not usable, or the run is interrupted.
    """
    quieten_lightning()
    if not is_first_process() and not has_launcher():
        end_with_parent()
    with process_as_before(), contextlib.ExitStack() as held:
        try:
            _train(TrainingCLI(sys.argv[1:] if args is None else args, prog, held))
        except UserError as error:
            raise _with_option(error) from error


def _with_option(error: UserError) -> UserError:
    """The error with the option that sets its parameter in place of that: ``model.lr`` for ``lr``."""
    if error.parameter == "seed":
        return UserError(error.message, "seed_everything")
    for group, of in (("model", FineTuning), ("data", PairDataModule), ("trainer", Trainer)):
        if error.parameter in inspect.signature(of).parameters:
            return UserError(error.message, f"{group}.{error.parameter}")
    is_own = error.parameter in (*OWN, "config", "seed_everything")
    return error if is_own else UserError(str(error))  # such as a loss's parameter, below another option


def _train(cli: TrainingCLI) -> None:
    trainer: Trainer = cli.trainer
    console = Console(highlight=False, quiet=not is_first_process(), soft_wrap=True)
    doing = f"continuing after {cli.resume_from}" if cli.resume_from else "training"
    device = f"{trainer.world_size} x {trainer.strategy.root_device.type.upper()}, precision {trainer.precision}"
    console.print(f"[bold]{doing}[/] into {escape(str(cli.output))}, on {device}")
    wandb_run = next((logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
    if wandb_run is not None and is_first_process():
        console.print(escape(where_logged(wandb_run, cli.output)))
    needs_its_name = cli.config.output is None  # to be continued: the folder is a dated one
    less_memory = "fewer batch_pairs, smaller views, or gradient_checkpointing true"
    try:
        with cli.kept_if_of_use(), staging_beside(cli.output), faults_in_one_line(less_memory):
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resume_from)
    except SystemExit:  # what Lightning turns Ctrl-C into
        named = f" with --output {cli.output}" if needs_its_name else ""
        kept = f"finished epochs are kept, the same command{named} continues"
        raise UserError(
            f"interrupted; {kept if cli.has_epochs else 'no epoch was finished, nothing is kept'}"
        ) from None
    except UserError as error:
        kept = f" (to continue, add --output {cli.output})" if needs_its_name and cli.has_epochs else ""
        raise UserError(error.message + kept, error.parameter) from error
    finally:
        if sys.exc_info()[0] is not None:
            for process in getattr(trainer.strategy.launcher, "procs", None) or []:
                process.kill()
    if trainer.is_global_zero:
        write_atomically(cli.output / "finished", f"{datetime.now().astimezone().isoformat(timespec='seconds')}\n")
        if wandb_run is not None:
            with staging_beside(cli.output), finishing(wandb_run):
                if cli.config.wandb_checkpoint and cli.best.best_model_path:
                    wandb_run.log_artifact(cli.best.best_model_path, f"model-{wandb_run.id}", "model", ["best"])
