"""Options of ``metilr train``, and the trainer made of them: a Lightning CLI whose errors are one line."""

import contextlib
import inspect
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import torch
import yaml
from jsonargparse import Namespace, _common
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, LearningRateMonitor
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.strategies import DDPStrategy
from typing_extensions import override

from metilr.cli import OneLineErrors, check_config, refuse_null_characters
from metilr.distributed import has_launcher, is_first_process
from metilr.errors import UserError
from metilr.evaluation.run_folder import RUNS, make_new_folder
from metilr.extraction.callbacks import ExactFloat32
from metilr.extraction.describe import PLAN_TIMEOUT
from metilr.files import parser_mode, read_yaml, remove_leftovers, write_atomically
from metilr.locks import LOCK, alone_in
from metilr.models.checkpoints import read_checkpoint
from metilr.report.wandb import PROJECT, WandbMode, open_wandb
from metilr.training.callbacks import (
    Announcement,
    AtomicCheckpointIO,
    EpochLines,
    KNNValidation,
    MovableModelCheckpoint,
    PairPictures,
    TrainingProgress,
)
from metilr.training.datamodule import PairDataModule
from metilr.training.module import FineTuning

TRUSTED = (
    "metilr.training.losses", "metilr.training.augmentations",
    "pytorch_metric_learning.losses", "pytorch_metric_learning.distances", "pytorch_metric_learning.reducers",
    "pytorch_metric_learning.regularizers", "pytorch_metric_learning.miners",
    "pytorch_lightning.callbacks", "pytorch_lightning.strategies", "torch.nn",
)  # fmt: skip
CONFIG = ("-c", "--config")
OPTIONS_FILES = (".yaml", ".yml", ".json")


class ClassRefused(UserError):
    """A class that a file names is not imported."""


@contextlib.contextmanager
def only_trusted_classes(args: Sequence[str]) -> Iterator[None]:
    """Have jsonargparse import, while a command line is read, what the command line itself names and what is trusted.

    Args:
        args: The command line.

    Yields:
        Nothing; what was allowed in this process before is so again afterwards.
    """
    before = dict(_common.parsing_settings)  # of the whole process, and there is no other way to take them back
    try:
        jsonargparse.set_parsing_settings(
            import_path_denylist=["*"],
            import_path_allowlist=[*TRUSTED, *_typed(args)],
            # Parameters without a type take any value: a class in one is checked and built as well.
            validate_subclass_spec_in_any=True,
            instantiate_subclass_spec_in_any=True,
        )
        yield
    finally:
        _common.parsing_settings.clear()
        _common.parsing_settings.update(before)


def refuse_class(message: str) -> None:
    """Pass on what jsonargparse says about a class that it does not import.

    Raises:
        ClassRefused: If its message says so.
    """
    denied = re.search(r"Importing '([\w.]+)' is not allowed", message)
    if denied:
        key = re.search(r"Parser key \"([\w.]+)\"", message)
        raise ClassRefused(f"{key[0] if key else ''}: {denied[0]}")


def refusal_of(error: ClassRefused, args: Sequence[str]) -> UserError:
    """Say where the class stands, and what to do about it."""
    quoted = re.findall(r"[\"']([\w.]+)[\"']", str(error))
    denied, key = quoted[-1], quoted[0]
    named = [("" if option in CONFIG else option.lstrip("-"), text) for option, text in _values(args)]
    file, at, whole = _place(named, denied, set()) or ("a file that the command line names", key, key)
    option = ".".join(
        part for part in whole.split(".") if part not in ("class_path", "init_args") and not part.isdigit()
    )
    return UserError(
        f"{file}: {at}: a file may not name the class {denied}, whose import runs code; if you trust it, give it on "
        f"the command line: --{option} {denied} (SECURITY.md says which a file may name)"
    )


def _typed(args: Sequence[str]) -> set[str]:
    """What the command line allows: a class that it names may be defined in another module of its package."""
    allowed = set()
    for word in (word for option, text in _values(args) if option not in CONFIG for word in _words(text)):
        parts = word.split(".")
        if len(parts) > 1 and all(part.isidentifier() for part in parts) and not Path(word).exists():
            is_ours = any(parts[0] == entry.split(".")[0] for entry in TRUSTED)  # much of those is not trusted
            allowed.add(".".join(parts[:-1] if len(parts) > 2 else parts) if is_ours else parts[0])
    return allowed - {"jsonargparse"}


def _values(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Values on a command line, each with the option before it."""
    option = ""
    for arg in args:
        text = arg
        if arg.startswith("-c") and len(arg) > 2:  # argparse takes -cFILE too
            option, text = "-c", arg[2:].lstrip("=")
        elif arg.startswith("-"):
            option, _, text = arg.partition("=")
        if text:
            yield option, text


def _words(text: str) -> list[str]:
    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
        return [word for _, word in _strings(yaml.safe_load(text))]
    return []


def _strings(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All text in it, each with its place."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, (dict, list)):
        for name, part in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _strings(part, f"{key}.{name}".lstrip("."))


def _place(named: Iterable[tuple[str, str]], denied: str, seen: set[Path]) -> tuple[str, str, str] | None:
    """The file among those named, or named in those, that names a class; its key there, and from the top."""
    for before, file in ((key, Path(text)) for key, text in named if text.endswith(OPTIONS_FILES)):
        if file in seen:
            continue
        seen.add(file)
        with contextlib.suppress(OSError, ValueError):
            strings = list(_strings(read_yaml(file)))
            found = [(str(file), key, f"{before}.{key}".lstrip(".")) for key, text in strings if text == denied]
            deeper = [(f"{before}.{key}".lstrip("."), str(file.parent / text)) for key, text in strings]
            place = found[0] if found else _place(deeper, denied, seen)
            if place:
                return place
    return None


OUTPUT_VARIABLE = "METILR_TRAINING_OUTPUT"  # tells the processes that Lightning starts which folder the first chose
BEST, LAST = "best", "last"


def open_run(output: Path | None, options: Mapping[str, Any], held: contextlib.ExitStack) -> tuple[Path, Path | None]:
    """Make the run's folder, or find the unfinished run in it; the first process holds it against other runs.

    Returns:
        The folder, and the checkpoint to continue from, if any.

    Raises:
        UserError: If the folder cannot be written, or holds a finished run, one of other options, or other files, or
            another run is at work there.
    """
    if not has_launcher() and not is_first_process():  # started by Lightning in the first one's environment
        output = Path(os.environ[OUTPUT_VARIABLE])
    elif output is None:
        if has_launcher():
            raise UserError("--output: name a folder; processes that a launcher starts cannot agree on a dated one")
        output = make_new_folder(RUNS, f"{datetime.now():%Y-%m-%d_%H-%M-%S}_train")
    os.environ[OUTPUT_VARIABLE] = str(output)
    config = output / "config.yaml"
    last = output / f"{LAST}.ckpt"
    if is_first_process():
        _claim(output, config, options, held)
    if not last.exists():
        return output, None
    try:
        read_checkpoint(last)
    except UserError as error:
        raise UserError(f"{error}; or delete {output}, or name another --output, to start anew") from None
    return output, last


def _claim(output: Path, config: Path, options: Mapping[str, Any], held: contextlib.ExitStack) -> None:
    text = yaml.safe_dump(dict(options), sort_keys=False)
    try:
        output.mkdir(parents=True, exist_ok=True)
        ours = (LOCK, f".{config.name}.")  # where a killed process got no further
        if not config.exists() and any(not file.name.startswith(ours) for file in output.iterdir()):
            raise UserError(f"--output {output}: holds other files; name an empty or new folder")
        held.enter_context(alone_in(output, "another run", "name another --output"))
        if (output / "finished").exists():
            raise UserError(f"--output {output}: holds a finished run; name another folder")
        remove_leftovers(output)
        if config.exists() and (output / f"{LAST}.ckpt").exists():
            _refuse_other_options(output, config, yaml.safe_load(text))
        else:  # what failed before its first epoch is tried anew
            write_atomically(config, text)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); name another folder") from None


def _refuse_other_options(output: Path, config: Path, options: Mapping[str, Any]) -> None:
    try:
        before = read_yaml(config)
    except (OSError, ValueError) as error:
        raise UserError(f"{config}: cannot be read ({type(error).__name__}); name another --output") from None
    other = _differing(before, options)
    if other:
        raise UserError(
            f"--output {output}: holds a run with other options ({', '.join(other[:4])}); name another folder, or "
            f"continue that run with --config {config} --output {output}"
        )


def _differing(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [d for key in keys for d in _differing(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == now else [name]


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
