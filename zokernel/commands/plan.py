"""Plan a zeroth-order run from forward passes only: perturbations, eps, learning rate and batch size.

zokernel plan --dataset_name movie-reviews
zokernel plan --train_file train.tsv --template "{sentence} It was" --label_words terrible great
zokernel plan --train_file train.tsv --verify true     # then measure all of it with real gradients
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zokernel.commands.messages import quiet_transformers
from zokernel.commands.parser import add_dataclasses, read_dataclasses
from zokernel.errors import UsageError
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.kernels.plan import Plan, make_plan
from zokernel.kernels.prober import ProbedTask

logger = logging.getLogger(__name__)


@dataclass
class PlanArguments:
    """What to probe and what to print."""

    num_probes: int = field(default=64, metadata={"help": "Random directions; each costs two forward passes."})
    update_examples: int = field(default=8, metadata={"help": "Examples in the batch a step is taken on."})
    observe_examples: int = field(default=4, metadata={"help": "Held-out examples whose beliefs are predicted."})
    eps: float = field(default=1e-3, metadata={"help": "Perturbation size of the probes."})
    distribution: str = field(default="rademacher", metadata={"help": "Distribution of the directions."})
    num_perturbations: list[int] = field(
        default_factory=lambda: [1, 10, 100], metadata={"help": "Values of P to predict for."}
    )
    tolerances: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 1.0], metadata={"help": "Relative errors to reach."}
    )
    verify: bool = field(default=False, metadata={"help": "Also measure everything with real gradients."})
    verify_draws: int = field(default=200, metadata={"help": "Fresh directions for the measured errors."})
    precision: str = field(
        default="auto", metadata={"help": "Forwards as training would run them: fp32, bf16 (autocast), or auto."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the examples and directions."})
    output_file: str | None = field(default=None, metadata={"help": "Write the numbers to this .json file."})


GROUPS = (ModelArguments, DataArguments, PlanArguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of model and data, as ``zokernel finetune`` has them, and those of the plan."""
    add_dataclasses(parser, *GROUPS)


def main(args: argparse.Namespace) -> int:
    """Probe, print the plan and, if asked for, write it."""
    quiet_transformers()
    model_arguments, data_arguments, arguments = read_dataclasses(args, *GROUPS)
    if arguments.update_examples < 2 or arguments.observe_examples < 1:
        raise UsageError("A plan needs --update_examples of at least 2 and --observe_examples of at least 1.")
    task, exact = load_task(model_arguments, data_arguments, arguments)
    start = time.perf_counter()
    plan = make_plan(
        task,
        num_probes=arguments.num_probes,
        eps=arguments.eps,
        distribution=arguments.distribution,
        seed=arguments.seed,
        counts=arguments.num_perturbations,
        tolerances=arguments.tolerances,
    )
    seconds = time.perf_counter() - start
    print(describe(plan, task, seconds))
    record: dict[str, Any] = {"plan": plan.as_dict(), "seconds": round(seconds, 2)}
    record["command"] = args.command_line
    if arguments.verify:
        from zokernel.kernels.plan_verify import table, verify

        start = time.perf_counter()
        comparisons = verify(
            exact,
            plan,
            as_trained=task,
            distribution=arguments.distribution,
            seed=arguments.seed,
            num_draws=arguments.verify_draws,
        )
        print(f"\nAgainst real gradients ({time.perf_counter() - start:.0f} s):\n{table(comparisons)}")
        record["verify"] = [asdict(c) | {"ratio": c.ratio} for c in comparisons]
    if arguments.output_file:
        path = Path(arguments.output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"\nWritten to {path}.")
    return 0


def load_task(model_arguments: Any, data_arguments: Any, arguments: PlanArguments) -> tuple[ProbedTask, ProbedTask]:
    """Load model and examples as the fine-tuning job does, and batch the examples that the plan needs.

    Args:
        model_arguments: Which model.
        data_arguments: Which examples and how they are phrased.
        arguments: How many of them, and in which precision.

    Returns:
        The task in the precision of training, and the same task without autocast (for gradients).

    Raises:
        UsageError: If there are too few examples, or a flag is wrong.
    """
    from zokernel.finetune.data.datasets import load_splits
    from zokernel.finetune.data.datasets import load_task as load_prompt_task
    from zokernel.finetune.models.kind import fills_masks
    from zokernel.finetune.models.load import load_model
    from zokernel.finetune.scoring.options import Collator, EncodedDataset, option_scores
    from zokernel.finetune.settings.config import ZOConfig
    from zokernel.finetune.tasks import encode

    prompt = load_prompt_task(data_arguments)
    if prompt.kind != "classification":
        raise UsageError(f"A plan is made for classification, not for a {prompt.kind} task: choose another --task.")
    splits = load_splits(data_arguments, prompt, seed=arguments.seed)
    rows = splits.train[: arguments.update_examples] + splits.validation[: arguments.observe_examples]
    if len(rows) < arguments.update_examples + arguments.observe_examples:
        raise UsageError("There are fewer examples than the plan needs: lower --update_examples or --observe_examples.")
    config = ZOConfig(
        output_dir="runs/plan",
        perturb="in_place:copy",
        use_cpu=not torch.cuda.is_available(),
        precision=arguments.precision,
    )
    model, tokenizer = load_model(model_arguments, config)
    encoded = encode(prompt, rows, tokenizer, masked=fills_masks(model), max_length=data_arguments.max_length or 2048)
    dataset = EncodedDataset(encoded)
    batch = Collator(tokenizer.pad_token_id)([dataset[n] for n in range(len(dataset))])
    exact = ProbedTask(
        params={name: p for name, p in model.named_parameters() if p.requires_grad},
        score=lambda inputs: option_scores(model, inputs),
        batch=batch,
        labels=batch["labels"],
        num_update=arguments.update_examples,
        num_tokens=int(batch["attention_mask"].sum()),
    )

    def score_as_trained(inputs: Any) -> torch.Tensor:
        device = inputs["input_ids"].device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bool(config.bf16), cache_enabled=False):
            return option_scores(model, inputs)

    return replace(exact, score=score_as_trained), exact


def describe(plan: Plan, task: ProbedTask, seconds: float) -> str:
    """Return the plan in words and a small table."""
    lines = [
        f"Probed {plan.num_probes} directions of {plan.num_parameters:,} parameters: {plan.forwards} forward passes, "
        f"{plan.tokens:,} tokens, {seconds:.0f} s; no gradient. Loss {plan.loss:.4f}.",
        "",
        f"  similarity rho                  {plan.rho}",
        f"  relative error of one step      {plan.relative_error_one} / sqrt(P)",
        f"  gradient norm                   {plan.gradient_norm}",
        f"  batch size (noise scale)        {plan.noise_scale}",
        f"  trace of the Hessian            {plan.trace_hessian}",
        f"  trace of the Fisher matrix      {plan.trace_fisher}",
        f"  curvature ratio r               {plan.curvature_ratio}",
        f"  loss noise, third derivative    {plan.loss_noise:.2g}, {plan.third_derivative}",
        f"  best eps                        {plan.eps}  (probed {plan.eps_probed:g}; there a projected gradient is "
        f"off by {100 * plan.finite_difference_error:.2g}%)",
        "",
        f"  {'P':>6}  {'relative error':>18}  {'eta_zo/eta_fo':>18}  {'best eta_zo':>18}  {'forwards per step':>17}  "
        f"{'tokens per step':>13}",
    ]
    for count, error in plan.predicted_error.items():
        ratio, rate = plan.learning_rate_ratio[count], plan.learning_rate[count]
        lines.append(
            f"  {count:>6}  {error!s:>18}  {ratio!s:>18}  {rate!s:>18}  {2 * count:>17}  "
            f"{2 * count * task.num_tokens * task.num_update // len(task.labels):>13,}"
        )
    lines.append("")
    lines += [
        f"  P = {count} for a relative error of {tolerance:g}" if count > 0 else "  P is not resolved by these probes"
        for tolerance, count in plan.required.items()
    ]
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join(lines)
