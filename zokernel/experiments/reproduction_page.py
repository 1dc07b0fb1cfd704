"""The page of one experiment, or of a whole ``zokernel reproduce``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from zokernel.experiments.base import MODULES, VERDICTS
from zokernel.experiments.runner import ERROR_FILE, duration
from zokernel.experiments.storage import load_record
from zokernel.reporting.page import Page, Picture, Section, Table, cell, tables_of, words
from zokernel.reporting.svg import read_svg


def is_reproduction(folder: Path) -> bool:
    """Say whether a folder holds results of experiments."""
    return load_record(folder) is not None or any(load_record(folder / name) for name in MODULES)


def read_reproduction(folder: Path) -> Page:
    """Return the page of a result folder.

    Args:
        folder: Output folder of ``zokernel reproduce``, or that of one experiment in it.
    """
    single = load_record(folder)
    if single is not None:
        section = experiment_section(single, folder)
        return Page(
            title=single["name"],
            kind="reproduce",
            summary=[f"{single['title']}.", single["summary"]],
            facts=_facts([single]),
            sections=[_verdict_section([single]), section],
            command=single.get("command", ""),
            made_with=_made_with(single),
        )
    records = [record for name in MODULES if (record := load_record(folder / name))]
    return Page(
        title="Reproducing the three papers",
        kind="reproduce",
        summary=_summary(records, failed=[name for name in MODULES if (folder / name / ERROR_FILE).exists()]),
        facts=_facts(records),
        sections=[
            _verdict_section(records),
            *(experiment_section(record, folder / record["name"]) for record in records),
        ],
        command=_command(records),
        made_with=_made_with(records[0]),
    )


def _summary(records: list[dict[str, Any]], failed: list[str]) -> list[str]:
    """Return what was run and judged, in plain words."""
    scales = _scales(records)
    verdicts = Counter(verdict["verdict"] for record in records for verdict in record["verdicts"])
    summary = [
        f"{len(records)} of {len(MODULES)} experiments of the three papers, at scale {', '.join(scales)}, took "
        f"{duration(sum(record['seconds'] for record in records))}. Together they judged "
        f"{sum(verdicts.values())} times: " + ", ".join(f"{verdicts[name]} {name}" for name in VERDICTS) + ".",
    ]
    if "smoke" in scales:
        summary.append(
            "Smoke scale shows that everything runs; its numbers come from tiny settings and decide nothing."
        )
    if failed:
        summary.append(f"Failed: {', '.join(failed)}; see {ERROR_FILE} in their folders.")
    return summary


def _scales(records: list[dict[str, Any]]) -> list[str]:
    return sorted({record["config"]["scale"] for record in records})


def _command(records: list[dict[str, Any]]) -> str:
    """Return the command that repeats all of the experiments."""
    if len(records) == 1:
        return records[0].get("command", "")
    seeds = sorted({record["config"]["seed"] for record in records})
    names = "all" if len(records) == len(MODULES) else " ".join(record["name"] for record in records)
    return f"zokernel reproduce {names} --scale {_scales(records)[0]}" + (f" --seed {seeds[0]}" if seeds[0] else "")


def experiment_section(record: dict[str, Any], folder: Path) -> Section:
    """Return one experiment: summary, figures, and every number as a table."""
    prefix = record["name"].replace("/", "-")
    return Section(
        title=f"{record['name']}: {record['title']}",
        anchor=prefix,
        text=[record["summary"]],
        pictures=[picture for stem in record["figures"] if (picture := _picture(folder, stem, prefix, record))],
        tables=tables_of(record["numbers"]),
        command=record.get("command", ""),
    )


def _picture(folder: Path, stem: str, prefix: str, record: dict[str, Any]) -> Picture | None:
    path = folder / f"{stem}.svg"
    if not path.is_file():
        return None
    alt = f"Figure {words(stem)} of the experiment {record['title']}. {record['summary']}"
    return read_svg(path, f"{prefix}-{stem}", title=words(stem), alt=alt)


def _verdict_section(records: list[dict[str, Any]]) -> Section:
    rows = [
        [cell(record["name"]), cell(verdict["verdict"]), cell(verdict["claim"]), cell(verdict["reason"])]
        for record in records
        for verdict in record["verdicts"]
    ]
    table = Table("What each run says about the papers' claims", ["experiment", "verdict", "claim", "why"], rows)
    return Section("Verdicts", "verdicts", tables=[table])


def _facts(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    counts = Counter(verdict["verdict"] for record in records for verdict in record["verdicts"])
    return [
        *([("experiments", str(len(records)))] if len(records) > 1 else []),
        *((name, str(counts[name])) for name in VERDICTS if counts[name]),
        ("time", duration(sum(record["seconds"] for record in records))),
    ]


def _made_with(record: dict[str, Any]) -> str:
    parts = [f"{name} {version}" for name, version in record["versions"].items()]
    if record.get("commit"):
        parts.append(f"commit {record['commit']}")
    return ", ".join(parts)
