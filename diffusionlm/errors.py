"""The one exception that means: the user can fix this, and the message says how."""


class UserError(ValueError):
    """A user's mistake, told in one line: what, the offending value, what is allowed, and the fix.

    `diffusionlm.cli.main` prints it to stderr and exits with code 2; from Python it is an ordinary `ValueError`.
    """
