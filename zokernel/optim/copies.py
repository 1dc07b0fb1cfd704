"""Copies and pickles of optimizers: torch's own keep groups and state, and lose all that directions need."""

from __future__ import annotations

from typing import Any

import torch


class Copied(torch.optim.Optimizer):
    """An optimizer that ``copy.deepcopy`` and ``pickle`` take whole.

    A copy continues as the original would.  Made alone it trains copies of the parameters; made together with the
    model, ``copy.deepcopy((model, optimizer))``, those of the copied model.
    """

    def __getstate__(self) -> dict[str, Any]:
        # torch makes its hooks anew; a learning rate schedule puts a wrapper in the place of step.
        return {key: value for key, value in vars(self).items() if key != "step" and not key.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "named_params" in state:  # torch also calls this to load a state
            self._after_copy()

    def _after_copy(self) -> None:
        """Take note of the copied weights as they are."""
