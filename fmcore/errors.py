"""Errors that a person can mend."""


class InputError(ValueError):
    """Something from outside is not what was wanted: a file, an option, a checkpoint, a tokenizer.

    The message is one line that names the thing, what was wanted, what came and, where there is one, the way out.
    The command line prints it without a traceback and exits with code 2.
    """
