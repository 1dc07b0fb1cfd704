"""The model inside an adapter of peft."""

from __future__ import annotations

from typing import Any


def without_adapter(model: Any) -> Any:
    """Return the model inside an adapter of peft, with the adapter's layers in it; any other model as it is.

    Args:
        model: A module, or a model of peft around one.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 2)
        >>> without_adapter(layer) is layer
        True
    """
    inside = getattr(model, "get_base_model", None)
    return model if inside is None else inside()
