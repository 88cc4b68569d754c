"""``metilr train``: a Lightning CLI around FineTuning and PairDataModule, with one-line errors.

In the repository it is ``python train.py`` too.
"""

import contextlib
import inspect
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import WandbLogger
from rich.console import Console
from rich.markup import escape

from metilr.distributed import (
    end_with_parent,
    faults_in_one_line,
    has_launcher,
    is_first_process,
    process_as_before,
    quieten_lightning,
)
from metilr.errors import UserError
from metilr.files import write_atomically
from metilr.report.wandb import staged_in, unharmed, where_logged
from metilr.training.cli import LAST, TrainingCLI, only_trusted_classes
from metilr.training.datamodule import PairDataModule
from metilr.training.module import FineTuning


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
        _train(sys.argv[1:] if args is None else args, prog, held)


def _train(args: Sequence[str], prog: str, held: contextlib.ExitStack) -> None:
    console = Console(highlight=False, quiet=not is_first_process())
    try:
        with only_trusted_classes(args):
            cli = TrainingCLI(args, prog, held)
    except UserError as error:
        raise UserError(_as_typed(str(error))) from None
    except (MisconfigurationException, ValueError) as error:  # Lightning's words for options that cannot work
        if "Does not validate" in str(error):  # jsonargparse's, for a class whose constructor failed
            reason = re.search(r"^\s*- (.*)$", str(error), re.MULTILINE)
            why = f" ({reason[1]})" if reason else ""
            raise UserError(
                f"--model.loss, or a view of --data: cannot be built with these parameters{why}; losses with weights "
                "of their own need num_classes and embedding_size"
            ) from None
        raise UserError(f"--trainer: {error}") from None
    trainer: Trainer = cli.trainer
    doing = f"continuing after {cli.resume_from}" if cli.resume_from else "training"
    device = f"{trainer.world_size} x {trainer.strategy.root_device.type.upper()}, precision {trainer.precision}"
    console.print(f"[bold]{doing}[/] into {escape(str(cli.output))}, on {device}", soft_wrap=True)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and is_first_process():
            console.print(escape(where_logged(logger.experiment, cli.output)), soft_wrap=True)
    try:
        less_memory = "fewer --data.batch_pairs, smaller views, or --model.gradient_checkpointing true"
        with cli.kept_if_of_use(), staged_in(cli.output), faults_in_one_line(less_memory):
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resume_from)
    except SystemExit:  # what Lightning turns Ctrl-C into
        raise UserError(f"interrupted; {_what_is_kept(cli)}") from None
    except MisconfigurationException as error:
        raise UserError(f"--trainer: {error}") from None
    except UserError as error:
        kept = f" (to continue, add --output {cli.output})" if _needs_its_name(cli) else ""
        raise UserError(_as_typed(str(error)) + kept) from None
    finally:
        launcher: Any = trainer.strategy.launcher
        if sys.exc_info()[0] is not None and launcher is not None:
            for process in getattr(launcher, "procs", None) or []:
                process.kill()
    if trainer.is_global_zero:
        with staged_in(cli.output):
            _finish(cli, console)


def _as_typed(message: str) -> str:
    """An error's option names as this command has them: --data.root for --root."""
    here = {name: f"trainer.{name}" for name in ("precision", "devices", "num_nodes", "accelerator")}
    for prefix, of in (("model", FineTuning), ("data", PairDataModule)):
        here |= {name: f"{prefix}.{name}" for name in inspect.signature(of.__init__).parameters}
    here["seed"] = "seed_everything"
    return re.sub(rf"--({'|'.join(here)})\b(?!\.)", lambda found: f"--{here[found[1]]}", message)


def _what_is_kept(cli: TrainingCLI) -> str:
    if not (cli.output / f"{LAST}.ckpt").exists():
        return "no epoch was finished, so nothing is kept"
    how = f"the same command with --output {cli.output}" if _needs_its_name(cli) else "the same command"
    return f"finished epochs are kept, {how} continues"


def _needs_its_name(cli: TrainingCLI) -> bool:
    """Whether the run can be continued, but not by the same command alone: its folder was not named."""
    return cli.config.output is None and (cli.output / f"{LAST}.ckpt").exists()


def _finish(cli: TrainingCLI, console: Console) -> None:
    write_atomically(cli.output / "finished", f"{datetime.now().astimezone().isoformat(timespec='seconds')}\n")
    _print_outcome(cli, console)
    for logger in cli.trainer.loggers:
        if not isinstance(logger, WandbLogger):
            continue
        with unharmed(logger.experiment):
            best = cli.best.best_model_path
            if cli.config.wandb_checkpoint and best:
                logger.experiment.log_artifact(best, f"model-{logger.experiment.id}", "model", ["best"])


def _print_outcome(cli: TrainingCLI, console: Console) -> None:
    best, score = cli.best.best_model_path, cli.best.best_model_score
    before = cli.validation.before
    start = "" if before is None else f", {100 * before['val/gap']:.2f} before training"
    if score is not None:
        console.print(f"val GAP {100 * float(score):.2f} at best{start} (single-scale, k = 1, τ = 1, no whitening)")
        if before is not None and float(score) <= before["val/gap"]:
            console.print(
                "[bold yellow]note:[/] training did not improve GAP on val; the starting weights were no worse"
            )
    root = cli.datamodule.root
    options = [] if root is None else ["--root", str(root)]
    options += [] if cli.datamodule.database == "full" else ["--database", cli.datamodule.database]
    # Whitening would undo a linear projector: it makes the database's covariance the identity, whatever comes before.
    options += ["--whitening", "none"] if cli.model.freeze_backbone else []
    evaluate = ("python", "evaluate.py") if cli.prog == "train.py" else ("metilr", "evaluate")
    command = shlex.join([*evaluate, "--ckpt", best or str(cli.output / f"{LAST}.ckpt"), *options])
    console.print(f"evaluate it with\n  {escape(command)}", soft_wrap=True)
