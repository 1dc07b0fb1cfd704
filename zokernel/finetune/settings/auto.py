r"""``--method auto``: settings chosen from the kernel theory and from what was measured on real tasks.

Each choice has its reason, and each can be overridden by its own flag.

- *Batch.*  With a gradient noise scale :math:`\nu = tr\Sigma/\|g\|^2` a step's progress goes like
  :math:`1/(1 + \nu/b)` at batch size b, so the tokens to a given loss go like :math:`b + \nu`: a batch well below
  :math:`\nu` (6 to 14 at the start of SST-2 and TREC) wastes none.
- *Directions.*  One-sided differences share the loss at the centre: P + 1 forwards instead of 2P.  Their error falls
  like 1/P until that of the b examples takes over, so P grows with b: half of it.
- *A direction for every example*, where LoRA is trained and the loss of every example is known: two forwards per step
  give as many directions as the batch has examples, and the noise of the examples takes no more of them.  One direction
  per example did better than two at batch 4.
- *Step.*  Slopes are divided by their running root mean square, so the learning rate is a distance.  Slopes of TREC
  are 1.6 (all weights) and 3 times (LoRA) those of SST-2, and so are the rates that either bears without it.
- *Rate.*  Most of a step is noise, a random walk that takes every weight :math:`\eta \sqrt{m T / P}` from its start in
  T steps, with m the mean square of the schedule.  How far it may go without harm is a property of the weights, so the
  rate follows from it, P and T.  It was nearly the same for two and for eight directions.
- *Distance.*  Chats bear a shorter walk than prompts with one word for an answer.  Before its first step a run takes
  three losses of a few batches (:mod:`zokernel.kernels.walk_rise`) and lowers its rate where the loss rises at that
  distance by more than its slopes can make up for; a noise scale of 10 stands for that of the task.
- *Swing.*  The walk of an adapter changes the loss of four examples by 8 to 10 % of itself on SST-2 and TREC with the
  model it was found on, and by 35 to 65 % with larger ones, where the runs diverge.  It is shortened to 15 %.
- *Bound.*  Where the loss is low, a share of Polyak's step is shorter: :math:`P / (P + 1 + r)` of it descends fastest,
  and about a third was best for eight directions on both tasks (r = 15 or so).
- *Schedule.*  For equal walks a constant rate goes furthest along the gradient, and a rate that falls at the end gets
  rid of the noise in steep directions: it stays for three fifths of the steps and falls to zero over the others.

``docs/results/queries.md`` has the measurements, and where they do not help.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from zokernel.errors import UsageError
from zokernel.kernels.walk_rise import Rise, walk_worth

METHOD = "forward_difference"
BATCH = 4
# How far the random walk of a run takes each weight, by what is trained.  Not measured for virtual tokens and scales.
WALK = {"full parameters": 1.35e-2, "LoRA": 6.5e-2, "scales": 1.35e-2, "virtual tokens": 6.5e-2}
LEAST_WALK = 0.1  # share of the walk that is left at least
# Share of the loss of a batch by which its walk may change it (root mean square).  All weights bear 50 % and more.
SWING = {"LoRA": 0.15}
NOISE_SCALE = 10.0  # of SST-2 and TREC at the start: 6 to 14
POLYAK_SHARE = 0.35
LORA_EPS = 2e-2
SCHEDULE = "warmup_stable_decay"
COOLDOWN = 0.4  # share of the steps over which the rate falls
# Mean squares of schedules, relative to the rate they start at; others count as constant.
MEAN_SQUARE = {SCHEDULE: 1 - 2 / 3 * COOLDOWN, "linear": 1 / 3, "cosine": 3 / 8}


def supports_per_example(kind: str, model: Any, config: Any) -> bool:
    """Return whether examples may have directions of their own: with plain LoRA and a loss that is a mean over them.

    Args:
        kind: Which kind of language model is trained.
        model: ``ModelArguments``.
        config: What the user asked for.
    """
    plain = not (model.use_dora or model.modules_to_save or model.target_parameters or model.adapter_name_or_path)
    whole = not (model.offload or config.torch_compile)
    return plain and whole and kind != "seq2seq" and config.objective == "cross_entropy"


def chooses_directions(pairs: Sequence[str]) -> bool:
    """Return whether options of the method say what its directions are.

    Example:
        >>> chooses_directions(["per_example=false"]), chooses_directions(["beta=0.5"])
        (True, False)
    """
    return any(pair.partition("=")[0] in ("per_example", "rank") for pair in pairs)


def method_args(pairs: Sequence[str], *, learning_rate: float | None, per_example: bool = False) -> list[str]:
    """Return the method's options: the explicit ones, slopes normalised, a bound on the step, directions per example.

    Raises:
        UsageError: If slopes are not to be normalised and no learning rate is given.

    Example:
        >>> method_args(["beta=0.5"], learning_rate=None)
        ['beta=0.5', 'normalize=true', 'polyak_share=0.35']
    """
    pairs = [*pairs, "per_example=true"] if per_example else list(pairs)
    if any(pair.startswith("normalize=") for pair in pairs):
        if learning_rate is None:
            raise UsageError("The rate that method auto chooses is one for normalised slopes: give learning_rate too.")
        return pairs
    bound = [] if any(pair.startswith("polyak_share=") for pair in pairs) else [f"polyak_share={POLYAK_SHARE}"]
    return [*pairs, "normalize=true", *bound]


def num_perturbations(batch: int) -> int:
    """Return the directions per step for a batch: half as many as it has examples, and two at least."""
    return max(2, batch // 2)


def cooldown_steps(steps: int) -> int:
    """Return the number of last steps of a run over which the rate falls.

    Example:
        >>> cooldown_steps(40)
        16
    """
    return math.ceil(COOLDOWN * steps)


def learning_rate(trained: str, *, num_perturbations: int, steps: int, schedule: str = SCHEDULE) -> float:
    r"""Return the rate :math:`D \sqrt{P / mT}` at which a run's random walk takes each weight D from its start.

    Args:
        trained: What is trained: a key of :data:`WALK`.
        num_perturbations: Directions per step, P.
        steps: Steps of the run, T.
        schedule: Its schedule, by transformers' name, whose mean square is m.

    Example:
        >>> f"{learning_rate('full parameters', num_perturbations=2, steps=1000):.2g}"
        '0.00071'
    """
    return WALK[trained] * math.sqrt(num_perturbations / (steps * MEAN_SQUARE.get(schedule, 1.0)))


def walk_within_swing(rise: Rise, *, trained: str, batch: int) -> float:
    r"""Return the share of its walk over which the loss of a batch changes by :data:`SWING` of itself.

    The slope of b examples is :math:`\sqrt{1 + \nu / b}` times that of all; a batch of four is what counts.

    Args:
        rise: The change of the loss of batches of ``batch`` examples over the walk.
        trained: What is trained: a key of :data:`WALK`.
        batch: Examples per batch, b.

    Returns:
        The share; 1 if the loss changes by less, or bounds nothing since it is not above zero.

    Example:
        >>> rise = Rise(0.065, 0.78, 0.2, 0.1, 4.2, 24)  # 0.27 of 0.78
        >>> round(walk_within_swing(rise, trained="LoRA", batch=4), 2)
        0.43
        >>> walk_within_swing(rise, trained="full parameters", batch=4)
        1.0
    """
    if trained not in SWING or not rise.loss > 0 or not rise.slope > 0:
        return 1.0
    slope = rise.slope * math.sqrt((1 + NOISE_SCALE / BATCH) / (1 + NOISE_SCALE / batch))
    return min(1.0, max(LEAST_WALK, SWING[trained] * rise.loss / (slope * rise.distance)))


def shorter_walk(rise: Rise, *, directions: int, batch: int, sharing: int) -> float:
    r"""Return the share of its walk that a run should take, by the rise of the loss over the whole of it.

    Args:
        rise: The rise of the loss of batches of ``batch`` examples.
        directions: Directions of all steps; those of all examples with directions of their own.
        batch: Examples per batch, b.
        sharing: Examples that share the directions of a step, B.

    Returns:
        1 if nothing speaks against the walk, else less, and :data:`LEAST_WALK` at least.

    Example:
        >>> run = {"directions": 256, "batch": 10, "sharing": 10}
        >>> shorter_walk(Rise(0.125, 1.0, 0.5, 0.01, 0.5, 24), **run)  # kappa = sqrt(256) / 4
        0.5
    """
    noise = math.sqrt((1 + NOISE_SCALE / batch) * (1 + NOISE_SCALE / sharing))
    return max(LEAST_WALK, walk_worth(rise, directions=directions, noise=noise) / rise.distance)
