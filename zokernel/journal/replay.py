r"""From base weights and a journal to the weights of any step.

A zeroth-order step is a function of the losses it measured: they give the scalars, (seed, step, index) the directions,
and the method's own update does the rest.  So replay runs the very optimizer of the run and hands it the recorded
losses instead of evaluating the model.  That covers every method, rebuilds its state (momentum, Adam's moments,
HiZOO's Hessian, averages) along with the weights, and repeats every rounding.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zokernel._version import __version__
from zokernel.directions.backends.dispatch import choose_backend
from zokernel.errors import RunError, UsageError
from zokernel.journal.compat import upgraded
from zokernel.journal.format import Conditions, Step
from zokernel.journal.hashes import weights_sha256
from zokernel.journal.reader import Journal
from zokernel.optim.registry import get_method
from zokernel.optim.zeroth_order import ZerothOrder
from zokernel.perturb import perturb_for_replay
from zokernel.readable import plural

logger = logging.getLogger(__name__)

# What a parameter group may have its own value of, beside its learning rate.
GROUP_SETTINGS = ("weight_decay", "momentum")
HEADER_KEYS = {
    *("method", "options", "seed", "directions", "estimator", "update", "perturb", "backend"),
    *("groups", "parameters", "base_sha256", "zokernel", "torch"),
}


def make_header(
    optimizer: ZerothOrder, method: str, options: Mapping[str, Any], *, base_sha256: str, **more: Any
) -> dict[str, Any]:
    """Return what a journal says once: how to make the optimizer again, and of which weights.

    Args:
        optimizer: The optimizer of the run.
        method: Its name in the registry.
        options: The keyword arguments it was made with, beside the learning rate.
        base_sha256: :func:`weights_sha256` of its parameters before it was made.
        more: Anything else to keep.

    Returns:
        The header, for :meth:`zokernel.journal.JournalWriter.create`.

    Raises:
        UsageError: If the method is not the optimizer's.
    """
    if type(optimizer) is not get_method(method):
        raise UsageError(f"A {type(optimizer).__name__} is not the method {method!r}: name the one it is.")
    try:
        json.dumps(dict(options))
    except TypeError as error:
        raise UsageError(
            f"A journal holds options as text ({error}): spell parts as text, such as update='adam' or "
            "directions='low_rank(2)'."
        ) from error
    return {
        "zokernel": __version__,
        "torch": torch.__version__,
        "method": method,
        "options": dict(options),
        **_traits(optimizer),
        "backend": backend_of(optimizer),
        "groups": [
            {"names": names, "lr": group.get("initial_lr", group["lr"])}
            | {key: group[key] for key in GROUP_SETTINGS if key in group}
            for group, names in optimizer.groups()
        ],
        "parameters": {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in optimizer.named_params.items()
        },
        "base_sha256": base_sha256,
        **more,
    }


def _traits(optimizer: ZerothOrder) -> dict[str, Any]:
    """Return what must come out the same when the optimizer is made again from the header."""
    return {
        "seed": optimizer.seed,
        "directions": repr(optimizer.directions),
        "estimator": repr(optimizer.estimator),
        "update": " + ".join(repr(part) for part in optimizer.updates),
        "perturb": optimizer.perturb.name,
    }


def backend_of(optimizer: ZerothOrder) -> str:
    """Return what generates the directions, and where: the same backend repeats the same roundings."""
    device = next(iter(optimizer.named_params.values())).device
    name = getattr(optimizer.directions, "backend", "auto")
    return f"{choose_backend(device, name)} on {device.type}"


def check_base(header: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those the journal begins with.

    Args:
        header: A journal's header.
        weights: Tensors by name.

    Raises:
        RunError: If a parameter is missing, has another shape or dtype, or other values.
    """
    if not header.keys() >= HEADER_KEYS:
        missing = ", ".join(sorted(HEADER_KEYS - header.keys()))
        raise RunError(f"The journal's header lacks {missing}: it was not made by zokernel.journal.make_header.")
    for name, (dtype, shape) in header["parameters"].items():
        if name not in weights:
            raise RunError(f"The base has no parameter {name!r}, which the journal changes: it is another model.")
        actual = str(weights[name].dtype).removeprefix("torch."), list(weights[name].shape)
        if actual != (dtype, shape):
            raise RunError(
                f"Parameter {name!r} of the base is {actual[0]} {actual[1]} and {dtype} {shape} in the journal: "
                "load the base that the run started from, in the same dtype."
            )
    base = {name: weights[name] for name in header["parameters"]}
    if weights_sha256(base) != header["base_sha256"]:
        raise RunError(
            "The base has the right shapes but other values than the run started from (its hash differs): "
            "give the very weights the run was started with."
        )


def make_optimizer(header: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ZerothOrder:
    """Make the optimizer of a journal's run, on base weights that it will change in place.

    Raises:
        UsageError: If the journal's method is not zeroth-order.
        RunError: If the optimizer comes out otherwise than in the run.
    """
    method: Any = get_method(header["method"])
    if method.first_order:
        raise UsageError(f"{header['method']} takes gradients, which no journal holds.")
    groups = []
    for group in header["groups"]:
        settings = {key: value for key, value in group.items() if key != "names"}
        groups.append({"params": [(name, weights[name]) for name in group["names"]], **settings})
    options = dict(header["options"])
    if header["perturb"] != "tangents":
        options["perturb"] = perturb_for_replay(header["perturb"])
    optimizer: ZerothOrder = method(groups, **options)
    for trait, value in ({} if "upgraded_from" in header else _traits(optimizer)).items():
        if value != header[trait]:
            raise RunError(
                f"The options in the journal make {trait} {value} and the run had {header[trait]}: the header was "
                "made with incomplete options, or by another version of zokernel."
            )
    return optimizer


@torch.no_grad()
def replay_(
    weights: Mapping[str, Tensor],
    journal: Journal,
    *,
    step: int | None = None,
    allow_other_backend: bool = False,
) -> ZerothOrder:
    """Turn base weights, in place, into those after some step of a journal.

    Args:
        weights: The base's tensors by name; those the journal names are changed.
        journal: The journal.
        step: After how many steps; all of them by default.
        allow_other_backend: Replay even if directions are generated by another backend than in the run, or if the
            result has other bits than the run's; such a result is logged.

    Returns:
        The optimizer, with the state it had after that step.

    Raises:
        UsageError: If the journal has no such step.
        RunError: If the base is another one, or the result is not what the run ended with.
    """
    header = upgraded(journal.header)
    last = journal.num_steps if step is None else step
    if not 0 <= last <= journal.num_steps:
        raise UsageError(f"{journal.path} holds {plural(journal.num_steps, 'step')}: choose one of them, not {last}.")
    check_base(header, weights)
    optimizer = make_optimizer(header, weights)
    backend = backend_of(optimizer)
    if backend != header["backend"] and not allow_other_backend:
        raise RunError(
            f"The run's directions were generated by {header['backend']} and would be by {backend} here, which may "
            "round differently: move the base there, or allow another backend and accept last-bit differences."
        )
    replay_steps(optimizer, journal.steps[:last])
    logger.info("%s: the weights after step %d of %d.", journal.path, last, journal.num_steps)
    for event in journal.events:
        if event["event"] == "end" and event["step"] == last and backend == header["backend"]:
            if weights_sha256(optimizer.named_params) == event["weights_sha256"]:
                continue
            difference = (
                f"The replay of {journal.path} did not end with the weights that the run had at step {last}: "
                f"another version of zokernel ({header['zokernel']}) or torch ({header['torch']}) wrote it, or "
                "another kind of processor, which may round roots and matrix products differently"
            )
            if not allow_other_backend:
                raise RunError(f"{difference}; replay it there, or allow another backend and accept such differences.")
            logger.warning("%s.", difference)
    return optimizer


def replay_steps(optimizer: ZerothOrder, steps: Iterable[Step]) -> None:
    """Repeat recorded steps on an optimizer that is where they begin.

    Raises:
        RunError: If the steps are not the optimizer's next ones.
    """
    for record in steps:
        if record.step != optimizer.step_count:
            raise RunError(f"The optimizer is at step {optimizer.step_count}, the journal at {record.step}.")
        set_learning_rates(optimizer, record.learning_rates)
        recorded, current = record.conditions or Conditions(), Conditions(optimizer.perturb.name)
        if recorded.perturb is not None and not Conditions(recorded.perturb).same_steps(current):
            optimizer.perturb = perturb_for_replay(recorded.perturb)
        optimizer.replay(record.losses, frozen=None if record.conditions is None else recorded.frozen)


def set_learning_rates(optimizer: ZerothOrder, rates: Sequence[float]) -> None:
    """Set every parameter group's learning rate, from one for all or one each.

    Raises:
        RunError: If there is another number of rates than of groups.
    """
    groups = optimizer.param_groups
    if len(rates) not in (1, len(groups)):
        raise RunError(
            f"The record has {len(rates)} learning rates and the optimizer {plural(len(groups), 'parameter group')}: "
            "make it with the groups of the run."
        )
    for group, rate in zip(groups, [*rates] * len(groups) if len(rates) == 1 else rates, strict=True):
        group["lr"] = rate


def record_of(optimizer: ZerothOrder) -> Step:
    """Return the record of the optimizer's last step; learning rates must not have been changed since."""
    rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
    conditions = Conditions(optimizer.perturb.name, optimizer.frozen, len(optimizer.param_groups))
    return Step(optimizer.step_count - 1, rates, tuple(optimizer.record()), conditions)
