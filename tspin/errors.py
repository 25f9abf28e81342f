"""Errors that end a command, and what is said of them."""


class UserError(Exception):
    """A mistake the user can put right: printed as one line, exit code 2."""


def reason(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
