"""The base of every error that a person can act on."""


class UserError(Exception):
    """Shown as its message alone, without a traceback: it names the thing, both values, and what to do."""
