"""Reproduce figures and tables of the three papers.

zokernel reproduce --list
zokernel reproduce nzk/linear_d2 nzk/mnist --scale cpu --output_dir runs/reproduce
zokernel reproduce all --scale smoke --jobs 2
zokernel reproduce kerzoo/language_model --set train_file=train.tsv --set seeds=5
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from zokernel.commands.parser import add_switch
from zokernel.errors import UsageError
from zokernel.experiments.base import MODULES, SCALES, Config, get_experiment
from zokernel.experiments.runner import duration, expected_seconds, plan, run_all
from zokernel.experiments.storage import load_record
from zokernel.files import check_output_dir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``zokernel reproduce``."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="experiments to run, a prefix such as 'nzk/', or 'all'"
    )
    add_switch(parser, "--list", help="list the experiments and stop")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="size of the experiments: smoke, cpu or full")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random quantity")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reproduce"), help="folder of the results")
    parser.add_argument("--jobs", type=int, default=1, help="experiments to run at once")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="options",
        help="override a setting of the experiments, such as seeds=5 (a JSON value, or text); may be repeated",
    )
    add_switch(parser, "--overwrite", help="run again what is already finished in output_dir")


def select(names: list[str]) -> list[str]:
    """Expand ``all`` and prefixes ending in ``/`` into experiment names, in their listed order."""
    selected: list[str] = []
    for name in names:
        if name == "all":
            selected += MODULES
        elif name.endswith("/") and any(experiment.startswith(name) for experiment in MODULES):
            selected += [experiment for experiment in MODULES if experiment.startswith(name)]
        else:
            get_experiment(name)
            selected.append(name)
    return list(dict.fromkeys(selected))


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Read ``name=value`` pairs; a value is JSON if it can be read as such, and text otherwise.

    Raises:
        UsageError: If a pair has no ``=``.

    Example:
        >>> parse_options(["seeds=5", "train_file=train.tsv", "scales=[1, 0.1]"])
        {'seeds': 5, 'train_file': 'train.tsv', 'scales': [1, 0.1]}
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise UsageError(f"--set takes NAME=VALUE, not {pair!r}.")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def main(args: argparse.Namespace) -> int:
    """Run the chosen experiments; finished ones are kept unless ``--overwrite``. Exit code 1 if any failed."""
    if args.list or not args.names:
        _print_list(args.scale, args.output_dir)
        return 0
    if args.jobs < 1:
        raise UsageError("--jobs must be at least 1.")
    config = Config(args.scale, args.seed, parse_options(args.options))
    names = select(args.names)
    check_output_dir(args.output_dir)
    todo, reused = plan(names, config, args.output_dir, overwrite=args.overwrite)
    for outcome in reused:
        folder = args.output_dir / outcome.name
        print(f"{outcome.name}: finished already in {folder} with {_origin(folder)} (--overwrite runs it again)")
    outcomes = run_all(todo, config, args.output_dir, jobs=args.jobs, report=lambda line: print(line, flush=True))
    finished = [outcome.name for outcome in outcomes if outcome.state == "finished"]
    _print_results([name for name in names if name in finished], args.output_dir)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    print(
        f"\n{len(finished)} run, {len(reused)} kept, {len(failed)} failed. "
        f"'zokernel report {args.output_dir}' makes a page of the results."
    )
    for outcome in failed:
        print(f"FAILED {outcome.name}: {outcome.message}")
    unread = _unread(names, args.output_dir, set(config.options))
    if unread:
        print(f"No experiment read the option {', '.join(unread)}: it had no effect.")
    return 1 if failed or unread else 0


def _print_list(scale: str, output_dir: Path) -> None:
    width = max(map(len, MODULES), default=0)
    total = 0.0
    for name in MODULES:
        seconds = expected_seconds(name, scale, output_dir)
        total += seconds
        print(f"{name:<{width}}  {duration(seconds):>6}  {get_experiment(name)[0]}")
    print(f"{'all':<{width}}  {duration(total):>6}  at scale {scale}, on two cores")


def _origin(folder: Path) -> str:
    """Return which release and commit made a result, for it is kept whatever has changed since."""
    record = load_record(folder)
    assert record is not None
    source = f", commit {record['commit']}" if record.get("commit") else ""
    return f"zokernel {record['versions']['zokernel']}{source}"


def _print_results(names: list[str], output_dir: Path) -> None:
    for name in names:
        record = load_record(output_dir / name)
        assert record is not None
        print(f"\n{name}\n  {record['summary']}")
        for verdict in record["verdicts"]:
            print(f"  {verdict['verdict']:>22}: {verdict['claim']} {verdict['reason']}")


def _unread(names: list[str], output_dir: Path, options: set[str]) -> list[str]:
    """Return the options that none of the finished experiments has asked for."""
    records = [record for name in names if (record := load_record(output_dir / name))]
    if not records:
        return []
    return sorted(options.intersection(*(record.get("unread_options", []) for record in records)))
