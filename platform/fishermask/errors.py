"""The exception for errors that the user can correct: one line without a traceback, exit status 2."""


class InputError(ValueError):
    """An error in a setting, a file or an argument of the user.

    Args:
        message: one line for each independent mistake: the setting, the problem, and the remedy.
        details: traceback of an exception in the user's code; the command writes it to a log file.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details
