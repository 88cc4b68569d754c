"""Turn typed functions into commands: options from signatures, help from docstrings, errors in one line.

A parameter that is a dataclass is a group of options: its fields, under their own names.
"""

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from metilr import __version__
from metilr.errors import UserError, shown
from metilr.files import read_yaml

EXIT_USER_ERROR = 2
SUBCOMMANDS = {  # where each is, and the first line of its docstring: --help prints it without importing anything
    "evaluate": ("metilr.commands.evaluate:evaluate",
        "Measure how well a model recognises exhibits: images and ground truth in, GAP, GAP⁻ and ACC out."),
    "train": ("metilr.training.cli:train",
        "Fine-tune a model, also on a museum's own catalogue images alone."),
    "identify": ("metilr.collection.identify:identify",
        "Say which exhibit each photo shows, or that it shows none of the collection."),
    "index": ("metilr.collection.index:index",
        "Describe a folder of a museum's own images, so that photos of its exhibits can be identified."),
    "serve": ("metilr.collection.serve.app:serve",
        "Serve a page on which a photo is dropped, chosen or taken, and that says which exhibit it shows."),
    "compare": ("metilr.commands.compare:compare",
        "Compare evaluations: figures on val and on test beside published ones, and paired differences."),
    "rerun": ("metilr.commands.rerun:rerun",
        "Repeat an evaluation from its results.json alone, and say whether the figures agree; exit status 1 if not."),
    "sweep": ("metilr.commands.sweep:sweep",
        "Evaluate many configurations, or one option over several values, and compare them."),
    "describe": ("metilr.commands.describe:describe",
        "Show what a data root holds: counts by split and kind, class sizes, sample images."),
    "download": ("metilr.commands.download:download",
        "Download the Met dataset, check it and unpack it; interrupted, the same command continues."),
    "verify": ("metilr.commands.verify:verify",
        "Check that every image that the ground truth names is there and readable; exit status 1 if one is not."),
    "pack": ("metilr.commands.pack:pack",
        "Write the model of an evaluation and the whitening that it learned into one checkpoint, to pass on."),
    "export-descriptors": ("metilr.extraction.reference_pickle:export_descriptors",
        "Write a descriptor store as the reference code's descriptors.pkl."),
    "visits": ("metilr.commands.visits:write_contact_sheet",
        "Draw simulated visits to the images of a folder on one sheet."),
    "demo": ("metilr.demo:draw_demo",
        "Draw the synthetic museum of the demo, in the layout of the Met dataset."),
}  # fmt: skip


def run_command(function: Callable[..., Any] | str, args: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Call a function with options from the command line and from YAML files (``--config``).

    A user's mistake, and Ctrl-C from the first second on, ends in one line on stderr and exit status 2.

    Args:
        function: The function, or ``module:name`` to import it here: that takes seconds, and Ctrl-C may come
            in them. Every parameter becomes an option; the docstring becomes ``--help``.
        args: Command line without the program; default: the process's own.
        prog: The program's name in messages; default: the process's own.
    """
    prog = prog or Path(sys.argv[0]).name

    def run() -> None:
        loaded = _load(function) if isinstance(function, str) else function
        call(loaded, parse_options(loaded, args, prog))

    _run(run, prog)


def run_main(function: str, args: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Call ``module:name``, which reads the command line itself, with errors as in ``run_command``."""
    prog = prog or Path(sys.argv[0]).name
    _run(lambda: _load(function)(args, prog), prog)


def main(args: Sequence[str] | None = None) -> None:
    """Run ``metilr SUBCOMMAND``: ``evaluate`` and ``train`` are the scripts of the repository by another name."""
    name, *rest = list(sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: metilr SUBCOMMAND [options] | metilr --version\n\nsubcommands (each has a --help of its own):")
        print("\n".join(f"  {name:<20} {summary}" for name, (_, summary) in SUBCOMMANDS.items()))
    elif name == "--version":
        print(f"metilr {__version__}")
    elif name in SUBCOMMANDS:
        (run_main if name == "train" else run_command)(SUBCOMMANDS[name][0], rest, prog=f"metilr {name}")
    else:
        _fail("metilr", f"no subcommand {name!r}{did_you_mean(name, SUBCOMMANDS)}; metilr --help lists them")


def _load(function: str) -> Callable[..., Any]:
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


class OneLineErrors:
    """For a parser of jsonargparse: what it says about a wrong value, as one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong.

        Raises:
            UserError: In any case.
        """
        line = " ".join(message.split())
        raise UserError(f"{line if len(line) <= 600 else line[:597] + '...'}; see --help")


class _Parser(OneLineErrors, ArgumentParser):
    """The commands' parser."""


def _parser(function: Callable[..., Any], prog: str | None = None) -> _Parser:
    description = (function.__doc__ or "").split("\n\n")[0]
    parser = _Parser(prog=prog, description=description, default_env=False)
    parser.allow_abbrev = False  # a config or a script with half a name would break with the next option
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse takes -1e-5 for an option
    parser.add_argument("--config", action="config", help="YAML file with any of the options below; later ones win.")
    groups = _groups(function)
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=set(groups))
    for options in groups.values():
        parser.add_class_arguments(options, None)
    for action in parser._actions:
        item = _item_type(getattr(action, "_typehint", None))
        if item is not None:  # --scales 1 0.5, as argparse has it
            action.default = list(action.default) if action.default is not None and action.option_strings else None
            action.nargs, action._typehint, action.metavar = "+", item, action.dest.upper()  # type: ignore[attr-defined]
    return parser


def _groups(function: Callable[..., Any]) -> dict[str, type]:
    """The dataclasses among a function's parameters, by the parameter's name."""
    kinds = {name: (kind, *typing.get_args(kind)) for name, kind in typing.get_type_hints(function).items()}
    found = {name: [part for part in parts if dataclasses.is_dataclass(part)] for name, parts in kinds.items()}
    return {name: parts[0] for name, parts in found.items() if parts and name != "return"}


def _item_type(kind: Any) -> Any:
    """Of what a list, or a list that may be null, is one; None for all other types."""
    for part in (kind, *typing.get_args(kind)):
        if typing.get_origin(part) in (list, tuple, Sequence):
            return typing.get_args(part)[0]
    return None


def parse_options(
    function: Callable[..., Any], args: Sequence[str] | None = None, prog: str | None = None
) -> dict[str, Any]:
    """Read a command line into the options of a function, flat, defaults included; ``call`` calls it with them.

    Raises:
        UserError: If an option is unknown, lacks a value or has one of a wrong type.
    """
    parser = _parser(function, prog)
    args = list(sys.argv[1:] if args is None else args)
    refuse_unknown(parser, args)
    for i, arg in enumerate(args):
        option, _, file = arg.partition("=")
        if option == "--config" and (file or i + 1 < len(args)):
            content = check_config(file or args[i + 1])
            _check_names(parser, content)
    return _checked(function, parser.parse_args(_spelt_out(parser, args)).as_dict())


def options_of(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Read recorded options as ``parse_options`` reads a command line.

    Raises:
        UserError: If the command has no such option, or not with such a value.
    """
    parser = _parser(function)
    _check_names(parser, options)
    return _checked(function, parser.parse_object(dict(options)).as_dict())


def call(function: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Call a function with flat options: those of its dataclasses are put together."""
    given = dict(options)
    arguments: dict[str, Any] = {}
    for name, kind in _groups(function).items():
        fields = {field.name for field in dataclasses.fields(kind)}
        arguments[name] = kind(**{field: given.pop(field) for field in fields & given.keys()})
    return function(**arguments, **given)


def flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """A function's arguments as flat options, with the fields of dataclasses in place of them."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= vars(value) if dataclasses.is_dataclass(value) else {name: value}
    return found


def flat_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Every option of a function's command that has a default, with it."""
    parameters = list(inspect.signature(function).parameters.values())
    groups = _groups(function)
    found = {each.name: each.default for each in parameters if each.name not in groups}
    for kind in groups.values():
        found |= {field.name: field.default for field in dataclasses.fields(kind)}
    return {name: default for name, default in found.items() if default is not inspect.Parameter.empty}


def _spelt_out(parser: _Parser, args: list[str]) -> list[str]:
    """Write out a switch without a value, ``--json``, and a list as YAML has it, ``--scales=[1,0.5]``."""
    actions, spelt = parser._option_string_actions, []
    for arg, following in zip(args, [*args, ""][1:], strict=True):
        option, equals, value = arg.partition("=")
        action = actions.get(option)
        is_switch = getattr(action, "_typehint", None) is bool and not equals and following not in ("true", "false")
        if is_switch:
            spelt.append(f"{arg}=true")
        elif action is not None and action.nargs == "+" and value.startswith("[") and value.endswith("]"):
            spelt += [option, *(part.strip() for part in value[1:-1].split(","))]
        else:
            spelt.append(arg)
    return spelt


def refuse_unknown(parser: ArgumentParser, args: Sequence[str]) -> None:
    """Refuse options that a parser does not have, with the nearest that it has; and names that are no text.

    Raises:
        UserError: At the first such.
    """
    for arg in args:
        name = arg.partition("=")[0]
        parts = name.split(".")
        known = [parser._option_string_actions.get(".".join(parts[:n])) for n in range(1, len(parts) + 1)]
        # An option that takes a class has the class's parameters below it.
        if name.startswith("--") and known[-1] is None and not any(hasattr(action, "_typehint") for action in known):
            raise _unknown(name, parser._option_string_actions)
        if any("\ud800" <= letter <= "\udfff" for letter in arg):  # how Python holds bytes that are no letters
            raise UserError(f"{arg}: its name is not in UTF-8; rename it")


def _unknown(option: str, known: Iterable[str]) -> UserError:
    return UserError(f"unknown option {option[:60]}{did_you_mean(option, known)}; --help lists them")


def check_config(file: str) -> Mapping[str, Any]:
    """Read a YAML file of options, refusing by its name what is none.

    Raises:
        UserError: If it is none, or cannot be read.
    """
    try:
        content = read_yaml(Path(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})", "config") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid YAML ({error})", "config") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold options, one a line, each as NAME: VALUE", "config")
    if "config" in content:
        raise UserError(f"{file}: config: is no option of a file; name the other file in a second --config", "config")
    return content


def _check_names(parser: _Parser, options: Mapping[str, Any]) -> None:
    """Refuse unknown options of a file, and what is no list where one is due."""
    known = {action.dest: action for action in parser._actions if hasattr(action, "_typehint")}
    for name, value in options.items():
        if name not in known:
            raise _unknown(f"--{name}", [f"--{each}" for each in known])
        if known[name].nargs == "+" and not isinstance(value, (list, tuple, type(None))):
            raise UserError(f"{shown(value)}: expected a list like [A, B]", name)


def _checked(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Refuse null, which jsonargparse takes for any type, where none is due."""
    options.pop("config", None)
    refuse_null_characters(options)
    for of in (function, *_groups(function).values()):
        for name, kind in typing.get_type_hints(of).items():
            if name in options and options[name] is None and type(None) not in typing.get_args(kind):
                raise UserError("null: give a value, or leave it out for the default", name)
    return options


def refuse_null_characters(options: Mapping[str, Any], before: str = "") -> None:
    """Refuse what no file's name can hold, which a YAML file can say.

    Raises:
        UserError: If there is such a character in a value.
    """
    for name, value in options.items():
        if isinstance(value, Mapping):
            refuse_null_characters(value, f"{before}{name}.")
        elif "\0" in str(value):
            raise UserError("holds a null character, which no file's name can", f"{before}{name}")


def _run(call: Callable[[], Any], prog: str) -> None:
    # Before PyTorch loads OpenMP: threads that wait by spinning slow down a busy machine many times over.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        with _sigterm_as_interrupt():
            call()
    except UserError as error:
        _fail(prog, str(error) if error.parameter is None else f"--{error.parameter} {error.message}")
    except BrokenPipeError:  # whoever read the output has had enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would complain again
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(prog, f"{where}{error.strerror}; finished work is kept, run the same command to continue")
    except KeyboardInterrupt:
        _fail(prog, "interrupted; finished work is kept, run the same command to continue")


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Schedulers stop a run with SIGTERM: let it end as by Ctrl-C, instead of in Lightning's own handler."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return

    def interrupt(signal_number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(prog: str, message: str) -> NoReturn:
    line = " ".join(message.split())
    # A hostile file's own words may be in it: none of them is to move a terminal's cursor.
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    print(f"{prog}: error: {line}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the names nearest to a wrong one, as a remark in brackets after it; empty if none is near."""
    bare = {known.lstrip("-"): known for known in names}  # two dashes are no likeness
    near = [bare[match] for match in difflib.get_close_matches(name.lstrip("-"), list(bare), n=2)]
    return f" (did you mean {' or '.join(near)}?)" if near else ""
