"""Every error this package raises on purpose.

Each message names the argument, or the file and field, what was wanted and what came. Errors about
values are also `ValueError`, so code that does not know this package still catches them.
"""

from __future__ import annotations


class Gpt2FastError(Exception):
    """Base of every error below."""


class ParameterError(Gpt2FastError, ValueError):
    """An argument is outside its range or of the wrong kind."""


class CheckpointError(Gpt2FastError, ValueError):
    """A model file is missing, malformed, truncated, unsafe, or does not fit its configuration."""


class TokenizerError(Gpt2FastError, ValueError):
    """A vocabulary file is malformed, or text or ids cannot be converted."""


class ContextOverflow(Gpt2FastError, ValueError):
    """A prompt does not fit into the model's context."""


class CapacityError(Gpt2FastError, MemoryError):
    """Memory for weights, cache or scratch could not be had, or the cache is full."""


class DeviceError(Gpt2FastError, RuntimeError):
    """The device or instruction set asked for is missing, or failed."""


class DownloadError(Gpt2FastError, OSError):
    """A model could not be fetched: no network, no such model, or damaged on the way."""


class Cancelled(Gpt2FastError):
    """Work was stopped before it finished."""
