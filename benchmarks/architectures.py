"""Train, stop, continue, save and reload a tiny model of every architecture of transformers, and compare bit by bit.

    python benchmarks/architectures.py [--only mixtral gpt_neox] [--output architectures.json] [--seconds 90]

For each: a run of four steps; the same run, stopped after two and continued; ``from_pretrained`` of what was saved; and
the base with the journal replayed on it.  All have to hold the same
bits, and the saved model to score as the trained one.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_architectures import TABLES, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from models import save_tokenizer

from zokernel.errors import ZokernelError
from zokernel.finetune import DataArguments, ModelArguments, ZOConfig, finetune, replay
from zokernel.finetune.models.kind import Kind, auto_class


def check(model_type: str, kind: Kind, folder: Path) -> str:
    """Return ``passed``, or what went wrong."""
    base = folder / "base"
    tokenizer = save_tokenizer(base, masked=kind == "masked")
    special = ("pad_token_id", "bos_token_id", "eos_token_id")
    ids = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in special}}
    try:
        tiny_model(model_type, kind, **ids).save_pretrained(base)
    except Exception as error:  # a configuration of this module, not the package
        return f"not built: {type(error).__name__} {str(error)[:100]}"
    rows = [{"text": text, "label": n % 2} for n, text in enumerate(["good day", "bad day", "Rome", "a bad one"] * 3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    whole = _train(folder / "whole", base, kind, steps=4)
    _train(folder / "parts", base, kind, steps=2)
    _train(folder / "parts", base, kind, steps=4, resume="last")
    if difference := _difference(folder, base, kind):
        return difference
    if whole["after"]["loss"] == whole["before"]["loss"]:
        return "nothing was learnt"
    before = _score(folder / "whole", base, kind, folder)
    if abs(before - whole["after"]["loss"]) > 1e-6:
        return f"reloaded model scores {before} where training ended at {whole['after']['loss']}"
    return "passed"


def _train(output: Path, base: Path, kind: Kind, *, steps: int, resume: str | None = None) -> dict[str, Any]:
    config = ZOConfig(
        output_dir=str(output),
        max_steps=steps,
        learning_rate=1e-2,
        eval_steps=2,
        save_steps=2,
        save_strategy="steps",
        per_device_train_batch_size=4,
        precision="fp32",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        load_best_model_at_end=False,
        resume_from_checkpoint=resume,
    )
    return finetune(ModelArguments(model_name_or_path=str(base), lm_type=kind), _data(output.parent), config)


def _difference(folder: Path, base: Path, kind: Kind) -> str:
    """Return how the saved models and the replayed journal differ, or nothing if they hold the same bits."""
    auto = auto_class(kind)
    saved, continued = (auto.from_pretrained(folder / name).eval() for name in ("whole", "parts"))
    expected = auto.from_pretrained(base).eval()
    with torch.no_grad():
        for name, value in replay(base, folder / "whole").items():
            expected.get_parameter(name).copy_(value)
    differing = [n for n, p in saved.named_parameters() if not torch.equal(p, continued.get_parameter(n))]
    if differing:
        return f"continued run differs in {differing[0]}"
    differing = [n for n, p in saved.named_parameters() if not torch.equal(p, expected.get_parameter(n))]
    return f"reloaded model differs from the journal in {differing[0]}" if differing else ""


def _score(model: Path, base: Path, kind: Kind, folder: Path) -> float:
    config = ZOConfig(
        output_dir=str(folder / "score"), do_train=False, precision="fp32", use_cpu=True, disable_tqdm=True
    )
    metrics = finetune(ModelArguments(model_name_or_path=str(model), lm_type=kind), _data(folder), config)
    return metrics["before"]["loss"]


def _data(folder: Path) -> DataArguments:
    rows = str(folder / "rows.jsonl")
    return DataArguments(train_file=rows, template="{text} It was", label_words=["bad", "good"])


def _stop(*_: Any) -> None:
    raise TimeoutError


def main() -> None:
    """Check all architectures, and print a line for each and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=int, default=90, help="Longest time for one model.")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGALRM, _stop)
    results = {}
    for kind, table in TABLES.items():
        for model_type in table:
            if args.only and model_type not in args.only:
                continue
            signal.alarm(args.seconds)
            try:
                with tempfile.TemporaryDirectory() as folder:
                    result = check(model_type, kind, Path(folder))  # type: ignore[arg-type]
            except ZokernelError as error:
                result = f"refused: {error}"
            except Exception as error:  # anything that fails is a finding
                result = f"failed: {type(error).__name__} {' '.join(str(error).split())[:200]}"
            finally:
                signal.alarm(0)
            results[f"{kind} {model_type}"] = result
            print(f"{kind:7} {model_type:28} {result}", flush=True)
    print(Counter(result.split(":")[0] if result != "passed" else result for result in results.values()))
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
