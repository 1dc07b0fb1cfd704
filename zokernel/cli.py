"""The ``zokernel`` command: one table of subcommands, each a module of :mod:`zokernel.commands`.

A module is imported only when its subcommand is called.  :class:`zokernel.commands.parser.Command` says what it
provides.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib
import importlib.util
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from zokernel._version import __version__
from zokernel.commands import finetune_flags
from zokernel.commands.messages import format_message, is_replica, set_message_flags, set_up_messages
from zokernel.commands.parser import BOOLEANS, Command, CommandParser
from zokernel.errors import MissingDependencyError, UsageError, ZokernelError, missing_extra
from zokernel.files import explain_write_error
from zokernel.private_apis import exit_at_once

SECTIONS: dict[str, dict[str, str]] = {
    "train": {
        "finetune": "fine-tune a language model with forward passes only",
        "demo": "run finetune on a real model and movie reviews, in minutes, without a GPU",
    },
    "before training": {
        "plan": "choose perturbations, eps and learning rate, from forward passes only",
        "kernel": "compare zeroth-order and first-order kernels: heatmaps and error curves",
        "evolve": "predict loss and outputs under zeroth-order training (NZK)",
        "fetch": "download a model or data set that installs from a package registry",
    },
    "after training": {
        "predict": "answer new rows with a finished run",
        "report": "write one HTML page about a run; --serve shows it live",
        "journal": "show, verify or truncate the journal of a run",
        "replay": "rebuild the weights of any step from the base and the journal",
        "merge": "add a trained adapter to the weights of its base",
    },
    "papers": {
        "reproduce": "reproduce figures and tables of three papers",
        "claims": "list the claims of six papers, how each is tested here, and the verdicts",
    },
}
COMMANDS = {name: summary for section in SECTIONS.values() for name, summary in section.items()}

# What the commands around a fine-tuning run need beside zokernel's own dependencies.
PACKAGES = ("transformers", "accelerate")
NEED_PACKAGES = ("finetune", "demo", "plan", "predict", "merge", "replay")
NEED_PACKAGES_FOR_HELP = ("finetune", "demo", "plan")  # whose flags are those of their classes

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
    sections = (
        "\n".join([title, *(f"  {name:<{width}}  {summary}" for name, summary in commands.items())])
        for title, commands in SECTIONS.items()
    )
    parser = argparse.ArgumentParser(
        prog="zokernel",
        usage="zokernel COMMAND [flags]",
        description="Zeroth-order fine-tuning, with forward passes only, and the kernels behind it.\n\n"
        "zokernel finetune --train_file reviews.csv --label_words bad good --output_dir runs/mine",
        epilog="\n\n".join(sections) + "\n\n'zokernel COMMAND --help' shows how to use one of them; --debug shows the "
        "traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"zokernel {__version__}", help=argparse.SUPPRESS)
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
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
        MissingDependencyError: If it needs an extra that is not installed.
    """
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else f": choose one of {', '.join(COMMANDS)}"
        raise UsageError(f"There is no command {name!r}{hint}.")
    if name in NEED_PACKAGES_FOR_HELP:
        look_for_packages(name)
    try:
        module = importlib.import_module(f"zokernel.commands.{name}")
        parser = CommandParser(name, module.__doc__)
        module.add_arguments(parser)
    except ModuleNotFoundError as error:
        raise missing_extra(error, f"'zokernel {name}'") or error from error
    return module, parser


def dispatch(name: str, argv: Sequence[str]) -> int:
    """Run the subcommand ``name`` on the arguments after it, and return its exit code.

    Raises:
        RunError: If a file cannot be written, among others that the subcommand raises.
    """
    if name in finetune_flags.COMMANDS:
        finetune_flags.refuse_unknown_flags(name, argv)
    with _exit_on_interrupt(), _without_garbage_collection():
        command, parser = load(name)
    set_message_flags(parser.flags)
    args = parser.parse(argv)
    look_for_packages(name)
    try:
        code = command.main(args)
        sys.stdout.flush()  # into a file, perhaps
        return code
    except OSError as error:
        if (failure := explain_write_error(error)) is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _print_nowhere()
        raise failure from error


def look_for_packages(name: str) -> None:
    """Refuse a subcommand whose packages are not installed, before the seconds that importing the others takes.

    Args:
        name: A name in ``COMMANDS``.

    Raises:
        MissingDependencyError: If one is missing, naming the extra that brings it.
    """
    for package in PACKAGES if name in NEED_PACKAGES else ():
        if importlib.util.find_spec(package) is None:  # imports nothing
            raise MissingDependencyError(package, "finetune", f"'zokernel {name}'")


@contextmanager
def _exit_on_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process while libraries load: one that is cut off half-way fails later, in other words."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _exit_interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Spare libraries that load the looks for garbage, which take time and find none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _exit_interrupted(number: int, frame: Any) -> None:
    os.write(2, b"zokernel: interrupted.\n")
    exit_at_once(130)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 could not be done, 2 wrong usage, 130 interrupted."""
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the output has seen enough, as in 'zokernel claims | head'
        _print_nowhere()
        return 141
    except KeyboardInterrupt:
        print("zokernel: interrupted.", file=sys.stderr)
        return 130


def _print_nowhere() -> None:
    """Let what is still to be printed go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: Sequence[str]) -> int:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    argv, debug = _take_debug(argv)
    set_up_messages(debug=debug)
    parser = build_parser()
    if not argv:
        parser.print_help()
        return 2
    if len(argv) > 1 and argv[0] == "help":
        argv = [argv[1], "--help"]
    args = parser.parse_args(argv)
    try:
        return dispatch(args.command, args.arguments)
    except ZokernelError as error:
        if debug:
            traceback.print_exc()
        if not (isinstance(error, UsageError) and is_replica()):  # the first process says the same
            print(format_message(f"zokernel: error: {error}"), file=sys.stderr)
        return error.exit_code


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
