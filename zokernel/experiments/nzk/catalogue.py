"""The eleven experiments of the NZK paper's code, one row each: its problem, its kernels, its sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from zokernel.dynamics.drift import DriftRow, kernel_drift
from zokernel.errors import RunError
from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.nzk import figures, verdicts
from zokernel.experiments.nzk.problems import (
    Problem,
    image_network_problem,
    linear_problem,
    projected_image_problem,
    stand_in_images,
    synthetic_network_problem,
)
from zokernel.experiments.nzk.record import attainment, numbers
from zokernel.experiments.nzk.study import Size, Study, Variant, study

SMOKE_FIGURES = ("losses",)  # drawing takes longer than everything else at that scale
SHARED = Variant("NZK, shared Gaussian")


@dataclass(frozen=True)
class Entry:
    """One experiment.

    Attributes:
        title: The figure or notebook that it reproduces.
        problem: Builds the data and the model for a configuration.
        variants: Its kernels.
        best_of: Directions of the biased best-of baseline; 0 leaves it out.
        draws_problem: Whether the figures that no kernel changes are drawn; nzk/mixture has those of its problem.
    """

    title: str
    problem: Callable[[Config], Problem]
    variants: tuple[Variant, ...] = (SHARED,)
    best_of: int = 0
    draws_problem: bool = True


def _linear(config: Config, *, dim: int, noise: float, steps: int = 16_000) -> Problem:
    return linear_problem(dim, noise, steps=steps, seed=config.seed)


def _synthetic_network(config: Config) -> Problem:
    return synthetic_network_problem(examples=config.pick("examples", smoke=30, cpu=150), seed=config.seed + 1)


def _images(config: Config, *, source: str, classes: tuple[int, int], projected: bool = False) -> Problem:
    per_class = config.pick("per_class", smoke=15, cpu=100)
    remarks: tuple[str, ...] = ()
    if config.scale == "smoke":
        images, labels = stand_in_images(
            {"mnist": 28, "cifar": 32, "tiny_imagenet": 64}[source], 40, classes, config.seed
        )
        remarks = ("Made-up images of the same shape stand in for the data at smoke scale.",)
    else:
        images, labels = _load(source, classes)
        if source == "cifar":
            remarks = ("CIFAR-10 test images stand in for the training images.",)
    build = projected_image_problem if projected else image_network_problem
    problem = build(images, labels, per_class=per_class, seed=config.seed)
    return replace(problem, remarks=remarks)


def _load(source: str, classes: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    if source == "mnist":
        from zokernel.data import load_mnist

        images, labels, _, _ = load_mnist()
        keep = np.isin(labels, classes)
        return images[keep], labels[keep]
    if source == "cifar":
        from zokernel.data.cifar import load_cifar10_test

        return load_cifar10_test(classes)
    from zokernel.data.tiny_imagenet import load_tiny_imagenet

    return load_tiny_imagenet(classes)


ENTRIES: dict[str, Entry] = {
    "nzk/linear_d2": Entry("linear regression, d = 2 (notebook degree2)", partial(_linear, dim=2, noise=1 / 20)),
    "nzk/linear_d30": Entry(
        "linear regression, d = 30, no noise (notebook degree50, which runs 30)",
        partial(_linear, dim=30, noise=0.0, steps=8_000),
    ),
    "nzk/mixture": Entry(
        "two independent vectors, three deviations of z (notebook degree2_mixture)",
        partial(_linear, dim=2, noise=1 / 50),
        tuple(
            Variant(f"independent, deviation {s}", f"gaussian({s})", "independent", "gaussian") for s in (1.0, 0.5, 1.5)
        ),
    ),
    "nzk/deviations": Entry(
        "one shared vector, three deviations (notebook variance; the numbers are standard deviations)",
        partial(_linear, dim=2, noise=1 / 50),
        tuple(Variant(f"shared, deviation {s}", f"gaussian({s})") for s in (1.0, 0.5, 1.5)),
        draws_problem=False,
    ),
    "nzk/laws": Entry(
        "one shared vector, five distributions (notebook distribution)",
        partial(_linear, dim=2, noise=1 / 50),
        (
            Variant("Gaussian", "gaussian"),
            Variant("Student t, 10", "student_t(10)"),
            Variant("Laplace 0.5", "laplace(0.5)"),
            Variant("Student t, 1000", "student_t(1000)"),
            Variant("Laplace 0.605", "laplace(0.605)"),
        ),
        draws_problem=False,
    ),
    "nzk/ffn_synthetic": Entry("linearised 2-5-5-1 network, synthetic teacher (notebook FFN)", _synthetic_network),
    "nzk/mnist": Entry(
        "linearised 64-10-5-1 network, MNIST 3 vs 5", partial(_images, source="mnist", classes=(3, 5)), best_of=10
    ),
    "nzk/linear_mnist_01": Entry(
        "linear model on projected MNIST, 0 vs 1", partial(_images, source="mnist", classes=(0, 1), projected=True)
    ),
    "nzk/cifar": Entry(
        "linearised 64-10-5-1 network, CIFAR-10 2 vs 9", partial(_images, source="cifar", classes=(2, 9)), best_of=10
    ),
    "nzk/linear_mnist_35": Entry(
        "linear model on projected MNIST, 3 vs 5 (published in the CIFAR folder)",
        partial(_images, source="mnist", classes=(3, 5), projected=True),
    ),
    "nzk/tiny_imagenet": Entry(
        "linearised 64-10-5-1 network, Tiny ImageNet 2 vs 9",
        partial(_images, source="tiny_imagenet", classes=(2, 9)),
        best_of=10,
    ),
}


def run(config: Config, *, entry: Entry) -> Result:
    """Run one experiment: compute, draw, judge.

    Args:
        config: Scale and seed.
        entry: The experiment.

    Returns:
        The result; verdict "not run here" when only Tiny ImageNet's data cannot be reached.
    """
    try:
        problem = entry.problem(config)
    except RunError as error:
        if "Tiny ImageNet" not in entry.title:
            raise
        return _not_run(error)
    size = _size(config, problem, best_of=entry.best_of)
    result = study(problem, list(entry.variants), size, config.seed)
    drift = _drift(problem, config)
    record = numbers(result)
    if drift:
        record["drift"] = [asdict(row) for row in drift]
    return Result(
        summary=_summary(result, drift),
        numbers=record,
        arrays=_arrays(result),
        figures=figures.draw(result, stems=_stems(config, entry)),
        verdicts=[
            verdicts.constancy(
                result.check,
                {name: result.fourth_moment[name] for name in ("rademacher", "laplace")},
                len(problem.y),
                drift,
            ),
            verdicts.acceleration(result),
            *([verdicts.attainability(attainment(result))] if result.stated else []),
        ],
    )


def _not_run(error: RunError) -> Result:
    """Return the result of an experiment whose data cannot be reached."""
    claims = {
        verdicts.CONSTANT_ID: verdicts.CONSTANT,
        verdicts.FASTER_ID: verdicts.FASTER,
        verdicts.ATTAINED_ID: verdicts.ATTAINED,
    }
    return Result(
        f"Not run here. {error}",
        verdicts=[Verdict(claim, "not run here", str(error), id=name) for name, claim in claims.items()],
    )


def _size(config: Config, problem: Problem, *, best_of: int) -> Size:
    return Size(
        nzk_samples=config.pick("nzk_samples", smoke=2_000, cpu=10_000),
        runs=config.pick("runs", smoke=50, cpu=200),
        process_steps=min(problem.steps, config.pick("process_steps", smoke=50, cpu=1_000)),
        baseline_steps=min(problem.steps, config.pick("baseline_steps", smoke=100, cpu=16_000)),
        check_runs=config.pick("check_runs", smoke=300, cpu=4_000),
        best_of=best_of,
        stated_steps=config.pick("stated_steps", smoke=50, cpu=16_000),
    )


def _arrays(result: Study) -> dict[str, np.ndarray]:
    arrays = {"steps": np.array(result.steps), "ntk": result.problem.kernel.numpy()}
    for number, curve in enumerate(result.curves):
        arrays[f"loss_{number}"] = curve.losses.numpy()
        arrays[f"predictions_{number}"] = curve.predictions.numpy()
        if curve.sampled is not None:
            arrays[f"nzk_{number}"] = curve.sampled.mean.numpy()
    return arrays


def _stems(config: Config, entry: Entry) -> tuple[str, ...]:
    """Return which figures an experiment draws."""
    if config.scale == "smoke":
        return SMOKE_FIGURES
    return tuple(stem for stem in figures.STEMS if entry.draws_problem or stem not in figures.OF_THE_PROBLEM)


def _drift(problem: Problem, config: Config) -> list[DriftRow]:
    if problem.network is None:
        return []
    last = config.pick("drift_steps", smoke=50, cpu=2_000)
    return kernel_drift(problem.network, problem.inputs, problem.y, 0.1, sorted({0, last // 20, last // 4, last}))


def _summary(result: Study, drift: list[DriftRow]) -> str:
    first, main = result.curves[0], result.curves[1]
    assert result.baseline is not None
    sentences = [
        *result.problem.remarks,
        f"Final losses at learning rate {result.problem.lr:g}: gradient descent {float(first.losses[-1]):.4g}, "
        f"{main.label} {float(main.losses[-1]):.4g} (floor {result.floor:.3g}).",
        f"The second curve is the first with time multiplied by {main.factor:.4g} (largest difference "
        f"{100 * main.collapse:.2g}%).",
        f"Corrected ZO-SGD ends at {float(result.baseline.losses[-1].mean()):.4g} after "
        f"{int(result.baseline.steps[-1]):,} steps; the public baseline cannot go below {result.line_minimum:.4g}.",
    ]
    if drift:
        change = 100 * drift[-1].relative_change
        sentences.append(f"The real network's kernel moves by {change:.1f}% in {drift[-1].step:,} gradient steps.")
    return " ".join(sentences)


for _name, _entry in ENTRIES.items():
    experiment(_name, _entry.title)(partial(run, entry=_entry))
