"""Workflows, templates, citation, changelog and the promises of SECURITY.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

import zokernel

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps_of(workflow: Path) -> list[dict]:
    """Every step of every job, with the matrix of its job under ``matrix``."""
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [{"matrix": job.get("strategy", {}).get("matrix", {})} | step for job in jobs for step in job["steps"]]


def filled(command: str, matrix: dict) -> list[str]:
    """A command for every value of its matrix."""
    commands = [command]
    for name, values in matrix.items():
        commands = [text.replace(f"${{{{ matrix.{name} }}}}", value) for text in commands for value in values]
    return commands


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_targets_that_exist(workflow):
    called = {
        words.split()[1]
        for step in steps_of(workflow)
        for words in filled(step.get("run", ""), step["matrix"])
        if words.startswith("make ")
    }
    assert called, "a workflow that calls no target tests nothing"
    assert called <= TARGETS


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_pinned_and_may_only_read(workflow):
    document = yaml.safe_load(workflow.read_text())
    assert document["permissions"] == {"contents": "read"}
    extra = {name: job["permissions"] for name, job in document["jobs"].items() if "permissions" in job}
    assert extra in ({}, {"publish": {"id-token": "write"}})  # what trusted publishing needs
    used = [line for line in workflow.read_text().splitlines() if "uses:" in line]
    assert used
    assert [line for line in used if not re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+", line)] == []
    dependencies = {name for job in document["jobs"].values() for name in [job.get("needs")] if name}
    assert dependencies <= set(document["jobs"])


def test_tests_cover_what_the_package_says_it_supports():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = {item.rsplit(" ", 1)[1] for item in project["classifiers"] if re.search(r"Python :: 3\.\d+$", item)}
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    for job in ("pythons", "wheel"):
        assert set(jobs[job]["strategy"]["matrix"]["python"]) == versions
    assert set(jobs["versions"]["strategy"]["matrix"]["target"]) == {"test-oldest", "test-newest"}


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_issue_forms_are_complete(form):
    document = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= set(document)
    fields = [item for item in document["body"] if item["type"] != "markdown"]
    assert all(item["attributes"]["label"] for item in fields)
    assert len({item["id"] for item in fields}) == len(fields)
    assert any(item.get("validations", {}).get("required") for item in fields)


def test_the_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert "version" not in citation  # _version.py has it
    for source in [citation, *citation["references"]]:
        assert source["type"] in ("software", "article")
        assert all(set(author) <= {"name", "family-names", "given-names"} for author in source["authors"])
    assert citation["license"] == "Apache-2.0"


def test_the_version_is_in_one_place_and_the_changelog_has_it():
    released = re.sub(r"\.dev\d+$", "", zokernel.__version__)
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", released]
    for name in ("pyproject.toml", "mkdocs.yml", "README.md", "CITATION.cff"):
        assert zokernel.__version__ not in re.findall(r"\d+\.\d+\.\d+\S*", (ROOT / name).read_text())


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(item.value) for item in call.keywords if item.arg == name), None)


def test_nothing_is_loaded_by_a_format_that_can_run_code():
    """What SECURITY.md says is never loaded has no call in the package that would load it."""
    wrong, paths = [], sorted((ROOT / "zokernel").rglob("*.py"))
    assert paths
    for path in paths:
        for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            last = name.rsplit(".", 1)[-1]
            if (
                name in ("torch.load", "joblib.load", "marshal.loads", "eval", "os.system", "yaml.unsafe_load")
                or name.startswith(("pickle.load", "dill.", "cloudpickle."))
                or (name in ("np.load", "numpy.load") and keyword(call, "allow_pickle") != "False")
                or (name == "yaml.load" and keyword(call, "Loader") != "Loader")
                or (last == "from_pretrained" and keyword(call, "trust_remote_code") == "True")
                or keyword(call, "shell") == "True"
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno} {name}")
    assert wrong == []


def test_the_only_loader_of_yaml_is_safe(tmp_path):
    from zokernel.data.yaml_mapping import read_mapping
    from zokernel.errors import UsageError

    path = tmp_path / "run.yaml"
    path.write_text("output_dir: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        read_mapping(path)


def test_code_of_a_model_is_not_run_by_default():
    from zokernel.finetune.settings.arguments import ModelArguments

    assert ModelArguments().trust_remote_code is False
