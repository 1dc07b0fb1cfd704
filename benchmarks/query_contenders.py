"""Who competes in ``query_efficiency.py``: methods, their settings and the learning rates they may run at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zokernel.finetune.settings.auto import LORA_EPS, POLYAK_SHARE, SCHEDULE, WALK, learning_rate

EPS = {"full": 1e-3, "lora": 1e-2}
# MeZO's sweep at P = 1; a contender's rates are these, times its own factor.
RATES = {"full": (1e-5, 3e-5, 1e-4), "lora": (1e-3, 3e-3, 1e-2)}
FORWARDS = {"sst2": 120, "trec": 80, "rte": 80}  # forwards of every run; MeZO takes half as many steps


@dataclass(frozen=True)
class Contender:
    """A method with its settings.

    Args:
        method: Name of the method.
        batch: Examples per batch.
        options: Settings of the method.
        factor: Its learning rates, relative to MeZO's; None for the one rate that ``--method auto`` chooses.
        schedule: ``constant``, ``linear`` (to zero) or that of ``--method auto``.
        last_third: Of adapters, train those of the last third of the layers.
        lora_eps: Radius for adapters, if not that of all.
        swept: Whether its rates are compared on seed 0; if not, the middle one is taken.
        frozen: Of all weights, the share of the layers that is not trained, and no vectors either; None for nothing.
        walk: How far the rate that follows from the run's length takes each weight, if not as far as ``auto``.
    """

    method: str
    batch: int
    options: dict[str, Any]
    factor: dict[str, float] | None
    schedule: str = "constant"
    last_third: bool = False
    lora_eps: float = EPS["lora"]
    swept: bool = True
    frozen: float | None = None
    walk: float | None = None


def same_factor(factor: float) -> dict[str, float]:
    return {"full": factor, "lora": factor}


REFERENCE = "MeZO, batch 16"
NORMALIZED: dict[str, Any] = {"normalize": True}
AUTO = NORMALIZED | {"polyak_share": POLYAK_SHARE}
TIGHTER = NORMALIZED | {"polyak_share": 0.25}
AS_AUTO: dict[str, Any] = {"schedule": SCHEDULE, "lora_eps": LORA_EPS, "swept": False}
FALLING = AS_AUTO | {"schedule": "linear"}
SIXTH, TENTH = (FALLING | {"frozen": share, "walk": 1.6e-2} for share in (1 / 6, 0.1))
# Rates of earlier defaults, about those of auto in runs as short as these.
AT_TWO = {"full": 6e-3 / 3e-5, "lora": 2.5e-2 / 3e-3}
AT_EIGHT = {train: 4 * factor for train, factor in AT_TWO.items()}


CONTENDERS = {
    REFERENCE: Contender("mezo", 16, {}, same_factor(1)),
    "MeZO, batch 4": Contender("mezo", 4, {}, same_factor(1)),
    # Its smoothing kernel makes scalars several times as large: MeZO's own rates diverge.
    "KerZOO, batch 4": Contender("kerzoo", 4, {"num_perturbations": 1}, same_factor(0.1)),
    "FZOO, batch 4": Contender("fzoo", 4, {"num_perturbations": 8}, {"full": 267, "lora": 33}),
    "HiZOO, batch 4": Contender("hizoo", 4, {}, same_factor(1)),
    "Sparse-MeZO, batch 4": Contender("sparse_mezo", 4, {}, same_factor(3)),
    "SubZero, batch 4": Contender("subzero", 4, {}, same_factor(1)),
    "LOZO, batch 4": Contender("lozo", 4, {}, same_factor(1)),
    "auto": Contender("forward_difference", 4, AUTO | {"num_perturbations": 2}, None, **AS_AUTO),
    "auto, batch 16": Contender("forward_difference", 16, AUTO | {"num_perturbations": 8}, None, **AS_AUTO),
    # As auto was until its rate came to stay for a while; so are all that follow.
    "falling rate, batch 4": Contender("forward_difference", 4, AUTO | {"num_perturbations": 2}, None, **FALLING),
    "falling rate, batch 16": Contender("forward_difference", 16, AUTO | {"num_perturbations": 8}, None, **FALLING),
    # Of all weights, some left untrained, the others taken further.
    "first sixth frozen, batch 4": Contender("forward_difference", 4, AUTO | {"num_perturbations": 2}, None, **SIXTH),
    "first sixth frozen, batch 16": Contender("forward_difference", 16, AUTO | {"num_perturbations": 8}, None, **SIXTH),
    "first tenth frozen, batch 4": Contender("forward_difference", 4, AUTO | {"num_perturbations": 2}, None, **TENTH),
    "first tenth frozen, batch 16": Contender("forward_difference", 16, AUTO | {"num_perturbations": 8}, None, **TENTH),
    # A tighter bound by Polyak's step, none, and a constant rate.
    "tighter bound, batch 4": Contender("forward_difference", 4, TIGHTER | {"num_perturbations": 2}, AT_TWO, **FALLING),
    "tighter bound, batch 16": Contender(
        "forward_difference", 16, TIGHTER | {"num_perturbations": 8}, AT_EIGHT, **FALLING
    ),
    "no bound, batch 4": Contender("forward_difference", 4, NORMALIZED | {"num_perturbations": 2}, AT_TWO, **FALLING),
    "no bound, batch 16": Contender(
        "forward_difference", 16, NORMALIZED | {"num_perturbations": 8}, AT_EIGHT, **FALLING
    ),
    "no bound, constant rate": Contender(
        "forward_difference",
        4,
        NORMALIZED | {"num_perturbations": 2},
        AT_TWO,
        **FALLING | {"schedule": "constant"},
    ),
    # Without normalised slopes: with LoRA the last third of the layers, or every adapter at lower rates.
    "one-sided, batch 4": Contender(
        "forward_difference", 4, {"num_perturbations": 2}, {"full": 4, "lora": 6}, "linear", True
    ),
    "one-sided, batch 16": Contender(
        "forward_difference", 16, {"num_perturbations": 8}, {"full": 16, "lora": 24}, "linear", True
    ),
    "one-sided, lower rates": Contender(
        "forward_difference", 4, {"num_perturbations": 2}, {"full": 8 / 3, "lora": 5 / 2}, "linear", lora_eps=2e-2
    ),
}


def rates_of(name: str, task: str, train: str) -> list[float]:
    """Return the learning rates that a contender may run at."""
    contender = CONTENDERS[name]
    if contender.factor is None:
        count = contender.options["num_perturbations"]
        trained = {"full": "full parameters", "lora": "LoRA"}[train]
        steps, schedule = FORWARDS[task] // (count + 1), contender.schedule
        rate = learning_rate(trained, num_perturbations=count, steps=steps, schedule=schedule)
        rates = [rate * (contender.walk or WALK[trained]) / WALK[trained]]
    else:
        rates = [rate * contender.factor[train] for rate in RATES[train]]
        rates = rates if contender.swept else rates[1:2]
    return [float(f"{rate:.3g}") for rate in rates]
