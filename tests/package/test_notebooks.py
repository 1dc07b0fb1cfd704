"""The notebooks are whole, can be opened anywhere, and run from top to bottom in a kernel, with few steps."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_core.utils import run_sync

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all notebooks, which imports torch once; after each, names are removed and imports kept."""
    manager = AsyncKernelManager()
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


def run(name, folder, kernel, settings, expression):
    """Execute a notebook; return its outputs, and the value of an expression in it."""
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = {"FOLDER": str(folder / "run")} | settings
    # Trainers collect garbage again and again: what is imported by then need not be looked at in the next notebook.
    epilogue = f"import json\nprint(json.dumps({expression}))\n%reset -f\nimport gc\ngc.collect()\ngc.freeze()\ndel gc"
    notebook = module.executed(ROOT / "notebooks" / f"{name}.ipynb", folder, settings, epilogue, kernel)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return outputs, json.loads(notebook.cells[-1].outputs[-1].text)


def figures(outputs):
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["choosing_p_and_eps", "first_finetune", "rewards"]


@each
def test_a_notebook_is_valid_and_small(path):
    notebook, code = read(path)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 300_000
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in code) == 1
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            assert len(cell.source.split()) <= 70, cell.source


@each
def test_the_committed_notebook_is_one_run_from_top_to_bottom(path):
    _, code = read(path)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert figures(outputs) >= 1
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)


@pytest.mark.parametrize(
    ("stem", "pattern"),
    [("first_finetune", r"{}: ([\d.]+)% ± ([\d.]+)% right"), ("rewards", r"{}: mean reward ([\d.]+) ± ([\d.]+)")],
)
def test_the_committed_notebook_has_learned(stem, pattern):
    _, code = read(ROOT / "notebooks" / f"{stem}.ipynb")
    text = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    (before, error), (after, last) = [
        map(float, re.search(pattern.format(when), text).groups()) for when in ("before", "after")
    ]
    assert after - before > 3 * math.hypot(error, last)


@each
def test_a_notebook_names_no_place_of_one_machine(path):
    """No absolute path, and no relative link to what is not there."""
    notebook, _ = read(path)
    targets = []
    for cell in notebook.cells:
        texts = [cell.source, *(output.get("text", "") for output in cell.get("outputs", ()))]
        for text in texts:
            assert re.findall(r"(?<![\w.<}])/(?:[\w.-]+/)+|[A-Z]:\\|~/", text) == [], text
        if cell.cell_type == "markdown":
            targets += re.findall(r"\]\(([^)#]+)", cell.source)
    assert targets
    assert [target for target in targets if not (path.parent / target).is_file()] == []


@each
def test_zokernel_is_installed_first_where_it_is_missing(path):
    """The first code is the same in each, and installs what the project says its address is, once it says one."""
    _, code = read(path)
    first = code[0].source
    assert first == read(NOTEBOOKS[0])[1][0].source
    assert re.search(r'^if importlib\.util\.find_spec\("zokernel"\) is None:\n    %pip install', first, re.MULTILINE)
    (requirement,) = re.findall(r'^ZOKERNEL = "(.+)"$', first, re.MULTILINE)
    assert "[finetune]" in requirement
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    assert requirement in ("..[finetune]", "zokernel[finetune]") or urls.get("Repository", "no address") in requirement
    assert not urls or requirement != "..[finetune]", (
        "a hosted notebook has no checkout: name the package or its address"
    )


@pytest.mark.parametrize("missing", [True, False])
def test_the_first_cell_asks_pip_only_where_zokernel_is_missing(missing, monkeypatch):
    from IPython.core.inputtransformer2 import TransformerManager

    calls = []

    class Shell:
        def run_line_magic(self, name, line):
            calls.append((name, line))

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if missing else object())
    code = TransformerManager().transform_cell(read(NOTEBOOKS[0])[1][0].source)
    names = {"get_ipython": Shell}
    exec(compile(code, "cell", "exec"), names)
    assert calls == ([("pip", 'install --quiet "{ZOKERNEL}"')] if missing else [])  # the shell fills in the braces


@pytest.mark.smollm2
def test_first_finetune(smollm2_path, movie_reviews_path, tmp_path, kernel):
    settings = {"MAX_STEPS": 2, "VALIDATION_EXAMPLES": 8, "TEST_EXAMPLES": 16}
    outputs, (metrics, answers) = run("first_finetune", tmp_path, kernel, settings, "(metrics, answers)")
    assert figures(outputs) == 1
    assert (metrics["steps"], metrics["num_test"], metrics["forwards"]) == (2, 16, 4)
    for stage in ("before", "after"):
        assert metrics[stage]["accuracy"] * 16 == pytest.approx(round(metrics[stage]["accuracy"] * 16), abs=1e-4)
        assert 0.3 < metrics[stage]["loss"] < 3  # ln 2 = 0.69 is a guess
    assert metrics["after"]["loss"] != metrics["before"]["loss"]
    assert len(answers) == 4
    for answer in answers:
        assert answer["word"] == ("terrible", "great")[answer["prediction"]]
        assert 0.5 <= answer["score"] <= 1
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert answers[0]["scores"]["1"] > answers[3]["scores"]["1"]  # a joy, and dull


def test_choosing_p_and_eps(tiny_lm_path, movie_reviews_path, tmp_path, kernel):
    settings = {"MODEL": str(tiny_lm_path), "NUM_PROBES": 24, "CURVATURE_PROBES": 2, "STEPS": 2}
    settings |= {"VALIDATION_EXAMPLES": 8, "TEST_EXAMPLES": 8}
    expression = "(plan.as_dict(), rates, runs, errors, [sizes, misses, best])"
    outputs, (plan, rates, runs, errors, (sizes, misses, best)) = run(
        "choosing_p_and_eps", tmp_path, kernel, settings, expression
    )
    assert figures(outputs) == 3
    assert (plan["num_probes"], plan["num_steps"]) == (24, 2)
    assert plan["forwards"] > 2 * 24
    assert 0.3 < plan["loss"] < 3
    assert 0 < plan["loss_noise"] < 1e-3
    # One direction is off by more than the step itself, and P of them by the root of P less.
    assert 1 <= plan["relative_error_one"]["value"] < math.inf
    assert errors[2] == pytest.approx(plan["relative_error_one"]["value"] / 10**0.5)
    assert plan["gradient_norm"]["value"] > 0
    assert 1e-6 < best < 1
    assert sizes[misses.index(min(misses))] == pytest.approx(best)
    assert rates["for-the-run"] <= rates["best-for-one-step"]
    assert {name: metrics["steps"] for name, metrics in runs.items()} == dict.fromkeys(rates, 2)
    for name, metrics in runs.items():
        assert metrics["learning_rate"] == rates[name] > 0
        assert metrics["before"] == runs["for-the-run"]["before"]
        assert 0 <= metrics["after"]["accuracy"] <= 1


@pytest.mark.smollm2
def test_rewards(smollm2_path, tmp_path, kernel):
    settings = {"MAX_STEPS": 2, "PROMPTS": 30}
    outputs, (metrics, rewards) = run("rewards", tmp_path, kernel, settings, "(metrics, rewards)")
    assert figures(outputs) == 1
    assert (metrics["steps"], metrics["forwards"], metrics["metric"]) == (2, 16, "reward")
    assert [len(members) for members in rewards] == [8, 8]
    for members in rewards:
        assert all(0 <= reward <= 1 and reward * 8 == round(reward * 8) for reward in members)  # 4 prompts, by halves
    for stage in ("before", "after"):
        halves = 2 * metrics["num_test"] * metrics[stage]["reward"]
        assert halves == pytest.approx(round(halves))
    assert metrics["before"]["reward"] > 0.4  # most answers begin with a number
    assert metrics["after"]["reward"] >= metrics["before"]["reward"] - 0.2
    score = {}
    (cell,) = [cell for cell in read(ROOT / "notebooks" / "rewards.ipynb")[1] if "def score" in cell.source]
    exec(cell.source.split("\n", 1)[1], score)
    assert score["score"]([" 42\n", "42", " 42.", "-7\nmore", " no", ""]) == [1.0, 0.5, 0.5, 1.0, 0.0, 0.0]
