"""Errors of a user's making: one line that says what is wrong, where, and the remedy."""


class UserError(Exception):
    """Bad input or a missing step.  The scripts print its message as one line, without a traceback, and exit with 1."""


class ImageError(UserError):
    """An image file that cannot be decoded; --on_bad_image says what happens then."""
