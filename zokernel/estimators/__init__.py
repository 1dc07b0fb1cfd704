"""Projected gradients from forward passes."""

from zokernel.estimators.base import Estimate, Estimator, Evaluate, Offsets
from zokernel.estimators.curvature import TwoPointCurvature
from zokernel.estimators.forward_derivative import ForwardDerivative
from zokernel.estimators.leave_one_out import LeaveOneOut
from zokernel.estimators.one_sided import OneSided
from zokernel.estimators.per_example import PerExample
from zokernel.estimators.population import Population
from zokernel.estimators.registry import ESTIMATORS
from zokernel.estimators.richardson import Richardson
from zokernel.estimators.smoothed import Smoothed
from zokernel.estimators.two_point import TwoPoint

__all__ = [
    "ESTIMATORS",
    "Estimate",
    "Estimator",
    "Evaluate",
    "ForwardDerivative",
    "LeaveOneOut",
    "Offsets",
    "OneSided",
    "PerExample",
    "Population",
    "Richardson",
    "Smoothed",
    "TwoPoint",
    "TwoPointCurvature",
]
