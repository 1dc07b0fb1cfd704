"""What keeps the runs of one file comparable: a refusal to add others to them."""

from __future__ import annotations

from typing import Any


def require_same_settings(runs: Any, among: dict[str, Any], **shared: Any) -> None:
    """End the program unless the kept runs have the settings of those that would be added to them.

    Args:
        runs: Kept runs, with their ``path`` and ``rows``.
        among: Values of the runs to look at; all of them if empty.
        shared: Settings that these runs must have.

    Raises:
        SystemExit: If a run has another value of one, or does not say it.
    """
    for row in runs.rows:
        for name, value in shared.items() if among.items() <= row.items() else ():
            if name not in row or row[name] != value:
                had = f"has {name} {row[name]}" if name in row else f"does not say its {name}"
                raise SystemExit(f"{runs.path} holds a run that {had}, not {value}: keep the new ones in another file.")
