"""What an experiment leaves behind: ``result.json``, ``arrays.npz`` and every figure as PNG and SVG."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from zokernel._version import __version__
from zokernel.errors import UsageError
from zokernel.experiments.base import Config, Result, get_experiment
from zokernel.files import read_json, whole_file, write_json

RECORD = "result.json"


def reproduce(name: str, config: Config, output_dir: Path) -> Result:
    """Run one experiment; save ``result.json``, ``arrays.npz`` and figures (PNG, SVG) under ``output_dir/name``.

    Args:
        name: A key of ``MODULES``.
        config: Scale, seed and overrides.
        output_dir: Parent folder; the experiment writes only below ``output_dir/name``.

    Returns:
        The result, as returned by the experiment.

    Raises:
        UsageError: If there is no experiment of that name.
    """
    title, run = get_experiment(name)
    start = time.perf_counter()
    result = run(config)
    save(result, output_dir / name, name=name, title=title, config=config, seconds=time.perf_counter() - start)
    return result


def save(result: Result, folder: Path, *, name: str, title: str, config: Config, seconds: float) -> None:
    """Write a result to ``folder``; ``result.json`` last, so that its presence means the folder is complete.

    Args:
        result: What the experiment found.
        folder: Where to write; created if missing.
        name: The experiment.
        title: The figure or table that it reproduces.
        config: Scale, seed and overrides it ran with.
        seconds: How long it took; the time to draw and write is added.  If the numbers have ``seconds`` of their own,
            which count what an earlier run kept, the record has the larger.
    """
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    if result.figures:
        from zokernel.figures import figures, save

        with figures():  # text stays text in SVG files
            for stem, figure in result.figures.items():
                for suffix in ("png", "svg"):
                    save(figure, folder / f"{stem}.{suffix}", dpi=160, bbox_inches="tight")
    if result.arrays:
        with whole_file(folder / "arrays.npz") as partial, partial.open("wb") as stream:
            np.savez_compressed(stream, **result.arrays)  # type: ignore[arg-type]
    elapsed = seconds + time.perf_counter() - start
    record = {
        "name": name,
        "title": title,
        "summary": result.summary,
        "verdicts": [asdict(verdict) for verdict in result.verdicts],
        "numbers": result.numbers,
        "figures": sorted(result.figures),
        "config": {"scale": config.scale, "seed": config.seed, "options": dict(config.options)},
        "unread_options": sorted(config.options.unread()),  # type: ignore[attr-defined]
        "seconds": round(max(elapsed, result.numbers.get("seconds", 0.0)), 2),
        "command": command(name, config),
        "commit": commit(),
        "versions": versions(),
        "threads": _threads(),
    }
    write_json(folder / RECORD, record, default=_jsonable)


def load_record(folder: Path) -> dict[str, Any] | None:
    """Return the ``result.json`` of a finished experiment, or ``None`` if there is none.

    Raises:
        UsageError: If the file is not one that ``save`` wrote.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        _ = record["name"], record["config"]["scale"], record["seconds"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not the result of an experiment: remove it, or choose another folder.") from error
    return record


def same_settings(record: dict[str, Any], config: Config) -> bool:
    """Say whether a stored result was made with this scale, seed and these options."""
    stored = record["config"]
    options = json.loads(json.dumps(dict(config.options), default=_jsonable))
    return (stored["scale"], stored["seed"], stored["options"]) == (config.scale, config.seed, options)


def command(name: str, config: Config) -> str:
    """Return the command line that repeats an experiment.

    Example:
        >>> command("kerzoo/eps", Config("smoke", options={"seeds": 2}))
        'zokernel reproduce kerzoo/eps --scale smoke --seed 0 --set seeds=2'
    """
    parts = ["zokernel", "reproduce", name, "--scale", config.scale, "--seed", str(config.seed)]
    for key, value in config.options.items():
        parts += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value, default=_jsonable)}"]
    return shlex.join(parts)


def commit() -> str | None:
    """Return the commit of the source tree that is running, with ``+`` if files differ from it; None if installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head, changed = (
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--", "zokernel"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def versions() -> dict[str, str]:
    """Return the versions that a number can depend on; only of packages that this process has imported."""
    installed = {"zokernel": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "numba", "scipy", "transformers", "peft", "matplotlib"):
        if package in sys.modules:
            installed[package] = importlib.metadata.version(package)
    return installed


def _threads() -> dict[str, int | None]:
    import torch

    return {"torch": torch.get_num_threads(), "processors": os.cpu_count()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written to {RECORD}: store it in arrays instead.")
