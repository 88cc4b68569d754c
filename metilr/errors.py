"""The one exception that stands for a user's mistake, and how its text quotes what a file says."""

import reprlib
import typing
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


def shown(value: object) -> str:
    """A value as Python writes it, in short, without writing all of it first."""
    text = _SHORT.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Short(reprlib.Repr):
    """Parts that share their parts would be gigabytes, written out."""

    def repr_instance(self, x: Any, level: int) -> str:
        """Write what is of no kind that the parent shortens."""
        return f"a {type(x).__name__}" if isinstance(x, (dict, list, tuple, set, frozenset)) else repr(x)


_SHORT = _Short()
_SHORT.maxlevel = 4
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200


DEEPEST = 20  # levels of lists and objects; metilr's own files have at most 8


def require(holds: object, name: str, value: object) -> None:
    """Refuse a value.

    Raises:
        ValueError: If it does not hold; names the value's place and the value.
    """
    if not holds:
        raise ValueError(f"{name} is {shown(value)}")


def is_text(value: object) -> bool:
    """Whether it is text that a file and a file's name can hold."""
    return type(value) is str and "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def is_list(value: object) -> bool:
    """Whether it is a list."""
    return type(value) is list


def is_whole(value: object, least: int) -> bool:
    """Whether it is a whole number from ``least`` on that 64 bits hold."""
    return type(value) is int and least <= value < 2**63


def is_number(value: Any) -> bool:
    """Whether it is a number that a float holds, neither NaN nor infinite."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def is_positive(value: Any) -> bool:
    """Whether it is such a number above 0."""
    return is_number(value) and value > 0


def is_share(value: Any) -> bool:
    """Whether it is a number in [0, 1]."""
    return is_number(value) and 0 <= value <= 1


def is_writable(value: Any, deepest: int = DEEPEST) -> bool:
    """Whether JSON can say it again: finite numbers, text, null, true, false, in lists and objects not too deep."""
    if isinstance(value, (dict, list)):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return deepest > 0 and all(is_writable(part, deepest - 1) for part in parts)
    return value is None or type(value) is bool or is_text(value) or is_number(value)


def check_choices(options: Any) -> None:
    """Refuse, in a dataclass, a value that is none of those that the type of its field lists.

    Raises:
        UserError: At the first such field.
    """
    for name, kind in typing.get_type_hints(type(options)).items():
        literals = [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is typing.Literal]
        choices = [choice for literal in literals for choice in typing.get_args(literal)]
        value = getattr(options, name)
        is_other = value is None or (int in typing.get_args(kind) and type(value) is int)  # beside the choices
        if choices and not is_other and value not in choices:
            raise UserError(f"{value}: choose one of {', '.join(map(str, choices))}", name)
