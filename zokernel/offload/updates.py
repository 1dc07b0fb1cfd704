"""Updates of trained weights: noted when a step ends, carried out when a unit is read next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from zokernel.directions import Directions
from zokernel.directions.weights.copy import Unmoved
from zokernel.offload.units import Unit

Draw = tuple[int, int]


@dataclass(frozen=True)
class RecordedUpdate:
    """One step's update: groups of names that share their coefficients and decay."""

    step: int
    groups: list[tuple[frozenset[str], Mapping[Draw, float], float]]


class Updates:
    """The updates of a run, numbered: version n of a weight has made the first n of them.

    Args:
        identity: Says which weights version 0 is.

    Attributes:
        history: For each version, a hash of the weights' identity and of all updates up to it.
    """

    def __init__(self, identity: str):
        self.history = [hashlib.sha256(identity.encode()).hexdigest()]
        self._recorded: list[RecordedUpdate] = []
        self._num_forgotten = 0
        self._apply: Callable[[dict[str, Tensor], RecordedUpdate], None] | None = None
        self._names: dict[str, dict[str, str]] = {}

    @property
    def newest(self) -> int:
        """The number of the newest version."""
        return len(self.history) - 1

    def train(self, directions: Directions, tensors: Mapping[str, Tensor], *, seed: int, units: list[Unit]) -> None:
        """Take note of what is trained, and along which directions."""
        trained = {id(tensor): name for name, tensor in tensors.items()}
        self._names = {
            unit.name: {key: trained[id(p)] for key, p in unit.tensors.items() if id(p) in trained} for unit in units
        }

        def apply(weights: dict[str, Tensor], update: RecordedUpdate) -> None:
            by_name = {n: (c, d) for names, c, d in update.groups for n in names if n in weights}
            Unmoved(directions, weights, seed=seed).commit(
                update.step,
                {name: coefficients for name, (coefficients, _) in by_name.items()},
                {name: decay for name, (_, decay) in by_name.items()},
            )

        self._apply = apply

    def names(self, unit: Unit) -> dict[str, str]:
        """Return what the trained weights of a unit are called in the optimizer, by their names in the model."""
        return self._names.get(unit.name, {})

    def note(self, step: int, update: Mapping[str, Mapping[Draw, float]], decay: float | Mapping[str, float]) -> None:
        """Note an update of the trained tensors, by name, for when their units are read next."""
        grouped: dict[tuple[int, float], list[str]] = {}
        for name, coefficients in update.items():
            grouped.setdefault((id(coefficients), decay if isinstance(decay, float) else decay[name]), []).append(name)
        groups = [(frozenset(names), update[names[0]], factor) for (_, factor), names in grouped.items()]
        text = json.dumps([step, sorted([sorted(names), sorted(c.items()), d] for names, c, d in groups)])
        self.history.append(hashlib.sha256((self.history[-1] + text).encode()).hexdigest())
        self._recorded.append(RecordedUpdate(step, groups))

    def carry_out(self, weights: dict[str, Tensor], version: int) -> None:
        """Make the updates that come after a version, in place.

        Args:
            weights: Weights by their names in the optimizer.
            version: Which version they are.
        """
        assert self._apply is not None
        for update in self._recorded[version - self._num_forgotten :]:
            self._apply(weights, update)

    def forget(self, version: int) -> None:
        """Forget the updates up to a version: nothing older is left."""
        if version > self._num_forgotten:
            del self._recorded[: version - self._num_forgotten]
            self._num_forgotten = version
