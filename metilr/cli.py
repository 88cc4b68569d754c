"""Turn typed functions into commands: options from signatures, help from docstrings, errors in one line."""

import argparse
import contextlib
import difflib
import importlib
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from metilr.errors import UserError

EXIT_USER_ERROR = 2


SUBCOMMANDS = {
    "export-descriptors": "metilr.reference_format:export_descriptors",
    "visits": "metilr.data.contact_sheet:write_contact_sheet",
    "demo": "metilr.data.demo:draw_demo",
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
        loaded(**_parsed(_parser(loaded, prog), args))

    _run(call, prog)


def run_main(function: str, args: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Call ``module:name``, which reads the command line itself, with errors as in ``run_command``."""
    _run(lambda: _load(function)(args), prog or Path(sys.argv[0]).name)


def main(args: Sequence[str] | None = None) -> None:
    """Run ``metilr SUBCOMMAND``."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        _run(_print_subcommands, "metilr")
    elif args[0] in SUBCOMMANDS:
        run_command(SUBCOMMANDS[args[0]], args[1:], prog=f"metilr {args[0]}")
    else:
        _fail("metilr", f"no subcommand {args[0]!r}{_did_you_mean(args[0], SUBCOMMANDS)}; metilr --help lists them")


def _print_subcommands() -> None:
    print("usage: metilr SUBCOMMAND [options]\n\nsubcommands (metilr SUBCOMMAND --help tells more):")
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
        """End the command, with what is wrong in one line."""
        _fail(self.prog, _one_line(message, self._option_names()))

    def _option_names(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]


class _Parser(OneLineErrors, ArgumentParser):
    """The commands' parser."""


def _parser(function: Callable[..., Any], prog: str | None = None) -> _Parser:
    parser = _Parser(prog=prog, description=(function.__doc__ or "").split("\n\n")[0], default_env=False)
    parser.allow_abbrev = False  # a config or a script with half a name would break with the next option
    parser.add_argument("--config", action="config", help="YAML file with any of the options below; later ones win.")
    parser.add_function_arguments(function, as_positional=True)
    for action in _list_actions(parser):
        action.metavar = f"{action.dest.upper()} [...]"  # one or more, as _join_lists takes them
    return parser


def _parsed(parser: _Parser, args: Sequence[str] | None) -> dict[str, Any]:
    args = _join_lists(parser, list(sys.argv[1:] if args is None else args))
    for i, arg in enumerate(args):
        option, _, file = arg.partition("=")
        if option == "--config" and (file or i + 1 < len(args)):
            check_config(parser, file or args[i + 1])
    options = parser.parse_args(args).as_dict()
    options.pop("config", None)
    return options


def check_config(parser: ArgumentParser, file: str) -> None:
    """Refuse what is no YAML file of options, by the file's name."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"--config {file}: cannot be read ({error.strerror})")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {file}: not valid YAML ({error})")
    if not isinstance(content, dict):
        parser.error(f"--config {file}: must hold options, one a line, each as NAME: VALUE")


def _join_lists(parser: _Parser, args: list[str]) -> list[str]:
    """Let ``--scales 1 0.5`` mean ``--scales [1,0.5]`` for every option that takes a list."""
    lists = {
        option: re.search(r"\b(Path|str)\b", str(getattr(action, "_typehint", ""))) is not None
        for action in _list_actions(parser)
        for option in action.option_strings
    }
    joined: list[str] = []
    rest = list(args)
    while rest:
        option = rest.pop(0)
        joined.append(option)
        if option not in lists:
            continue
        values = []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if len(values) == 1 and (values[0].startswith("[") or values[0] == "null"):
            joined.append(values[0])
        elif values:
            holds_text = lists[option]  # a folder may be called 2024
            joined.append(json.dumps(values if holds_text else [_number_or_text(value) for value in values]))
    return joined


def _list_actions(parser: _Parser) -> list[argparse.Action]:
    kinds = {action: str(getattr(action, "_typehint", "")) for action in parser._actions}
    return [action for action, kind in kinds.items() if re.search(r"(list|tuple|Sequence)\[", kind)]


def _number_or_text(value: str) -> float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def _run(call: Callable[[], Any], prog: str) -> None:
    try:
        with _sigterm_as_interrupt():
            call()
    except UserError as error:
        _fail(prog, str(error))
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
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def _one_line(message: str, options: list[str]) -> str:
    """Jsonargparse's explanation of a bad option, in one line that names the option, the value and the remedy."""
    unknown = re.search(r"[Uu]nrecognized arguments: (--[\w.-]+)", message) or re.search(
        r"(?:Key|key|Option) ['\"]([\w.-]+)['\"] is not (?:expected|accepted)", message
    )
    if unknown:
        name = "--" + unknown[1].lstrip("-")
        return f"unknown option {name}{_did_you_mean(name, options)}; --help lists them"
    bad_value = re.search(r"Parser key [\"']([\w.-]+)[\"']:", message)
    if bad_value:
        expected = dict.fromkeys(re.findall(r"Expected (?:an? )?(.*?)(?:\. Got value.*)?$", message, re.MULTILINE))
        kinds = " or ".join(_readable_type(kind) for kind in expected)
        value = re.search(r"(?:Given value|Got value): (.*)$", message, re.MULTILINE)
        if kinds and value:
            return f"--{bad_value[1]} {value[1]}: expected {kinds}; see --help"
    return message


def _readable_type(kind: str) -> str:
    literal = re.search(r"Literal\[(.*)\]", kind)
    if literal:
        return "one of " + literal[1].replace("'", "")
    kind = kind.replace("<class 'collections.abc.Sequence'>", "a list like [A, B]")
    return re.sub(r"<class '(?:pathlib\.)?(\w+)'>", r"\1", kind).replace("NoneType", "null").replace("typing.", "")


def _did_you_mean(name: str, names: Any) -> str:
    bare = {known.lstrip("-"): known for known in names}  # two dashes are no likeness
    near = [bare[match] for match in difflib.get_close_matches(name.lstrip("-"), list(bare), n=2)]
    return f" (did you mean {' or '.join(near)}?)" if near else ""
