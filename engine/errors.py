"""The base of every error that a person can act on."""


class UserError(Exception):
    """Shown as its message alone, without a traceback: it names the thing, both values, and what to do."""


class CheckpointError(UserError):
    """A model directory that cannot be used: the message names the file or tensor and what contradicts what."""
