"""Losses that are taken around the weights to learn something: a run can do without them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zokernel.errors import UsageError


@contextmanager
def log_refusal(logger: logging.Logger, message: str) -> Iterator[None]:
    """Log why a model cannot take losses without moving its weights, and go on after the block.

    Running out of memory is an error all the same.

    Args:
        logger: Where to log.
        message: What was not taken.

    Example:
        >>> with log_refusal(logging.getLogger(), "The loss was not taken"):
        ...     raise UsageError("This layer reads other weights.")
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (UsageError, RuntimeError, TypeError) as error:
        logger.info("%s: %s", message, error)
