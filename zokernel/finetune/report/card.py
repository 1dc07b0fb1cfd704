"""The model card: a ``README.md`` with the front matter that the hub reads and the run's own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zokernel.finetune.report.run_report import summary_rows
from zokernel.finetune.report.told import examples_told, method_told, rate_told, weights_told


def write_card(metrics: dict[str, Any], path: Path) -> None:
    """Write the card of a finished run.

    Args:
        metrics: What ``metrics.json`` holds.
        path: The ``README.md`` beside the saved weights.
    """
    adapter = metrics["saved"] == "adapter"
    pipeline, head = {
        "causal": ("text-generation", "CausalLM"),
        "masked": ("fill-mask", "MaskedLM"),
        "seq2seq": ("text2text-generation", "Seq2SeqLM"),
    }[metrics["language_model"]]
    words = ", ".join(repr(word) for word in metrics["label_words"])
    scored = f"The words that were compared: {words}." if words else "Each example brings its own options or answers."
    rows = "\n".join(f"| {name} | {value} |" for name, value in summary_rows(metrics))
    auto = f"AutoModelFor{head}"
    load = (
        f'base = {auto}.from_pretrained("{metrics["model"]}")\nmodel = PeftModel.from_pretrained(base, "{path.parent}")'
        if adapter
        else f'model = {auto}.from_pretrained("{path.parent}")'
    )
    extra = "\nfrom peft import PeftModel" if adapter else ""
    options = ", ".join(f"{name}={value}" for name, value in metrics["method_options"].items())
    phrased = f", phrased as\n`{metrics['template']!r}`. {scored}"
    uncertain = (
        f"The ± is the standard error of the {examples_told(metrics)}, from one data set and one template; nothing "
        "else was\nevaluated."
    )
    if metrics["metric"] == "perplexity":
        phrased = ": chats, instructions or texts,\nby the loss of the tokens that count."
        uncertain = (
            f"Perplexity is that of the {examples_told(metrics)}, from one data set; nothing else was evaluated."
        )
    path.write_text(
        f"""---
base_model: "{metrics["model"]}"
library_name: {"peft" if adapter else "transformers"}
pipeline_tag: {pipeline}
tags:
- zokernel
- zeroth-order
- {metrics["method"]}
---

# {metrics["model"]} fine-tuned with {method_told(metrics)}

Trained by zokernel {metrics["versions"]["zokernel"]} on {metrics["num_train"]:,} examples{phrased}

| | |
|---|---|
{rows}
| learning rate | {rate_told(metrics)} |
| method's options | {options} |
| precision, seed | {metrics["precision"]}, {metrics["seed"]} |

{weights_told(metrics)}

{uncertain}

```python
from transformers import {auto}{extra}

{load}
```

Trained with:

```
{metrics["command"]}
```
""",
        encoding="utf-8",
    )
