"""Runs that are kept in a file, so that an experiment of many hours can be stopped and goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zokernel.kernels.plan import plain

KEPT = ("learning_rate", "effective_lr", "before", "after", "forwards", "train_seconds", "evaluations")


@dataclass
class KeptRuns:
    """Finished runs by their settings, kept in a file of one JSON line each if there is one."""

    path: Path | None
    known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            rows = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
            self.known = {row["run"]: row["metrics"] for row in rows}

    def get(self, key: dict[str, Any], train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what a run gave, from the file or by training it; numbers that are not finite are None."""
        name = json.dumps(key, sort_keys=True)
        if name not in self.known:
            metrics = train()
            self.known[name] = plain({part: metrics[part] for part in KEPT})
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"run": name, "metrics": self.known[name]}, allow_nan=False) + "\n")
        return self.known[name]
