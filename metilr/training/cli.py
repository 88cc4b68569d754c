"""``metilr train``: a Lightning CLI around FineTuning and PairDataModule, with one-line errors.

In the repository it is ``python train.py`` too.
"""

import contextlib
import inspect
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, LearningRateMonitor
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
from metilr.errors import UserError, one_line
from metilr.evaluation.run_folder import RUNS, make_new_folder
from metilr.extraction.callbacks import ExactFloat32
from metilr.extraction.describe import PLAN_TIMEOUT
from metilr.files import LOCK, alone_in, read_yaml, remove_leftovers, write_atomically
from metilr.models.checkpoints import read_checkpoint
from metilr.report.wandb import PROJECT, WandbMode, open_wandb, staged_in, unharmed, where_logged
from metilr.training.callbacks import (
    AtomicCheckpointIO,
    MovableModelCheckpoint,
    PairPictures,
    TrainingLines,
    TrainingProgress,
)
from metilr.training.datamodule import PairDataModule
from metilr.training.module import FineTuning

OWN = ("config", "output", "seed_everything", "wandb", "pictures_every")  # options that no group has
OUTPUT_VARIABLE = "METILR_TRAINING_OUTPUT"  # tells the processes that Lightning starts which folder the first chose
BEST, LAST = "best", "last"
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
        raise UserError(" ".join(message.split()))


class TrainingCLI(LightningCLI):
    """Options of the trainer, the model and the data, as ``--trainer.x``, ``--model.x`` and ``--data.x``.

    Args:
        args: The command line.
        prog: The command's name.
        held: Gets what is left when the run ends: the lock of its folder.
    """

    def __init__(self, args: Sequence[str], prog: str, held: contextlib.ExitStack) -> None:
        self.held = held
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
                check_config(file or args[i + 1])
        refuse_unknown(parser, args)
        self.config = parser.parse_args(args)
        seed = self.config.seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise UserError(f"{seed}: give a number from 0 to 2**32 - 1", "seed_everything")
        if self.config.pictures_every < 1:
            raise UserError(f"{self.config.pictures_every}: must be at least 1", "pictures_every")
        refuse_what_breaks_promises(self.config.trainer)

    @override
    def instantiate_classes(self) -> None:
        """Build model, data and trainer.

        Raises:
            UserError: If one of them, or a class that an option names, does not take its parameters.
        """
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(
                f"a class that an option names cannot be built: {_words(error)} (a loss with weights of its own needs "
                "num_classes and embedding_size)"
            ) from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Open the run's folder, and make the trainer with its callbacks and loggers."""
        self.options = _plain(self.parser, self.config)
        self.output, self.resume_from = open_run(self.config.output, self.options, self.held)
        with self.kept_if_of_use():
            try:
                return self._trainer(**kwargs)
            except UserError:
                raise
            except (MisconfigurationException, ValueError) as error:
                raise UserError(_words(error)) from error

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
        self.lines = TrainingLines(each_epoch=not shows_bar)
        self.best = MovableModelCheckpoint(
            self.output, filename=BEST, monitor="val/gap", mode="max", save_on_train_epoch_end=True,
            auto_insert_metric_name=False, enable_version_counter=False,
        )  # fmt: skip
        callbacks: list[Callback] = [
            self.lines, PairPictures(self.config.pictures_every), LearningRateMonitor("step"), ExactFloat32(),
            self.best,
            # After the best: it is what a killed run continues from, and has the best's state in it.
            MovableModelCheckpoint(
                self.output, filename=LAST, save_on_train_epoch_end=True, enable_version_counter=False
            ),
        ]  # fmt: skip
        self.trainer_defaults["callbacks"] = callbacks + [TrainingProgress()] * shows_bar
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
        taken = len(list(self.output.glob("csv*"))) if self.resume_from else 0
        loggers: list[Logger] = [CSVLogger(str(self.output), name="", version=f"csv_{taken + 1}" if taken else "csv")]
        config = self.config
        if config.wandb == "off" or os.environ.get("WANDB_MODE") == "disabled":
            return loggers
        if not is_first_process():
            return [*loggers, WandbLogger(project=config.wandb_project, offline=True, save_dir=self.output)]
        run = open_wandb(config.wandb, config.wandb_project, self.output, self.options)
        return loggers if run is None else [*loggers, WandbLogger(experiment=run)]


def _words(error: Exception) -> str:
    """What Lightning or jsonargparse say, in a line."""
    return " ".join(str(error).split())


def _plain(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """All options as resolved, in plain values, without where this run lies."""
    options = yaml.safe_load(parser.dump(config, skip_unset=False, skip_link_targets=True))
    return {name: value for name, value in options.items() if name not in ("config", "output")}


def refuse_what_breaks_promises(trainer: Namespace) -> None:
    """Refuse options of the trainer that this command decides, or with which a run could not be resumed.

    Raises:
        UserError: If there is one.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(Trainer).parameters.items()}
    for name in SET_HERE:
        if trainer.get(name) not in (None, defaults[name]):
            raise UserError(f"{trainer.get(name)}: is decided by this command; leave it out", name)
    precision = str(trainer.get("precision"))
    if precision not in PRECISIONS:
        raise UserError(f"{precision}: choose one of {', '.join(PRECISIONS)}", "precision")
    if precision.startswith("16") and not torch.cuda.is_available():
        raise UserError("16-mixed: needs an NVIDIA GPU; elsewhere use 32 or bf16-mixed", "precision")
    if (trainer.get("max_epochs") or 0) < 1:
        raise UserError(
            f"{trainer.get('max_epochs')}: give a number from 1 up; an epoch is what is validated and resumed",
            "max_epochs",
        )


def _several_processes(trainer: Namespace) -> bool:
    if has_launcher() or trainer.num_nodes > 1:
        return True
    devices = trainer.devices
    if devices in ("auto", -1, "-1"):
        on_gpu = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
        devices = torch.cuda.device_count() if on_gpu else 1
    return len(devices) > 1 if isinstance(devices, list) else str(devices) != "1"


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
            raise UserError("name a folder: processes that a launcher starts cannot agree on a dated one", "output")
        output = make_new_folder(RUNS, f"{datetime.now():%Y-%m-%d_%H-%M-%S}_train")
    os.environ[OUTPUT_VARIABLE] = str(output)
    if is_first_process():
        try:
            _claim(output, options, held)
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error.strerror}); name another folder", "output") from None
    last = output / f"{LAST}.ckpt"
    if not last.exists():
        return output, None
    try:
        read_checkpoint(last)
    except UserError as error:
        raise UserError(f"{error}; or delete {output}, or name another output, to start anew") from None
    return output, last


def _claim(output: Path, options: Mapping[str, Any], held: contextlib.ExitStack) -> None:
    config = output / "config.yaml"
    output.mkdir(parents=True, exist_ok=True)
    ours = (LOCK, f".{config.name}.")  # where a killed process got no further
    if not config.exists() and any(not file.name.startswith(ours) for file in output.iterdir()):
        raise UserError(f"{output}: holds other files; name an empty or new folder", "output")
    held.enter_context(alone_in(output, "another run", "name another output"))
    if (output / "finished").exists():
        raise UserError(f"{output}: holds a finished run; name another folder", "output")
    remove_leftovers(output)
    text = yaml.safe_dump(dict(options), sort_keys=False)
    if not config.exists() or not (output / f"{LAST}.ckpt").exists():
        write_atomically(config, text)  # what failed before its first epoch is tried anew
        return
    try:
        before = read_yaml(config)
    except ValueError as error:
        raise UserError(f"{config}: cannot be read ({one_line(error)}); name another output") from None
    other = _differing(before, yaml.safe_load(text))
    if other:
        raise UserError(
            f"{output}: holds a run with other options ({', '.join(other[:4])}); name another folder, or continue that "
            f"run with --config {config} --output {output}", "output"
        )  # fmt: skip


def _differing(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [d for key in keys for d in _differing(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == now else [name]


def train(args: Sequence[str] | None = None, prog: str = "metilr train") -> None:
    """Fine-tune a model, also on a museum's own catalogue images alone.

    One run at a time works in an output folder.

    Args:
        args: Command line without the program; default: the process's own.
        prog: The command's name in messages.

    Raises:
        UserError: If an option, a file or the data is not usable.
        KeyboardInterrupt: If interrupted; finished epochs are kept.
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
    return error if error.parameter in OWN else UserError(str(error))  # such as a loss's, below another option


def _train(cli: TrainingCLI) -> None:
    trainer: Trainer = cli.trainer
    console = Console(highlight=False, quiet=not is_first_process())
    doing = f"continuing after {cli.resume_from}" if cli.resume_from else "training"
    device = f"{trainer.world_size} x {trainer.strategy.root_device.type.upper()}, precision {trainer.precision}"
    console.print(f"[bold]{doing}[/] into {escape(str(cli.output))}, on {device}", soft_wrap=True)
    wandb_run = next((logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
    if wandb_run is not None and is_first_process():
        console.print(escape(where_logged(wandb_run, cli.output)), soft_wrap=True)
    needs_its_name = cli.config.output is None  # to be continued: the folder is a dated one
    less_memory = "fewer batch_pairs, smaller views, or gradient_checkpointing true"
    try:
        with cli.kept_if_of_use(), staged_in(cli.output), faults_in_one_line(less_memory):
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resume_from)
    except SystemExit:  # what Lightning turns Ctrl-C into
        named = f" with --output {cli.output}" if needs_its_name else ""
        kept = f"finished epochs are kept, the same command{named} continues"
        raise UserError(
            f"interrupted; {kept if cli.has_epochs else 'no epoch was finished, so nothing is kept'}"
        ) from None
    except MisconfigurationException as error:
        raise UserError(_words(error)) from error
    except UserError as error:
        kept = f" (to continue, add --output {cli.output})" if needs_its_name and cli.has_epochs else ""
        raise UserError(error.message + kept, error.parameter) from error
    finally:
        launcher: Any = trainer.strategy.launcher
        if sys.exc_info()[0] is not None and launcher is not None:
            for process in getattr(launcher, "procs", None) or []:
                process.kill()
    if trainer.is_global_zero:
        write_atomically(cli.output / "finished", f"{datetime.now().astimezone().isoformat(timespec='seconds')}\n")
        _print_outcome(cli, console)
        if wandb_run is not None:
            with staged_in(cli.output), unharmed(wandb_run):
                if cli.config.wandb_checkpoint and cli.best.best_model_path:
                    wandb_run.log_artifact(cli.best.best_model_path, f"model-{wandb_run.id}", "model", ["best"])


def _print_outcome(cli: TrainingCLI, console: Console) -> None:
    best, score, before = cli.best.best_model_path, cli.best.best_model_score, cli.lines.before
    if score is not None:
        start = "" if before is None else f", {100 * before['val/gap']:.2f} before training"
        console.print(f"val GAP {100 * float(score):.2f} at best{start} (single-scale, k = 1, τ = 1, no whitening)")
        if before is not None and float(score) <= before["val/gap"]:
            console.print(
                "[bold yellow]note:[/] training did not improve GAP on val; the starting weights were no worse"
            )
    data = cli.datamodule
    options = [] if data.root is None else ["--root", str(data.root)]
    options += [] if data.database == "full" else ["--database", data.database]
    # Whitening would undo a linear projector: it makes the database's covariance the identity, whatever comes before.
    options += ["--whitening", "none"] if cli.model.freeze_backbone else []
    evaluate = ("python", "evaluate.py") if cli.parser.prog == "train.py" else ("metilr", "evaluate")
    command = shlex.join([*evaluate, "--ckpt", best or str(cli.output / f"{LAST}.ckpt"), *options])
    console.print(f"evaluate it with\n  {escape(command)}", soft_wrap=True)
