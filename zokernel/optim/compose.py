"""Parts of an optimizer from text, as the command line and journals spell them: ``low_rank(2, refresh=5)``."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from zokernel.calls import build
from zokernel.errors import UsageError
from zokernel.estimators import ESTIMATORS, Estimator
from zokernel.optim.updates.adam import Adam
from zokernel.optim.updates.averaging.averages import iterate_average
from zokernel.optim.updates.base import Rule, Update
from zokernel.optim.updates.coefficients import Clip, ClipSlopes, Normalized, PolyakBound, SignOfProjections
from zokernel.optim.updates.curvature_weights import CurvatureWeights
from zokernel.optim.updates.rules import SGD, Sign
from zokernel.perturb import Perturb

UPDATES: dict[str, Callable[..., Update]] = {
    "sgd": SGD,
    "sign": Sign,
    "sign_of_projections": SignOfProjections,
    "adam": Adam,
    "curvature_weights": CurvatureWeights,
    "normalized": Normalized,
    "polyak_bound": PolyakBound,
    "clip": Clip,
    "clip_slopes": ClipSlopes,
    "average": iterate_average,
}


def make_estimator(estimator: Estimator | str) -> Estimator:
    """Return an estimator, given an object or its text.

    Example:
        >>> make_estimator("one_sided(1e-3, 8)").num_perturbations
        8
    """
    if isinstance(estimator, str):
        return build(estimator, ESTIMATORS, "estimator")
    if not isinstance(estimator, Estimator):
        raise UsageError(f"{estimator!r} is not an estimator: pass one such as TwoPoint(), or its text.")
    return estimator


def check_together(estimator: Estimator, perturb: Perturb) -> None:
    """Refuse a way of perturbing that does not give the numbers that an estimator takes.

    Raises:
        UsageError: If it does not.
    """
    if (estimator.numbers_per_point == 2) != (perturb.name == "tangents"):
        raise UsageError(
            "ForwardDerivative and Tangents belong together: one takes the derivatives that the other makes."
        )
    if (estimator.numbers_per_point is None) != (perturb.name == "per_example"):
        raise UsageError(
            "PerExample and perturb='per_example' belong together: the losses of all examples are taken at weights "
            "perturbed for each."
        )


def check_tied(tied: Mapping[str, str], perturb: Perturb) -> None:
    """Refuse a way of perturbing that sees only one of two tensors that are the same memory.

    Args:
        tied: For the name of each such tensor, the name under which its memory is trained.
        perturb: How the losses are taken.

    Raises:
        UsageError: If there are such tensors and it does not see all.
    """
    if tied and perturb.restore_mode == "unmoved":
        name, first = next(iter(tied.items()))
        raise UsageError(
            f"Parameters {first!r} and {name!r} have the same memory, of which {perturb.name} sees only the first: "
            "leave the other name out if they are one tensor, or choose a way that perturbs in place."
        )


def make_updates(update: Update | Sequence[Update] | str | None) -> list[Update]:
    """Return the parts of an update, with a plain step if no part is a rule.

    Args:
        update: A part, several, or their text such as ``normalized(0.9) + adam``.

    Raises:
        UsageError: If there is more than one rule.

    Example:
        >>> make_updates("normalized(0.5) + adam")
        [Normalized(beta=0.5), Adam(beta1=0.9, beta2=0.999, delta=1e-08, amsgrad=False, of_momentum=False)]
    """
    if isinstance(update, str):
        parts = [build(text, UPDATES, "update") for text in split_sum(update)]
    else:
        parts = list(update) if isinstance(update, Sequence) else [update] if update is not None else []
    for part in parts:
        if not isinstance(part, Update):
            raise UsageError(
                f"{part!r} is not part of an update: pass objects such as zokernel.optim.updates.Adam(), or one text."
            )
    _check_order(parts)
    rules = [part for part in parts if isinstance(part, Rule)]
    if len(rules) > 1:
        raise UsageError(f"An update has one rule, not {len(rules)}: {', '.join(map(repr, rules))}.")
    return parts if rules else [*parts, SGD()]


def split_sum(text: str) -> list[str]:
    """Split ``normalized(0.9) + adam`` into its parts.

    Raises:
        UsageError: If the text is no such sum.

    Example:
        >>> split_sum("clip(1e+2) + adam")
        ['clip(100.0)', 'adam']
    """
    try:
        tree, parts = ast.parse(text.strip(), mode="eval").body, []
    except SyntaxError as error:
        raise UsageError(f"{text!r} is not of the form name or name(value, key=value), joined by +.") from error
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        parts.append(tree.right)
        tree = tree.left
    return [ast.unparse(part) for part in [tree, *reversed(parts)]]


def _check_order(parts: Sequence[Update]) -> None:
    """Refuse parts that would undo what an earlier part has done.

    Raises:
        UsageError: If one would.
    """
    kinds = (Normalized, PolyakBound, Clip, ClipSlopes, CurvatureWeights, SignOfProjections)
    for earlier, later in pairwise(part for part in parts if isinstance(part, kinds)):
        is_unaffected = isinstance(earlier, CurvatureWeights)  # whose weights a common factor leaves as they are
        if isinstance(later, SignOfProjections) or (isinstance(later, Normalized) and not is_unaffected):
            raise UsageError(f"{later!r} would undo {earlier!r}: put it first, or leave one of them out.")
