"""``metilr train``, in the repository ``python train.py`` too: its command line and its YAML files."""

import importlib
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from metilr.cli import Parser, refuse_unknown
from metilr.distributed import end_with_parent, has_launcher, is_first_process, process_as_before, quieten_lightning
from metilr.errors import UserError
from metilr.files import check_config
from metilr.models import is_on_hub
from metilr.training import FineTuningOptions, PairOptions, RunOptions

TRAINER = (
    "Most parameters of Lightning's Trainer are options: --trainer.max_epochs (default: 2), --trainer.precision (32, "
    "bf16-mixed, 16-mixed; default: bf16-mixed where the device computes in bfloat16, else 32), --trainer.accelerator, "
    "--trainer.devices, --trainer.num_nodes, --trainer.accumulate_grad_batches, --trainer.deterministic and so on."
)
OPTIONS = {  # of whatever names a parameter in an error
    "seed": "seed_everything", "dim": "model.projector_dim", "config": "config",
    **{field.name: field.name for field in fields(RunOptions)},
    **{field.name: f"data.{field.name}" for field in fields(PairOptions)},
    **{field.name: f"model.{field.name}" for field in fields(FineTuningOptions)},
}  # fmt: skip


def make_parser(prog: str, for_help: bool = False) -> Any:
    """Make the parser; one for help alone needs neither PyTorch nor Lightning, which take seconds to import."""
    description = "Fine-tune a model on pairs of views. Without options: on the demo museum."
    parser: Any = Parser(prog=prog, description=description)
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options; later ones win.")
    if for_help:
        parser.add_class_arguments(PairOptions, "data")
        parser.add_class_arguments(FineTuningOptions, "model")
        _add_run(parser)
        parser.add_argument_group("Lightning's trainer", TRAINER)
        return parser
    from pytorch_lightning import Trainer
    from torch import nn

    @dataclass(frozen=True)
    class WithLoss(FineTuningOptions):
        loss: nn.Module | None = None

    parser.add_class_arguments(PairOptions, "data")
    parser.add_class_arguments(WithLoss, "model", fail_untyped=False)
    _add_run(parser)
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False)
    parser.set_defaults({"trainer.max_epochs": 2, "trainer.log_every_n_steps": 1})
    return parser


def _add_run(parser: Any) -> None:
    parser.add_class_arguments(RunOptions, None)
    [logger] = [action for action in parser._actions if action.dest == "logger"]
    logger.nargs, logger._typehint, logger.metavar = "+", str, "LOGGER"  # --logger wandb tensorboard
    logger.default = list(logger.default)


def train(args: Sequence[str] | None = None, prog: str = "metilr train") -> None:
    """Fine-tune a model, also on a museum's own catalogue images alone.

    Without ``args``, by those of the process.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not {"-h", "--help"}.isdisjoint(args):
        make_parser(prog, for_help=True).parse_args(["--help"])
    quieten_lightning()
    if not is_first_process() and not has_launcher():
        end_with_parent()
    try:
        with process_as_before():
            _train(make_parser(prog), args)
    except UserError as error:
        option = OPTIONS.get(error.parameter or "", error.parameter)
        # One that is no option is such as a loss's, below another option.
        known = option in OPTIONS.values() or str(option).startswith("trainer.")
        raise (UserError(error.message, option) if known else UserError(str(error))) from error


def _train(parser: Any, args: Sequence[str]) -> None:
    from pytorch_lightning import seed_everything

    from metilr.training.run import check_trainer_options, run, usual_precision

    refuse_unknown(parser, args)
    for arg, following in pairwise([*args, ""]):
        option, _, file = arg.partition("=")
        if option in ("-c", "--config") and (file or following):
            check_config(file or following)
    config = parser.parse_args(args)
    if config.trainer.precision is None:
        config.trainer.precision = usual_precision(config.trainer.accelerator)
        if config.trainer.precision == "32" and is_first_process():
            print("note: training in float32, since this device does not compute in bfloat16", flush=True)
    check_trainer_options(config.trainer)
    for name in ("callbacks", "profiler"):
        named = config.trainer[name]
        for built in named if isinstance(named, list) else [named]:
            _refuse_paths(built, f"trainer.{name}")
    options = RunOptions(**{field.name: config[field.name] for field in fields(RunOptions)})
    if is_on_hub(config.model.weights):
        from metilr.models.hub import WEIGHTS, locate

        config.model.weights = locate(config.model.weights, WEIGHTS, "weights")[1]
    recorded = yaml.safe_load(parser.dump(config, skip_unset=False))
    recorded = {name: value for name, value in recorded.items() if name not in ("config", "output")}
    seed_everything(options.seed_everything, workers=True, verbose=False)
    try:
        built = parser.instantiate(config)
    except (TypeError, ValueError) as error:  # of a class that an option names
        hint = "a loss with weights of its own needs num_classes and embedding_size"
        parser.error(f"the options do not go together ({hint}): {error}", error)
    evaluate = ("python", "evaluate.py") if parser.prog == "train.py" else ("metilr", "evaluate")
    run(options, built.model, built.data, built.trainer.as_dict(), recorded, evaluate)


def _refuse_paths(built: Any, option: str) -> None:
    """Refuse a folder or file that an option gives to a class: what a training writes stays in its output folder."""
    if not hasattr(built, "class_path"):  # none, or one of Lightning's by a short name
        return
    module, _, name = built.class_path.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    for argument, value in [*(built.get("init_args") or {}).items(), *(built.get("dict_kwargs") or {}).items()]:
        parameter = parameters.get(argument)
        is_default = value is None or (parameter is not None and value == parameter.default)
        annotation = "" if parameter is None else str(parameter.annotation)
        is_path = "path" in annotation.lower() or argument.endswith(("dir", "path"))
        leads_out = isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts)
        if not is_default and (is_path or leads_out):
            what = "what a training writes stays in its output folder"
            raise UserError(f"{value}: {what}; leave it out", f"{option}.{argument}")
