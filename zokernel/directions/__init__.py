"""Random directions: seeded, position-addressable, added to weights without being stored."""

from zokernel.directions.base import Directions, Scale
from zokernel.directions.dense import Dense
from zokernel.directions.laws import GAUSSIAN, LAWS, RADEMACHER, SPHERE, UNIFORM, Law, get_law
from zokernel.directions.restore import Restore, make_restore

__all__ = [
    "GAUSSIAN",
    "LAWS",
    "RADEMACHER",
    "SPHERE",
    "UNIFORM",
    "Dense",
    "Directions",
    "Law",
    "Restore",
    "Scale",
    "get_law",
    "make_restore",
]
