"""``zokernel report``: what every page says, that it needs no network, and that foreign text cannot run in it."""

from __future__ import annotations

import http.client
import json
import math
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser

import pytest

from zokernel.cli import main
from zokernel.commands.report import read
from zokernel.errors import UsageError
from zokernel.reporting.html import render
from zokernel.reporting.page import Page, Section, cell, table_of_rows, tables_of
from zokernel.reporting.plan_page import read_kernel, read_plan
from zokernel.reporting.serve import live_data, make_server
from zokernel.reporting.svg import draw, inline_svg
from zokernel.reporting.training import read_training

KINDS = ("finetune", "plan", "kernel", "evolve", "reproduce")


@pytest.fixture(scope="session")
def pages(run_folders):
    """HTML of every kind of run."""
    return {kind: render(read(run_folders[kind])) for kind in KINDS}


class Outline(HTMLParser):
    """Collects what a page would load, its ids, and the text of its tables."""

    def __init__(self):
        super().__init__()
        self.loads, self.ids, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        for name in ("src", "href", "xlink:href", "data", "action"):
            if values.get(name) and not values[name].startswith(("#", "data:")):
                self.loads.append(values[name])


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_is_self_contained(kind, pages):
    outline = Outline()
    outline.feed(pages[kind])
    assert outline.loads == []
    assert len(outline.ids) == len(set(outline.ids)), "two elements share an id"
    assert "default-src 'none'" in pages[kind]
    assert "url(http" not in pages[kind]
    assert outline.tags.count("script") == 1
    assert {"svg", "table", "h1", "dialog"} <= set(outline.tags)
    assert pages[kind].count('role="img"') == pages[kind].count("<desc") > 0


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "finetune",
            ["No gradient was computed", "24 test examples", "zokernel finetune", "Validation during training"],
        ),
        ("plan", ["no gradient was taken", "zokernel plan", "Predicted and measured with real gradients"]),
        ("kernel", ["exact formula", "rho", "zokernel kernel", "jl bound"]),
        ("evolve", ["stable", "loss evaluations", "zokernel evolve", "simulated mean"]),
        ("reproduce", ["holds under conditions", "zokernel reproduce", "decide nothing", "Similar pairs|P x T"]),
    ],
)
def test_every_page_says_what_happened_and_how_to_repeat_it(kind, words, pages):
    text = re.sub(r"<[^>]*>", " ", pages[kind])
    for word in words:
        assert re.search(word, text), word


def test_the_command_repeats_the_run(run_folders):
    for kind in ("kernel", "evolve", "plan", "finetune"):
        command = read(run_folders[kind]).command
        assert command.startswith(f"zokernel {kind} --"), command
    assert read(run_folders["reproduce"] / "nzk/linear_d2").command == (
        "zokernel reproduce nzk/linear_d2 --scale smoke --seed 0"
    )


def test_an_unfinished_run_is_read_from_its_journal(run_folders, tmp_path):
    run, folder = run_folders["finetune"], tmp_path / "going"
    folder.mkdir()
    shutil.copy(run / "journal.zkj", folder)
    whole, unfinished = read_training(run), read_training(folder)
    assert not unfinished.finished
    assert unfinished.method == "mezo"
    assert [row["step"] for row in unfinished.rows] == [row["step"] for row in whole.rows]
    for early, late in zip(unfinished.rows, whole.rows, strict=True):
        assert early["loss"] == pytest.approx(late["loss"], rel=1e-5)
        assert early["projected_gradient"] == pytest.approx(late["projected_gradient"], rel=1e-4)
    assert [e["step"] for e in unfinished.evaluations] == [0, 20, 40]
    assert "40 steps so far" in " ".join(read(folder).summary)
    # half a record at the end: the write that a crash cut off
    data = (folder / "journal.zkj").read_bytes()
    (folder / "journal.zkj").write_bytes(data[:-3])
    assert len(read_training(folder).rows) == 40


def test_a_run_without_steps_shows_scores_only(run_folders, tmp_path):
    metrics = json.loads((run_folders["finetune"] / "metrics.json").read_text())
    metrics |= {"steps": 0, "forwards": 0, "forwards_per_step": None, "evaluations": [], "after": metrics["before"]}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    shutil.copy(run_folders["finetune"] / "run.json", tmp_path)
    page = read(tmp_path)
    assert page.title.endswith("as it is")
    assert page.summary[0].startswith("No step was taken. On 24 test examples: accuracy")
    assert "backpropagation" not in render(page)


def test_predictions_stand_next_to_what_was_measured(run_folders, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folders["finetune"], folder)
    shutil.copy(run_folders["plan"] / "plan.json", folder)
    shutil.copy(run_folders["evolve"] / "evolution.json", folder)
    text = render(read(folder))
    assert "rms slope, predicted by the plan" in text
    assert "predicted (zokernel evolve)" in text
    data = live_data(folder)
    assert data["slope"][0] > 0
    assert len(data["prediction"]["expected_loss"]) == len(data["prediction"]["step"])


def test_directions_are_counted_in_words(run_folders):
    plan = json.loads((run_folders["plan"] / "plan.json").read_text())
    for count, words in ((1, "1 direction"), (1200, "1,200 directions")):
        plan["plan"]["required"] = {"0.3": count}
        assert f"A relative error of 0.3 needs {words} per step." in read_plan(plan).summary
    kernel = json.loads((run_folders["kernel"] / "kernel.json").read_text())
    for count, words in ((1, "1 direction"), (1200, "1,200 directions")):
        kernel["rows"][0]["P"] = count
        assert read_kernel(kernel).summary[0].startswith(f"With {words} the kernel")


def test_foreign_text_cannot_run():
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    page = Page(
        evil,
        "kernel",
        [evil],
        [(evil, evil)],
        [Section(evil, "a", [evil], tables=[table_of_rows(evil, [{evil: evil}])])],
        evil,
    )
    text = render(page)
    assert text.count("<script>") == 1
    assert "<img" not in text
    drawing = '<svg viewBox="0 0 1 1" onload="x()"><script>alert(1)</script><g id="a" onclick=\'x()\'/></svg>'
    cleaned = inline_svg(drawing, "p", title=evil, alt=evil)
    assert not re.search(r"<script|onload|onclick|<img", cleaned)


def test_drawings_follow_the_page():
    """Ids are the page's own, black and white are its colours, text stays text."""
    picture = draw(lambda figure: figure.subplots().plot([0, 1], [1, 0]), "one", title="A line", alt="It falls.")
    other = draw(lambda figure: figure.subplots().plot([0, 1], [1, 0]), "two", title="A line", alt="It falls.")
    ids = [set(re.findall(r'id="([^"]+)"', one.svg)) for one in (picture, other)]
    assert not ids[0] & ids[1]
    references = set(re.findall(r"url\(#([^)]+)\)", picture.svg))
    assert references
    assert references <= ids[0]
    assert "currentColor" in picture.svg
    assert "var(--paper)" in picture.svg
    assert "#ffffff" not in picture.svg
    assert "<text" in picture.svg
    assert not picture.is_wide
    assert draw(lambda f: f.subplots(), "w", title="w", alt="w", size=(10, 3)).is_wide


def test_loose_numbers_become_tables():
    numbers = {
        "slope": -0.5,
        "rows": [{"P": 1, "x": [2.0, 1.0, 3.0]}, {"P": 5, "y": None}],
        "by_name": {"a": {"u": 1}, "b": {"u": 2}},
        "columns": {"step": [0, 10], "loss": [1.0, 0.5]},
        "mixed": {"deep": [{"k": 1}], "flat": 3},
    }
    tables = {table.title: table for table in tables_of(numbers)}
    assert [c.text for c in tables["Numbers"].rows[0]] == ["slope", "-0.5"]
    assert [c.text for c in tables["rows"].rows[0]] == ["1", "2 [1, 3]", ""]
    assert [c.text for c in tables["by name"].rows[1]] == ["b", "2"]
    assert [c.text for c in tables["columns"].rows[1]] == ["10", "0.5"]
    assert [c.text for c in tables["mixed: deep"].rows[0]] == ["1"]
    assert cell(True).text == "yes"
    assert cell(math.nan).is_number


def test_the_command_writes_one_file(run_folders, tmp_path, capsys):
    target = tmp_path / "new" / "page.html"
    assert main(["report", str(run_folders["kernel"]), "--output", str(target)]) == 0
    assert f"written: {target}" in capsys.readouterr().out
    assert target.read_text().startswith("<!doctype html>")
    assert main(["report", str(run_folders["plan"] / "plan.json")]) == 0
    assert (run_folders["plan"] / "report.html").is_file()
    upper = shutil.copy(run_folders["plan"] / "plan.json", tmp_path / "new" / "plan.JSON")
    for place in (upper, upper.parent):
        assert main(["report", str(place), "--output", str(target)]) == 0
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["report", "--serve", str(run_folders["kernel"]), "--output", "x.html"]) == 2
    assert main(["report", str(run_folders["kernel"]), "--port", "1"]) == 2
    assert "--port is for --serve: add it, or leave both out." in capsys.readouterr().err
    for name in ("plan.json", "kernel.json"):
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        (tmp_path / "damaged").mkdir()
        (tmp_path / "damaged" / name).write_text("{")
        for place in ("damaged", *(["damaged/plan.json"] if name == "plan.json" else [])):
            assert main(["report", str(tmp_path / place)]) == 2
            error = capsys.readouterr().err
            assert f"{name} is not valid JSON (" in error
            assert "restore it from a copy, or repeat the command that wrote it." in error
    with pytest.raises(UsageError, match="Port"):
        make_server(tmp_path, port=99999)


def test_a_report_needs_no_transformers(run_folders, tmp_path):
    folder, page = str(run_folders["finetune"]), str(tmp_path / "page.html")
    code = f"""
import sys
sys.modules["transformers"] = None
from zokernel import cli
sys.exit(cli.main(["report", {folder!r}, "--output", {page!r}]))
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.fixture
def server(run_folders):
    with make_server(run_folders["finetune"], port=0) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(server, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.putrequest("GET", path, skip_host=host is not None)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_live_view_serves_three_addresses_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"
    status, text = get(server, "/")
    assert status == 200
    assert "connect-src 'self'" in text
    status, text = get(server, "/data.json?since=30")
    assert status == 200
    assert [row["step"] for row in json.loads(text)["rows"]] == list(range(31, 41))
    assert get(server, "/report")[0] == 200
    for path in (
        "/metrics.json",
        "/../metrics.json",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/data.json/../run.json",
    ):
        assert get(server, path)[0] == 404, path
    assert get(server, "/data.json?since=-1")[0] == 200
    assert get(server, "/", host="evil.example")[0] == 403


def test_the_live_view_waits_for_a_run_that_has_not_begun(tmp_path):
    waiting = live_data(tmp_path)
    assert (waiting["state"], waiting["rows"], waiting["evaluations"]) == ("waiting", [], [])
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    data = live_data(tmp_path)
    assert [row["loss"] for row in data["rows"]] == [2.0, None]
    json.dumps(data, allow_nan=False)
