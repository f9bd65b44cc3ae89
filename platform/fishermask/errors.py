"""The one exception that is the user's to mend: shown as one line, without a traceback, exit status 2."""


class InputError(ValueError):
    """What was wrong, which value came, and what would be right."""
