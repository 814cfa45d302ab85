"""The errors a user is meant to read: what is wrong, where, and the remedy, in one line."""


class UserError(Exception):
    """Bad input or a missing step. The scripts print its single line and exit with status 1, without a traceback."""


class ImageError(UserError):
    """An image file that cannot be decoded: what --on_bad_image decides about."""
