"""The one exception that is the user's to mend: shown as one line, without a traceback, exit status 2."""


class InputError(ValueError):
    """What was wrong, which value came, and what would be right.

    Args:
        message: one line for each independent mistake.
        details: the traceback of what the user's code or file raised; the command writes it to a log file.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details
