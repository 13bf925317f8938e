"""The error of every conversion."""

from mixbit.engine.errors import UserError


class ConvertError(UserError):
    """The input cannot be converted as asked; the message names the file or tensor and says why."""
