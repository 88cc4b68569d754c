"""Which classes an options file may name: to name one is to import its module, which runs code.

What the user types on the command line is his own word. A file may be somebody else's: it may name classes of the
packages below alone, each of which builds what its name says and does nothing else. Other parts of the same libraries
would start programs.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import _common

from metilr.errors import UserError
from metilr.yaml_files import read_yaml

TRUSTED = (
    "metilr.losses", "metilr.data.augmentations",
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
