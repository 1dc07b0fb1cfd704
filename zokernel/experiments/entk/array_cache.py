"""Arrays that an experiment of hours keeps in a folder, so that it can be stopped and goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from zokernel.experiments.base import Config
from zokernel.experiments.entk.sentences import training_rows
from zokernel.experiments.kept_runs import rows_sha256

_SECONDS = "seconds"


class ArrayCache:
    """What was measured of one model on one set of sentences, in the folder of the option ``cache`` if there is one.

    Args:
        config: The experiment's configuration.
        model: The model's folder or hub id.

    Attributes:
        folder: Where the arrays are; it is named after the model and after what its training sentences say.  None
            keeps nothing.
        seconds: How long it took to measure all arrays returned so far, now or earlier.

    Example:
        >>> cache = ArrayCache(Config("smoke"), "16")
        >>> cache("squares", lambda: {"squares": np.ones(2)}), cache.folder
        ({'squares': array([1., 1.])}, None)
    """

    def __init__(self, config: Config, model: str):
        self.folder: Path | None = None
        self.seconds = 0.0
        if "cache" in config.options:
            data = "random"
            if config.scale != "smoke":
                rows, source = training_rows(config)
                data = f"{Path(source).stem}-{rows_sha256(rows)}"
            self.folder = Path(config.options["cache"]) / model.strip("/").replace("/", "--") / data

    def __call__(self, name: str, measure: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the arrays of a name that says all they depend on, or measure and keep them."""
        path = None if self.folder is None else self.folder / f"{name}.npz"
        if path is not None and path.exists():
            arrays = dict(np.load(path, allow_pickle=False))
            self.seconds += float(arrays.pop(_SECONDS))
            return arrays
        start = time.perf_counter()
        arrays = measure()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **arrays, **{_SECONDS: np.array(seconds)})  # type: ignore[arg-type]
        return arrays
