"""The zeroth-order kernel's error on real architectures: no bias and the predicted rms, for three distributions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.criteria import FAILS, HOLDS, OPEN, combined, largest_z_by_chance
from zokernel.experiments.entk.lenet import lenet, load_digits, updated_image
from zokernel.experiments.entk.nets import flattened, group_norm_net, random_prompt, tiny_language_model
from zokernel.figures import PALETTE, figures
from zokernel.kernels import entk, kernel_moments, zo_entk_factors
from zokernel.theory import KernelMoments, expected_squared_error, relative_error

DISTRIBUTIONS = ("gaussian", "rademacher", "sphere")
COUNT = 25


@experiment("entk/laws", "The exact error of the kernel on five architectures and three distributions of directions")
def run(config: Config) -> Result:
    """Draw many kernels of 25 directions each; compare their mean and rms error with the closed forms."""
    replicates = config.pick("replicates", smoke=40, cpu=2400, full=4000)
    draws = config.pick("chance_draws", smoke=5_000, cpu=200_000)
    rows: list[dict[str, Any]] = []
    for name, model, x_o, x_u, outputs in models(config):
        vector_model = flattened(model, outputs)
        moments = kernel_moments(vector_model, x_o, x_u)
        exact = entk(vector_model, x_o, x_u, check=False).double()
        repeats = min(replicates, 200) if vector_model.dim > 100_000 else replicates
        for distribution in DISTRIBUTIONS:
            kernels = draw(vector_model, x_o, x_u, distribution, repeats, config.seed)
            row = {"model": name, "distribution": distribution, "d": vector_model.dim, "rho": moments.rho}
            rows.append(row | compare_kernels(kernels, exact, moments, distribution, draws))
    worst = max(abs(row["measured_over_predicted"] - 1) for row in rows)
    bias = max(row["bias_in_units_of_its_spread"] for row in rows)
    names = list(dict.fromkeys(row["model"] for row in rows))
    coarsest = max(row["spread_of_the_mean"] for row in rows)
    return Result(
        summary=(
            f"{len(names)} models ({', '.join(names)}), three distributions, P = {COUNT}, {replicates} replicates "
            f"(200 for models above 1e5 parameters): the largest gap between measured and predicted rms error is "
            f"{worst:.1%}; the mean kernel is K within {bias:.2f} times its expected spread, which is "
            f"{coarsest:.1%} of K or less."
        ),
        numbers={"rows": rows, "largest_gap": worst, "largest_z": max(abs(row["z"]) for row in rows)},
        figures={"laws": draw_figure(rows, names)},
        verdicts=[judge_bias(rows), judge_distributions(rows)],
    )


def compare_kernels(
    kernels: Tensor, exact: Tensor, moments: KernelMoments, distribution: str, draws: int
) -> dict[str, Any]:
    """Return the error and the bias of sampled kernels beside the closed forms.

    Args:
        kernels: Independent kernels of ``COUNT`` directions, (R, V, V).
        exact: K, (V, V).
        moments: Moments of the pair.
        distribution: That of the directions.
        draws: Sums to sample for the probability of the bias.
    """
    repeats = len(kernels)
    squared = (kernels - exact).square().sum((1, 2))
    expected = expected_squared_error(moments, COUNT, distribution)
    bias = (kernels.mean(0) - exact).square().sum().item() * repeats / expected
    return {
        "replicates": repeats,
        "measured_over_predicted": math.sqrt(squared.mean().item() / expected),
        "z": ((squared.mean() - expected) / (squared.std() / math.sqrt(repeats))).item(),
        "bias_in_units_of_its_spread": math.sqrt(bias),
        "bias_by_chance": chance_of_bias(kernels, exact, draws),
        "spread_of_the_mean": math.sqrt(expected / repeats) / exact.norm().item(),
        "predicted_rms_error": relative_error(moments, COUNT, distribution),
    }


def judge_bias(rows: list[dict[str, Any]]) -> Verdict:
    """Judge unbiasedness: no mean kernel is farther from K than chance explains, at 5% over all settings."""
    least, bound = min(row["bias_by_chance"] for row in rows), 0.05 / len(rows)
    coarsest = max(row["spread_of_the_mean"] for row in rows)
    return Verdict(
        "The ZO kernel is an unbiased estimate of the FO kernel (eq. 4).",
        HOLDS if least > bound else FAILS,
        f"A deviation of the mean kernel as large as the largest of {len(rows)} settings has probability {least:.3f} "
        f"without bias (required: above {bound:.4f}); the means are exact to {coarsest:.1%} of K or better.",
        id="entk-unbiased",
    )


def judge_distributions(rows: list[dict[str, Any]]) -> Verdict:
    """Judge equal fidelity: errors on the closed forms (largest z), which differ by less than 5% in each model."""
    z, bound = max(abs(row["z"]) for row in rows), largest_z_by_chance(len(rows))
    predicted = {(row["model"], row["distribution"]): row["predicted_rms_error"] for row in rows}
    gaps = [abs(value / predicted[m, "rademacher"] - 1) for (m, d), value in predicted.items() if d == "gaussian"]
    verdict = combined(HOLDS if gap < 0.05 else FAILS for gap in gaps) if z < bound else OPEN
    return Verdict(
        "Gaussian and Rademacher directions behave alike (Fig. 4, 5).",
        verdict,
        f"The measured errors are on their closed forms (largest |z| of {len(rows)} {z:.2f}; by chance up to "
        f"{bound:.2f}), and the forms of Gaussian and Rademacher directions differ by {max(gaps):.2%} or less "
        "(required: 5%).",
        id="entk-laws-of-kernels",
    )


def chance_of_bias(kernels: Tensor, exact: Tensor, draws: int = 200_000) -> float:
    r"""Return the probability of a mean kernel as far from K, if it is unbiased.

    R times the squared distance is distributed as :math:`\sum_i \lambda_i \chi^2_1` with the eigenvalues of the
    covariance of the kernel's entries, which is sampled.  (One scaled chi-square has too light a tail.)

    Args:
        kernels: Independent kernels, (R, V, V).
        exact: K, (V, V).
        draws: How many sums to sample.

    Example:
        >>> kernels = torch.randn(400, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> biased = kernels + 0.5
        >>> chance_of_bias(kernels, torch.zeros(2, 2)) > 0.05 > chance_of_bias(biased, torch.zeros(2, 2))
        True
    """
    count = len(kernels)
    centred = (kernels - kernels.mean(0)).flatten(1)
    spectrum = torch.linalg.eigvalsh(centred.T @ centred / (count - 1))
    distance = count * (kernels.mean(0) - exact).square().sum()
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for part in torch.arange(draws).split(20_000):
        normals = torch.randn(len(part), len(spectrum), generator=generator, dtype=spectrum.dtype)
        hits += int((normals.square() @ spectrum >= distance).sum())
    return hits / draws


def models(config: Config):
    """Yield ``(name, model, x_o, x_u, outputs)``; SmolLM2 only beyond smoke scale."""
    digits = load_digits(config)
    x_o, x_u = digits.first_of_each()[9:], updated_image(digits, 4)
    yield "LeNet", lenet(config.seed), x_o, x_u, None
    yield "conv GroupNorm", group_norm_net(config.seed), x_o, x_u, None
    for name, kind in (("tiny GPT-2, tied", "gpt2"), ("tiny Llama", "llama")):
        yield name, tiny_language_model(kind, config.seed), random_prompt(1), random_prompt(2), [3, 7, 11]
    if config.scale == "smoke":
        return
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from zokernel.data import fetch

    path = fetch("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).eval()
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" terrible", " great")]
    texts = ("a joy from start to finish . It was", "dull and far too long . It was")
    batches: list[dict[str, Tensor]] = [dict(tokenizer(text, return_tensors="pt")) for text in texts]
    inputs = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]
    yield "SmolLM2, LoRA, label words", model, inputs[0], inputs[1], words


def draw(model, x_o, x_u, distribution: str, repeats: int, seed: int) -> Tensor:
    """Return ``repeats`` independent kernels of ``COUNT`` directions, (repeats, V, V)."""
    kernels = []
    per_call = max(1, min(repeats, 250_000_000 // (model.dim * COUNT)))
    for start in range(0, repeats, per_call):
        count = min(per_call, repeats - start)
        factors = zo_entk_factors(
            model,
            x_o,
            x_u,
            num_perturbations=count * COUNT,
            distribution=distribution,
            seed=seed,
            first=start * COUNT,
            method="jacobian",
            check=False,
        )
        left, right = (side.double().reshape(-1, count, COUNT) for side in (factors.left, factors.right))
        kernels.append(torch.einsum("vrp,wrp->rvw", left, right) / COUNT)
    return torch.cat(kernels)


def draw_figure(rows: list[dict[str, Any]], names: list[str]):
    """Draw measured over predicted rms error, with two standard errors."""
    with figures() as Figure:
        figure = Figure(layout="constrained")
        axis = figure.subplots()
        for offset, (distribution, color) in enumerate(zip(DISTRIBUTIONS, PALETTE, strict=False)):
            points = [row for row in rows if row["distribution"] == distribution]
            x = [names.index(row["model"]) + 0.2 * (offset - 1) for row in points]
            y = [row["measured_over_predicted"] for row in points]
            spread = [abs((r**2 - 1) / row["z"]) / r if row["z"] else 0.0 for r, row in zip(y, points, strict=True)]
            axis.errorbar(x, y, yerr=spread, fmt="o", color=color, label=distribution, capsize=3)
        axis.axhspan(0.95, 1.05, color="grey", alpha=0.15, linewidth=0)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(names)), names, rotation=15, fontsize=8)
        axis.set_ylabel(f"measured / predicted rms error, P = {COUNT}")
        axis.legend()
    return figure
