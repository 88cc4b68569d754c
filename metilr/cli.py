"""Turn typed functions into commands: options from signatures, help from docstrings, errors in one line.

A parameter that is a dataclass stands for its fields: options of their own names, in a group of the help.
"""

import argparse
import dataclasses
import importlib
import inspect
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from metilr import __version__
from metilr.distributed import CONTINUE, is_lack_of_memory, sigterm_as_interrupt
from metilr.errors import UserError, did_you_mean, one_line, shown, unknown_option
from metilr.files import check_config

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130  # as shells have it
SUBCOMMANDS = {  # where each is within metilr, and its summary, which --help prints without importing it
    "evaluate": ("commands.evaluate:evaluate", "Measure how well a model recognises exhibits: GAP, GAP⁻ and ACC."),
    "train": ("training.cli:train", "Fine-tune a model, also on a museum's own catalogue images alone."),
    "identify": ("collection.identify:identify", "Say which exhibit each photo shows, or that it shows none."),
    "index": ("collection.index:index", "Describe a museum's own images, to identify photos."),
    "serve": ("collection.serve:serve", "Serve a page and an API that say which exhibit a photo shows."),
    "compare": ("commands.compare:compare", "Compare evaluations with each other and with published figures."),
    "rerun": ("commands.rerun:rerun", "Repeat an evaluation and say whether its figures come out again."),
    "sweep": ("commands.sweep:sweep", "Evaluate many configurations, or one option over several values."),
    "dataset": ("commands.dataset:dataset", "Show what a data root holds: counts, class sizes, sample images."),
    "audit": ("commands.audit:audit_and_exit", "Look for copies, leaks, doubtful labels and bad images."),
    "download": ("commands.download:download", "Download the Met dataset, check it and unpack it."),
    "verify": ("commands.verify:verify", "Check that every image of a ground truth is there and readable."),
    "export": ("commands.export:export", "Write a model as one ONNX file, or an index's descriptors as a table."),
    "pack": ("commands.pack:pack", "Write a run's model and whitening into one checkpoint, to pass on."),
    "push": ("commands.push:push", "Publish a run's model on the Hugging Face Hub, with a card of its figures."),
    "export-descriptors": ("extraction.reference_pickle:export_descriptors", "Write a store as a descriptors.pkl."),
    "visits": ("commands.dataset:write_contact_sheet", "Draw simulated visits to a folder's images on one sheet."),
    "demo": ("demo:draw_demo", "Draw the synthetic museum of the demo, in the Met's layout."),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``metilr SUBCOMMAND``: ``evaluate`` and ``train`` are the scripts of the repository by another name."""
    name, *rest = list(sys.argv[1:] if args is None else args) or ["--help"]
    if name == "describe":
        print("metilr describe is metilr dataset now", file=sys.stderr)
    if name in ("-h", "--help"):
        print("usage: metilr SUBCOMMAND [options] | metilr --version\n\nsubcommands (each has a --help of its own):")
        print("\n".join(f"  {name:<20} {summary}" for name, (_, summary) in SUBCOMMANDS.items()))
    elif name == "--version":
        print(f"metilr {__version__}")
    elif (name := {"describe": "dataset"}.get(name, name)) in SUBCOMMANDS:
        (run_main if name == "train" else run_command)(SUBCOMMANDS[name][0], rest, prog=f"metilr {name}")
    else:
        _fail("metilr", f"no subcommand {name!r}{did_you_mean(name, SUBCOMMANDS)}; metilr --help lists them")


def run_command(function: Callable[..., Any] | str, args: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Call a function, or ``module:name``, with options from the command line and from YAML files (``--config``).

    A user's mistake, and Ctrl-C from the first second on (imports take some), ends in one line on stderr and exit
    status 2. Without ``args`` and ``prog`` they are the process's own.
    """

    def run(prog: str) -> None:
        loaded = _load(function) if isinstance(function, str) else function
        options = parse_options(loaded, args, prog)
        try:
            call(loaded, options)
        except UserError as error:  # its parameter may be none of this command's, or one without two dashes
            if flat_defaults(loaded).get(error.parameter or "", inspect.Parameter.empty) is inspect.Parameter.empty:
                raise UserError(str(error)) from error
            raise

    _run(run, prog)


def run_main(function: str, args: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Call ``module:name``, which reads the command line itself, with errors as in ``run_command``."""
    _run(lambda prog: _load(function)(args, prog), prog)


def _load(function: str) -> Callable[..., Any]:
    module, name = function.split(":")
    return getattr(importlib.import_module(f"metilr.{module.removeprefix('metilr.')}"), name)


def call(function: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Call a function with flat options, of which its dataclasses are put together."""
    given, arguments = dict(options), {}
    for name, kind in _groups(function).items():
        fields = {field.name for field in dataclasses.fields(kind)}
        arguments[name] = kind(**{field: given.pop(field) for field in fields & given.keys()})
    return function(**arguments, **given)


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A function's arguments as flat options, with a dataclass's fields in its place."""
    options: dict[str, Any] = {}
    for name, value in arguments.items():
        options |= vars(value) if dataclasses.is_dataclass(value) else {name: value}
    return options


def flat_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Defaults of a function's options."""
    groups, parameters = _groups(function), inspect.signature(function).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.name not in groups}
    return defaults | {field.name: field.default for kind in groups.values() for field in dataclasses.fields(kind)}


def _groups(function: Callable[..., Any]) -> dict[str, Any]:
    """The dataclasses among a function's parameters, by the parameter's name."""
    kinds = {name: kind for name, kind in typing.get_type_hints(function).items() if name != "return"}
    parts = ((name, part) for name, kind in kinds.items() for part in (kind, *typing.get_args(kind)))
    return {name: part for name, part in parts if dataclasses.is_dataclass(part)}


def parse_options(
    function: Callable[..., Any], args: Sequence[str] | None = None, prog: str | None = None
) -> dict[str, Any]:
    """Read a command line into the flat options of a function, defaults included; ``call`` calls it with them."""
    parser, args = _parser(function, prog), list(sys.argv[1:] if args is None else args)
    refuse_unknown(parser, args)
    for i, arg in enumerate(args):
        option, _, file = arg.partition("=")
        if option == "--config" and (file or i + 1 < len(args)):
            _check_names(parser, check_config(file or args[i + 1]))
    return _checked(function, parser.parse_args([*_spelt_out(parser, args)]).as_dict())


def options_of(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Read recorded options as ``parse_options`` reads a command line, or refuse them."""
    parser = _parser(function)
    _check_names(parser, options)
    return _checked(function, parser.parse_object(dict(options)).as_dict())


class Help(DefaultHelpFormatter):
    """Help without types, which choices and sentences tell, and without a second form of an option."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if action.dest == "print_config" or not action.option_strings or default in (None, argparse.SUPPRESS, []):
            return "Print all options as YAML, and stop." if action.dest == "print_config" else action.help or ""
        if isinstance(default, (list, tuple)):
            default = " ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in default)
        elif isinstance(default, bool):
            default = str(default).lower()
        elif isinstance(default, dict):  # of a class
            default = default["class_path"].rpartition(".")[2]
        return f"{action.help or ''} (default: {default})"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(name for name in action.option_strings if not name.endswith("+"))
        metavar = self._get_default_metavar_for_optional(action)
        return names if action.nargs == 0 else f"{names} {self._format_args(action, metavar)}"

    def _format_usage(self, usage: Any, actions: Iterable[argparse.Action], *_: Any) -> str:
        """Name what must be given; the options follow, and would fill a screen here."""
        needed = [action.dest.upper() for action in actions if not action.option_strings]
        return f"usage: {self._prog} {' '.join([*needed, '[options]'])}\n\n"


class Parser(ArgumentParser):
    """The commands' parser: what is wrong is a ``UserError``."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**{"formatter_class": Help, "default_env": False, **how})
        self.allow_abbrev = False  # a config or a script with half a name would break with the next option

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what an option has said about its value, or else what jsonargparse says, in one line."""
        cause: BaseException | None = ex
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        line = " ".join(message.split())
        raise cause or UserError(f"{line if len(line) <= 600 else line[:597] + '...'}; see --help")


def _parser(function: Callable[..., Any], prog: str | None = None) -> Any:
    parser: Any = Parser(prog=prog, description=(inspect.getdoc(function) or "").partition("\n\nArgs:")[0])
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse takes -1e-5 for an option
    parser.add_argument("--config", action="config", help="YAML file with any of the options below; later ones win.")
    groups = _groups(function)
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=set(groups))
    for options in groups.values():
        parser.add_class_arguments(options, None)
    for action in (each for each in parser._actions if hasattr(each, "_typehint")):
        kind = action._typehint
        lists = [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) in (list, tuple, Sequence)]
        if lists:  # --scales 1 0.5, as argparse has it
            action.nargs, action._typehint, action.metavar = "+", typing.get_args(lists[0])[0], action.dest.upper()
            action.default = list(action.default) if isinstance(action.default, tuple) else action.default
        action._check_type = _named(action, ("a list of " if lists else "") + _in_words(action._typehint))
    return parser


def _named(action: Any, expected: str) -> Callable[..., Any]:
    """An option's check of its value that says in one line which option, which value and what is expected."""
    check = action._check_type

    def checked(value: Any, **how: Any) -> Any:
        try:
            return check(value, **how)
        except (TypeError, ValueError, RuntimeError) as error:
            text = value[:200] if isinstance(value, str) else shown(value)
            raise UserError(f"{text}: expected {expected}; see --help", action.dest) from error

    return checked


def _in_words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, typing.get_args(kind)))
    return "null" if kind is type(None) else getattr(kind, "__name__", str(kind))


def _spelt_out(parser: Any, args: list[str]) -> Iterator[str]:
    """Write out a switch without a value: ``--json`` means ``--json=true``."""
    for arg, following in zip(args, [*args, ""][1:], strict=True):
        is_switch = getattr(parser._option_string_actions.get(arg), "_typehint", None) is bool
        yield f"{arg}=true" if is_switch and following not in ("true", "false") else arg


def refuse_unknown(parser: Any, args: Sequence[str]) -> None:
    """Refuse options that a parser does not have, with the nearest that it has; and what is no text."""
    options = parser._option_string_actions
    classes = tuple(f"{option}." for option, action in options.items() if hasattr(action, "_typehint"))
    for arg in args:
        name = arg.partition("=")[0]
        # An option that takes a class has the class's parameters below it.
        if name.startswith("--") and name not in options and not name.startswith(classes):
            raise unknown_option(name, options)
        if any("\ud800" <= letter <= "\udfff" for letter in arg):  # how Python holds bytes that are no letters
            raise UserError(f"{arg}: its name is not in UTF-8; rename it")


def _check_names(parser: Any, options: Mapping[str, Any]) -> None:
    """Refuse unknown options of a file, and what is no list where one is due."""
    known = {action.dest: action for action in parser._actions if hasattr(action, "_typehint")}
    for name, value in options.items():
        if name not in known:
            raise unknown_option(f"--{name}", [f"--{each}" for each in known])
        if known[name].nargs == "+" and not isinstance(value, (list, tuple, type(None))):
            raise UserError(f"{shown(value)}: expected a list like [A, B]", name)


def _checked(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Refuse null for an option that needs a value: jsonargparse would let it pass."""
    options.pop("config", None)
    for of in (function, *_groups(function).values()):
        for name, kind in typing.get_type_hints(of).items():
            if name in options and options[name] is None and type(None) not in typing.get_args(kind):
                raise UserError(f"null: expected {_in_words(kind)}; leave it out for the default", name)
    return options


def _run(call: Callable[[str], Any], prog: str | None) -> None:
    prog = prog or Path(sys.argv[0]).name
    # Before PyTorch loads OpenMP: threads that wait by spinning slow down a busy machine many times over.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home that cannot be written
    try:
        with sigterm_as_interrupt():
            call(prog)
    except UserError as error:
        _fail(prog, str(error) if error.parameter is None else f"--{error.parameter} {error.message}")
    except BrokenPipeError:  # whoever read the output has had enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would complain again
    except Exception as error:
        if is_lack_of_memory(error):
            limited = "was it limited (ulimit, a container)?"
            _fail(prog, f"memory does not suffice ({one_line(error)}); {limited} {CONTINUE.capitalize()}")
        if not isinstance(error, OSError) or error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(prog, f"{where}{error.strerror}; {CONTINUE}")
    except KeyboardInterrupt as error:
        _fail(prog, f"interrupted; {str(error) or CONTINUE}", EXIT_INTERRUPTED)


def _fail(prog: str, message: str, status: int = EXIT_USER_ERROR) -> NoReturn:
    # A hostile file's own words may be in it: none of them is to move a terminal's cursor.
    letters = (letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(message.split()))
    print(f"{prog}: error: {''.join(letters)}", file=sys.stderr)
    sys.exit(status)
