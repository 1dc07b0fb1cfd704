"""Commit-ready results: ``python docs/publish.py runs/cpu`` copies a run of ``zokernel reproduce all`` here.

Keeps every ``result.json`` (six significant digits) and figure (PNG, reduced colours), refreshes the ledger's numbers
and the expected seconds of every experiment, and writes the two generated pages.  Without a folder, only the pages.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from sentences import item, split

from zokernel.experiments.base import MODULES, Config
from zokernel.experiments.claims import PAPERS, Claim, contradictions, load_claims, save_claims, update
from zokernel.experiments.criteria import VERDICTS
from zokernel.experiments.runner import duration
from zokernel.experiments.storage import RECORD, command, load_record

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS / "results"
SECONDS = DOCS.parent / "zokernel" / "experiments" / "seconds.json"
WIDEST = 1400  # pixels


def compact(value: Any) -> Any:
    """Round numbers to six significant digits, recursively."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: compact(item) for key, item in value.items()}
    return [compact(item) for item in value] if isinstance(value, list) else value


def portable(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record whose options, and so its command, name files without the folders of the machine it ran on."""
    config = record["config"]
    options = {
        name: "/".join(Path(value).parts[-2:]) if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in config["options"].items()
    }
    repeat = command(record["name"], Config(config["scale"], config["seed"], options))
    return record | {"config": config | {"options": options}, "command": repeat}


def small_png(source: Path) -> bytes:
    """Return a figure with at most 64 colours and ``WIDEST`` pixels: a fifth of the bytes, the same to the eye."""
    from PIL import Image

    with Image.open(source) as image:
        flat = image.convert("RGB")
    if flat.width > WIDEST:
        flat = flat.resize((WIDEST, round(flat.height * WIDEST / flat.width)), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    flat.quantize(64, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def copy_results(folder: Path) -> list[str]:
    """Copy the finished experiments of ``folder`` into the documentation; return their names."""
    seconds = json.loads(SECONDS.read_text(encoding="utf-8"))
    copied = []
    for name in MODULES:
        record = load_record(folder / name)
        if record is None:
            continue
        target = RESULTS / name
        target.mkdir(parents=True, exist_ok=True)
        for old in target.glob("*.png"):
            old.unlink()
        for stem in record["figures"]:
            (target / f"{stem}.png").write_bytes(small_png(folder / name / f"{stem}.png"))
        (target / RECORD).write_text(json.dumps(compact(portable(record))) + "\n", encoding="utf-8")
        seconds.setdefault(name, {})[record["config"]["scale"]] = round(record["seconds"], 1)
        copied.append(name)
    SECONDS.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
    return copied


def pages() -> dict[Path, str]:
    """Return the generated pages by path: the ledger, and all experiments with their figures."""
    claims = load_claims()
    return {RESULTS / "claims.md": claims_page(claims), RESULTS / "experiments.md": experiments_page()}


def claims_page(claims: list[Claim]) -> str:
    """Return the ledger as a page."""
    counts = {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in VERDICTS}
    lines = [
        "# The claims ledger",
        "",
        f"The ledger holds {len(claims)} claims of {len(PAPERS)} papers: "
        + ", ".join(f"{count} *{verdict}*" for verdict, count in counts.items())
        + ".",
        "Each row names the experiment or the test that decides it.",
        "It says how many seeds ran, how learning rates were matched, and how large the trained network was.",
        "It also says which outcome would change the verdict.",
        "",
        "*Not resolved* means that the interval of the measurement includes the bound that decides.",
        "Brackets are 95% intervals, or ranges where the row says so.",
        "A test fails when a committed result contradicts a verdict or a number on this page.",
        "",
        "`zokernel claims` prints the ledger in a terminal.",
        "The errata are on [the theory page](../theory.md).",
        "This page is written by `python docs/publish.py`.",
        "",
    ]
    for paper in PAPERS:
        lines += [
            f"## {paper}",
            "",
            "| claim | verdict | why, what was measured, on what evidence, what tests it |",
            "|---|---|---|",
        ]
        for claim in claims:
            if claim.paper == paper:
                lines.append(_claim_row(claim))
        lines.append("")
    return "\n".join(lines)


def _claim_row(claim: Claim) -> str:
    measured = "".join(f"<br>• {_cell(str(number))}" for number in claim.measured)
    if claim.evidence:
        measured += f"<br>*Evidence:* {_cell(claim.evidence)}"
    if claim.refuted_by:
        measured += f"<br>*Would be refuted by:* {_cell(claim.refuted_by)}"
    experiments = [f"[{name}](experiments.md#{_anchor(name)})" for name in claim.experiments]
    if len(experiments) > 3:
        experiments = [*experiments[:2], f"and {len(experiments) - 2} more"]
    tests = [f"`{test.rpartition('::')[2]}`" for test in claim.tests]
    labels = [f"[{label}](../theory.md#{label[0].lower()}2-errata)" for label in claim.errata]
    errata = f" (erratum {', '.join(labels)})" if labels else ""
    return (
        f"| {_cell(claim.claim)} <small>{_cell(claim.where)}{errata}; `{claim.id}`</small> | **{claim.verdict}** "
        f"| {_cell(claim.why)}{measured}<br><small>{', '.join([*experiments, *tests]) or 'not tested here'}</small> |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def _anchor(name: str) -> str:
    return name.replace("/", "-")


def experiments_page() -> str:
    """Return a page with every experiment's summary, verdicts and figures."""
    records = {name: record for name in MODULES if (record := load_record(RESULTS / name))}
    total = sum(record["seconds"] for record in records.values())
    lines = [
        "# Every experiment",
        "",
        f"These are the recorded results of {len(records)} of {len(MODULES)} experiments.",
        f"They took {duration(total)} in all, on one or two threads of shared cores.",
        "Each names the command that repeats it; most belong to `zokernel reproduce all --scale cpu`.",
        "The text comes from the experiments, and the numbers are in the `result.json` beside the figures.",
        "This page is written by `python docs/publish.py`.",
        "",
    ]
    for name in MODULES:
        lines += [f"## {name} {{ #{_anchor(name)} }}", ""]
        record = records.get(name)
        if record is None:
            lines += ["Not run at this scale: no result is committed.", ""]
            continue
        lines += [f"*{_cell(record['title'])}.*", "", *split(_cell(record["summary"])), ""]
        lines += [
            item(f"**{v['verdict']}**: {_cell(v['claim'])} {_cell(v['reason'])} (`{v['id']}`)")
            for v in record["verdicts"]
        ]
        lines += [
            "",
            f"`{record['command']}`, {duration(record['seconds'])}, commit `{record['commit']}`; "
            f"[result.json]({name}/{RECORD}).",
            "",
        ]
        for stem in record["figures"]:
            lines += [f"![{stem.replace('_', ' ')} of {name}]({name}/{stem}.png)", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Copy, update, write; exit code 1 if results contradict the ledger."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="output folder of zokernel reproduce")
    folder = parser.parse_args().folder
    if folder is not None:
        print(f"copied {', '.join(copy_results(folder))}")
        claims = load_claims()
        update(claims, RESULTS)
        save_claims(claims)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    sentences = contradictions(load_claims(), RESULTS)
    print("\n".join(sentences) or "no result contradicts the ledger")
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
