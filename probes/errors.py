"""What is wrong with the input: errors that a person can mend, and that a program can tell from a fault."""


class InputError(ValueError):
    """The input is wrong. The text says what, where, and how to mend it, on one line."""


class UnknownNameError(InputError, LookupError):
    """A name that is not known; the text lists those that are."""
