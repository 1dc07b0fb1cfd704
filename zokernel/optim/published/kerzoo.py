r"""KerZOO: kernel-smoothed zeroth-order optimization.

The published Algorithm 1 has more options than its results need.  Those that exist to reproduce the paper (projections
on a ball, gradients at a shifted point, lengthening steps, a misprinted constant) are in
``zokernel.experiments.kerzoo.printed``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import ClassVar, Unpack

from zokernel.directions import Dense
from zokernel.errors import UsageError
from zokernel.estimators import Smoothed
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.averaging.averages import iterate_average
from zokernel.optim.updates.base import Update
from zokernel.optim.updates.coefficients import Clip
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder
from zokernel.theory.smoothing import KernelFacts
from zokernel.values import plain_number

logger = logging.getLogger(__name__)


@register("kerzoo")
class KerZOO(ZerothOrder):
    r"""Kernel-smoothed zeroth-order SGD with iterate averaging.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P
        \frac{L(\theta + \epsilon r_p z_p) - L(\theta - \epsilon r_p z_p)}{2\epsilon}\, K(r_p)\, z_p

    On average this is MeZO at the learning rate :meth:`effective_lr`, which is ``4 * lr`` with the paper's settings.
    Compare methods at equal effective learning rates.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation at r = 1, in units of the weights.
        num_perturbations: Directions per step; each costs two forward passes.
        kernel_order: Order of the smoothing kernel: 1, 3, 5, 7, ...
        kernel_constant: The kernel's constant C, the factor on the mean gradient at ``radius=1``.
        radius: Half-width of the range of r at the start.
        radius_schedule: ``none``, ``literal``, ``rescaled`` or ``lr_compensated``: whether the range shrinks during the
            run, and what that does to the kernel (see :mod:`zokernel.estimators.smoothed`).
        shrink_to: Share of ``radius`` left at the last step, when there is a schedule.
        total_steps: Length of the run, which radius schedules need.
        clip: ``none``, or ``grad``: limit the norm of the estimate to ``clip_radius``.
        clip_radius: Radius of the clip.
        averaging: How the averaged iterate is kept: ``none``, ``fp32``, ``int8`` or ``journal`` (no memory; rebuilt
            from seeds and scalars when needed).  See :meth:`averaged_weights` and :meth:`averaged`.
        distribution: Distribution of the directions; the paper's algorithm uses ``gaussian``.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Raises:
        UsageError: If a setting is out of range or settings do not go together.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = KerZOO([weight], lr=0.01, averaging="journal")
        >>> optimizer.effective_lr()
        0.04
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-3 < losses[0]
        True
        >>> optimizer.averaged_weights()["0"].abs().max() < 0.1
        tensor(True)

    References:
        KerZOO: Kernel Function Informed Zeroth-Order Optimization for Accurate and Accelerated LLM Fine-Tuning (2025),
        arXiv:2505.18886, Algorithm 1 and eq. 14.
    """

    estimator: Smoothed
    moved_options: ClassVar[dict[str, str]] = dict.fromkeys(("paper_k5", "grad_at", "step_schedule"), "kerzoo_printed")
    """Options that only the method of that name has."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 3,
        kernel_order: int = 3,
        kernel_constant: float = 4.0,
        radius: float = 1.0,
        radius_schedule: str = "none",
        shrink_to: float = 0.1,
        total_steps: int | None = None,
        clip: str = "none",
        clip_radius: float | None = None,
        averaging: str = "none",
        distribution: str = "rademacher",
        **options: Unpack[ZerothOrderOptions],
    ):
        _refuse_printed(clip, options)
        estimator = Smoothed(
            eps=eps,
            num_perturbations=num_perturbations,
            order=plain_number("kernel_order", kernel_order),
            constant=plain_number("kernel_constant", kernel_constant),
            radius=radius,
            schedule=radius_schedule,
            shrink_to=shrink_to,
            total_steps=total_steps,
        )
        if clip not in ("none", "grad"):
            raise UsageError(f"There is no clip {clip!r}: choose one of none, grad.")
        if (clip == "none") != (clip_radius is None):
            raise UsageError("clip and a positive clip_radius go together: give both or neither.")
        update: list[Update] = [SGD()]
        if clip_radius is not None:
            update.insert(0, Clip(plain_number("clip_radius", clip_radius)))
        if averaging != "none":
            update.append(iterate_average(averaging))
        super().__init__(params, lr, directions=Dense(distribution), estimator=estimator, update=update, **options)
        self.averaging = averaging
        log_facts(self.facts())

    def facts(self) -> KernelFacts:
        """Return gain, bias, second-moment and noise ratios of the coming step's estimate, all relative to MeZO's."""
        return self.estimator.facts_at(self.step_count)


def _refuse_printed(clip: str, options: Collection[str]) -> None:
    """Refuse options that only reproduce the paper.

    Raises:
        UsageError: If there is one.
    """
    printed = [f"clip={clip!r}"] if str(clip).startswith("param_") else []
    printed += [name for name in options if name in KerZOO.moved_options]
    if printed:
        raise UsageError(
            f"{printed[0]} only reproduces the paper and is no option of KerZOO: use "
            "zokernel.experiments.kerzoo.printed.PrintedKerZOO, or --method kerzoo_printed on the command line."
        )


def log_facts(facts: KernelFacts) -> None:
    """Log how the smoothed estimate compares with MeZO's."""
    logger.info(
        "KerZOO: mean gradient x %.4g, second moment x %.4g, loss noise x %.4g, eps^2 bias x %.4g relative to MeZO",
        facts.gain,
        facts.second_moment_ratio,
        facts.noise_ratio,
        facts.bias_ratio,
    )
