"""The claims ledger: what the papers say, how it is tested here, the verdict and the numbers behind it.

``claims.yaml`` is written by people except for the measured values, the commit and the scale, which come from committed
results (``docs/results/**/result.json``).  A verdict is never written by a program: :func:`contradictions` compares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zokernel.errors import MissingDependencyError, UsageError
from zokernel.experiments.base import MODULES
from zokernel.experiments.criteria import NOT_RUN, VERDICTS, combined
from zokernel.experiments.storage import load_record
from zokernel.files import write_text

LEDGER = Path(__file__).with_name("claims.yaml")
PAPERS = ("ZO-eNTK", "NZK", "KerZOO", "Multi-query", "GRZO", "ES")
STATISTICS = ("value", "interval", "mean", "max", "min")
_HEADER = """\
# The claims of the papers, how each is tested here, and what came out. Written by people; the numbers under
# "measured", commit and scale are filled in from committed results by: zokernel claims --update docs/results
# at: experiment#/path/in/numbers (a * takes every value, key=value picks a row); above/below: what a verdict rests on
# (of an interval its lower or upper end). evidence: seeds, matched rate, size; refuted_by: what changes the verdict.
"""


@dataclass
class Measured:
    """A number behind a verdict.

    Attributes:
        what: What it is, with its unit or conditions.
        at: ``experiment#/path``: where it stands among the numbers of ``result.json``.
        statistic: ``value``; ``interval`` (a stored mean and 95% interval); or ``mean`` (with the range), ``max`` or
            ``min`` of the values at ``at``.
        above: The verdict needs the value, or the lower end of its interval, above this.
        below: The verdict needs the value, or the upper end of its interval, below this.
        value: The number.
        low: Lower end of its interval or range.
        high: Upper end.
    """

    what: str
    at: str
    statistic: str = "value"
    above: float | None = None
    below: float | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.what}: not measured yet"
        band = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.what}: {self.value:.4g}{band}"


@dataclass
class Claim:
    """One claim of a paper and what became of it.

    Attributes:
        id: Its name.
        paper: One of ``PAPERS``.
        where: Where it is stated.
        claim: The claim in one sentence.
        verdict: One of ``VERDICTS``.
        why: What decides, in one or two sentences.
        evidence: How many seeds, at which (matched) learning rates, on what and of which size.
        refuted_by: The outcome that would change the verdict.
        errata: Errata of the theory page that it covers.
        experiments: Experiments that test it.
        tests: Tests that decide it, as ``file::function``.
        measured: The numbers.
        commit: Commit of the experiment's run.
        scale: Scale of that run.
    """

    id: str
    paper: str
    where: str
    claim: str
    verdict: str
    why: str
    evidence: str = ""
    refuted_by: str = ""
    errata: list[str] = field(default_factory=list)
    experiments: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    commit: str | None = None
    scale: str | None = None

    def __post_init__(self):
        self.measured = [Measured(**item) if isinstance(item, dict) else item for item in self.measured]
        if self.paper not in PAPERS or self.verdict not in VERDICTS:
            raise ValueError(f"{self.id}: {self.paper!r} is no paper, or {self.verdict!r} no verdict, of the ledger.")
        unknown = [name for name in self.experiments if name not in MODULES]
        if unknown:
            raise ValueError(f"{self.id}: there is no experiment {unknown[0]!r}.")
        for number in self.measured:
            if number.at.partition("#")[0] not in self.experiments or number.statistic not in STATISTICS:
                raise ValueError(f"{self.id}: {number.at!r} names none of its experiments, or a wrong statistic.")
        if self.verdict != NOT_RUN and not (self.experiments or self.tests):
            raise ValueError(f"{self.id}: a judged claim needs an experiment or a test.")
        if self.verdict != NOT_RUN and not (self.evidence and self.refuted_by):
            raise ValueError(f"{self.id}: a judged claim needs its evidence, and what would refute it.")


def load_claims(path: Path = LEDGER) -> list[Claim]:
    """Read the ledger.

    Args:
        path: The YAML file.

    Returns:
        The claims in their order.

    Raises:
        MissingDependencyError: If PyYAML is not installed.
    """
    claims = [Claim(**entry) for entry in _yaml().safe_load(path.read_text(encoding="utf-8"))]
    if len({claim.id for claim in claims}) != len(claims):
        raise ValueError(f"Two claims of {path} have the same id.")
    return claims


def save_claims(claims: Sequence[Claim], path: Path = LEDGER) -> None:
    """Write the ledger, leaving out what is empty."""
    entries = []
    for claim in claims:
        entry = {key: value for key, value in asdict(claim).items() if value not in (None, [], ())}
        if "measured" in entry:
            entry["measured"] = [
                {key: value for key, value in number.items() if value is not None and (key, value) not in _DEFAULTS}
                for number in entry["measured"]
            ]
        entries.append(entry)
    text = _yaml().safe_dump(entries, sort_keys=False, width=118, allow_unicode=True)
    write_text(path, _HEADER + text)


_DEFAULTS = {("statistic", "value")}
OLD_KEYS = {"distribution": "law"}  # what results written by earlier versions call it


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError("pyyaml", "report", "Reading the claims ledger") from error
    return yaml


def values_at(numbers: Any, path: str) -> list[Any]:
    """Return the values of ``result.json`` that a path names.

    Args:
        numbers: The ``numbers`` of a result.
        path: Segments after ``/``: a key, an index, ``key=value`` to pick a row of a list (several with ``&``), or
            ``*`` for all. A slash within a key is written ``~1``.

    Returns:
        One value, or with ``*`` all of them.

    Raises:
        UsageError: If there is nothing of that name.

    Example:
        >>> values_at({"rows": [{"P": 1, "error": 3.0}, {"P": 5, "error": 1.5}]}, "/rows/P=5/error")
        [1.5]
        >>> values_at({"a": {"x": [1, 2], "y": [3]}}, "/a/*/*")
        [1, 2, 3]
    """
    values = [numbers]
    for raw in path.strip("/").split("/"):
        segment = raw.replace("~1", "/")
        values = [item for node in values for item in _step(node, segment, path)]
    return values


def _step(value: Any, segment: str, path: str) -> list[Any]:
    if segment == "*":
        return list(value.values()) if isinstance(value, dict) else list(value)
    if isinstance(value, dict) and segment in value:
        return [value[segment]]
    if isinstance(value, list):
        if segment.lstrip("-").isdigit() and -len(value) <= int(segment) < len(value):
            return [value[int(segment)]]
        conditions = [part.partition("=")[::2] for part in segment.split("&")]
        rows = [row for row in value if isinstance(row, dict) and all(_field(row, k) == v for k, v in conditions)]
        if len(rows) == 1:
            return rows
    raise UsageError(f"There is no single {segment!r} in the results at {path!r}.")


def _field(row: dict[str, Any], key: str) -> str:
    return str(row.get(key, row.get(OLD_KEYS.get(key, ""))))


def measure(number: Measured, record: dict[str, Any]) -> tuple[float, float | None, float | None]:
    """Return value, low and high of a ledger's number as a result has it.

    Args:
        number: The entry.
        record: The experiment's ``result.json``.

    Returns:
        Value and its interval or range, rounded to five significant digits.

    Raises:
        UsageError: If the result has no such number.
    """
    values = values_at(record["numbers"], number.at.partition("#")[2])
    if number.statistic == "interval":
        ((value, low, high),) = values
    elif number.statistic == "mean":
        value, low, high = sum(values) / len(values), min(values), max(values)
    elif number.statistic in ("max", "min"):
        value, low, high = (max if number.statistic == "max" else min)(values), None, None
    else:
        (value,), low, high = values, None, None
    return _rounded(value), _rounded(low), _rounded(high)


def _rounded(value: Any) -> Any:
    return None if value is None else float(f"{value:.5g}")


def update(claims: Sequence[Claim], folder: Path) -> None:
    """Fill in the measured values, commit and scale from the results in ``folder``; verdicts stay as they are."""
    for claim in claims:
        records = {name: record for name in claim.experiments if (record := load_record(folder / name))}
        for number in claim.measured:
            record = records.get(number.at.partition("#")[0])
            if record is not None:
                number.value, number.low, number.high = measure(number, record)
        if records:
            claim.commit = ", ".join(dict.fromkeys(str(record.get("commit")) for record in records.values()))
            claim.scale = ", ".join(dict.fromkeys(record["config"]["scale"] for record in records.values()))
        elif claim.tests and claim.verdict != "not run here":
            claim.scale = "test suite"


def contradictions(claims: Sequence[Claim], folder: Path) -> list[str]:
    """Compare the ledger with the results in ``folder``.

    Args:
        claims: The ledger.
        folder: Parent of the experiments' folders.

    Returns:
        What does not agree, a sentence each: a verdict that its runs contradict (those of several experiments are
        combined as parts of the claim), a number outside of what the verdict rests on, one that differs from the
        result's, or a verdict on a claim that is not in the ledger.
    """
    by_id = {claim.id: claim for claim in claims}
    verdicts_by_claim: dict[str, dict[str, str]] = {}
    sentences = []
    for name in MODULES:
        record = load_record(folder / name)
        for verdict in record["verdicts"] if record else ():
            claim = by_id.get(verdict["id"])
            if claim is None:
                sentences.append(f"{name} judges {verdict['id']!r}, which is not in the ledger.")
            elif name not in claim.experiments:
                sentences.append(f"{name} judges {claim.id}, whose entry does not name it.")
            elif verdict["verdict"] != NOT_RUN:
                verdicts_by_claim.setdefault(claim.id, {})[name] = verdict["verdict"]
    for claim in claims:
        runs = verdicts_by_claim.get(claim.id, {})
        if runs and combined(runs.values()) != claim.verdict:
            texts = " and ".join(f"{name} says {verdict!r}" for name, verdict in runs.items())
            sentences.append(f"{claim.id}: the ledger says {claim.verdict!r}, {texts}.")
        for number in claim.measured:
            record = load_record(folder / number.at.partition("#")[0])
            if record is not None:
                sentences += _compare(claim, number, measure(number, record))
    return sentences


def _compare(claim: Claim, number: Measured, results: tuple[float, float | None, float | None]) -> list[str]:
    sentences = []
    for stored, measured in zip((number.value, number.low, number.high), results, strict=True):
        if (stored is None) != (measured is None) or (
            stored is not None and measured is not None and not math.isclose(stored, measured, rel_tol=1e-4)
        ):
            sentences.append(f"{claim.id}: {number.what} is {stored} in the ledger and {measured} in the results.")
    least, most = results[1:] if number.statistic == "interval" else (results[0], results[0])
    if number.above is not None and not (least is not None and least > number.above):
        sentences.append(f"{claim.id}: {number.what} is {least}, not above {number.above}.")
    if number.below is not None and not (most is not None and most < number.below):
        sentences.append(f"{claim.id}: {number.what} is {most}, not below {number.below}.")
    return sentences


def as_json(claims: Sequence[Claim]) -> str:
    """Return the claims as JSON."""
    return json.dumps([asdict(claim) for claim in claims], indent=2)
