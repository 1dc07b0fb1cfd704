"""Accuracy and peak memory of the demo's task, with forward passes only and with gradients: the figure of the README.

python benchmarks/headline.py --output_dir runs/headline           # finished runs are not repeated
python benchmarks/headline.py --output_dir runs/headline --draw    # prints the table and draws the figure

SmolLM2, 1,200 movie reviews to train on, 3,000 to report.  Every contender sees 300 batches of 4 or fewer, at the rate
that the command takes by default or, for MeZO, the demo's.  No rate was chosen on the sentences that report.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from drawing import svg, themed

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "img"
COMMON = ["--model_name_or_path", "smollm2", "--dataset_name", "movie-reviews", "--task", "movie-reviews"]
COMMON += ["--per_device_train_batch_size", "4", "--max_train_samples", "1200", "--max_eval_samples", "200"]
COMMON += ["--max_test_samples", "3000", "--eval_steps", "100", "--report_to", "none", "--max_steps"]
CONTENDERS = {
    "AdamW": ["300", "--method", "adamw"],
    "AdamW, LoRA": ["300", "--method", "adamw", "--lora", "true"],
    "MeZO": ["300", "--method", "mezo", "--learning_rate", "2e-5", "--lr_scheduler_type", "linear"],
    "auto": ["100", "--method", "auto"],
    "auto, LoRA": ["100", "--method", "auto", "--lora", "true"],
}
FORWARD_ONLY = ("MeZO", "auto", "auto, LoRA")


def run(name: str, folder: Path) -> dict[str, Any]:
    """Return the metrics of a contender; the command trains what is not finished, and refuses other settings."""
    command = [sys.executable, "-m", "zokernel", "finetune", *COMMON, *CONTENDERS[name]]
    if code := subprocess.call([*command, "--output_dir", str(folder)]):
        raise SystemExit(code)
    metrics = json.loads((folder / "metrics.json").read_text())
    accuracy, rows = metrics["after"]["accuracy"], metrics["num_test"]
    return {
        "before": metrics["before"]["accuracy"],
        "accuracy": accuracy,
        "error": math.sqrt(accuracy * (1 - accuracy) / rows),
        "rows": rows,
        "seconds": metrics["train_seconds"],
        "memory": metrics["peak_memory_training"],
        "inference": metrics["peak_memory_inference"],
    }


def draw(rows: dict[str, dict[str, Any]], *, dark: bool) -> bytes:
    """Return accuracy against peak memory as SVG."""
    with themed(dark=dark) as (Figure, colours):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, row in rows.items():
            memory, colour = row["memory"] / row["inference"], colours[2 if name in FORWARD_ONLY else 1]
            axes.errorbar(memory, 100 * row["accuracy"], 196 * row["error"], fmt="o", color=colour, markersize=7)
            axes.annotate(name, (memory, 100 * row["accuracy"]), (9, 0), textcoords="offset points", va="center")
        before, placement = 100 * rows["MeZO"]["before"], {"transform": axes.get_yaxis_transform()}
        label = axes.text(0.99, before, "before training", fontsize=9, ha="right", va="bottom", **placement)
        axes.axhline(before, color=label.get_color(), linestyle=":", linewidth=1)
        axes.set(xlabel="peak memory of training, relative to inference", ylabel="accuracy, %")
        axes.set_xlim(left=0.9, right=axes.get_xlim()[1] * 1.12)
        return svg(figure)


def main() -> None:
    """Run missing contenders, print the table, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/headline"))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    rows = {name: run(name, args.output_dir / name.replace(", ", "-")) for name in args.contenders}
    print("| | accuracy before | after | training / inference memory | training, s |\n|---|---|---|---|---|")
    for name, row in rows.items():
        after = f"{100 * row['accuracy']:.1f} ± {196 * row['error']:.1f}"
        ratio, before = row["memory"] / row["inference"], 100 * row["before"]
        print(f"| {name} | {before:.1f} % | {after} % | {ratio:.2f} | {row['seconds']:.0f} |")
    if args.draw:
        for dark in (False, True):
            path = IMAGES / f"headline-{'dark' if dark else 'light'}.svg"
            path.write_bytes(draw(rows, dark=dark))


if __name__ == "__main__":
    main()
