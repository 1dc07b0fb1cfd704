r"""Random directions: seeded, addressed by position, and added to weights without being stored.

A direction is a pure function of (seed, step, index, tensor name, element position).  From the lowest layer up:

* ``placement`` says where the elements of a tensor lie, and ``philox`` generates the random bits of a position;
* ``terms`` describes what is added to one tensor;
* ``backends`` (numba, Triton, torch) add :math:`\sum_i scale_i z_i` to weights in one read and one write;
* ``base`` and ``families`` say which coordinates are random (:class:`Dense`, :class:`Sparse`, :class:`Subspace`,
  :class:`LowRank`, :class:`Flipout`, :class:`Blockwise`, :class:`Orthogonal`);
* ``weights`` moves weights along directions and restores them.
"""

from zokernel.directions.base import Directions, Scale
from zokernel.directions.families.blockwise import Blockwise
from zokernel.directions.families.dense import Dense
from zokernel.directions.families.flipout import Flipout
from zokernel.directions.families.low_rank import LowRank
from zokernel.directions.families.orthogonal import Orthogonal
from zokernel.directions.families.sparse import Sparse
from zokernel.directions.families.subspace import Subspace
from zokernel.directions.registry import FAMILIES, get_directions
from zokernel.directions.weights.copy import Copy, Unmoved
from zokernel.directions.weights.grid import Grid
from zokernel.directions.weights.modes import make_restore
from zokernel.directions.weights.restore import Fold, Restore, nearest_power_of_two

__all__ = [
    "FAMILIES",
    "Blockwise",
    "Copy",
    "Dense",
    "Directions",
    "Flipout",
    "Fold",
    "Grid",
    "LowRank",
    "Orthogonal",
    "Restore",
    "Scale",
    "Sparse",
    "Subspace",
    "Unmoved",
    "get_directions",
    "make_restore",
    "nearest_power_of_two",
]
