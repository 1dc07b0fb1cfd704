"""The pages of ``zokernel plan``, ``zokernel kernel`` and ``zokernel evolve``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from zokernel.readable import plural
from zokernel.reporting.page import Page, Picture, Section, number, table_of_rows, words
from zokernel.reporting.series import band_look, look
from zokernel.reporting.svg import draw


def read_plan(record: dict[str, Any]) -> Page:
    """Return the page of a plan.

    Args:
        record: What ``zokernel plan --output_file`` wrote.
    """
    plan = record["plan"]
    return Page(
        title="Plan of a zeroth-order run",
        kind="plan",
        summary=[*_plan_summary(plan), *plan["notes"]],
        facts=[
            ("relative error at P = 1", _estimate(plan["relative_error_one"])),
            ("best eps", _estimate(plan["eps"])),
            ("gradient norm", _estimate(plan["gradient_norm"])),
            ("rms slope of a batch", _estimate(plan.get("slope"))),
            ("noise scale", _estimate(plan["noise_scale"])),
            ("forward passes", f"{plan['forwards']:,}"),
        ],
        sections=[plan_section(record)],
        command=record.get("command", ""),
    )


def _plan_summary(plan: dict[str, Any]) -> list[str]:
    """Return what the probes say, in plain words."""
    summary = [
        f"Probing {plan['num_probes']} random directions of {plural(plan['num_parameters'], 'parameter')} with "
        f"{plan['forwards']:,} forward passes says how training would go; no gradient was taken.",
        f"One step along a single direction would be off by {_estimate(plan['relative_error_one'])} times the change "
        "that gradient descent would make; with P directions by that over the root of P."
        if _is_resolved(plan["relative_error_one"])
        else "How far one step along a single direction would be off is not known from these probes; about "
        f"{_probes_needed(plan, 'relative_error_one')} would be needed.",
        f"The best perturbation size is {_estimate(plan['eps'])}; the batch size at which noise equals signal is "
        f"{_estimate(plan['noise_scale'])}.",
    ]
    rates = [(count, rate) for count, rate in plan.get("run_rate", {}).items() if _is_resolved(rate)]
    if rates:
        summary.append(
            f"For a run of {plural(plan['num_steps'], 'step')} along {plural(int(rates[0][0]), 'direction')} per "
            f"step, the learning rate {rates[0][1]['value']:.2g} is advised."
            + (
                f" Slopes double once noise has taken every weight {plan['reach']['value']:.2g} from its start; such a "
                "run stays well below that."
                if _is_resolved(plan.get("reach"))
                else ""
            )
        )
    tolerance, count = next(iter(plan["required"].items()), (None, None))
    if count is not None and count > 0:
        summary.append(f"A relative error of {tolerance} needs {plural(count, 'direction')} per step.")
    return summary


def plan_section(record: dict[str, Any]) -> Section:
    """Return figure and tables of a plan: predicted next to measured where the plan was verified."""
    plan = record["plan"]
    rows = [
        {
            "P": int(count),
            "relative error": _estimate(error),
            "rate over gradient descent's": _estimate(plan["learning_rate_ratio"][count]),
            "best rate for one step": _estimate(plan["learning_rate"][count]),
            "rate for the run": _estimate(plan.get("run_rate", {}).get(count)),
            "forward passes per step": 2 * int(count),
        }
        for count, error in plan["predicted_error"].items()
    ]
    quantities = [
        {"quantity": words(name), "estimate": value if isinstance(value, (int, float)) else _estimate(value)}
        for name, value in plan.items()
        if not isinstance(value, (list, dict)) or (isinstance(value, dict) and "value" in value)
    ]
    required = [
        {"relative error": float(target), "directions": _count(count)} for target, count in plan["required"].items()
    ]
    tables = [
        table_of_rows("For each number of directions", rows),
        table_of_rows("Directions needed", required),
        table_of_rows("What the probes say", quantities),
    ]
    if record.get("verify"):
        verified = [{"quantity": row["quantity"], **row} for row in record["verify"]]
        tables.insert(0, table_of_rows("Predicted and measured with real gradients", verified))
    resolved = _is_resolved(plan["relative_error_one"])
    pictures = [_plan_picture(plan, record.get("verify") or [])] if resolved else []
    return Section("Plan", "plan", pictures=pictures, tables=tables)


def _plan_picture(plan: dict[str, Any], verified: list[dict[str, Any]]) -> Picture:
    first = plan["relative_error_one"]
    counts = np.geomspace(1, max(map(int, plan["predicted_error"])), 60)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        low, high = ((first["value"] + sign * 2 * first["error"]) / np.sqrt(counts) for sign in (-1, 1))
        axes.fill_between(counts, np.maximum(low, 1e-6), high, label="2 standard errors", **band_look("predicted band"))
        axes.plot(counts, first["value"] / np.sqrt(counts), label="predicted", **look("predicted"))
        measurements = [
            (int(row["quantity"].split("P = ")[1].split(",")[0]), row["measured"])
            for row in verified
            if "relative error at P = " in row["quantity"]
        ]
        if measurements:
            axes.plot(*zip(*measurements, strict=True), label="measured with real gradients", **look("test"))
        axes.set(xscale="log", yscale="log", xlabel="directions P", ylabel="relative error of one step")

    alt = f"Predicted relative error of one step against P: {first['value']:.3g} over the root of P."
    return draw(paint, "plan-error", title="Error of one step", alt=alt)


def _is_resolved(value: dict[str, float] | None) -> bool:
    """Return whether probes carry an estimate; older plans wrote what they do not carry as infinite."""
    return value is not None and math.isfinite(value["error"]) and value["error"] <= abs(value["value"])


def _estimate(value: dict[str, float] | None) -> str:
    return f"{value['value']:.3g} ± {value['error']:.1g}" if value is not None and _is_resolved(value) else "not known"


def _probes_needed(plan: dict[str, Any], name: str) -> str:
    count = plan.get("probes_needed", {}).get(name)
    return f"{count:,}" if count else f"{4 * plan['num_probes']:,}"


def _count(count: int | None) -> str:
    return f"{count:,}" if count is not None and count > 0 else "not known"


def read_kernel(record: dict[str, Any]) -> Page:
    """Return the page of ``kernel.json``."""
    rows, rho = record["rows"], record["rho"]
    first, last = rows[0], rows[-1]
    worst = max(abs(row["measured"] / row["predicted"] - 1) for row in rows)
    return Page(
        title="Zeroth-order against first-order kernel",
        kind="kernel",
        summary=[
            f"With {plural(first['P'], 'direction')} the kernel of zeroth-order training is "
            f"off by {first['measured']:.3g} times the exact kernel; with {last['P']:,} by {last['measured']:.3g}.",
            f"The exact formula predicts these errors from rho = {rho:.3g} alone; measured and predicted differ by at "
            f"most {worst:.0%}.",
        ],
        facts=[("rho", f"{rho:.4g}"), (f"error at P = {last['P']:,}", f"{last['measured']:.3g}")],
        sections=[
            Section(
                "Error and kernel",
                "error",
                pictures=[_kernel_curve(rows, rho), _heatmap(record["kernel"], record.get("outputs"))],
                tables=[table_of_rows("Relative error of the kernel", rows)],
            )
        ],
        command=record.get("command", ""),
    )


def _kernel_curve(rows: list[dict[str, float]], rho: float) -> Picture:
    column = {name: [row[name] for row in rows] for name in rows[0]}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.fill_between(column["P"], column["low"], column["high"], label="5-95% of draws", **band_look("all"))
        axes.plot(column["P"], column["measured"], label="measured (rms)", **look("validation"))
        axes.plot(column["P"], column["predicted"], label="exact rms", **look("predicted"))
        axes.plot(column["P"], column["jl_bound"], label="JL bound, corrected", **look("bound"))
        axes.set(xscale="log", yscale="log", xlabel="directions P", ylabel="relative Frobenius error")

    alt = f"Relative error of the zeroth-order kernel against P, measured and predicted, for rho = {rho:.3g}."
    return draw(paint, "kernel-curve", title="Error against P", alt=alt)


def _heatmap(kernel: list[Any], names: list[str] | None) -> Picture:
    matrix = np.array(kernel)
    while matrix.ndim > 2:
        matrix = matrix.reshape(matrix.shape[0] * matrix.shape[1], -1) if matrix.ndim == 4 else matrix[0]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        limit = float(np.abs(matrix).max())
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.grid(False)
        axes.set(xlabel="output of the updated input", ylabel="output of the observed input")
        if names and len(names) == len(matrix):
            axes.set_xticks(range(len(names)), names, rotation=45)
            axes.set_yticks(range(len(names)), names)
        figure.colorbar(image, label="kernel")

    alt = f"Heatmap of the exact first-order kernel, {matrix.shape[0]} by {matrix.shape[1]} outputs."
    return draw(paint, "kernel-heatmap", title="Exact kernel", alt=alt, size=(5.0, 4.0))


def read_evolve(record: dict[str, Any]) -> Page:
    """Return the page of ``evolution.json``."""
    stable, steps = record["stable"], record["steps_to_target"]
    summary = [
        f"{record['source']}: {plural(record['examples'], 'example')}, {plural(record['parameters'], 'parameter')}. "
        f"At learning rate {record['learning_rate']:.3g} with "
        f"{plural(record['num_perturbations'], record['distribution'] + ' direction')} per step, training is "
        f"{'stable' if stable else 'UNSTABLE: the expected loss diverges'}; the limit is "
        f"{record['stability_limit']:.3g} (gradient descent: {record['first_order_limit']:.3g}).",
        f"The loss {record['target_loss']:.3g} is not reached in expectation at this rate."
        if steps is None
        else f"The loss {record['target_loss']:.3g} is expected after {plural(steps, 'step')}: "
        f"{plural(record['queries_to_target'], 'loss evaluation')}.",
    ]
    losses = record["losses"]
    rows = [dict(zip(losses, values, strict=True)) for values in zip(*losses.values(), strict=True)]
    tables = [table_of_rows("Predicted loss", rows)]
    if record["per_query"]:
        tables.append(table_of_rows("Loss evaluations to the target, by directions per step", record["per_query"]))
    return Page(
        title="Predicted evolution under zeroth-order training",
        kind="evolve",
        summary=summary,
        facts=[
            ("learning rate", f"{record['learning_rate']:.3g}"),
            ("stability limit", f"{record['stability_limit']:.3g}"),
            ("steps to target", "not reached" if steps is None else number(steps)),
            ("best directions per step", str(record["best_num_perturbations"])),
        ],
        sections=[Section("Loss", "loss", pictures=[_evolution_picture(losses)], tables=tables)],
        command=record.get("command", ""),
    )


def _evolution_picture(losses: dict[str, list[float | None]]) -> Picture:
    column = {
        name: np.array([math.nan if value is None else value for value in values], dtype=float)
        for name, values in losses.items()
    }

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        steps = column["step"]
        band = band_look("predicted band")
        axes.fill_between(steps, column["band_low"], column["band_high"], label="about 90% of runs", **band)
        axes.plot(steps, column["expected_loss"], label="expected loss", **look("predicted"))
        axes.plot(steps, column["loss_of_mean_path"], label="loss of the mean path", **look("bound"))
        if "simulated_mean" in column:
            axes.errorbar(
                steps,
                column["simulated_mean"],
                2 * column["simulated_error"],
                label="mean of simulated runs",
                **look("test"),
            )
        axes.set(yscale="log", xlabel="step", ylabel="loss")
        axes.set_xscale("symlog", linthresh=1)

    first, last = column["expected_loss"][0], column["expected_loss"][-1]
    alt = f"Predicted expected loss from {first:.3g} at step 0 to {last:.3g} at step {column['step'][-1]:,.0f}."
    return draw(paint, "evolution", title="Predicted loss", alt=alt)
