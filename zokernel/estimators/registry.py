"""Estimators by the names that the command line uses."""

from __future__ import annotations

from zokernel.estimators.base import Estimator
from zokernel.estimators.curvature import TwoPointCurvature
from zokernel.estimators.leave_one_out import LeaveOneOut
from zokernel.estimators.one_sided import OneSided
from zokernel.estimators.population import Population
from zokernel.estimators.richardson import Richardson
from zokernel.estimators.smoothed import Smoothed
from zokernel.estimators.two_point import TwoPoint

ESTIMATORS: dict[str, type[Estimator]] = {
    "two_point": TwoPoint,
    "one_sided": OneSided,
    "leave_one_out": LeaveOneOut,
    "population": Population,
    "smoothed": Smoothed,
    "richardson": Richardson,
    "two_point_curvature": TwoPointCurvature,
}
