"""Turn typed functions into commands: options from signatures, help from docstrings, errors in one line."""

import argparse
import contextlib
import difflib
import importlib
import json
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
from metilr.errors import UserError
from metilr.files import read_yaml

EXIT_USER_ERROR = 2
KINDS = r"(?:Expected (?:an? )?|Not of type )(.*?)(?:\. Got value.*|: expected .*)?$"  # in jsonargparse's errors
WITHOUT_VALUE = ("-h", "--help", "--print_config")

SUBCOMMANDS = {
    "evaluate": "metilr.commands.evaluate:evaluate",
    "train": "metilr.training.cli:train",
    "identify": "metilr.collection.identify:identify",
    "index": "metilr.collection.index:index",
    "serve": "metilr.collection.serve.app:serve",
    "compare": "metilr.commands.compare:compare",
    "rerun": "metilr.commands.rerun:rerun",
    "sweep": "metilr.commands.sweep:sweep",
    "describe": "metilr.commands.describe:describe",
    "download": "metilr.commands.download:download",
    "verify": "metilr.commands.verify:verify",
    "pack": "metilr.commands.pack:pack",
    "export-descriptors": "metilr.extraction.reference_pickle:export_descriptors",
    "visits": "metilr.commands.visits:write_contact_sheet",
    "demo": "metilr.demo:draw_demo",
}


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

    def call() -> None:
        loaded = _load(function) if isinstance(function, str) else function
        loaded(**parse_options(loaded, args, prog))

    _run(call, prog)


def run_main(function: str, args: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Call ``module:name``, which reads the command line itself, with errors as in ``run_command``."""
    prog = prog or Path(sys.argv[0]).name
    _run(lambda: _load(function)(args, prog), prog)


def main(args: Sequence[str] | None = None) -> None:
    """Run ``metilr SUBCOMMAND``: ``evaluate`` and ``train`` are the scripts of the repository by another name."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        _run(_print_subcommands, "metilr")
    elif args[0] == "--version":
        print(f"metilr {__version__}")
    elif args[0] == "train":
        run_main(SUBCOMMANDS["train"], args[1:], prog="metilr train")
    elif args[0] in SUBCOMMANDS:
        run_command(SUBCOMMANDS[args[0]], args[1:], prog=f"metilr {args[0]}")
    else:
        _fail("metilr", f"no subcommand {args[0]!r}{did_you_mean(args[0], SUBCOMMANDS)}; metilr --help lists them")


def _print_subcommands() -> None:
    print("usage: metilr SUBCOMMAND [options] | metilr --version\n\nsubcommands (metilr SUBCOMMAND --help tells more):")
    for name, function in SUBCOMMANDS.items():
        print(f"  {name:<20} {(_load(function).__doc__ or '').strip().splitlines()[0]}")


def _load(function: str) -> Callable[..., Any]:
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


class OneLineErrors:
    """For a parser of jsonargparse: errors in one line."""

    prog: str
    _actions: list[argparse.Action]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one line.

        Raises:
            UserError: In any case.
        """
        raise UserError(_one_line(message, self._option_names()))

    def _option_names(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]


class _Parser(OneLineErrors, ArgumentParser):
    """The commands' parser."""


def _parser(function: Callable[..., Any], prog: str | None = None) -> _Parser:
    description = (function.__doc__ or "").split("\n\n")[0]
    parser = _Parser(prog=prog, description=description, default_env=False)
    parser.allow_abbrev = False  # a config or a script with half a name would break with the next option
    parser.add_argument("--config", action="config", help="YAML file with any of the options below; later ones win.")
    parser.add_function_arguments(function, as_positional=True)
    for action in _list_actions(parser):
        action.metavar = f"{action.dest.upper()} [...]"  # one or more, as _join_lists takes them
    return parser


def parse_options(
    function: Callable[..., Any], args: Sequence[str] | None = None, prog: str | None = None
) -> dict[str, Any]:
    """Read a command line into the arguments that ``run_command`` calls the function with, defaults included.

    Raises:
        UserError: If an option is unknown, lacks a value or has one of a wrong type.
    """
    parser = _parser(function, prog)
    args = _join_lists(parser, list(sys.argv[1:] if args is None else args))
    for i, arg in enumerate(args):
        option, _, file = arg.partition("=")
        if option == "--config" and (file or i + 1 < len(args)):
            check_config(parser, file or args[i + 1])
    return _without_nulls(function, parser.parse_args(args).as_dict())


def options_of(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Read recorded options into the arguments that a command's function is called with, defaults included.

    Raises:
        UserError: If the command has no such option, or not with such a value.
    """
    return _without_nulls(function, _parser(function).parse_object(dict(options)).as_dict())


def _without_nulls(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Refuse null, which jsonargparse takes for any kind, where the function does not take it."""
    options.pop("config", None)
    for name, kind in typing.get_type_hints(function).items():
        if name in options and options[name] is None and type(None) not in typing.get_args(kind):
            raise UserError(f"--{name} null: expected {_readable_type(str(kind))}; leave it out for the default")
    refuse_null_characters(options)
    return options


def refuse_null_characters(options: Mapping[str, Any], before: str = "--") -> None:
    """Refuse what no file's name can hold, which a YAML file can say; names the option.

    Raises:
        UserError: If there is such a character in a value.
    """
    for name, value in options.items():
        if isinstance(value, Mapping):
            refuse_null_characters(value, f"{before}{name}.")
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, (str, Path)) and "\0" in str(part):
                raise UserError(f"{before}{name}: holds a null character, which no file's name can")


def check_config(parser: ArgumentParser, file: str) -> None:
    """Refuse what is no YAML file of options, by the file's name.

    Raises:
        UserError: If it is none, or cannot be read.
    """
    try:
        content = read_yaml(Path(file))
    except OSError as error:
        parser.error(f"--config {file}: cannot be read ({error.strerror})")
    except ValueError as error:
        parser.error(f"--config {file}: not valid YAML ({error})")
    if not isinstance(content, dict):
        parser.error(f"--config {file}: must hold options, one a line, each as NAME: VALUE")
    if "config" in content:
        parser.error(f"--config {file}: config: is no option of a file; name the other file in a second --config")


def _join_lists(parser: _Parser, args: list[str]) -> list[str]:
    """Let ``--scales 1 0.5`` mean ``--scales [1,0.5]``, and ``a.jpg b.jpg`` ``[a.jpg,b.jpg]`` where a list is due."""
    lists = {option: action for action in _list_actions(parser) for option in action.option_strings}
    are_flags = [action for action in parser._actions if getattr(action, "_typehint", None) is bool]
    flags = {option for action in are_flags for option in action.option_strings}  # --json means --json true
    joined: list[str] = []
    bare: list[str] = []  # what belongs to no option
    rest = list(args)
    while rest:
        option = rest.pop(0)
        if not option.startswith("-"):
            bare.append(option)
            continue
        if not option.startswith("--") and option[:2] not in parser._option_string_actions:
            raise UserError(f"{option}: no such option; a file of that name is given as ./{option}")
        joined.append(option)
        if option in lists:
            values = []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            joined += [_joined(lists[option], values)] if values else []
        elif option in flags:
            joined.append(rest.pop(0) if rest and rest[0] in ("true", "false") else "true")
        elif rest and "=" not in option and option not in WITHOUT_VALUE and not rest[0].startswith("--"):
            joined[-1] += f"={rest.pop(0)}"  # apart, argparse takes -1e-5 for an option
    return _join_bare(parser, bare) + joined


def _join_bare(parser: _Parser, bare: list[str]) -> list[str]:
    """Join for a list among the arguments without a name: it takes what the others leave."""
    positionals = [action for action in parser._actions if not action.option_strings]
    places = [i for i, action in enumerate(positionals) if action in _list_actions(parser)]
    if not places or len(bare) <= places[0]:
        return bare  # nothing for the list: the parser says what is missing
    first = places[0]
    end = max(first + 1, len(bare) - (len(positionals) - first - 1))
    return [*bare[:first], _joined(positionals[first], bare[first:end]), *bare[end:]]


def _joined(action: argparse.Action, values: list[str]) -> str:
    if len(values) == 1 and (re.fullmatch(r"\[.*\]", values[0]) or values[0] == "null"):
        return values[0]
    for value in values:
        if any("\ud800" <= letter <= "\udfff" for letter in value):  # how Python holds bytes that are no letters
            raise UserError(f"{value}: its name is not in UTF-8; rename it")
    holds_text = re.search(r"\b(Path|str)\b", str(getattr(action, "_typehint", "")))  # a folder may be called 2024
    text = json.dumps(values if holds_text else [_number_or_text(value) for value in values], ensure_ascii=False)
    return re.sub(r"[^ -~]", lambda letter: f"\\U{ord(letter[0]):08x}", text)  # YAML's: any letter of a file name


def _list_actions(parser: _Parser) -> list[argparse.Action]:
    kinds = {action: str(getattr(action, "_typehint", "")) for action in parser._actions}
    return [action for action, kind in kinds.items() if re.search(r"(list|tuple|Sequence)\[", kind)]


def _number_or_text(value: str) -> float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


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


def _one_line(message: str, options: list[str]) -> str:
    """Jsonargparse's explanation of a bad option, in one line that names the option, the value and the remedy."""
    unknown = re.search(r"[Uu]nrecognized arguments: (--[\w.-]+)", message) or re.search(
        r"(?:Key|key|Option) ['\"]([\w.-]+)['\"] is not (?:expected|accepted)", message
    )
    if unknown:
        name = "--" + unknown[1].lstrip("-")[:60]
        return f"unknown option {name}{did_you_mean(name, options)}; --help lists them"
    bad_value = re.search(r"Parser key [\"']([\w.-]+)[\"']:", message)
    if bad_value:
        expected = dict.fromkeys(re.findall(KINDS, message, re.MULTILINE))
        kinds = " or ".join(_readable_type(kind) for kind in expected)
        value = re.search(r"(?:Given value|Got value): (.*)$", message, re.MULTILINE)
        if kinds and value:
            text = value[1] if len(value[1]) <= 200 else value[1][:197] + "..."
            return f"--{bad_value[1]} {text}: expected {kinds}; see --help"
    line = " ".join(message.split())
    return line if len(line) <= 1000 else line[:997] + "..."


def _readable_type(kind: str) -> str:
    literal = re.search(r"Literal\[(.*)\]", kind)
    if literal:
        return "one of " + literal[1].replace("'", "")
    kind = kind.replace("<class 'collections.abc.Sequence'>", "a list like [A, B]")
    return re.sub(r"<class '(?:pathlib\.)?(\w+)'>", r"\1", kind).replace("NoneType", "null").replace("typing.", "")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the names nearest to a wrong one, as a remark in brackets after it; empty if none is near."""
    bare = {known.lstrip("-"): known for known in names}  # two dashes are no likeness
    near = [bare[match] for match in difflib.get_close_matches(name.lstrip("-"), list(bare), n=2)]
    return f" (did you mean {' or '.join(near)}?)" if near else ""
