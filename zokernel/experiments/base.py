"""What an experiment is: a function of its configuration that returns a :class:`Result`, registered by name.

Each figure or table group has one file, with a ``run(config: Config) -> Result`` decorated by :func:`experiment`.
``config.scale`` is ``smoke`` (seconds, part of the test suite), ``cpu`` (minutes on two cores) or ``full`` (as in the
paper).  An experiment computes and draws; what is written is the business of :mod:`zokernel.experiments.storage`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from zokernel.errors import UsageError
from zokernel.experiments.criteria import VERDICTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = ("smoke", "cpu", "full")


class Options(dict[str, Any]):
    """A user's overrides by name, which remembers the names that an experiment asked for.

    Example:
        >>> options = Options(steps=3, stpes=4)
        >>> options.get("steps"), sorted(options.unread())
        (3, ['stpes'])
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self._read.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of ``name``, or ``default``."""
        self._read.add(name)
        return super().get(name, default)

    def unread(self) -> set[str]:
        """Return the names that nobody has asked for: a misspelt option, or one of another experiment."""
        return set(self) - self._read


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
    options: dict[str, Any] = field(default_factory=Options)

    def __post_init__(self):
        if not isinstance(self.options, Options):
            object.__setattr__(self, "options", Options(self.options))
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
        verdict: ``holds``, ``holds under conditions``, ``does not hold``, ``not resolved`` (its interval does not
            decide) or ``not run here``.
        reason: The numbers that decide, in one or two sentences.
        id: The claim's name in ``claims.yaml``, by which the ledger finds every verdict on it.
    """

    claim: str
    verdict: str
    reason: str
    id: str = ""

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
    "entk/laws": "zokernel.experiments.entk.distributions",
    "entk/dimension": "zokernel.experiments.entk.dimension",
    "entk/horizon": "zokernel.experiments.entk.horizon",
    "entk/drift": "zokernel.experiments.entk.drift",
    "entk/language_model": "zokernel.experiments.entk.language_model",
    "entk/model_sizes": "zokernel.experiments.entk.model_sizes",
    "entk/trajectories": "zokernel.experiments.entk.trajectories",
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
    "multi_query/budget": "zokernel.experiments.multi_query.budget",
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
