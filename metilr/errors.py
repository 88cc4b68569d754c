"""The one exception that stands for a user's mistake, and how its text quotes what a file says."""

import difflib
import reprlib
import typing
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A mistake the user can mend: bad file, parameter or data.

    The text is one line that names the file or parameter and the remedy: ``UserError("0: choose 1 or more", "k")``
    reads "k 0: choose 1 or more", and a command, which knows its parameters as options, prints "--k 0: choose 1 or
    more", without a traceback, and exits with status 2. Anything else that is raised is a defect of metilr.
    """

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message, parameter)
        self.message = message
        self.parameter = parameter

    def __str__(self) -> str:
        return self.message if self.parameter is None else f"{self.parameter} {self.message}"


def one_line(error: Exception) -> str:
    """What an error says, in a line, without what a file might have put into it at length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def amount(n: int, noun: str, ending: str = "s") -> str:
    """A number with its noun: 1 image, 2,000 images."""
    return f"{n:,} {noun}{'' if n == 1 else ending}"


def amount_is(n: int, noun: str, one: str = "is", more: str = "are") -> str:
    """A number with its noun and verb: 1 image is, 2,000 images are."""
    return f"{amount(n, noun)} {one if n == 1 else more}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the names nearest to a wrong one, as a remark in brackets after it; empty if none is near."""
    bare = {known.lstrip("-"): known for known in names}  # two dashes are no likeness
    near = [bare[match] for match in difflib.get_close_matches(name.lstrip("-"), list(bare), n=2)]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def unknown_option(option: str, known: Iterable[str]) -> UserError:
    """The error that names a wrong option and the nearest ones that there are."""
    return UserError(f"unknown option {option[:60]}{did_you_mean(option, known)}; --help lists them")


def shown(value: object) -> str:
    """A value as Python writes it, shortened; the whole text is never made."""
    text = _SHORT.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Short(reprlib.Repr):
    """Names nested containers instead of writing them: shared ones could expand to gigabytes."""

    def repr_instance(self, x: Any, level: int) -> str:
        return f"a {type(x).__name__}" if isinstance(x, (dict, list, tuple, set, frozenset)) else repr(x)


_SHORT = _Short()
_SHORT.maxlevel = 4
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200


def check_choices(options: Any) -> None:
    """Refuse, in a dataclass, a value that is none of those that the type of its field lists.

    Raises:
        UserError: At the first such field.
    """
    for name, kind in typing.get_type_hints(type(options)).items():
        literals = [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is typing.Literal]
        choices = [choice for literal in literals for choice in typing.get_args(literal)]
        value = getattr(options, name)
        for each in value if isinstance(value, (list, tuple)) else (value,):
            is_other = each is None or (int in typing.get_args(kind) and type(each) is int)  # beside the choices
            if choices and not is_other and each not in choices:
                raise UserError(f"{each}: choose one of {', '.join(dict.fromkeys(map(str, choices)))}", name)
