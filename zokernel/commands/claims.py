"""List the papers' claims: the verdict on each, its evidence, and what would refute it.

zokernel claims
zokernel claims --paper KerZOO --verdict "does not hold"
zokernel claims kerzoo-iterations --json
zokernel claims --check docs/results      # exit code 1 if a result contradicts the ledger
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections import Counter
from pathlib import Path

from zokernel.commands.parser import add_switch
from zokernel.errors import UsageError
from zokernel.experiments.base import VERDICTS
from zokernel.experiments.claims import PAPERS, Claim, as_json, contradictions, load_claims, save_claims, update
from zokernel.readable import plural


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``zokernel claims``."""
    parser.add_argument("ids", nargs="*", metavar="ID", help="claims to show in full (default: one line per claim)")
    parser.add_argument("--paper", choices=PAPERS, help="only this paper's claims")
    parser.add_argument("--verdict", choices=VERDICTS, help="only claims with this verdict")
    add_switch(parser, "--json", help="print JSON")
    add_switch(parser, "--full", help="show reasons, tests and numbers of every claim")
    parser.add_argument("--check", type=Path, metavar="DIR", help="compare the ledger with the results in DIR")
    parser.add_argument("--update", type=Path, metavar="DIR", help="write the numbers of the results in DIR into it")


def main(args: argparse.Namespace) -> int:
    """Print, check or update the ledger."""
    claims = load_claims()
    for folder in (args.check, args.update):
        if folder is not None and not folder.is_dir():
            raise UsageError(f"There is no folder {folder}.")
    if args.update:
        update(claims, args.update)
        save_claims(claims)
    if args.check or args.update:
        conflicts = contradictions(claims, args.check or args.update)
        print("\n".join(conflicts) if conflicts else f"{len(claims)} claims agree with {args.check or args.update}.")
        return 1 if conflicts else 0
    selected = [
        claim
        for claim in claims
        if (not args.ids or claim.id in args.ids)
        and args.paper in (None, claim.paper)
        and args.verdict in (None, claim.verdict)
    ]
    missing = set(args.ids) - {claim.id for claim in claims}
    if missing:
        raise UsageError(f"There is no claim {sorted(missing)[0]!r}: 'zokernel claims' lists them.")
    if args.json:
        print(as_json(selected))
        return 0
    full = args.full or bool(args.ids)
    for paper in PAPERS:
        of_paper = [claim for claim in selected if claim.paper == paper]
        if of_paper:
            print(f"{paper}\n")
            print("\n".join(describe(claim) if full else line(claim) for claim in of_paper), end="\n\n")
    counts = Counter(claim.verdict for claim in selected)
    print(f"{plural(len(selected), 'claim')}: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS))
    return 0


def line(claim: Claim) -> str:
    """Return verdict, name and claim, wrapped to the terminal."""
    width = max(60, min(shutil.get_terminal_size().columns, 150))
    head = f"  {claim.verdict:<22}  {claim.id:<28}  "
    if width < 100:
        return f"  {claim.verdict}: {claim.id}\n" + textwrap.indent(textwrap.fill(claim.claim, width - 4), "    ")
    return textwrap.fill(claim.claim, width, initial_indent=head, subsequent_indent=" " * len(head))


def describe(claim: Claim) -> str:
    """Return everything the ledger has on a claim."""
    tested = [*claim.experiments, *claim.tests] or ["nothing here"]
    run = ", ".join(text for text in (claim.scale, claim.commit) if text)
    parts = [
        f"{claim.id}: {claim.verdict}",
        textwrap.indent(textwrap.fill(f"{claim.claim} ({claim.where})", 110), "    "),
        textwrap.indent(textwrap.fill(claim.why, 110), "    "),
        *(f"    - {number}" for number in claim.measured),
        *(
            textwrap.indent(textwrap.fill(f"{name}: {text}", 110), "    ")
            for name, text in (("evidence", claim.evidence), ("would be refuted by", claim.refuted_by))
            if text
        ),
        textwrap.indent(textwrap.fill(f"tested by {', '.join(tested)}", 110), "    "),
    ]
    if run:
        parts.append(f"    run: {run}")
    return "\n".join(parts) + "\n"
