"""Reproduce figures and tables of the three papers.

zokernel reproduce --list
zokernel reproduce nzk/linear_d2 nzk/mnist --scale cpu --output_dir runs/reproduce
zokernel reproduce all --scale smoke
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from zokernel.experiments.base import MODULES, SCALES, Config, get_experiment, reproduce


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``zokernel reproduce``."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="experiments to run, a prefix such as 'nzk/', or 'all'"
    )
    parser.add_argument("--list", action="store_true", help="list the experiments and stop")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="how large (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random quantity (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reproduce"), help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="run again what is already finished in output_dir")


def select(names: list[str]) -> list[str]:
    """Expand ``all`` and prefixes ending in ``/`` into experiment names, in their listed order."""
    wanted: list[str] = []
    for name in names:
        if name == "all":
            wanted += MODULES
        elif name.endswith("/") and any(known.startswith(name) for known in MODULES):
            wanted += [known for known in MODULES if known.startswith(name)]
        else:
            get_experiment(name)
            wanted.append(name)
    return list(dict.fromkeys(wanted))


def main(args: argparse.Namespace) -> int:
    """Run the chosen experiments one after the other; finished ones are kept unless ``--overwrite``."""
    if args.list or not args.names:
        width = max(map(len, MODULES), default=0)
        for name in MODULES:
            print(f"{name:<{width}}  {get_experiment(name)[0]}")
        return 0
    names = select(args.names)
    for number, name in enumerate(names, start=1):
        folder = args.output_dir / name
        head = f"[{number}/{len(names)}] {name}"
        if (folder / "result.json").exists() and not args.overwrite:
            print(f"{head}: already finished in {folder} (--overwrite runs it again)")
            continue
        start = time.perf_counter()
        result = reproduce(name, Config(args.scale, args.seed), args.output_dir)
        print(f"{head}: {time.perf_counter() - start:.1f} s -> {folder}\n  {result.summary}")
        for verdict in result.verdicts:
            print(f"  {verdict.verdict:>22}: {verdict.claim} {verdict.reason}")
    return 0
