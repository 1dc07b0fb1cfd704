"""Plan a zeroth-order run from forward passes only: perturbations, eps, learning rate and batch size.

zokernel plan --dataset_name movie-reviews
zokernel plan --train_file train.tsv --template "{sentence} It was" --label_words terrible great
zokernel plan --train_file train.tsv --verify true     # then measure all of it with real gradients
zokernel plan --memory true --model_name_or_path gpt2  # memory of each way; nothing is loaded
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zokernel.commands.messages import quiet_transformers
from zokernel.commands.parser import add_dataclasses, read_dataclasses
from zokernel.errors import UsageError
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.kernels.plan import FROM_CURVATURE_PROBES, STEP_BATCHES, Plan, make_plan, plain
from zokernel.kernels.prober import ProbedTask
from zokernel.kernels.probes import Measurement

logger = logging.getLogger(__name__)

EPS = {"LoRA": 1e-2, "others": 1e-3}  # the defaults of training


@dataclass
class PlanArguments:
    """What to probe and what to print."""

    memory: bool = field(
        default=False,
        metadata={
            "help": "Only print what each way to hold the weights takes (in memory, quantized, streamed), from its "
            "configuration, for batches of --update_examples rows."
        },
    )
    tokens: int = field(default=128, metadata={"help": "Tokens of a row that --memory counts with."})
    new_tokens: int = field(
        default=0, metadata={"help": "Tokens written after each row that --memory counts with (answers, rewards)."}
    )
    num_probes: int = field(default=64, metadata={"help": "Random directions; each costs two forward passes."})
    curvature_probes: int = field(
        default=8,
        metadata={
            "help": "Directions for second and third derivatives, and random walks that say how far noise may take the "
            "weights; each costs about twelve forward passes."
        },
    )
    max_steps: int = field(default=1000, metadata={"help": "Steps of the run that the learning rate is for."})
    update_examples: int = field(
        default=16, metadata={"help": "Examples in the batch a step is taken on: the batch of the run."}
    )
    observe_examples: int = field(default=4, metadata={"help": "Held-out examples whose beliefs are predicted."})
    eps: float | None = field(
        default=None, metadata={"help": "Perturbation size of the probes (default: that of training, 1e-3; LoRA 1e-2)."}
    )
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
    for name in ("max_steps", "curvature_probes"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(arguments, name)}.")
    if arguments.eps is not None and not arguments.eps > 0:
        raise UsageError(f"--eps must be above 0, not {arguments.eps:g}.")
    if arguments.memory:
        from zokernel.finetune.models.needed import needed, read_configuration

        rows, tokens = arguments.update_examples, data_arguments.max_length or arguments.tokens
        losses = 2 * min(arguments.num_perturbations)
        print(needed(*read_configuration(model_arguments), losses, rows, tokens, arguments.new_tokens))
        return 0
    start = time.perf_counter()
    found = plan_for(model_arguments, data_arguments, arguments)
    plan, task = found.plan, found.task
    seconds = time.perf_counter() - start
    print(describe(plan, task, seconds))
    record: dict[str, Any] = {"plan": plan.as_dict(), "seconds": round(seconds, 2)}
    record["command"] = args.command_line
    if arguments.verify:
        from zokernel.kernels.plan_verify import table, verify

        start = time.perf_counter()
        comparisons = verify(
            found.exact,
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
        path.write_text(json.dumps(plain(record), indent=2, allow_nan=False) + "\n")
        print(f"\nWritten to {path}.")
    return 0


@dataclass(frozen=True)
class Planned:
    """A plan, its task in the precision of training, and the same task without autocast (for gradients)."""

    plan: Plan
    task: ProbedTask
    exact: ProbedTask


def plan_for(model_arguments: ModelArguments, data_arguments: DataArguments, arguments: PlanArguments) -> Planned:
    """Load model and examples, and make the plan.

    Args:
        model_arguments: Which model.
        data_arguments: Which examples and how they are phrased.
        arguments: What to probe.

    Raises:
        UsageError: If there are too few examples or probes, or a flag is wrong.
        RunError: If a score is not finite.
    """
    task, exact = load_task(model_arguments, data_arguments, arguments)
    lora = model_arguments.lora or model_arguments.adapter_name_or_path is not None
    plan = make_plan(
        task,
        num_probes=arguments.num_probes,
        eps=arguments.eps or EPS["LoRA" if lora else "others"],
        distribution=arguments.distribution,
        seed=arguments.seed,
        counts=arguments.num_perturbations,
        tolerances=arguments.tolerances,
        num_steps=arguments.max_steps,
        curvature_probes=arguments.curvature_probes,
    )
    return Planned(plan, task, exact)


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
    from transformers import set_seed

    from zokernel.finetune.data.datasets import load_splits
    from zokernel.finetune.data.datasets import load_task as load_prompt_task
    from zokernel.finetune.models.kind import fills_masks, kind_of_model
    from zokernel.finetune.models.load import load_model
    from zokernel.finetune.scoring.options import Collator, EncodedDataset, option_scores
    from zokernel.finetune.settings.config import ZOConfig
    from zokernel.finetune.tasks import encode
    from zokernel.finetune.tasks.seq2seq import decoder_of

    if model_arguments.offload or model_arguments.offload_dir:
        raise UsageError("A plan holds all weights in memory: leave out --offload and --offload_dir.")
    prompt = load_prompt_task(data_arguments)
    if prompt.kind != "classification":
        raise UsageError(f"A plan is made for classification{_instead(prompt, data_arguments)}.")
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
    set_seed(arguments.seed)  # of a new adapter's weights
    model, tokenizer = load_model(model_arguments, config)
    decoder = decoder_of(model, tokenizer) if kind_of_model(model) == "seq2seq" else None
    length = data_arguments.max_length or 2048
    encoded = encode(prompt, rows, tokenizer, masked=fills_masks(model), decoder=decoder, max_length=length)
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


def _instead(task: Any, data: Any) -> str:
    """Return what the data are instead of a classification, and which flags make them one."""
    if task.kind == "text" and not (data.task or data.task_file):
        from zokernel.finetune.tasks.text import needed

        columns = " and ".join(map(repr, needed(task.form)))
        return f", and these rows have {columns}, to be learned as text: say --template and --label_words"
    flag = "task" if data.task else "task_file" if data.task_file else "dataset_name"
    return f", not for a {task.kind} task: choose another --{flag}"


def describe(plan: Plan, task: ProbedTask, seconds: float) -> str:
    """Return the plan in words and a small table."""
    shown = {name: said(plan, name) for name, value in vars(plan).items() if isinstance(value, Measurement)}
    lines = [
        f"Probed {plan.num_probes} directions of {plan.num_parameters:,} parameters: {plan.forwards} forward passes, "
        f"{plan.tokens:,} tokens, {seconds:.0f} s; no gradient. Loss {plan.loss:.4f}.",
        "",
        f"  similarity rho                  {shown['rho']}",
        f"  relative error of one step      {shown['relative_error_one']}"
        f"{' / sqrt(P)' if plan.relative_error_one.known else ''}",
        f"  gradient norm                   {shown['gradient_norm']}",
        f"  batch where noise equals signal {shown['noise_scale']}",
        f"  trace of the Hessian            {shown['trace_hessian']}",
        f"  trace of the Fisher matrix      {shown['trace_fisher']}",
        f"  curvature ratio r               {shown['curvature_ratio']}",
        f"  rounding noise of the loss      {plan.loss_noise:.2g}",
        f"  third derivative                {shown['third_derivative']}",
        f"  best eps                        {best_eps(plan)}",
        f"  distance where slopes double    {shown['reach']}",
        "",
        f"  {'P':>6}  {'relative error':>18}  {'rate / gradient':>18}  {'best for one step':>18}  "
        f"{f'for {plan.num_steps:,} steps':>18}  {'forwards per step':>17}  {'tokens per step':>15}",
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
    found = plan.best_step(batch_size)
    if found is None:
        return f"The best step at batch {batch_size} is not known: it needs the noise scale and the curvature ratio."
    each = "per example" if found.scheme == "per_example" else "for the batch"
    sides = "one-sided" if found.one_sided else "two-sided"
    return (
        f"Most decrease per forward at batch {batch_size}: {found.num_perturbations} directions {each}, {sides}, "
        f"{found.forwards} forwards per step; predicted {found.gain:.1f} times MeZO's."
    )


def said(plan: Plan, name: str) -> str:
    """Return a quantity with its standard error, or how many probes would carry it."""
    value, used = getattr(plan, name), plan.probes_used(name)
    if name == "reach" and math.isinf(value.value):
        return "they do not"
    if value.known:
        return str(value)
    return f"not known from {probes(name, used)}; {more_probes(name, value.probes_needed(used))}"


def probes(name: str, count: int) -> str:
    """Return so many of the probes that a quantity comes from, in words."""
    kind = "curvature probe" if name in FROM_CURVATURE_PROBES else "probe"
    return f"{count:,} {kind}{'' if count == 1 else 's'}"


def more_probes(name: str, needed: int) -> str:
    """Return how many probes a quantity would need, and the flag that sets their number."""
    flag = "curvature_probes" if name in FROM_CURVATURE_PROBES else "num_probes"
    return f"about {needed:,} would be needed (--{flag} {needed})"


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
        walks = math.isfinite(plan.reach.value) and not plan.reach.known
        name, told = ("reach", "how far noise may take the weights") if walks else ("curvature_ratio", "the curvature")
        used = plan.probes_used(name)
        needed = (plan.reach if walks else rate).probes_needed(used)
        return (
            f"No learning rate is advised: {told} is not known from {probes(name, used)}; {more_probes(name, needed)}."
        )
    return (
        f"For a run of {plan.num_steps:,} steps: --method mezo --num_perturbations {count} "
        f"--per_device_train_batch_size {batch} --eps {plan.eps_probed:g} --learning_rate {rate.value:.1e}, kept "
        "constant. The best rate for one step is no rate for a run: most of a step is noise, which adds up, and slopes "
        "grow along the way."
    )
