"""What ``zokernel evolve`` reads: features and targets from a file, or a model and data turned into a kernel."""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zokernel.commands.arrays import read_arrays
from zokernel.commands.label_tokens import label_tokens
from zokernel.errors import UsageError
from zokernel.kernels.features import MEMORY_BUDGET, jacobian_features
from zokernel.readable import readable_bytes

logger = logging.getLogger(__name__)

SMALL_FEATURES = 2**26  # elements: features up to this size are kept for distributions that need them


@dataclass(frozen=True)
class EvolveInputs:
    """A linear(ised) model and its data.

    Attributes:
        kernel: NTK of the training points, (n, n) float64.
        y: Targets, (n,).
        f0: Initial predictions, (n,).
        dim: Number of parameters.
        features: Features, (n, d) float64, when they are small enough to keep.
        source: Where all this comes from, for the report.
        test: Features, targets and initial predictions of test points, or None.
    """

    kernel: Tensor
    y: Tensor
    f0: Tensor
    dim: int
    features: Tensor | None
    source: str
    test: tuple[Tensor, Tensor, Tensor] | None = None


def from_features(path: Path, *, target_column: str | None = None, max_examples: int | None = None) -> EvolveInputs:
    """Read features and targets.

    A ``.npz`` file holds ``features`` (n, d) and ``targets`` (n,), optionally ``predictions`` (n,) (initial ones; zero
    when absent) and ``test_features``, ``test_targets``, ``test_predictions``.  A ``.csv`` or ``.tsv`` file has a
    header; the target is its last column unless named, a column ``prediction`` holds initial predictions, and every
    other column is a feature.

    Args:
        path: The file.
        target_column: Name of the target column of a table.
        max_examples: Keep only the first so many rows.

    Returns:
        The inputs.

    Raises:
        UsageError: If the file is missing, lacks a part, or holds values that are not finite numbers.
    """
    if not path.is_file():
        raise UsageError(f"There is no file {path}: check the path.")
    if path.suffix.lower() == ".npz":
        arrays = _read_npz(path)
    else:
        arrays = _read_table(path, target_column)
    features, y = arrays["features"], arrays["targets"].reshape(-1)
    if features.ndim != 2 or len(features) != len(y):
        raise UsageError(f"{path}: features {tuple(features.shape)} and targets {tuple(y.shape)} do not match.")
    f0 = arrays.get("predictions", torch.zeros_like(y)).reshape(-1)
    if len(f0) != len(y):
        raise UsageError(f"{path}: there are {len(f0)} predictions for {len(y)} targets.")
    features, y, f0 = (values[:max_examples] for values in (features, y, f0))
    test = None
    if "test_features" in arrays:
        if "test_targets" not in arrays:
            raise UsageError(f"{path} has test_features but no test_targets.")
        test_y = arrays["test_targets"].reshape(-1)
        test = arrays["test_features"], test_y, arrays.get("test_predictions", torch.zeros_like(test_y)).reshape(-1)
    return EvolveInputs(features @ features.T, y, f0, features.shape[1], features, str(path), test)


def _read_npz(path: Path) -> dict[str, Tensor]:
    arrays = read_arrays(path)
    missing = {"features", "targets"} - arrays.keys()
    if missing:
        raise UsageError(f"{path} has no array {' or '.join(sorted(missing))}; it holds {', '.join(sorted(arrays))}.")
    return {name: _numbers(values, f"{path}: {name}") for name, values in arrays.items()}


def _read_table(path: Path, target_column: str | None) -> dict[str, Tensor]:
    from zokernel.data import load_table

    rows = load_table(path)
    columns = list(rows[0])
    target = target_column or columns[-1]
    if target not in columns:
        raise _missing_column(path, target, columns, "--target_column")
    names = [name for name in columns if name not in (target, "prediction")]
    if not names:
        raise UsageError(f"{path} has no feature column beside the target {target!r}.")
    arrays = {"features": _column_numbers(rows, names, path), "targets": _column_numbers(rows, [target], path)[:, 0]}
    if "prediction" in columns and target != "prediction":
        arrays["predictions"] = _column_numbers(rows, ["prediction"], path)[:, 0]
    return arrays


def _missing_column(path: Path, name: str, columns: Sequence[str], flag: str) -> UsageError:
    """Return the error for a table without a column, with the flag that names it."""
    from zokernel.finetune.tasks.columns import close_column

    close = close_column(name, columns)
    hint = f"did you mean {close!r} (in {flag})?" if close else f"name one of these with {flag}."
    return UsageError(f"{path} has no column {name!r} (it has {', '.join(columns)}): {hint}")


def _column_numbers(rows: list[dict[str, Any]], names: list[str], path: Path) -> Tensor:
    for number, row in enumerate(rows, start=1):
        for name in names:
            try:
                float(row[name])
            except (TypeError, ValueError) as error:
                raise UsageError(f"{path}, row {number}: {name} is {row[name]!r}, which is not a number.") from error
    values = np.array([[float(row[name]) for name in names] for row in rows])
    return _numbers(values, f"{path}: {', '.join(names[:3])}")


def _numbers(values: np.ndarray, what: str) -> Tensor:
    if not np.issubdtype(values.dtype, np.number):
        raise UsageError(f"{what} must be numbers, not {values.dtype}.")
    tensor = torch.as_tensor(values.astype(np.float64))
    if not tensor.isfinite().all():
        raise UsageError(f"{what}: every value must be finite, but there are NaN or infinite ones.")
    return tensor


def from_factory(spec: str, path: Path, *, offset: bool, max_examples: int | None = None) -> EvolveInputs:
    """Linearize the module that ``module:factory`` returns, on the inputs and targets of a file.

    Args:
        spec: Import string of a function without arguments that returns an ``nn.Module`` with one output.
        path: A ``.npz`` file with ``inputs`` (n, ...) and ``targets`` (n,), or a table as for :func:`from_features`
            whose feature columns are the inputs.
        offset: Start from the network's own outputs; else from its Jacobian times its weights.
        max_examples: Keep only the first so many rows.

    Returns:
        The inputs.

    Raises:
        UsageError: If the factory cannot be imported or called, or the model has several outputs.
    """
    model = _build(spec)
    if path.suffix.lower() == ".npz":
        if not path.is_file():
            raise UsageError(f"There is no file {path}: check the path.")
        file_arrays = read_arrays(path)
        if not {"inputs", "targets"} <= file_arrays.keys():
            raise UsageError(f"{path} needs arrays inputs and targets; it holds {', '.join(file_arrays)}.")
        arrays = {name: _numbers(file_arrays[name], f"{path}: {name}") for name in ("inputs", "targets")}
        x, y = arrays["inputs"], arrays["targets"].reshape(-1)
    else:
        table = _read_table(path, None)
        x, y = table["features"], table["targets"]
    if len(x) != len(y):
        raise UsageError(f"{path}: there are {len(x)} inputs and {len(y)} targets.")
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    linear = jacobian_features(model, x[:max_examples].to(dtype))
    if linear.features.ndim != 2:
        raise UsageError(f"{spec} has {linear.features.shape[1]} outputs: wrap it so that it returns one.")
    return _from_rows(linear.features, y[:max_examples], linear.initial_predictions(offset), spec)


def _build(spec: str) -> nn.Module:
    module_name, _, factory_name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in the working folder, as with python -m
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{spec} cannot be imported ({error}): give it as package.module:function.") from error
    try:
        model = factory()
    except TypeError as error:
        raise UsageError(f"{spec} could not be called without arguments: {error}.") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec} returned {type(model).__name__}: it must return a torch.nn.Module.")
    return model.eval()


@dataclass(frozen=True)
class TextTask:
    """How a language model's output becomes one number: the logit of one word over that of another.

    Attributes:
        text_column: Column of the text.
        label_column: Column of the label, 0 or 1; the targets are -1 and 1.
        words: The words of label 0 and label 1, which come after the prompt and a space.
        template: Prompt, with columns in braces; ``{}`` is the text.
    """

    text_column: str
    label_column: str
    words: tuple[str, str]
    template: str


def from_language_model(
    name: str,
    load: Callable[[], tuple[Any, Any]],
    path: Path,
    task: TextTask,
    *,
    trainable: str | None = None,
    max_examples: int = 16,
    memory_budget: int = MEMORY_BUDGET,
) -> EvolveInputs:
    """Linearize a causal language model's difference of two word logits on labelled texts.

    Args:
        name: What it is called.
        load: Returns model and tokenizer.
        path: Table with a text and a label column.
        task: How the output is formed.
        trainable: Regular expression of the parameters that are trained; all when not given.
        max_examples: Texts used.
        memory_budget: Bytes that the gradients may take.

    Returns:
        The inputs; predictions start from the model's own outputs.

    Raises:
        UsageError: If columns, labels, words or parameters do not fit, or gradients would not fit in memory.
    """
    from zokernel.data import load_table

    prompts, y = _prompts(load_table(path)[:max_examples], task, path)
    model, tokenizer = load()
    low, high = label_tokens(tokenizer, task.words)
    if low == high:
        raise UsageError(f"{task.words[0]!r} and {task.words[1]!r} are the same token: choose other words.")
    parameters = _matching_parameters(model, trainable)
    dim = sum(parameter.numel() for parameter in parameters)
    gradient_bytes = 4 * dim * len(prompts)
    if gradient_bytes > memory_budget:
        raise UsageError(
            f"Gradients of {len(prompts)} texts in {dim:,} parameters need {readable_bytes(gradient_bytes)} (allowed: "
            f"{readable_bytes(memory_budget)}): lower --max_examples, or choose fewer with --trainable_parameters."
        )
    rows, outputs = torch.empty(len(prompts), dim), []
    for number, prompt in enumerate(prompts):
        tokens = torch.tensor([tokenizer.encode(prompt)])
        logits = model(input_ids=tokens, use_cache=False).logits[0, -1].float()
        output = logits[high] - logits[low]
        gradients = torch.autograd.grad(output, parameters, allow_unused=True, materialize_grads=True)
        rows[number] = torch.cat([gradient.reshape(-1) for gradient in gradients])
        outputs.append(float(output.detach()))
    return _from_rows(rows, y, torch.tensor(outputs, dtype=torch.float64), f"{name} on {len(prompts)} texts of {path}")


def _prompts(rows: list[dict[str, Any]], task: TextTask, path: Path) -> tuple[list[str], Tensor]:
    from zokernel.finetune.tasks.template import column_in_braces, fill, parse

    template = task.template.replace("{}", column_in_braces(task.text_column))
    flags = {task.text_column: "--text_column"} if "{}" in task.template else {}
    for column in (*parse(template), task.label_column):
        if column not in rows[0]:
            flag = "--label_column" if column == task.label_column else flags.get(column, "--template")
            raise _missing_column(path, column, list(rows[0]), flag)
    labels = [str(row[task.label_column]).strip() for row in rows]
    unknown = sorted(set(labels) - {"0", "1"})
    if unknown:
        raise UsageError(f"Labels must be 0 or 1, but {path} has {', '.join(unknown[:3])}.")
    if len(set(labels)) == 1:
        raise UsageError(
            f"The {len(rows)} rows that are used of {path} all have label {labels[0]}: shuffle them, or raise "
            "--max_examples."
        )
    return [fill(template, row) for row in rows], torch.tensor([2.0 * int(label) - 1 for label in labels]).double()


def _matching_parameters(model: nn.Module, trainable: str | None) -> list[nn.Parameter]:
    try:
        pattern = re.compile(trainable or "")
    except re.error as error:
        raise UsageError(f"--trainable_parameters is not a regular expression: {error}.") from error
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    chosen = [parameter for name, parameter in trained if pattern.search(name)]
    if not chosen:
        names = [name for name, _ in trained]
        raise UsageError(f"No parameter matches {trainable!r}; there are {names[0]}, ..., {names[-1]}.")
    return chosen


def _from_rows(rows: Tensor, y: Tensor, f0: Tensor, source: str) -> EvolveInputs:
    count, dim = rows.shape
    kernel = torch.zeros(count, count, dtype=torch.float64)
    for block in rows.split(2**22, dim=1):  # float64 products without a float64 copy of everything
        kernel += block.double() @ block.double().T
    features = rows.double() if rows.numel() <= SMALL_FEATURES else None
    if features is None:
        logger.info("The %d x %d features are too large to keep: only their kernel is used.", count, dim)
    return EvolveInputs(kernel, y.double(), f0.double(), dim, features, source)
