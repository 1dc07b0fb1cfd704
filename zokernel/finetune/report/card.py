"""The model card: a ``README.md`` that says what was trained, how well it does, and how to use it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from zokernel.finetune.models.saved_adapter import ON_THE_HUB
from zokernel.finetune.report.run_report import PERPLEXITY, REWARD, summary_rows
from zokernel.finetune.report.text import describe_examples, describe_method, describe_rate, describe_weights
from zokernel.finetune.tasks.template import parse
from zokernel.optim import method_options

KINDS = {
    "causal": ("text-generation", "AutoModelForCausalLM"),
    "masked": ("fill-mask", "AutoModelForMaskedLM"),
    "seq2seq": ("text2text-generation", "AutoModelForSeq2SeqLM"),
}
OMITTED = ("lr", "seed", "perturb")  # options that the card shows elsewhere, or that do not change what is learned
HERE = "."  # the card lies beside the weights, wherever they are copied


def write_card(metrics: dict[str, Any], path: Path) -> None:
    """Write the card of a finished run.

    Args:
        metrics: What ``metrics.json`` holds.
        path: The ``README.md`` beside the saved weights.
    """
    base, name = base_of(metrics["model"])
    rows = "\n".join(f"| {name} | {value} |" for name, value in summary_rows(metrics | {"model": name}))
    options = ", ".join(f"{name}={value}" for name, value in _options(metrics).items())
    path.write_text(
        f"""{_front_matter(metrics, base)}
# {name} fine-tuned with {describe_method(metrics)}

Trained by zokernel {metrics["versions"]["zokernel"]} with forward passes only, on {metrics["num_train"]:,} examples.

## Use it

{_usage(metrics, base)}

## How well it does

| | |
|---|---|
{rows}
| learning rate | {describe_rate(metrics)} |
| method's options | {options} |
| precision, seed | {metrics["precision"]}, {metrics["seed"]} |

{describe_weights(metrics)}

{_uncertainty(metrics)}

Trained with:

```
{metrics["command"]}
```
""",
        encoding="utf-8",
    )


def _front_matter(metrics: dict[str, Any], base: str | None) -> str:
    """Return the metadata that the hub reads."""
    pipeline, _ = KINDS[metrics["language_model"]]
    base_line = f'base_model: "{base}"\n' if base else ""  # the hub takes no paths
    return f"""---
{base_line}library_name: {"peft" if metrics["saved"] == "adapter" else "transformers"}
pipeline_tag: {pipeline}
tags:
- zokernel
- zeroth-order
- {metrics["method"]}
---
"""


def base_of(model: str) -> tuple[str | None, str]:
    """Return the hub id of a base, if it has one, and a name that means something on other machines.

    Example:
        >>> base_of("smollm2"), base_of("org/model"), base_of("/home/me/models/mine")
        (('HuggingFaceTB/SmolLM2-135M-Instruct', 'SmolLM2-135M-Instruct'), ('org/model', 'model'), (None, 'mine'))
    """
    hub = ON_THE_HUB.get(model, model)
    name = Path(hub).name or hub
    return (None, name) if Path(model).exists() or hub.count("/") > 1 or hub.startswith(".") else (hub, name)


def _options(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the method's options in effect: its defaults that are on, and what was set.

    Example:
        >>> _options({"method": "qzo", "method_options": {"eps": 0.01, "momentum": 0.0}})
        {'eps': 0.01, 'num_perturbations': 1, 'clip_slope': 100.0, 'distribution': 'gaussian', 'momentum': 0.0}
    """
    defaults = {name: value for name, value in method_options(metrics["method"]).items() if name not in OMITTED}
    active = {name: value for name, value in defaults.items() if value not in (None, False, 0, math.inf, "none")}
    return active | metrics["method_options"]


def _usage(metrics: dict[str, Any], base: str | None) -> str:
    """Return how the weights answer new rows, with zokernel and with plain libraries."""
    _, auto = KINDS[metrics["language_model"]]
    if metrics["metric"] in (PERPLEXITY, REWARD):
        example, phrased = '"What is the capital of France?"', "Chats are phrased by the tokenizer's chat template."
        if metrics["language_model"] == "seq2seq":
            phrased = "The encoder reads what is asked, as the tokenizer's chat template renders it if it has one."
    else:
        columns = ", ".join(f'"{column}": "..."' for column in parse(metrics["template"]))
        example, words = f"{{{columns}}}", ", ".join(f"`{word}`" for word in metrics["label_words"])
        phrased = f"The prompt is `{metrics['template']!r}`; " + (
            f"the answer is the one of {words} with the largest mean log-probability of its tokens."
            if words
            else "each example brings its own options, or its answer is written."
        )
    load = f'model = {auto}.from_pretrained("{HERE}")'
    if metrics["saved"] == "adapter":
        note = "" if base else "  # where the base was for training"
        revision = metrics.get("model_revision", "main")
        at = "" if revision == "main" else f', revision="{revision}"'
        load = f'base = {auto}.from_pretrained("{base or metrics["model"]}"{at}){note}\n'
        load += f'model = PeftModel.from_pretrained(base, "{HERE}")'
    extra = "from peft import PeftModel\n" if metrics["saved"] == "adapter" else ""
    return f"""```python
from zokernel.finetune import load_predictor

load_predictor("{HERE}")([{example}])  # "{HERE}" is the folder of this card, or its copy
```

{phrased} The weights load without zokernel, too{_library_note(metrics)}:

```python
{extra}from transformers import {auto}

{load}
```"""


def _library_note(metrics: dict[str, Any]) -> str:
    """Return which library the saved weights need beside transformers, in words; empty if none."""
    quantized = metrics["saved"] == "model" and str(metrics.get("quantization", "")).startswith("torchao")
    return " (they are quantized, which needs torchao: `pip install torchao`)" if quantized else ""


def _uncertainty(metrics: dict[str, Any]) -> str:
    if metrics["metric"] == PERPLEXITY:
        return f"Perplexity is that of the {describe_examples(metrics)}, from one data set; nothing else was evaluated."
    if metrics["metric"] == REWARD:
        return (
            f"The ± is the standard error of the {describe_examples(metrics)}, answered greedily, and of nothing else."
        )
    return (
        f"The ± is the standard error of the {describe_examples(metrics)}, from one data set and one template; nothing "
        "else was evaluated."
    )
