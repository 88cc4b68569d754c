"""The one exception that stands for a user's mistake, and how its message quotes what a file says."""

import reprlib
from typing import Any


class UserError(ValueError):
    """A mistake the user can mend: bad file, option or data.

    The message is one line that names the file or option and the remedy; commands print it without a
    traceback and exit with status 2. Anything else that is raised is a defect of metilr.
    """


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
