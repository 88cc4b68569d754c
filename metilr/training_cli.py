"""Options of ``metilr train``, and the trainer made of them: a Lightning CLI whose errors are one line."""

import contextlib
import inspect
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, LearningRateMonitor
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.strategies import DDPStrategy
from typing_extensions import override

from metilr.callbacks import ExactFloat32
from metilr.checkpoints import AtomicCheckpointIO, MovableModelCheckpoint
from metilr.class_paths import ClassRefused, refusal_of, refuse_class
from metilr.cli import OneLineErrors, check_config, refuse_null_characters
from metilr.data.pair_datamodule import PairDataModule
from metilr.errors import UserError
from metilr.extraction import PLAN_TIMEOUT
from metilr.launch import has_launcher, is_first_process
from metilr.training import FineTuning
from metilr.training_callbacks import Announcement, EpochLines, KNNValidation, PairPictures, TrainingProgress
from metilr.training_run import BEST, LAST, open_run
from metilr.wandb_run import PROJECT, WandbMode, open_wandb
from metilr.yaml_files import parser_mode

PRECISIONS = ("32", "32-true", "bf16-mixed", "16-mixed")  # mining and validation are float32 in any case
# What this command gives the trainer: an epoch is what is drawn, validated and resumed.
SET_HERE = (
    "logger", "plugins", "limit_val_batches", "num_sanity_val_steps", "reload_dataloaders_every_n_epochs",
    "default_root_dir", "use_distributed_sampler", "enable_model_summary", "check_val_every_n_epoch",
    "val_check_interval", "enable_checkpointing", "fast_dev_run", "overfit_batches", "barebones",
)  # fmt: skip


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, whose errors are one line."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        refuse_class(message)
        parameter = re.search(r"NestedArg\(key='([\w.]+)'|^Option '(\w+)' is not accepted", message)
        no_class = re.search(r"Problem with given class_path '([\w.]+)'", message)
        if parameter:  # of a class such as a loss
            message = f"{parameter[1] or parameter[2]}: the class that is named has no such parameter or value"
        elif no_class:
            message = f"{no_class[1]}: there is no such class"
        super().error(message, ex)


class TrainingCLI(LightningCLI):
    """Options of the trainer, the model and the data, as ``--trainer.x``, ``--model.x`` and ``--data.x``."""

    def __init__(self, args: Sequence[str], prog: str, held: contextlib.ExitStack) -> None:
        self.prog = prog
        self.held = held  # what is left when the run ends: the lock of its folder
        super().__init__(
            FineTuning,
            PairDataModule,
            save_config_callback=None,  # written before the training, by open_run
            trainer_defaults={"max_epochs": 2, "log_every_n_steps": 1, "precision": "bf16-mixed"},
            seed_everything_default=0,
            parser_kwargs={
                "prog": prog,
                "parser_mode": parser_mode(),
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
        """Add the options that are neither trainer's, model's nor data's."""
        parser.allow_abbrev = False  # a config or a script with half a name would break with the next option
        parser.add_argument(
            "--output", type=Path | None, default=None,
            help="Folder of the run; without it a dated one under runs/. With an unfinished run of the same options in "
            "it, that run is continued from its last epoch. Needed under torchrun and SLURM.",
        )  # fmt: skip
        parser.add_argument(
            "--validate_first", type=bool, default=True, help="Validate the starting weights too, before training."
        )
        parser.add_argument(
            "--wandb", type=WandbMode, default="auto",
            help="Log to Weights & Biases: auto is online if there is a key (WANDB_API_KEY or netrc), else offline.",
        )  # fmt: skip
        parser.add_argument("--wandb_project", type=str, default=PROJECT, help="Project in Weights & Biases.")
        parser.add_argument(
            "--wandb_checkpoint", type=bool, default=False, help="Store the best checkpoint as an artifact there."
        )
        parser.add_argument(
            "--pictures_every", type=int, default=2, help="Epochs between tables of pairs as pictures in W&B."
        )
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the command line, refusing what Lightning lets through."""
        for i, arg in enumerate(args):
            option, _, file = arg.partition("=")
            if option in ("--config", "-c") and (file or i + 1 < len(args)):
                check_config(parser, file or args[i + 1])
        try:
            self.config = parser.parse_args(args)
        except ClassRefused as error:
            raise refusal_of(error, args) from None
        refuse_null_characters(self.config.as_dict())
        seed = self.config.seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            parser.error(f"--seed_everything {seed}: give a number from 0 to 2**32 - 1")
        if self.config.pictures_every < 1:
            parser.error(f"--pictures_every {self.config.pictures_every}: must be at least 1")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Open the run's folder, and make the trainer with its callbacks and loggers."""
        _refuse_what_would_not_resume(self.config.trainer)
        self.options = _plain(self.parser, self.config)
        self.output, self.resume_from = open_run(self.config.output, self.options, self.held)
        with self.kept_if_of_use():
            return self._trainer(**kwargs)

    @contextlib.contextmanager
    def kept_if_of_use(self) -> Iterator[None]:
        """Remove a dated folder again if the block fails before an epoch was finished."""
        try:
            yield
        except BaseException:
            if self.config.output is None and is_first_process() and not (self.output / f"{LAST}.ckpt").exists():
                shutil.rmtree(self.output, ignore_errors=True)
            raise

    def _trainer(self, **kwargs: Any) -> Trainer:
        self.datamodule.folder = self.output
        self.model.run_config = self.options
        self.validation = KNNValidation(self.config.validate_first)
        self.best = MovableModelCheckpoint(
            self.output,
            filename=BEST,
            monitor="val/gap",
            mode="max",
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        callbacks: list[Callback] = [
            Announcement(), self.validation, PairPictures(self.config.pictures_every), LearningRateMonitor("step"),
            ExactFloat32(), self.best,
            # After the best: it is what a killed run continues from, and has the best's state in it.
            MovableModelCheckpoint(
                self.output, filename=LAST, save_on_train_epoch_end=True, enable_version_counter=False
            ),
        ]  # fmt: skip
        shows_bar = self.config.trainer.enable_progress_bar is not False and sys.stdout.isatty()
        callbacks.append(TrainingProgress() if shows_bar else EpochLines())
        self.trainer_defaults["callbacks"] = callbacks
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
            limit_val_batches=0,  # validation is the callback's
            num_sanity_val_steps=0,
            enable_progress_bar=shows_bar,
            enable_model_summary=False,
            **kwargs,
        )

    def _loggers(self) -> list[Logger]:
        # A continued run gets a file of its own: the logger would overwrite the first one's.
        taken = len(list(self.output.glob("csv*"))) if self.resume_from else 0
        loggers: list[Logger] = [CSVLogger(str(self.output), name="", version=f"csv_{taken + 1}" if taken else "csv")]
        wandb_logger = _wandb_logger(self.config, self.output, self.options)
        return loggers if wandb_logger is None else [*loggers, wandb_logger]


def _plain(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """All options as resolved, in plain values, without where this run lies."""
    options = yaml.safe_load(parser.dump(config, skip_unset=False, skip_link_targets=True))
    for name in ("config", "output"):
        options.pop(name, None)
    return dict(options)


def _several_processes(trainer: Any) -> bool:
    on_gpu = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
    devices = trainer.devices if trainer.devices not in ("auto", -1, "-1") else None
    if devices is None:
        devices = torch.cuda.device_count() if on_gpu else 1
    several = len(devices) > 1 if isinstance(devices, list) else str(devices) != "1"
    return has_launcher() or trainer.num_nodes > 1 or several


def _refuse_what_would_not_resume(trainer: Any) -> None:
    """Refuse options of the trainer that this command decides, or that would silently do nothing."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(Trainer).parameters.items()}
    for name in SET_HERE:
        if trainer.get(name) not in (None, defaults[name]):
            raise UserError(f"--trainer.{name}: is decided by this command; leave it out")
    precision = str(trainer.get("precision"))
    if precision not in PRECISIONS:
        raise UserError(f"--trainer.precision {precision}: choose one of {', '.join(PRECISIONS)}")
    if precision.startswith("16") and not torch.cuda.is_available():
        raise UserError("--trainer.precision 16-mixed: needs an NVIDIA GPU; elsewhere use 32 or bf16-mixed")
    if (trainer.get("max_epochs") or 0) < 1:
        raise UserError("--trainer.max_epochs: give a number from 1 up; an epoch is what is validated and resumed")


def _wandb_logger(config: Namespace, output: Path, options: Mapping[str, Any]) -> WandbLogger | None:
    if config.wandb == "off" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    if not is_first_process():
        return WandbLogger(project=config.wandb_project, offline=True, save_dir=output)
    run = open_wandb(config.wandb, config.wandb_project, output, options)
    return None if run is None else WandbLogger(experiment=run)
