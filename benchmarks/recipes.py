"""Run recipes in full, one after the other, and keep a table of what each gave.

    python benchmarks/recipes.py mezo-opt-sst2 mezo-opt-rte --seeds 1 2 3
    python benchmarks/recipes.py --all -- --dtype bfloat16

The published models have up to 13 billion parameters: this is for a machine with a GPU.  What follows ``--`` goes to
``zokernel finetune``.  A run that was stopped goes on when the command is repeated; a finished one is only read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from zokernel.finetune.settings.flag_files import recipe_names

HEADER = (
    "| recipe | model | seed | steps | before | after | metric | hours | peak memory | version |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


def row(name: str, run: dict[str, Any]) -> str:
    """Return the line of a finished run."""
    metric, after = run["metric"], run.get("after") or run["before"]
    score = [f"{100 * part[metric]:.1f} of {run['num_test']}" for part in (run["before"], after)]
    memory = (run.get("peak_memory_training") or run.get("peak_memory_inference") or 0) / 2**30
    hours = run["total_seconds"] / 3600
    cells = (name, run["model"], run["seed"], run.get("steps", 0), *score, metric, f"{hours:.2f}", f"{memory:.1f} GiB")
    return f"| {' | '.join(map(str, cells))} | {run['versions'].get('zokernel', '?')} |\n"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names; see zokernel/finetune/settings/recipes")
    parser.add_argument("--all", action="store_true", help="run every recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/recipes"))
    words = sys.argv[1:] if words is None else words
    cut = words.index("--") if "--" in words else len(words)
    args, rest = parser.parse_args(words[:cut]), words[cut + 1 :]
    names = recipe_names() if args.all else args.recipes
    unknown = sorted(set(names) - set(recipe_names()))
    if unknown or not names:
        parser.error(f"there is no recipe {unknown[0]!r}" if unknown else "name recipes, or give --all")
    failed = []
    for name in names:
        for seed in args.seeds:
            folder = args.output_dir / f"{name}-{seed}"
            flags = ["--config", name, "--output_dir", str(folder), "--seed", str(seed), *rest]
            if subprocess.run([sys.executable, "-m", "zokernel", "finetune", *flags], check=False).returncode:
                failed.append(folder.name)
    runs = sorted(args.output_dir.glob("*/metrics.json"))
    lines = [row(path.parent.name.rpartition("-")[0], json.loads(path.read_text())) for path in runs]
    table = args.output_dir / "results.md"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(HEADER + "".join(lines))
    print(f"{len(lines)} runs are in {table}." + (f" These stopped: {', '.join(failed)}." if failed else ""))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
