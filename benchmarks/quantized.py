"""Quantized bases on SST-2: accuracy and loss beside the same run in bf16, and what trained scales gain.

    python benchmarks/quantized.py --data folder-with-train.tsv-and-dev.tsv --output_dir runs/quantized --seeds 0 1 2

Each run is one process.  What is finished is not repeated, so the script may be stopped and started again; a folder
with runs of other settings is refused.  The table has peak memory of training and, over the same held-out examples,
mean differences with 95 % intervals: of an adapter to the adapter on the bf16 base, of scales to the scales before
training.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zokernel.experiments.kept_runs import KeptRuns, rows_sha256

COMMON = ["--task", "sst2", "--per_device_eval_batch_size", "16", "--report_to", "none", "--precision", "bf16"]
COMMON += ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--max_eval_samples", "16"]
LORA = ["--lora", "true", "--dtype", "bfloat16"]
SCALES = ["--train", "scales", "--method", "qzo", "--eps", "1e-2", "--num_perturbations", "2", "--learning_rate"]
SCALES += ["3e-3", "--per_device_train_batch_size", "8"]
FOUR, EIGHT = ["--load_in_4bit", "true"], ["--load_in_8bit", "true"]
CONTENDERS = {
    "bf16": LORA,
    "bitsandbytes 4 bit": [*LORA, *FOUR],
    "bitsandbytes 8 bit": [*LORA, *EIGHT],
    "torchao int8": [*LORA, "--quantization", "torchao:int8"],
    "scales int8": [*SCALES, "--quantization", "torchao:int8"],
    "scales int4": [*SCALES, "--quantization", "torchao:int4"],
}


def write_rows(args: argparse.Namespace) -> list[dict[str, str]]:
    """Draw the held-out rows once, write them, and return them."""
    with (args.data / "dev.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    random.Random(0).shuffle(rows)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"sentence": row["sentence"], "label": int(row["label"])}) for row in rows[: args.test]]
    (args.output_dir / "test.jsonl").write_text("\n".join(lines) + "\n")
    return rows[: args.test]


def train(args: argparse.Namespace, name: str, seed: int, folder: Path) -> None:
    """Train one contender; the command trains what is not finished, and refuses a run of other settings."""
    data = ["--train_file", str(args.data / "train.tsv"), "--max_train_samples", str(args.train)]
    data += ["--test_file", str(args.output_dir / "test.jsonl"), "--max_test_samples", "-1", "--data_seed", "0"]
    method = [] if name.startswith("scales") else ["--method", "auto"]
    flags = [*COMMON, *data, *method, *CONTENDERS[name], "--max_steps", str(args.steps), "--seed", str(seed)]
    command = [sys.executable, "-m", "zokernel", "finetune", "--model_name_or_path", args.model, *flags]
    if code := subprocess.call([*command, "--output_dir", str(folder)]):
        raise SystemExit(code)


def answers(args: argparse.Namespace, folder: Path, rows: Sequence[dict[str, str]], *, untrained: bool) -> list[Any]:
    """Return (correct, loss) of every held-out row; with scales, also as they were before training."""
    stored = KeptRuns(folder / "answers.jsonl")
    key = {"untrained": untrained, "model": args.model, "steps": args.steps, "train": args.train}
    key |= {"data": str(args.data), "rows": rows_sha256(rows)}
    if (run := stored.find(**key)) is not None:
        return list(run["answers"])
    from zokernel.finetune import ModelArguments, ZOConfig, load_predictor
    from zokernel.finetune.models.load import load_model

    predictor = load_predictor(folder)
    if untrained:
        settings = json.loads((folder / "run.json").read_text())["settings"]
        arguments = ModelArguments(args.model, quantization=settings["quantization"], train="scales")
        predictor.model = load_model(arguments, ZOConfig(output_dir=str(folder), report_to="none"))[0].eval()
    answers_of_rows = []
    for row, answer in zip(rows, predictor([{"sentence": row["sentence"]} for row in rows], batch_size=16)):
        share = max(answer["scores"][row["label"]], 1e-12)
        answers_of_rows.append((int(answer["prediction"] == row["label"]), -math.log(share)))
    stored.add(key | {"answers": answers_of_rows})
    return answers_of_rows


def interval(differences: Sequence[float]) -> str:
    """Return the mean of paired differences with its 95 % interval."""
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.fmean(differences):+.4f} ± {half:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv of SST-2")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quantized"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--train", type=int, default=1000, help="training examples")
    parser.add_argument("--test", type=int, default=872, help="held-out examples")
    args = parser.parse_args()
    rows, lines = write_rows(args), []
    bf16: dict[int, list[Any]] = {}
    for seed in args.seeds:
        for name in args.contenders:
            folder = args.output_dir / f"{name.replace(' ', '-')}-{seed}"
            train(args, name, seed, folder)
            after, metrics = (
                answers(args, folder, rows, untrained=False),
                json.loads((folder / "metrics.json").read_text()),
            )
            scales = name.startswith("scales")
            if name == "bf16":
                bf16[seed] = after
            beside = answers(args, folder, rows, untrained=True) if scales else bf16.get(seed)
            differences = ["", ""]
            if beside is not None and beside is not after:
                differences = [interval([a[k] - b[k] for a, b in zip(after, beside)]) for k in (0, 1)]
            accuracy, loss = (statistics.fmean(answer[k] for answer in after) for k in (0, 1))
            zero_shot, peak = metrics["before"]["accuracy"], metrics["peak_memory_training"] / 2**20
            cells = [name, seed, f"{zero_shot:.3f}", f"{accuracy:.3f}", f"{loss:.4f}", *differences, f"{peak:.0f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            print(lines[-1], flush=True)
    print(f"\n{args.model}, {args.steps} steps, {len(rows)} held-out examples\n")
    print("| base | seed | zero-shot | accuracy | loss | accuracy, difference | loss, difference | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
