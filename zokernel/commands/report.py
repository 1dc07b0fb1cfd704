"""Write one HTML page about a run, or show a run in progress.

zokernel report runs/reviews                 # writes runs/reviews/report.html
zokernel report runs/reproduce --output page.html
zokernel report --serve runs/reviews         # http://127.0.0.1:8321, until Ctrl-C
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from zokernel.commands.parser import add_switch
from zokernel.errors import UsageError
from zokernel.files import check_output_file
from zokernel.flags import given_flags
from zokernel.reporting.page import Page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``zokernel report``."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="output_dir of a run, or the .json file of a plan")
    parser.add_argument(
        "--output", type=Path, help="where to write (default: report.html in the folder of the run, or beside the plan)"
    )
    add_switch(parser, "--serve", help="show the run live on this machine, until Ctrl-C")
    parser.add_argument("--port", type=int, default=8321, help="port of --serve; 0 takes a free one")


def main(args: argparse.Namespace) -> int:
    """Write the page, or serve it."""
    if args.serve:
        return serve(args)
    if "port" in given_flags(shlex.split(args.command_line)):
        raise UsageError("--port is for --serve: add it, or leave both out.")
    from zokernel.reporting.html import write_report

    folder = args.folder
    target = args.output or (folder if folder.is_dir() else folder.parent) / "report.html"
    check_output_file(target, "--output")
    write_report(read(folder), target)
    print(f"written: {target}")
    return 0


def serve(args: argparse.Namespace) -> int:
    """Show the run live until Ctrl-C.

    Raises:
        UsageError: If ``--output`` is given, too.
    """
    if args.output is not None:
        raise UsageError("--serve writes no file: leave out --output.")
    from zokernel.reporting.serve import make_server

    with make_server(args.folder, port=args.port, read=read) as server:
        print(f"http://127.0.0.1:{server.server_address[1]} shows {args.folder} (only on this machine; Ctrl-C stops)")
        server.serve_forever()
    return 0


def read(folder: Path) -> Page:
    """Return the page of whatever run a folder holds, experiments of ``zokernel reproduce`` included."""
    from zokernel.experiments.reproduction_page import is_reproduction, read_reproduction
    from zokernel.reporting.run_page import read_run

    return read_reproduction(folder) if is_reproduction(folder) else read_run(folder)
