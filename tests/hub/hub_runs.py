"""What a test of the hub is given to run commands with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Run = Callable[..., list[dict[str, Any]]]
