"""A batch several times over, for losses that are taken in one forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def repeat_batch(batch: dict[str, Any], copies: int) -> dict[str, Any]:
    """Return a collated batch with its examples repeated, copy after copy."""
    repeated = {
        key: value.repeat(copies, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
        for key, value in batch.items()
    }
    if "rows" in batch:  # they number the rows of input_ids
        shift = torch.arange(copies, device=batch["rows"].device) * len(batch["input_ids"])
        repeated["rows"] = repeated["rows"] + shift.repeat_interleave(len(batch["rows"]))
    if "cells" in batch:
        # Cells number the options of the whole batch.
        shift = torch.arange(copies, device=batch["cells"].device) * batch["option_mask"].numel()
        shift_RK = shift.repeat_interleave(batch["cells"].shape[0])[:, None]
        repeated["cells"] = torch.where(repeated["cells"] >= 0, repeated["cells"] + shift_RK, repeated["cells"])
    return repeated
