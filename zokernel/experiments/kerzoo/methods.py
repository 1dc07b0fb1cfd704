"""The lines of KerZOO's comparisons, and what the paper printed for them."""

from __future__ import annotations

import numpy as np

from zokernel.estimators.smoothed import Smoothed
from zokernel.estimators.two_point import TwoPoint
from zokernel.experiments.kerzoo.replicas import Method

EPS = 1e-3
CONSTANT = 4.0
MATCHED = "MeZO-3 at KerZOO's effective lr"


def mezo(perturbations: int = 1, *, lr_factor: float = 1.0, label: str | None = None, eps: float = EPS) -> Method:
    """MeZO with so many perturbations."""
    return Method(label or f"MeZO-{perturbations}", lambda steps: TwoPoint(eps, perturbations), lr_factor=lr_factor)


def sequential_mezo(count: int = 3) -> Method:
    """Several MeZO-1 steps on fresh batches counted as one iteration: the forwards of KerZOO, spent one by one."""
    return Method(f"{count} sequential MeZO-1 steps", lambda steps: TwoPoint(EPS, 1), steps_per_iteration=count)


def kerzoo(
    label: str = "KerZOO",
    *,
    order: int = 3,
    constant: float = CONSTANT,
    radius: float = 1.0,
    schedule: str = "none",
    lr_factor: float = 1.0,
    eps: float = EPS,
) -> Method:
    """KerZOO with three perturbations."""
    return Method(
        label,
        lambda steps: Smoothed(
            eps, 3, order=order, constant=constant, radius=radius, schedule=schedule, total_steps=steps
        ),
        lr_factor=lr_factor,
    )


def comparison() -> list[Method]:
    """Return every line of the loss curves, the paper's and the controls it lacks."""
    return [
        mezo(1),
        mezo(3),
        mezo(3, lr_factor=CONSTANT, label=MATCHED),
        sequential_mezo(3),
        kerzoo("KerZOO, radius 1"),
        kerzoo("KerZOO, radius 1/2", radius=0.5),
        kerzoo("KerZOO, radius 1 shrinking, literal", schedule="literal"),
        kerzoo("KerZOO, radius 1/2 shrinking, literal", radius=0.5, schedule="literal"),
        kerzoo("KerZOO, radius 1 shrinking, rescaled", schedule="rescaled"),
    ]


# Table 13 (OPT-2.7B, SST-2): training loss and wall-clock seconds by iteration.
PUBLISHED_ITERATIONS = np.array([200, 400, 600, 800, 1000, 1200, 1500, 2000, 3000, 4000])
PUBLISHED_MEZO = np.array([0.7844, 0.6701, 0.5954, 0.5422, 0.5042, 0.4732, 0.4357, 0.3933, 0.3500, 0.3392])
PUBLISHED_KERZOO = np.array([0.5939, 0.4743, 0.4104, 0.3734, 0.3497, 0.3361, 0.3149, 0.2955, 0.2801, 0.2775])
PUBLISHED_SECONDS_MEZO = np.array([65, 132, 230, 293, 388, 449, 576, 766, 1172, 1551])
PUBLISHED_SECONDS_KERZOO = np.array([180, 368, 592, 781, 1012, 1182, 1518, 2019, 3063, 4061])


def published_time_scale() -> dict[str, list[float]]:
    """Return how many of MeZO's published iterations and seconds reach each of KerZOO's published losses.

    Example:
        >>> [round(ratio, 2) for ratio in published_time_scale()["iterations_ratio"]]
        [3.02, 2.98, 2.97, 3.01, 3.02]
    """
    within_range = [k for k, loss in enumerate(PUBLISHED_KERZOO) if loss >= PUBLISHED_MEZO[-1]]
    order = np.argsort(PUBLISHED_MEZO)
    losses = PUBLISHED_KERZOO[within_range]
    # Between two printed points the loss is close to linear in the logarithm of the iterations.
    mezo_at = np.exp(np.interp(losses, PUBLISHED_MEZO[order], np.log(PUBLISHED_ITERATIONS[order])))
    seconds_at = np.interp(losses, PUBLISHED_MEZO[order], PUBLISHED_SECONDS_MEZO[order])
    return {
        "kerzoo_iterations": PUBLISHED_ITERATIONS[within_range].tolist(),
        "mezo_iterations": mezo_at.tolist(),
        "iterations_ratio": (mezo_at / PUBLISHED_ITERATIONS[within_range]).tolist(),
        "seconds_ratio": (seconds_at / PUBLISHED_SECONDS_KERZOO[within_range]).tolist(),
    }
