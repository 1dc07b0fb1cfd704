"""Projected gradients from forward passes."""

from zokernel.estimators.base import Estimate, Estimator, Evaluate, Offsets
from zokernel.estimators.two_point import TwoPoint

__all__ = ["Estimate", "Estimator", "Evaluate", "Offsets", "TwoPoint"]
