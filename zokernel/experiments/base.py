"""What an experiment is: a function of its configuration that returns a :class:`Result`, registered by name.

One file a figure or table group, each with a ``run(config: Config) -> Result`` decorated by :func:`experiment`.
``config.scale`` is ``smoke`` (seconds, part of the test suite), ``cpu`` (minutes on two cores) or ``full`` (as in the
paper).  An experiment computes and draws; saving, timing and versions are done here, once.
"""

from __future__ import annotations

import importlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zokernel._version import __version__
from zokernel.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = ("smoke", "cpu", "full")
VERDICTS = ("holds", "holds under conditions", "does not hold", "not run here")


@dataclass(frozen=True)
class Config:
    """How large to run an experiment and from which seed.

    Attributes:
        scale: ``smoke``, ``cpu`` or ``full``.
        seed: Seed of every random quantity in the experiment.
        options: Overrides of the experiment's own settings, by name.
    """

    scale: str = "cpu"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.scale not in SCALES:
            raise UsageError(f"There is no scale {self.scale!r}: choose one of {', '.join(SCALES)}.")

    def pick(self, name: str, *, smoke: Any, cpu: Any, full: Any = None) -> Any:
        """Return the setting ``name`` for this scale, unless ``options`` overrides it."""
        by_scale = {"smoke": smoke, "cpu": cpu, "full": cpu if full is None else full}
        return self.options.get(name, by_scale[self.scale])


@dataclass(frozen=True)
class Verdict:
    """What one run says about one claim of a paper.

    Attributes:
        claim: The claim in one sentence, with where it is stated.
        verdict: ``holds``, ``holds under conditions``, ``does not hold`` or ``not run here``.
        reason: The numbers that decide, in one or two sentences.
    """

    claim: str
    verdict: str
    reason: str

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise ValueError(f"A verdict is one of {', '.join(VERDICTS)}, not {self.verdict!r}.")


@dataclass
class Result:
    """What an experiment found.

    Attributes:
        summary: Two to five sentences in plain words.
        numbers: Scalars, lists and small tables (JSON types or NumPy scalars).
        arrays: Curves and matrices by name.
        figures: Matplotlib figures by file stem.
        verdicts: What the run says about the paper's claims.
    """

    summary: str
    numbers: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)


Experiment = Callable[[Config], Result]

# name -> module that registers it; imported on demand so that listing is cheap.
MODULES: dict[str, str] = {
    "entk/heatmaps": "zokernel.experiments.entk.heatmaps",
    "entk/curves": "zokernel.experiments.entk.curves",
    "entk/laws": "zokernel.experiments.entk.laws",
    "entk/dimension": "zokernel.experiments.entk.dimension",
    "entk/horizon": "zokernel.experiments.entk.horizon",
    "entk/drift": "zokernel.experiments.entk.drift",
    "entk/language_model": "zokernel.experiments.entk.language_model",
    "nzk/linear_d2": "zokernel.experiments.nzk.catalogue",
    "nzk/linear_d30": "zokernel.experiments.nzk.catalogue",
    "nzk/mixture": "zokernel.experiments.nzk.catalogue",
    "nzk/deviations": "zokernel.experiments.nzk.catalogue",
    "nzk/laws": "zokernel.experiments.nzk.catalogue",
    "nzk/ffn_synthetic": "zokernel.experiments.nzk.catalogue",
    "nzk/mnist": "zokernel.experiments.nzk.catalogue",
    "nzk/linear_mnist_01": "zokernel.experiments.nzk.catalogue",
    "nzk/cifar": "zokernel.experiments.nzk.catalogue",
    "nzk/linear_mnist_35": "zokernel.experiments.nzk.catalogue",
    "nzk/tiny_imagenet": "zokernel.experiments.nzk.catalogue",
    "kerzoo/estimator": "zokernel.experiments.kerzoo.estimator",
    "kerzoo/loss_curves": "zokernel.experiments.kerzoo.loss_curves",
    "kerzoo/order": "zokernel.experiments.kerzoo.ablations",
    "kerzoo/constant": "zokernel.experiments.kerzoo.ablations",
    "kerzoo/eps": "zokernel.experiments.kerzoo.ablations",
    "kerzoo/three_perturbations": "zokernel.experiments.kerzoo.costs",
    "kerzoo/memory_and_time": "zokernel.experiments.kerzoo.costs",
    "kerzoo/language_model": "zokernel.experiments.kerzoo.language_model",
    "kerzoo/accuracy": "zokernel.experiments.kerzoo.accuracy",
}
_REGISTRY: dict[str, tuple[str, Experiment]] = {}


def experiment(name: str, title: str) -> Callable[[Experiment], Experiment]:
    """Register ``run`` under ``name`` (``paper/what``) with the figure or table it reproduces as ``title``."""

    def register(run: Experiment) -> Experiment:
        _REGISTRY[name] = (title, run)
        return run

    return register


def get_experiment(name: str) -> tuple[str, Experiment]:
    """Return ``(title, run)`` of a registered experiment.

    Raises:
        UsageError: If there is no experiment of that name.
    """
    if name not in MODULES:
        raise UsageError(f"There is no experiment {name!r}: choose one of {', '.join(MODULES)}.")
    importlib.import_module(MODULES[name])
    return _REGISTRY[name]


def reproduce(name: str, config: Config, output_dir: Path) -> Result:
    """Run one experiment; save ``result.json``, ``arrays.npz`` and figures (PNG, SVG) under ``output_dir/name``.

    Args:
        name: A key of ``MODULES``.
        config: Scale and seed.
        output_dir: Parent folder; the experiment writes only below ``output_dir/name``.

    Returns:
        The result, as returned by the experiment.
    """
    title, run = get_experiment(name)
    start = time.perf_counter()
    result = run(config)
    save(result, output_dir / name, name=name, title=title, config=config, seconds=time.perf_counter() - start)
    return result


def save(result: Result, folder: Path, *, name: str, title: str, config: Config, seconds: float) -> None:
    """Write a result to ``folder``; ``result.json`` last, so that its presence means the folder is complete."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    for stem, figure in result.figures.items():
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"{stem}.{suffix}", dpi=160, bbox_inches="tight")
    if result.arrays:
        np.savez_compressed(folder / "arrays.npz", **result.arrays)  # type: ignore[arg-type]
    record = {
        "name": name,
        "title": title,
        "summary": result.summary,
        "verdicts": [asdict(verdict) for verdict in result.verdicts],
        "numbers": result.numbers,
        "figures": sorted(result.figures),
        "config": asdict(config),
        "seconds": round(seconds, 2),
        "versions": {
            "zokernel": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(record, indent=2, default=_jsonable) + "\n")
    partial.replace(folder / "result.json")


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written to result.json: store it in arrays instead.")
