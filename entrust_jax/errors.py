"""The one exception that is meant for a person."""


class UserError(Exception):
    """A mistake that the user can mend: one line that names the file or the key, what is wrong, and the mend.

    Entry points print it without a traceback and exit with code 2.
    """
