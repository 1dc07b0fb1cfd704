"""The page of a training run."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from zokernel.readable import plural, readable_bytes, readable_seconds
from zokernel.reporting.page import Page, Section, Table, table_of_rows, words
from zokernel.reporting.plan_page import plan_section
from zokernel.reporting.training import TrainingRun, find_plan, read_training
from zokernel.reporting.training_pictures import pictures
from zokernel.reporting.training_text import alert, facts, has_reasons, summary, title

SHOWN_STEPS = 200
SHOWN_CHARACTERS = 600  # of each text of a sample


def read_finetune(folder: Path) -> Page:
    """Return the page of a training run, finished or not.

    Args:
        folder: Its ``output_dir``.
    """
    run = read_training(folder)
    plan = find_plan(folder)
    sections = [
        _reasons(run.metrics),
        Section("Training", "training", pictures=pictures(run)) if run.rows else None,
        plan_section(plan) if plan is not None else None,
        _samples(run.metrics),
        _offload(run.metrics.get("offload")),
        Section("Numbers", "numbers", tables=[_numbers(run.metrics)]) if run.metrics else None,
        _steps(run),
    ]
    versions = run.metrics.get("versions", {})
    return Page(
        title=title(run),
        kind="finetune",
        summary=summary(run),
        facts=facts(run),
        sections=[section for section in sections if section is not None],
        command=command(run),
        made_with=", ".join(f"{name} {version}" for name, version in versions.items()),
        alert=alert(run),
    )


def command(run: TrainingRun) -> str:
    """Return the command line that repeats the run, as far as its folder says."""
    if run.metrics:
        return str(run.metrics.get("command", ""))
    words_ = run.run.get("command", [])
    return shlex.join(["zokernel", *words_]) if words_ else ""


def _reasons(metrics: dict[str, Any]) -> Section | None:
    """Return why the loss did not fall; None if it fell, or nobody looked."""
    if not has_reasons(metrics):
        return None
    diagnosis, text = metrics["diagnosis"], []
    if metrics.get("went_wrong"):  # else the alert says it
        text = [f"{diagnosis['outcome']} The reasons took {plural(diagnosis.get('forwards', 0), 'more forward pass')}."]
    return Section("Why the loss did not fall", "reasons", text=text, items=list(diagnosis["reasons"]))


def _samples(metrics: dict[str, Any]) -> Section | None:
    """Return what the model wrote before and after training; None if it wrote nothing."""
    samples = metrics.get("samples") or []
    if not samples:
        return None
    trained = bool(metrics["steps"])
    samples_as_text = []
    for sample in samples:
        written = [("Before training", sample["before"]), ("After training", sample["after"])]
        texts = [("Prompt", sample["prompt"]), *(written if trained else [("Written", sample["before"])])]
        texts += [("In the data", sample["answer"])] if sample["answer"] else []
        samples_as_text.append([(name, _short(text or "")) for name, text in texts])
    return Section("Samples", "samples", text=["Greedy answers to held-out prompts."], samples=samples_as_text)


def _short(text: str) -> str:
    """Return the beginning of a text, or that there is none."""
    return (text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ...") or "(nothing)"


def _offload(offload: dict[str, Any] | None) -> Section | None:
    """Return what streaming the weights took; None if they were in memory."""
    if not offload:
        return None
    passes, peak, before = offload["passes"], offload["anonymous_peak"], offload["anonymous_before"]
    per_pass = (lambda count: f" ({readable_bytes(count / passes)} per pass)") if passes else (lambda count: "")
    rows = {
        "weights that were streamed": readable_bytes(offload["weights_bytes"]),
        "passes over them": f"{passes:,}",
        "bytes read": f"{readable_bytes(offload['bytes_read'])}{per_pass(offload['bytes_read'])}",
        "bytes written": f"{readable_bytes(offload['bytes_written'])}{per_pass(offload['bytes_written'])}",
        "time per pass": "not measured" if not passes else readable_seconds(offload["seconds_per_pass"]),
        "peak anonymous memory": "not told by this system"
        if peak is None
        else f"{readable_bytes(peak)} ({readable_bytes(before)} before training)",
    }
    explanation = (
        "Weights stay in files, or in host memory, and come in block by block; all losses of a step share one pass. "
        "These numbers are of the last process of the run and include evaluations between steps. Rows of an embedding "
        "that are looked up are not counted as read. Anonymous memory is what no file backs: the weights in their "
        "files are not in it, Python and its libraries are."
    )
    table = table_of_rows("What it took", [{"quantity": name, "value": value} for name, value in rows.items()])
    return Section("Streamed weights", "offload", text=[explanation], tables=[table])


def _numbers(metrics: dict[str, Any]) -> Table:
    hidden = {"evaluations", "command", "versions", "before", "after", "diagnosis", "samples", "offload"}
    hidden |= {"went_wrong", "warning"}
    rows = [
        {"quantity": words(key), "value": readable_bytes(value) if key.startswith("peak_memory") and value else value}
        for key, value in metrics.items()
        if key not in hidden and value not in (None, "", [], {})
    ]
    rows += [
        {"quantity": f"{words(name)} {when} training", "value": value}
        for when in ("before", "after")
        for name, value in metrics[when].items()
    ]
    return table_of_rows("Everything measured", rows)


def _steps(run: TrainingRun) -> Section | None:
    """Return evaluations and steps as tables; of rewards with the spread of the members."""
    tables = [table_of_rows("Validation during training", run.evaluations)] if run.evaluations else []
    if run.rows:
        interval = math.ceil(len(run.rows) / SHOWN_STEPS)
        note = "" if interval == 1 else f"Every {interval}th step; all of them are in steps.jsonl."
        tables.append(table_of_rows("Steps", [_step(run, row) for row in run.rows[::interval]], note))
    return Section("Steps", "steps", tables=tables) if tables else None


def _step(run: TrainingRun, row: dict[str, float]) -> dict[str, Any]:
    spread = run.rewards.get(int(row["step"]))
    rewards = {} if spread is None else {f"{name} reward": spread[name] for name in ("least", "median", "most")}
    return {**row, **rewards}
