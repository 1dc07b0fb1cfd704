"""Plan a zeroth-order run from forward passes only: perturbations, eps, learning rate and batch size.

zokernel plan --dataset_name movie-reviews
zokernel plan --train_file train.tsv --template "{sentence} It was" --label_words terrible great
zokernel plan --train_file train.tsv --verify true     # then measure all of it with real gradients
zokernel plan --memory true --model_name_or_path gpt2  # memory of each setup; nothing is loaded
"""

from __future__ import annotations

import argparse
import logging
import random
import shlex
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zokernel.commands.messages import quiet_transformers
from zokernel.commands.parser import add_dataclasses, read_dataclasses
from zokernel.commands.plan_text import describe
from zokernel.errors import UsageError
from zokernel.files import check_output_file, write_json
from zokernel.finetune.models.revision import with_revision
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.settings.resolve import LORA_EPS, PLAIN_EPS, setting_sources
from zokernel.kernels.plan import FEWEST_PROBES, make_plan
from zokernel.kernels.plan_record import Plan, plain
from zokernel.kernels.prober import ProbedTask, StepBatch

logger = logging.getLogger(__name__)

# The flags that plan --memory counts with, and those of every command.
MEMORY_FLAGS = (
    *("memory", "model_name_or_path", "model_revision", "dtype", "lm_type", "gguf_file", "trust_remote_code"),
    *("lora", "prefix_tuning", "prompt_tuning", "adapter_name_or_path"),
    *("update_examples", "num_perturbations", "tokens", "max_length", "new_tokens", "config", "debug"),
)


@dataclass
class PlanArguments:
    """What to probe and what to print."""

    memory: bool = field(
        default=False,
        metadata={
            "help": "only print how much memory each way to hold the weights needs (in memory, quantized, streamed), "
            "from the model's configuration, for batches of --update_examples rows"
        },
    )
    tokens: int = field(default=128, metadata={"help": "tokens per row that --memory assumes"})
    new_tokens: int = field(
        default=0, metadata={"help": "tokens written after each row that --memory assumes (answers, rewards)"}
    )
    num_probes: int = field(
        default=64,
        metadata={
            "help": "random directions, and random walks that show how far noise may take the weights; each costs two "
            "forward passes, and about ten in a batch of its own"
        },
    )
    curvature_probes: int = field(
        default=8,
        metadata={"help": "directions for second and third derivatives; each costs four forward passes"},
    )
    max_steps: int = field(default=1000, metadata={"help": "steps of the run that the learning rate is for"})
    update_examples: int = field(default=16, metadata={"help": "examples per step: the batch size of the run"})
    observe_examples: int = field(default=4, metadata={"help": "held-out examples whose beliefs are predicted"})
    eps: float | None = field(
        default=None,
        metadata={"help": "perturbation size of the probes (default: that of training: 1e-3, or 1e-2 with LoRA)"},
    )
    distribution: str = field(default="rademacher", metadata={"help": "distribution of the directions"})
    num_perturbations: list[int] = field(
        default_factory=lambda: [1, 10, 100], metadata={"help": "values of P to predict for"}
    )
    tolerances: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 1.0], metadata={"help": "relative errors to reach"}
    )
    verify: bool = field(default=False, metadata={"help": "also measure everything with real gradients"})
    verify_draws: int = field(default=200, metadata={"help": "fresh directions for the measured errors"})
    precision: str = field(
        default="auto",
        metadata={"help": "precision of the forward passes, as in training: fp32, bf16 (autocast), or auto"},
    )
    seed: int = field(default=42, metadata={"help": "seed of the examples and directions, as in training"})
    output_file: str | None = field(default=None, metadata={"help": "write the numbers to this .json file"})


GROUPS = (ModelArguments, DataArguments, PlanArguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of model and data, as ``zokernel finetune`` has them, and those of the plan."""
    add_dataclasses(parser, *GROUPS)


def main(args: argparse.Namespace) -> int:
    """Probe, print the plan and, if asked for, write it."""
    quiet_transformers()
    model_arguments, data_arguments, arguments = read_dataclasses(args, *GROUPS)
    _check_numbers(arguments)
    explicit = setting_sources(None, shlex.split(args.command_line)[1:])
    revision = model_arguments.model_revision if "model_revision" in explicit else None
    model_arguments = with_revision(model_arguments, revision)
    if arguments.memory:
        print(_memory(model_arguments, data_arguments, arguments, explicit))
        return 0
    if arguments.output_file:
        if Path(arguments.output_file).suffix.lower() != ".json":
            raise UsageError(f"--output_file {arguments.output_file} is read again as .json: give it that ending.")
        check_output_file(Path(arguments.output_file))
    start = time.perf_counter()
    planned = plan_for(model_arguments, data_arguments, arguments)
    plan, task = planned.plan, planned.task
    seconds = time.perf_counter() - start
    print(describe(plan, task, seconds))
    record: dict[str, Any] = {"plan": plan.as_dict(), "seconds": round(seconds, 2)}
    record["command"] = args.command_line
    if arguments.verify:
        from zokernel.kernels.plan_verify import table, verify

        start = time.perf_counter()
        comparisons = verify(
            planned.exact,
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
        write_json(path, plain(record))
        print(f"\nWritten to {path}.")
    return 0


def _check_numbers(arguments: PlanArguments) -> None:
    """Refuse numbers that no plan can work with, before anything is read."""
    if not arguments.memory and (arguments.update_examples < 2 or arguments.observe_examples < 1):
        raise UsageError("A plan needs --update_examples of at least 2 and --observe_examples of at least 1.")
    one_or_more = ("update_examples", "max_steps", "curvature_probes", "verify_draws", "tokens")
    counts = {name: [getattr(arguments, name)] for name in one_or_more}
    for name, values in (counts | {"num_perturbations": arguments.num_perturbations}).items():
        if min(values) < 1:
            raise UsageError(f"--{name} must be at least 1, not {min(values)}.")
    if not arguments.memory and arguments.num_probes < FEWEST_PROBES:
        raise UsageError(f"--num_probes must be at least {FEWEST_PROBES}, not {arguments.num_probes}.")
    for name, sizes in (("eps", [arguments.eps]), ("tolerances", arguments.tolerances)):
        for size in sizes:
            if size is not None and not size > 0:
                raise UsageError(f"--{name} must be above 0, not {size:g}.")


def _memory(
    model_arguments: ModelArguments, data_arguments: DataArguments, arguments: PlanArguments, explicit: Collection[str]
) -> str:
    """Return what each way to hold the weights takes, as text.

    Raises:
        UsageError: If there is no such model, or a flag has no effect on the table.
    """
    from zokernel.finetune.models.memory_report import describe_setups, read_configuration

    if unused := [f"--{name}" for name in explicit if name not in MEMORY_FLAGS]:
        raise UsageError(
            f"plan --memory shows every way to hold the weights, before any data are read, and {' and '.join(unused)} "
            f"would change nothing: leave {'it' if len(unused) == 1 else 'them'} out."
        )
    rows, tokens = arguments.update_examples, data_arguments.max_length or arguments.tokens
    losses = 2 * min(arguments.num_perturbations)
    return describe_setups(read_configuration(model_arguments), losses, rows, tokens, arguments.new_tokens)


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
    lora = any("lora_" in name for name in task.params)
    plan = make_plan(
        task,
        num_probes=arguments.num_probes,
        eps=arguments.eps or (LORA_EPS if lora else PLAIN_EPS),
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

    from zokernel.finetune.models.load import load_model
    from zokernel.finetune.scoring.options import option_scores
    from zokernel.finetune.settings.config import ZOConfig

    prompt = _classification_task(model_arguments, data_arguments)
    rows = _draw_rows(prompt, data_arguments, arguments)
    config = ZOConfig(
        output_dir="runs/plan",
        perturb="in_place:copy",
        use_cpu=not torch.cuda.is_available(),
        precision=arguments.precision,
    )
    set_seed(arguments.seed)  # of a new adapter's weights
    model, tokenizer = load_model(model_arguments, config)
    encoded, collate = _encode(prompt, rows, model, tokenizer, data_arguments)
    train, validation = ([part[n] for n in range(len(part))] for part in (encoded["train"], encoded["validation"]))
    batch = collate([*train[: arguments.update_examples], *validation])
    exact = ProbedTask(
        params={name: p for name, p in model.named_parameters() if p.requires_grad},
        score=lambda inputs: option_scores(model, inputs),
        batch=batch,
        labels=batch["labels"],
        num_update=arguments.update_examples,
        num_tokens=int(batch["attention_mask"].sum()),
        steps=_draw_steps(train, collate, arguments),
    )

    def score_as_trained(inputs: Any) -> torch.Tensor:
        device = inputs["input_ids"].device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bool(config.bf16), cache_enabled=False):
            return option_scores(model, inputs)

    return replace(exact, score=score_as_trained), exact


def _classification_task(model_arguments: Any, data_arguments: Any) -> Any:
    """Return the task that the flags describe, refusing what no plan is made for."""
    from zokernel.finetune.data.check_flags import check_flags
    from zokernel.finetune.data.datasets import load_task as load_prompt_task
    from zokernel.finetune.settings.check import check_values

    check_values(data_arguments)
    if model_arguments.offload or model_arguments.offload_dir:
        raise UsageError("A plan holds all weights in memory: leave out --offload and --offload_dir.")
    prompt = load_prompt_task(data_arguments)
    if prompt.kind != "classification":
        raise UsageError(f"A plan is made for classification{_describe_other_task(prompt, data_arguments)}.")
    check_flags(prompt, data_arguments, model_arguments)
    unused = {"calibrate": data_arguments.calibrate, "merge_adapter": model_arguments.merge_adapter}
    for flag, is_set in unused.items():
        if is_set:
            raise UsageError(f"--{flag} changes nothing in training, which a plan is made for: leave it out.")
    return prompt


def _draw_rows(prompt: Any, data_arguments: Any, arguments: PlanArguments) -> Any:
    """Return the rows that the plan needs: to demonstrate with, to update on and to take steps on, and to observe."""
    from zokernel.finetune.data.datasets import Splits, load_splits

    splits = load_splits(data_arguments, prompt, seed=arguments.seed, tests=False)
    num_train = arguments.update_examples + data_arguments.num_demonstrations
    num_step = arguments.update_examples * arguments.num_probes
    rows = Splits(splits.train[: num_train + num_step], splits.validation[: arguments.observe_examples], [])
    if len(rows.train) < num_train or len(rows.validation) < arguments.observe_examples:
        raise UsageError(
            "There are fewer examples than the plan needs: lower --update_examples, --observe_examples or "
            "--num_demonstrations."
        )
    return rows


def _draw_steps(train: list[Any], collate: Callable[[list[Any]], Any], arguments: PlanArguments) -> list[StepBatch]:
    """Return as many batches of training examples as there are probes, drawn as those of steps are."""
    draw = random.Random(arguments.seed)
    batches = [collate(draw.sample(train, arguments.update_examples)) for _ in range(arguments.num_probes)]
    return [StepBatch(batch, batch["labels"], int(batch["attention_mask"].sum())) for batch in batches]


def _encode(prompt: Any, rows: Any, model: Any, tokenizer: Any, data_arguments: Any) -> tuple[dict[str, Any], Any]:
    """Return the encoded rows of each split, and what makes a batch of some."""
    from zokernel.finetune.data.encode_splits import encode_splits
    from zokernel.finetune.models.adapters import virtual_tokens
    from zokernel.finetune.models.kind import fills_masks, kind_of_model
    from zokernel.finetune.models.load import longest_input
    from zokernel.finetune.scoring.options import Collator
    from zokernel.finetune.tasks.seq2seq import decoder_of

    encoded, _ = encode_splits(
        prompt,
        rows,
        tokenizer,
        max_length=longest_input(model, tokenizer, data_arguments.max_length, reserved=virtual_tokens(model)),
        masked=fills_masks(model),
        decoder=decoder_of(model, tokenizer) if kind_of_model(model) == "seq2seq" else None,
        num_demonstrations=data_arguments.num_demonstrations,
    )
    return encoded, Collator(tokenizer.pad_token_id)


def _describe_other_task(task: Any, data: Any) -> str:
    """Return what the data are instead of a classification, and which flags make them one."""
    if task.kind == "text" and not (data.task or data.task_file):
        from zokernel.finetune.tasks.text import columns_of_form

        columns = " and ".join(map(repr, columns_of_form(task.form)))
        return f", and these rows have {columns}, to be learned as text: say --template and --label_words"
    flag = "task" if data.task else "task_file" if data.task_file else "dataset_name"
    return f", not for a {task.kind} task: choose another --{flag}"
