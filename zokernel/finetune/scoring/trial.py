"""A model tried on a batch in an unusual layout, which its own code may refuse in any way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zokernel.errors import first_line


def try_outputs(outputs: Callable[[], Tensor]) -> tuple[Tensor | None, str]:
    """Return the outputs and an empty text, or None and why the model cannot compute them.

    Running out of a GPU's memory says nothing about the model, so it is raised.

    Example:
        >>> try_outputs(lambda: torch.zeros(2)[3])
        (None, 'IndexError: index 3 is out of bounds for dimension 0 with size 2')
    """
    try:
        return outputs(), ""
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        return None, f"{type(error).__name__}: {first_line(error)}"


def score_tolerance(model: nn.Module) -> float:
    """Return how far the scores of two layouts of a batch may be apart, from rounding alone."""
    return 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
