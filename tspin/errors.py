class UserError(Exception):
    """A mistake the user can put right: printed as one line, exit code 2."""
