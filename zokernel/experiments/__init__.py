"""Every figure and table of the three papers: one file each, ``run(config) -> Result``."""

from zokernel.experiments.base import MODULES, Config, Result, Verdict, experiment, get_experiment
from zokernel.experiments.storage import reproduce

__all__ = ["MODULES", "Config", "Result", "Verdict", "experiment", "get_experiment", "reproduce"]
