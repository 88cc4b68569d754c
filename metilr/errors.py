"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake the user can mend: bad file, option or data.

    The message is one line that names the file or option and the remedy; commands print it without a
    traceback and exit with status 2. Anything else that is raised is a defect of metilr.
    """
