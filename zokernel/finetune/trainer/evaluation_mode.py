"""Layers in evaluation mode, in a model whose ``training`` is true.

The losses of a step are comparable only without dropout and with fixed batch statistics.  But some trainers read
``model.training`` to tell a training step from an evaluation, and would log the one as the other.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class EvaluationLayers:
    """Keeps the layers of a model in evaluation mode while ``model.training`` is true outside its forward.

    Args:
        model: The model.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5))
        >>> layers = EvaluationLayers(model)
        >>> layers.begin_step()
        >>> model.training, model[0].training
        (True, False)
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._was_training = False

    def begin_step(self) -> None:
        """Put the layers into evaluation mode, which an evaluation since the last step may have changed."""
        if not self._handles:
            self._handles = [
                self._model.register_forward_pre_hook(self._enter),
                self._model.register_forward_hook(self._leave, always_call=True),
            ]
        self._model.eval()
        self._model.training = self._was_training = True

    def remove(self) -> None:
        """Remove the hooks, and leave the whole model in evaluation mode."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._was_training = [], False
        self._model.eval()

    def _enter(self, model: nn.Module, args: Any) -> None:
        self._was_training = model.training
        model.training = False

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        model.training = self._was_training
