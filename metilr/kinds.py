"""Kinds of values that JSON and YAML files from elsewhere must hold: what may be any value goes in."""

from typing import Any

from metilr.errors import shown

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
