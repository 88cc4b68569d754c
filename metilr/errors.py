"""The one exception that stands for a user's mistake, and how its message quotes what a file says."""


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
    """A value as Python writes it, in short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
