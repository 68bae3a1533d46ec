"""Errors that are the user's to mend."""


class UserError(ValueError):
    """Something the user can fix; the message is one line that says what is wrong and what to do.

    The command line prints the message and exits with status 2 (`--debug` shows the traceback).
    """
