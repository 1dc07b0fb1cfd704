"""The part of an optimizer that perturbs its weights, and sees when someone else has changed them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zokernel.directions.weights.restore import memory_of
from zokernel.errors import UsageError
from zokernel.estimators import Estimator
from zokernel.optim.compose import check_tied, check_together
from zokernel.optim.trained import Trained
from zokernel.optim.updates.averaging.averages import IterateAverage
from zokernel.optim.updates.base import Rule, Update
from zokernel.perturb import Perturb, make_perturb
from zokernel.private_apis import write_count


class Perturbable(Trained):
    """Trained weights at which losses are taken.

    Attributes:
        updates: The parts of the update.
        estimator: Turns the losses of a step into coefficients.
    """

    updates: list[Update]
    estimator: Estimator
    _perturb: Perturb
    _versions: list[tuple[Any, bool]]
    _named_groups: list[tuple[dict[str, Any], list[str]]]

    @property
    def perturb(self) -> Perturb:
        """How the losses at perturbed weights are taken, and how the weights are restored."""
        return self._perturb

    @perturb.setter
    def perturb(self, perturb: Perturb | str) -> None:
        previous, self._perturb = self._perturb, make_perturb(perturb)
        previous.release()
        try:
            self._attach()
        except BaseException:
            self._perturb = previous
            self._attach()
            raise

    def _attach(self) -> None:
        """Take the weights as they are for the unperturbed ones: at the start, and when someone else changed them."""
        self._check_density()
        check_together(self.estimator, self.perturb)
        check_tied(self.tied_names(), self.perturb)
        self.perturb.attach(self.active, self.directions, seed=self.seed, reach=self.estimator.reach)
        self._named_groups = self.moving_groups()  # the same dictionaries, found by name once
        self._note_versions()

    def _refresh_base(self) -> None:
        """Before a step, take note of weights that someone else wrote to, and of parameters frozen or not any more."""
        changed = self.changed_by_others
        if self._choose_active():
            self.perturb.release()
            changed = True
        if changed:
            self._attach()

    @property
    def changed_by_others(self) -> bool:
        """Whether anything but this optimizer has written to the weights, or replaced them, since its last step."""
        return [written for written, _ in self._versions_now()] != [written for written, _ in self._versions]

    def _versions_now(self) -> list[tuple[Any, bool]]:  # writes to each parameter, and whether it requires gradients
        location = memory_of if self.perturb.weights.stay else (lambda p: None)
        return [((write_count(p), location(p)), p.requires_grad) for p in self.named_params.values()]

    def _note_versions(self) -> None:
        self._versions = self._versions_now()

    @property
    def rule(self) -> Rule:
        """The part of the update that turns the estimate into a step."""
        return next(part for part in self.updates if isinstance(part, Rule))

    @property
    def moves_along_directions(self) -> bool:
        """Whether every step is scalars times directions of that step."""
        dense = any(map(self._is_dense, self.param_groups))
        return not dense and all(part.keeps_to_directions for part in self.updates)

    def _is_dense(self, group: Mapping[str, Any]) -> bool:
        """Return whether a group's step is more than scalars times directions."""
        setting = self.rule.dense_where
        return setting is None or group[setting] > 0

    def _check_density(self) -> None:
        """Refuse groups whose steps are more than scalars times directions where an average or a grid needs these.

        Raises:
            UsageError: If there is one: made so, added, or made so by a schedule that moves the momentum.
        """
        averages = any(isinstance(part, IterateAverage) for part in self.updates)
        if averages and (any(map(self._is_dense, self.param_groups)) or not self.directions.seeded):
            raise UsageError(
                "An average of the iterates is rebuilt from scalars and seeded directions, and this update adds more: "
                "average no momentum (also of a schedule), no Adam, no sign of the estimate and no preconditioned "
                "directions."
            )
        if self.perturb.restore_mode == "grid" and not self.moves_along_directions:
            raise UsageError(
                f"perturb='in_place:grid' keeps the weights on a grid, but this {type(self).__name__} adds more than "
                "scalars times directions and would leave it: set momentum to 0 (also in a schedule), or use "
                "'in_place' or 'in_place:copy'."
            )
