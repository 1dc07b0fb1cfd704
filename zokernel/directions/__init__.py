"""Random directions: seeded, position-addressable, added to weights without being stored.

A direction is a pure function of (seed, step, index, tensor name, element position).  Families say which coordinates
are random (:class:`Dense`, :class:`Sparse`, :class:`Subspace`, :class:`LowRank`, :class:`Blockwise`, :class:`Frames`);
backends (numba, Triton, torch) add ``sum_i scale_i z_i`` to weights in one read and one write; :func:`make_restore`
brings perturbed weights back.
"""

from zokernel.directions.base import Directions, Scale
from zokernel.directions.blockwise import Blockwise
from zokernel.directions.dense import Dense
from zokernel.directions.family import Family
from zokernel.directions.frames import Frames
from zokernel.directions.laws import GAUSSIAN, LAWS, RADEMACHER, SPHERE, UNIFORM, Law, get_law
from zokernel.directions.lowrank import LowRank
from zokernel.directions.registry import FAMILIES, get_directions
from zokernel.directions.restore import Copy, Fold, Grid, make_restore, nearest_power_of_two
from zokernel.directions.restore_base import Restore
from zokernel.directions.sparse import Sparse
from zokernel.directions.subspace import Subspace

__all__ = [
    "FAMILIES",
    "GAUSSIAN",
    "LAWS",
    "RADEMACHER",
    "SPHERE",
    "UNIFORM",
    "Blockwise",
    "Copy",
    "Dense",
    "Directions",
    "Family",
    "Fold",
    "Frames",
    "Grid",
    "Law",
    "LowRank",
    "Restore",
    "Scale",
    "Sparse",
    "Subspace",
    "get_directions",
    "get_law",
    "make_restore",
    "nearest_power_of_two",
]
