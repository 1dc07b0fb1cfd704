"""Every figure and table of the three papers: one ``run(config) -> Result`` per figure or table."""

from zokernel.experiments.base import MODULES, Config, Result, Verdict, experiment, get_experiment
from zokernel.experiments.storage import reproduce

__all__ = ["MODULES", "Config", "Result", "Verdict", "experiment", "get_experiment", "reproduce"]
