"""What ``zokernel plan`` prints: the quantities with their errors, what they say of a run, and what is not known."""

from __future__ import annotations

import math

from zokernel.kernels.plan_record import FROM_CURVATURE_PROBES, STEP_BATCHES, Plan
from zokernel.kernels.prober import ProbedTask
from zokernel.kernels.probes import Measurement
from zokernel.readable import plural

NOISE_SCALE, CURVATURE_RATIO = "batch where noise equals signal", "curvature ratio r"


def describe(plan: Plan, task: ProbedTask, seconds: float) -> str:
    """Return the plan in words and a small table."""
    quantities = {
        name: describe_quantity(plan, name) for name, value in vars(plan).items() if isinstance(value, Measurement)
    }
    lines = [
        f"Probed {plan.num_probes} directions of {plural(plan.num_parameters, 'parameter')}: "
        f"{plan.forwards} forward passes, {plan.tokens:,} tokens, {seconds:.0f} s; no gradient. Loss {plan.loss:.4f}.",
        "",
        f"  similarity rho                  {quantities['rho']}",
        f"  relative error of one step      {quantities['relative_error_one']}"
        f"{' / sqrt(P)' if plan.relative_error_one.known else ''}",
        f"  gradient norm                   {quantities['gradient_norm']}",
        f"  rms slope of a batch            {quantities['slope']}",
        f"  {NOISE_SCALE} {quantities['noise_scale']}",
        f"  trace of the Hessian            {quantities['trace_hessian']}",
        f"  trace of the Fisher matrix      {quantities['trace_fisher']}",
        f"  {CURVATURE_RATIO:<31} {quantities['curvature_ratio']}",
        f"  rounding noise of the loss      {plan.loss_noise:.2g}",
        f"  third derivative                {quantities['third_derivative']}",
        f"  best eps                        {best_eps(plan)}",
        f"  distance where slopes double    {quantities['reach']}",
        "",
        f"  {'P':>6}  {'relative error':>18}  {'rate / gradient':>18}  {'best for one step':>18}  "
        f"{'for ' + plural(plan.num_steps, 'step'):>18}  {'forwards per step':>17}  {'tokens per step':>15}",
    ]
    for count, error in plan.predicted_error.items():
        cells = (error, plan.learning_rate_ratio[count], plan.learning_rate[count], plan.run_rate[count])
        columns = "  ".join(f"{str(cell) if cell.known else 'not known':>18}" for cell in cells)
        lines.append(
            f"  {count:>6}  {columns}  "
            f"{2 * count:>17}  {2 * count * task.num_tokens * task.num_update // len(task.labels):>15,}"
        )
    lines.append("")
    lines += [
        f"  P = {count} gives a relative error of {tolerance:g} in one step"
        for tolerance, count in plan.required.items()
        if count is not None
    ]
    lines += [f"  {best_step(plan, size)}" for size in STEP_BATCHES]
    lines += [f"  {advice(plan, task.num_update)}", *(f"  note: {note}" for note in plan.notes)]
    return "\n".join(lines)


def best_step(plan: Plan, batch_size: int) -> str:
    """Return the directions of a step with the most decrease per forward at a batch size, in words."""
    step = plan.best_step(batch_size)
    if step is None:
        return f"The best step at batch {batch_size} is not known: {_describe_missing(plan)}."
    each = "per example" if step.scheme == "per_example" else "for the batch"
    sides = "one-sided" if step.one_sided else "two-sided"
    return (
        f"Most decrease per forward at batch {batch_size}: {plural(step.num_perturbations, 'direction')} {each}, "
        f"{sides}, {step.forwards} forwards per step; predicted {step.gain:.1f} times MeZO's."
    )


def _describe_missing(plan: Plan) -> str:
    """Return in a clause what the best step needs and the probes do not carry, in the words of the table."""
    quantities = {NOISE_SCALE: plan.noise_scale.known, CURVATURE_RATIO: plan.curvature_ratio.known}
    names = [f"the {name}" for name, is_known in quantities.items() if not is_known]
    return f"it needs {' and '.join(names)}" if names else f"the {CURVATURE_RATIO} is not above 0"


def describe_quantity(plan: Plan, name: str) -> str:
    """Return a quantity with its standard error, or how many probes would carry it."""
    value, num_probes = getattr(plan, name), plan.probes_used(name)
    if name == "reach" and math.isinf(value.value):
        return "they do not"
    if value.known:
        return str(value)
    return f"not known from {probes(name, num_probes)}; {more_probes(name, value.probes_needed(num_probes))}"


def probes(name: str, count: int) -> str:
    """Return so many of the probes that a quantity comes from, in words."""
    kind = "curvature probe" if name in FROM_CURVATURE_PROBES else "probe"
    return plural(count, kind)


def more_probes(name: str, count: int) -> str:
    """Return how many probes a quantity would need, and the flag that sets their number."""
    flag = "curvature_probes" if name in FROM_CURVATURE_PROBES else "num_probes"
    return f"about {count:,} would be needed (--{flag} {count})"


def best_eps(plan: Plan) -> str:
    """Return the perturbation size to use, and how good the probed one is."""
    off = f"{100 * plan.finite_difference_error:.2g}%"
    if not plan.eps.known:
        return f"not known from {probes('eps', plan.num_curvature_probes)}: keep {plan.eps_probed:g}"
    return f"{plan.eps}  (probed {plan.eps_probed:g}; at the best a projected gradient is off by {off})"


def advice(plan: Plan, batch: int) -> str:
    """Return the learning rate to train with, in a sentence; none if the probes do not carry one."""
    count = min(plan.run_rate)
    rate = plan.run_rate[count]
    if not rate.known:
        reach_unknown = math.isfinite(plan.reach.value) and not plan.reach.known
        name, what = (
            ("reach", "how far noise may take the weights") if reach_unknown else ("curvature_ratio", "the curvature")
        )
        num_probes = plan.probes_used(name)
        missing = more_probes(name, (plan.reach if reach_unknown else rate).probes_needed(num_probes))
        return f"No learning rate is advised: {what} is not known from {probes(name, num_probes)}; {missing}."
    return (
        f"For a run of {plural(plan.num_steps, 'step')}: --method mezo --num_perturbations {count} "
        f"--per_device_train_batch_size {batch} --eps {plan.eps_probed:g} --learning_rate {rate.value:.1e}, kept "
        "constant. The best rate for one step is too large for a run: most of a step is noise, which adds up, and "
        f"slopes grow along the way.{_why_probed_eps(plan)}"
    )


def _why_probed_eps(plan: Plan) -> str:
    """Return why the advice does not name the best eps, as a sentence; empty if that is not far from the probed one."""
    ratio = plan.eps.value / plan.eps_probed
    if not plan.eps.known or 0.5 <= ratio <= 2:
        return ""
    return (
        " The eps is the one that was probed, since the rate was measured at it: for the best eps, repeat the plan "
        f"with --eps {plan.eps.value:.1e}."
    )
