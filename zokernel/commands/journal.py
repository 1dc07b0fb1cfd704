"""Show a run's journal, verify it, or truncate it to an earlier step.

zokernel journal show RUN            what was trained, how, and how many steps
zokernel journal verify RUN          every checksum; with --base, the base too
zokernel journal truncate RUN --step N
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from zokernel.commands.loading import LOADING_FLAGS, add_loading_flags, loading_arguments
from zokernel.commands.parser import add_switch
from zokernel.errors import UsageError
from zokernel.files import whole_file
from zokernel.flags import given_flags
from zokernel.readable import plural

# How the names of an evaluation's measures end that say how long it took.
TIMINGS = ("runtime", "per_second", "preparation_time", "epoch")
# The flags that not every action takes, and which do.
_ACTIONS_OF = {
    **dict.fromkeys(("base", "model_revision", "trust_remote_code"), ("verify",)),
    "step": ("show", "truncate"),
    "damaged": ("truncate",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``zokernel journal``."""
    parser.add_argument("action", choices=["show", "verify", "truncate"], help="what to do with the journal")
    parser.add_argument("journal", type=Path, help="a .zkj file, or the output_dir of the run")
    parser.add_argument("--base", help="verify: check that the run started from this model")
    parser.add_argument("--step", type=int, help="show: this step; truncate: keep this many steps")
    add_loading_flags(parser, what="that model", default="that of the run")
    add_switch(parser, "--damaged", help="truncate: keep what precedes the damage in a damaged journal")


def main(args: argparse.Namespace) -> int:
    """Carry out ``zokernel journal`` and return the exit code."""
    _refuse_flags_of_others(args)
    # torch takes seconds to load, and --help needs none of it.
    from zokernel.journal.reader import Journal

    if args.action == "truncate":
        return truncate(args)
    journal = Journal.read(args.journal)
    if args.action == "verify":
        if args.base is not None:
            from zokernel.finetune.storage.replay import load_base
            from zokernel.journal.replay import check_base

            check_base(
                journal.header, dict(load_base(args.base, journal, **loading_arguments(args)).named_parameters())
            )
        torn_bytes = plural(journal.torn_bytes, "byte")
        torn = f" A torn last record of {torn_bytes} will be dropped." if journal.torn_bytes else ""
        base = " The base is the run's." if args.base is not None else ""
        print(f"{journal.path}: {plural(journal.num_steps, 'step')}, every checksum right.{torn}{base}")
        return 0
    print("\n".join(describe(journal) if args.step is None else describe_step(journal, args.step)))
    return 0


def _refuse_flags_of_others(args: argparse.Namespace) -> None:
    """Refuse flags of another action, and those of a base that is not given.

    Raises:
        UsageError: If there is one.
    """
    given = given_flags(shlex.split(args.command_line))
    for flag in given:
        actions = _ACTIONS_OF.get(flag, (args.action,))
        if args.action not in actions:
            raise UsageError(f"--{flag} is for journal {' and '.join(actions)}: leave it out of journal {args.action}.")
        if flag in LOADING_FLAGS and args.base is None:
            raise UsageError(f"--{flag} is for the model of --base: add it, or leave both out.")


def describe(journal: Any) -> list[str]:
    """Return the lines of ``zokernel journal show``."""
    from zokernel.journal.compat import is_old
    from zokernel.journal.replay import HEADER_KEYS

    header, steps, events = journal.header, journal.steps, journal.events
    summary = f"{journal.path}: {plural(journal.num_steps, 'step')} in {journal.size:,} bytes"
    if is_old(header):
        header = {**header, "perturb": f"{header['restore']} (as zokernel 0.1 called it)", "update": ""}
    if not header.keys() >= HEADER_KEYS:
        return [summary, f"header      {header}"]
    numbers = sum(math.prod(shape) for _, shape in header["parameters"].values())
    lines = [
        summary,
        f"method      {header['method']}  {header['options']}",
        f"estimator   {header['estimator']}",
        f"directions  {header['directions']}, seed {header['seed']}, by {header['backend']}",
        f"perturb     {header['perturb']}",
        f"parameters  {plural(len(header['parameters']), 'tensor')}, {plural(numbers, 'number')}",
        f"base        sha256 {header['base_sha256']}",
        f"written by  zokernel {header['zokernel']}, torch {header['torch']}",
    ]
    if header.get("model"):
        what = "an adapter on " if header["model"]["adapter"] else ""
        lines.insert(1, f"model       {what}{header['model']['class']} {header['model']['name_or_path']}")
    if steps:
        lines.append(f"losses      {steps[0].losses[0]:.4f} at step 1, {steps[-1].losses[0]:.4f} at step {len(steps)}")
    for event in events:
        if event["event"] == "evaluation":
            results = {k: v for k, v in event["metrics"].items() if not k.endswith(TIMINGS)}
            result_text = ", ".join(
                f"{k} {v:.4f}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in results.items()
            )
            lines.append(f"evaluation  after step {event['step']}: {result_text}")
        elif event["event"] == "conditions":
            frozen = f", {plural(len(event['frozen']), 'parameter')} frozen" if event["frozen"] else ""
            lines.append(f"conditions  from step {event['step'] + 1} on: perturb {event['perturb']}{frozen}")
        elif event["event"] == "end":
            lines.append(f"end         after step {event['step']}: weights sha256 {event['weights_sha256']}")
    if journal.torn_bytes:
        torn = plural(journal.torn_bytes, "byte")
        lines.append(f"torn        half a record at the end of the file, {torn}, which is ignored")
    return lines


def describe_step(journal: Any, step: int) -> list[str]:
    """Return the lines of ``zokernel journal show --step``; steps count from one, as everywhere on the command line.

    Raises:
        UsageError: If the journal has no such step.
    """
    if not 1 <= step <= journal.num_steps:
        num_steps = plural(journal.num_steps, "step")
        raise UsageError(f"{journal.path} holds {num_steps}: choose one of 1 to {journal.num_steps}, not {step}.")
    record = journal.steps[step - 1]
    rates = ", ".join(f"{rate:g}" for rate in record.learning_rates)
    return [f"step {step}: learning rate {rates}", *(f"  loss {loss!r}" for loss in record.losses)]


def truncate(args: argparse.Namespace) -> int:
    """Truncate a journal to some step, and keep the old file beside it as ``.bak``, ``.bak.2`` and so on.

    Raises:
        UsageError: If no step is given, or the journal has no such step.
        RunError: If a run is using the journal.
    """
    from zokernel.finetune.storage.lock import exclusive
    from zokernel.journal.reader import Journal, find

    if args.step is None:
        raise UsageError("Say how many steps to keep: --step N.")
    path = find(args.journal)
    with exclusive(path.parent):
        journal = Journal.read(path, up_to_damage=args.damaged)
        if args.step > journal.num_steps or args.step < 0:
            good = plural(journal.num_steps, "good step")
            raise UsageError(f"{path} holds {good}: choose one of 0 to {journal.num_steps}.")
        size = journal.end_of_step(args.step)
        backup = _unused_path(path.with_name(path.name + ".bak"))
        with whole_file(backup) as partial:
            shutil.copyfile(path, partial)
        with whole_file(path) as partial:
            shutil.copyfile(path, partial)
            os.truncate(partial, size)
    print(f"{path}: {plural(args.step, 'step')} kept; the file as it was is {backup}.")
    return 0


def _unused_path(path: Path) -> Path:
    """Return the path, or the first one with a number after it, that is not taken: an earlier backup is kept."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())
