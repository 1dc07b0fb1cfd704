"""The claims ledger: every claim is tested by something that exists, and no result contradicts it."""

from __future__ import annotations

import ast
import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.experiments.base import MODULES
from zokernel.experiments.claims import (
    PAPERS,
    Claim,
    contradictions,
    load_claims,
    measure,
    save_claims,
    update,
    values_at,
)
from zokernel.experiments.criteria import interval
from zokernel.experiments.storage import load_record

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
CLAIMS = load_claims()
ERRATA = [f"A.2.{n}" for n in range(1, 12)] + [f"B.2.{n}" for n in range(1, 11)] + [f"C.2.{n}" for n in range(1, 13)]


def functions_in(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def test_every_claim_is_tested_by_something_that_exists():
    files = (ROOT / "tests").rglob("test_*.py")
    functions = {path.relative_to(ROOT).as_posix(): functions_in(path) for path in files}
    for claim in CLAIMS:
        for test in claim.tests:
            file, _, function = test.partition("::")
            assert function in functions[file], f"{claim.id} names {test}, which does not exist"
        tested = claim.experiments or claim.tests
        assert tested or claim.verdict == "not run here", claim.id
        assert len(claim.why) > 20, claim.id


@pytest.mark.parametrize("field", ["evidence", "refuted_by"])
def test_a_judged_claim_states_its_evidence_and_what_would_refute_it(field):
    (claim,) = [claim for claim in CLAIMS if claim.id == "entk-root-p"]
    with pytest.raises(ValueError, match="needs its evidence"):
        replace(claim, **{field: ""})
    assert all(getattr(claim, field) for claim in CLAIMS if claim.verdict != "not run here")


def test_every_experiment_and_every_erratum_is_covered():
    assert {name for claim in CLAIMS for name in claim.experiments} == set(MODULES)
    assert {erratum for claim in CLAIMS for erratum in claim.errata} == set(ERRATA)
    assert {claim.paper for claim in CLAIMS} == set(PAPERS)


@pytest.mark.parametrize("name", MODULES)
def test_every_verdict_of_an_experiment_is_in_the_ledger(name, smoke_run):
    by_id = {claim.id: claim for claim in CLAIMS}
    verdicts = smoke_run.record(name)["verdicts"]
    assert verdicts
    for verdict in verdicts:
        assert name in by_id[verdict["id"]].experiments


def test_committed_results_agree_with_the_ledger():
    assert contradictions(CLAIMS, RESULTS) == []
    committed = [name for name in MODULES if load_record(RESULTS / name)]
    for claim in CLAIMS:
        if claim.verdict == "not run here":
            continue
        missing = [name for name in claim.experiments if name not in committed]
        assert not missing, f"{claim.id} is judged, but there are no committed results of {missing}"
        assert all(number.value is not None for number in claim.measured), claim.id
        if claim.experiments:
            assert claim.scale in ("cpu", "full"), f"{claim.id}: scale {claim.scale}"
            assert claim.commit, claim.id


def test_contradictions_are_found(tmp_path):
    """A changed verdict, a changed number, and one beyond what the verdict rests on: each is noticed."""
    (claim,) = [copy.deepcopy(claim) for claim in CLAIMS if claim.id == "kerzoo-bias"]
    folder = tmp_path / "kerzoo/estimator"
    folder.mkdir(parents=True)
    record = load_record(RESULTS / "kerzoo/estimator")
    record["verdicts"] = [verdict for verdict in record["verdicts"] if verdict["id"] == claim.id]

    def current_contradictions() -> list[str]:
        (folder / "result.json").write_text(json.dumps(record))
        return contradictions([claim], tmp_path)

    assert current_contradictions() == []
    record["verdicts"][0]["verdict"] = "does not hold"
    assert "the ledger says 'holds under conditions'" in current_contradictions()[0]
    record["verdicts"][0]["verdict"] = claim.verdict
    record["numbers"]["slopes"]["K3"] = 2.0
    messages = current_contradictions()
    assert any("in the ledger and 2.0 in the results" in message for message in messages)
    assert any("not above 3.9" in message for message in messages)
    record["numbers"]["slopes"]["K3"] = 3.9976
    record["verdicts"][0]["verdict"] = "not resolved"
    assert "says 'not resolved'" in current_contradictions()[0]
    record["verdicts"][0]["id"] = "something-else"
    assert any("not in the ledger" in message for message in current_contradictions())


def test_verdicts_of_several_runs_are_parts_of_one_claim(tmp_path):
    """A claim that fails on one data set and holds on another holds under conditions."""
    (claim,) = [copy.deepcopy(claim) for claim in CLAIMS if claim.id == "nzk-attainable"]
    claim.measured = []
    for name, verdict in (("nzk/mnist", "holds"), ("nzk/cifar", "does not hold")):
        (tmp_path / name).mkdir(parents=True)
        record = load_record(RESULTS / name) | {"verdicts": [{"id": claim.id, "verdict": verdict}]}
        (tmp_path / name / "result.json").write_text(json.dumps(record))
    claim.verdict = "holds under conditions"
    assert contradictions([claim], tmp_path) == []
    claim.verdict = "does not hold"
    assert "nzk/mnist says 'holds' and nzk/cifar says 'does not hold'" in contradictions([claim], tmp_path)[0]


def test_an_interval_needs_its_end_beyond_what_the_verdict_rests_on():
    (claim,) = [copy.deepcopy(claim) for claim in CLAIMS if claim.id == "kerzoo-three-perturbations"]
    (number,) = [number for number in claim.measured if number.what == "final loss, MeZO-3 at 4 lr"]
    claim.measured = [number]

    def current_contradictions() -> list[str]:
        return [message for message in contradictions([claim], RESULTS) if number.what in message]

    number.below = 1.001 * number.value
    assert f"is {number.high}, not below" in current_contradictions()[0]
    number.below = 1.001 * number.high
    assert current_contradictions() == []


def test_update_writes_numbers_and_never_verdicts(tmp_path):
    claims = copy.deepcopy(CLAIMS)
    for claim in claims:
        claim.commit = claim.scale = None
        for number in claim.measured:
            number.value = number.low = number.high = None
    update(claims, RESULTS)
    save_claims(claims, tmp_path / "claims.yaml")
    assert load_claims(tmp_path / "claims.yaml") == CLAIMS


def test_paths_into_results():
    numbers = {"rows": [{"law": "g", "P": 1, "x": [2.0, 1.0, 3.0]}, {"law": "r", "P": 1, "x": [4.0, 3.0, 5.0]}]}
    assert values_at(numbers, "/rows/law=g&P=1/x/-1") == [3.0]
    assert values_at({"a/b": {"c": 1}}, "/a~1b/c") == [1]
    for path in ("/rows/P=1/x", "/rows/law=z/x", "/rows/7", "/nothing"):
        with pytest.raises(UsageError, match="There is no single"):
            values_at(numbers, path)
    record = {"numbers": numbers}
    assert measure(number("/rows/law=r/x", "interval"), record) == (4.0, 3.0, 5.0)
    assert measure(number("/rows/*/x/0", "mean"), record) == (3.0, 2.0, 4.0)
    assert measure(number("/rows/*/x/0", "max"), record) == (4.0, None, None)


def number(path: str, statistic: str):
    claim = Claim(
        "x",
        "NZK",
        "here",
        "A claim.",
        "holds",
        "because",
        "one seed",
        "another number",
        experiments=["nzk/laws"],
        measured=[{"what": "it", "at": f"nzk/laws#{path}", "statistic": statistic}],
    )
    return claim.measured[0]


def test_the_command_prints_filters_and_refuses(capsys):
    assert main(["claims", "--paper", "KerZOO", "--verdict", "does not hold"]) == 0
    printed = capsys.readouterr().out
    assert "kerzoo-mechanism" in printed
    assert "entk-" not in printed
    assert main(["claims", "kerzoo-iterations"]) == 0
    printed = capsys.readouterr().out
    assert "same effective rate: 1." in printed
    assert "evidence: " in printed
    assert "would be refuted by: " in printed
    assert main(["claims", "--verdict", "not resolved"]) == 0
    assert "entk-laws-of-trajectories" in capsys.readouterr().out
    assert main(["claims", "--json", "entk-root-p"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["verdict"] == "holds"
    assert main(["claims", "--check", str(RESULTS)]) == 0
    assert main(["claims", "nonsense"]) == 2
    assert main(["claims", "--check", "no/such/folder"]) == 2


def test_two_anisotropic_vectors_can_diverge_for_every_learning_rate():
    """X M_zeta M_z X^T is no descent kernel in general (erratum B.2.4): a negative eigenvalue grows at any rate."""
    rng = np.random.default_rng(1)
    lowest = 0.0
    for _ in range(200):
        roots = rng.standard_normal((3, 3, 3))
        x, zeta, z = roots[0], roots[1] @ roots[1].T, roots[2] @ roots[2].T
        eigenvalues = np.linalg.eigvals(x @ zeta @ z @ x.T)
        if eigenvalues.real.min() < lowest:
            lowest, kernel = eigenvalues.real.min(), x @ zeta @ z @ x.T
    assert lowest < -1
    for lr in (1e-3, 1e-2, 1e-1):
        step = np.eye(3) - lr / 3 * kernel
        assert np.abs(np.linalg.eigvals(step)).max() > 1


def test_the_public_script_ascends():
    """Its loop takes the z with the largest L(-) - L(+), and steps theta -= lr * that * z: uphill (erratum B.2.6)."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(20, generator=generator, dtype=torch.float64)

    def loss(values):
        return 0.5 * values.square().sum(-1)

    start = loss(theta)
    for _ in range(50):
        z = torch.randn(10, 20, generator=generator, dtype=torch.float64)
        difference = loss(theta - 1e-3 * z) - loss(theta + 1e-3 * z)
        best = difference.argmax()
        theta = theta - 10.0 * difference[best] * z[best]
    assert loss(theta) > 1.5 * start


def test_numbers_in_kerzoos_text_against_its_tables():
    """Table 1 and 5 against the sentences about them (erratum C.2.8)."""
    sst2_gain = 92.1 - 90.5
    assert sst2_gain == pytest.approx(1.6)  # the text says 1.7
    share_of_iterations = 1200 / 4000
    assert share_of_iterations == pytest.approx(0.30)  # Table 11 says 25.0%
    num_correct = 0.654 * 104
    assert num_correct == pytest.approx(68, abs=0.05)  # WSC's 65.4 in six settings is one count of correct answers
    num_gained = 0.029 * 104
    assert num_gained == pytest.approx(3, abs=0.1)  # and the headline's 2.9 points are three of them


def test_a_population_of_eight_learns_a_form_of_answer():
    """The ledger's numbers on ES are those of the committed runs: three seeds, each far above its start."""
    rows = [json.loads(line) for line in (RESULTS / "rewards.jsonl").read_text().splitlines()]
    runs = [row for row in rows if row.get("method") == "es" and row.get("split") == "held-out"]
    assert len({row["seed"] for row in runs}) == 3
    gains = [row["after"]["pass_rate"] - row["before"]["pass_rate"] for row in runs]
    mean, low, _ = interval(gains, logs=False)
    assert mean == pytest.approx(0.59, abs=0.01)
    assert low > 0.5


def test_one_direction_an_example_has_one_seed():
    """The page that the ledger's verdict on GRZO's training rests on says so."""
    text = (RESULTS / "notes" / "queries.md").read_text()
    section = text[text.index("### A direction for every example") :]
    assert "**One seed**" in section[:800]
    assert "| | 4 | **1 per example** | 2 | 0.09 | 0.39 | 0.526 |" in section
