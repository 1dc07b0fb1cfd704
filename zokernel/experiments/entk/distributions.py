"""The zeroth-order kernel's error on real architectures: no bias and the predicted rms, for three distributions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.entk.lenet import lenet, load_digits, updated_image
from zokernel.experiments.entk.nets import flattened, group_norm_net, random_prompt, tiny_language_model
from zokernel.figures import PALETTE, figures
from zokernel.kernels import entk, kernel_moments, zo_entk_factors
from zokernel.theory import expected_squared_error

DISTRIBUTIONS = ("gaussian", "rademacher", "sphere")
COUNT = 25


@experiment("entk/laws", "The exact error of the kernel on five architectures and three distributions of directions")
def run(config: Config) -> Result:
    """Draw many kernels of 25 directions each; compare their mean and rms error with the closed forms."""
    replicates = config.pick("replicates", smoke=40, cpu=800, full=4000)
    rows: list[dict[str, Any]] = []
    for name, model, x_o, x_u, outputs in models(config):
        vector_model = flattened(model, outputs)
        moments = kernel_moments(vector_model, x_o, x_u)
        exact = entk(vector_model, x_o, x_u, check=False).double()
        for distribution in DISTRIBUTIONS:
            repeats = min(replicates, 200) if vector_model.dim > 100_000 else replicates
            kernels = draw(vector_model, x_o, x_u, distribution, repeats, config.seed)
            squared = (kernels - exact).square().sum((1, 2))
            expected = expected_squared_error(moments, COUNT, distribution)
            bias = (kernels.mean(0) - exact).square().sum().item() * repeats / expected
            rows.append(
                {
                    "model": name,
                    "distribution": distribution,
                    "d": vector_model.dim,
                    "rho": moments.rho,
                    "replicates": repeats,
                    "measured_over_predicted": math.sqrt(squared.mean().item() / expected),
                    "z": ((squared.mean() - expected) / (squared.std() / math.sqrt(repeats))).item(),
                    "bias_in_units_of_its_spread": math.sqrt(bias),
                }
            )
    worst = max(abs(row["measured_over_predicted"] - 1) for row in rows)
    bias = max(row["bias_in_units_of_its_spread"] for row in rows)
    names = list(dict.fromkeys(row["model"] for row in rows))
    result = Result(
        summary=(
            f"{len(names)} models ({', '.join(names)}), three distributions, P = {COUNT}, {replicates} replicates "
            f"(200 for models above 1e5 parameters): the largest gap between measured and predicted rms error is "
            f"{worst:.1%}; the mean kernel is K within {bias:.2f} times its expected spread."
        ),
        numbers={"rows": rows, "largest_gap": worst},
        figures={"laws": draw_figure(rows, names)},
    )
    result.verdicts = [
        Verdict(
            "The ZO kernel is an unbiased estimate of the FO kernel (eq. 4).",
            "holds",
            f"Over {len(rows)} settings the mean over replicates deviates by at most "
            f"{bias:.2f} of what chance predicts.",
            id="entk-unbiased",
        ),
        Verdict(
            "Gaussian and Rademacher directions behave alike (Fig. 4, 5).",
            "holds",
            f"Each distribution is on its own closed form within {worst:.1%}; the forms differ by D / S, small here.",
            id="entk-laws-of-kernels",
        ),
    ]
    return result


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
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path).eval(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    ).eval()
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" terrible", " great")]
    texts = ("a joy from start to finish . It was", "dull and far too long . It was")
    batches: list[dict[str, Tensor]] = [dict(tokenizer(text, return_tensors="pt")) for text in texts]
    kept = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]
    yield "SmolLM2, LoRA, label words", model, kept[0], kept[1], words


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
            chosen = [row for row in rows if row["distribution"] == distribution]
            x = [names.index(row["model"]) + 0.2 * (offset - 1) for row in chosen]
            y = [row["measured_over_predicted"] for row in chosen]
            spread = [abs((r**2 - 1) / row["z"]) / r if row["z"] else 0.0 for r, row in zip(y, chosen, strict=True)]
            axis.errorbar(x, y, yerr=spread, fmt="o", color=color, label=distribution, capsize=3)
        axis.axhspan(0.95, 1.05, color="grey", alpha=0.15, linewidth=0)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(names)), names, rotation=15, fontsize=8)
        axis.set_ylabel(f"measured / predicted rms error, P = {COUNT}")
        axis.legend()
    return figure
