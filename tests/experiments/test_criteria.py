"""Verdicts follow numbers: each criterion comes out both ways, and committed verdicts are those of their numbers."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from zokernel.experiments import criteria
from zokernel.experiments.criteria import FAILS, HOLDS, NOT_RUN, OPEN, PARTLY, interval
from zokernel.experiments.entk import (
    curves,
    dimension,
    distributions,
    drift,
    heatmaps,
    horizon,
    language_model,
    model_sizes,
    trajectories,
)
from zokernel.experiments.kerzoo import ablations, accuracy, costs, estimator, loss_curves
from zokernel.experiments.kerzoo import language_model as kerzoo_language_model
from zokernel.experiments.multi_query import budget
from zokernel.experiments.nzk import verdicts as nzk
from zokernel.experiments.storage import load_record

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
LOW, MIDDLE, HIGH = (0.02, 0.01, 0.03), (1.0, 0.5, 2.0), (9.0, 8.0, 10.0)


def test_an_interval_that_includes_the_bound_does_not_resolve():
    assert [criteria.below(found, 1.0) for found in (LOW, MIDDLE, HIGH)] == [HOLDS, OPEN, FAILS]
    assert [criteria.above(found, 1.0) for found in (LOW, MIDDLE, HIGH)] == [FAILS, OPEN, HOLDS]
    assert [criteria.within(found, 0.1, 1.5) for found in (LOW, (1.0, 0.9, 1.1), MIDDLE)] == [FAILS, HOLDS, OPEN]
    assert [criteria.graded(found, 0.1, 5.0) for found in (LOW, MIDDLE, HIGH)] == [HOLDS, PARTLY, FAILS]
    assert criteria.graded((1.0, 0.05, 9.0), 0.1, 5.0) == OPEN
    assert [criteria.less(found, MIDDLE) for found in (LOW, (1.9, 0.6, 3.0), HIGH)] == [HOLDS, OPEN, FAILS]
    assert criteria.below((math.inf,) * 3, 1.0) == OPEN  # not reached by all seeds


@pytest.mark.parametrize("values", [[1.0, math.nan], [1.0, -math.inf], [1.0, math.inf], [math.inf, -math.inf], [2.0]])
def test_a_seed_that_diverged_resolves_nothing(values):
    bounds = criteria.interval(values, logs=False)
    assert bounds[1:] == (-math.inf, math.inf)
    assert {criteria.above(bounds, 5.0), criteria.below(bounds, 5.0), criteria.within(bounds, 0.0, 5.0)} == {OPEN}
    assert criteria.less((1.0, 0.9, 1.1), bounds) == criteria.less(bounds, (1.0, 0.9, 1.1)) == OPEN


def test_five_values_are_too_few_for_an_interval_of_their_median():
    """With six, the least and the greatest miss it with probability 2 / 64."""
    assert criteria.median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, -math.inf, math.inf)
    assert criteria.median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, 1.0, 6.0)


def test_parts_make_a_claim():
    assert criteria.combined([HOLDS, HOLDS]) == HOLDS
    assert criteria.combined([HOLDS, FAILS]) == criteria.combined([OPEN, PARTLY]) == PARTLY
    assert criteria.combined([OPEN, FAILS]) == FAILS
    assert criteria.combined([OPEN, OPEN]) == OPEN
    assert criteria.worst([HOLDS, PARTLY, OPEN]) == OPEN


def test_differences_that_are_all_positive_by_chance_do_not_exclude_zero():
    """On logarithms the interval of positive numbers never includes zero, whatever they are."""
    values = np.array([0.01, 0.4, 0.02, 0.9, 0.05])
    assert interval(values)[1] > 0
    assert interval(values, logs=False)[1] < 0
    assert criteria.student_quantile(11) == pytest.approx(2.201, rel=0.002)
    assert criteria.student_quantile(29) == pytest.approx(2.045, rel=0.002)


def test_intervals_cover_what_they_estimate():
    """95% intervals of 4,000 samples: of medians, shares and means; |z| of the coverage below 4.5 or conservative."""
    rng = np.random.default_rng(0)
    samples = rng.standard_exponential((4000, 50))
    medians = [criteria.median_interval(row) for row in samples]
    coverage = np.mean([low <= math.log(2) <= high for _, low, high in medians])
    assert 0.93 < coverage < 0.98
    shares = [criteria.share_interval(int(hits), 50) for hits in rng.binomial(50, 0.1, 4000)]
    assert 0.93 < np.mean([low <= 0.1 <= high for _, low, high in shares]) < 0.99
    normal = rng.standard_normal((4000, 12))
    means = [interval(row, logs=False) for row in normal]
    assert np.mean([low <= 0 <= high for _, low, high in means]) == pytest.approx(0.95, abs=4.5 * 0.0035)


def test_bias_by_chance_is_uniform_without_bias():
    generator = torch.Generator().manual_seed(0)
    mix = torch.tensor([[1.0, 0.8, 0.0, 0.0], [0.0, 1.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.2]])
    draws = torch.randn(300, 200, 4, generator=generator, dtype=torch.float64) @ mix.double()
    p_values = [distributions.chance_of_bias(part.view(200, 2, 2), torch.zeros(2, 2), 4000) for part in draws]
    assert np.mean(p_values) == pytest.approx(0.5, abs=4.5 * 0.29 / 300**0.5)
    assert np.mean(np.array(p_values) < 0.05) < 0.12
    assert distributions.chance_of_bias(draws[0].view(200, 2, 2) + 0.5, torch.zeros(2, 2)) < 1e-4


def law(model, distribution, error, z=0.5, chance=0.5):
    return {
        "model": model,
        "distribution": distribution,
        "predicted_rms_error": error,
        "z": z,
        "bias_by_chance": chance,
        "spread_of_the_mean": 0.1,
    }


def test_kernel_verdicts():
    close = [law("a", "gaussian", 1.0), law("a", "rademacher", 1.01)]
    far = [law("b", "gaussian", 1.0), law("b", "rademacher", 1.5)]
    assert distributions.judge_bias(close).verdict == HOLDS
    assert distributions.judge_bias([law("a", "gaussian", 1.0, chance=1e-5), *close]).verdict == FAILS
    verdicts = [distributions.judge_distributions(rows).verdict for rows in (close, close + far, far)]
    assert verdicts == [HOLDS, PARTLY, FAILS]
    assert distributions.judge_distributions([law("a", "gaussian", 1.0, z=6.0), *close]).verdict == OPEN
    slopes = ((-0.5, -0.51, -0.49), (-0.5, -0.6, -0.4), (-0.3, -0.35, -0.25))
    assert [curves.judge_root(slope, 120, 20).verdict for slope in slopes] == [HOLDS, OPEN, FAILS]
    same, faster = (0.0, -0.01, 0.01), (-0.1, -0.15, -0.05)
    assert curves.judge_similar(faster, [0.99], 20).verdict == HOLDS
    assert curves.judge_similar(same, [0.99], 20).verdict == PARTLY
    assert curves.judge_similar(same, [0.99, 0.2], 20).verdict == FAILS
    verdicts = [curves.judge_bound(*case).verdict for case in (([1.2, 1.9], {"2": 0.9}), ([5.0], {"2": 1.2}))]
    assert verdicts == [HOLDS, PARTLY]
    assert curves.judge_bound([0.5, 5.0], {"2": 1.2}).verdict == FAILS
    assert [heatmaps.judge_denoising({"p": f}, 10).verdict for f in (LOW, MIDDLE, HIGH)] == [HOLDS, OPEN, FAILS]
    assert heatmaps.judge_similar({"init": MIDDLE, "trained": LOW}, 10).verdict == PARTLY
    assert heatmaps.judge_similar({"init": MIDDLE, "trained": HIGH}, 10).verdict == FAILS


def test_kernel_verdicts_over_steps_and_sizes():
    half, none, steep = (-0.5, -0.55, -0.45), (0.0, -0.05, 0.05), (-0.2, -0.5, 0.1)
    verdicts = [horizon.judge({"P": p, "T": t}, 6).verdict for p, t in ((half, none), (half, half), (none, half))]
    assert verdicts == [HOLDS, PARTLY, FAILS]
    assert horizon.judge({"P": steep, "T": half}, 6).verdict == OPEN
    sizes = ((0.0, -0.05, 0.05), (0.2, 0.1, 0.3), (0.9, 0.8, 1.0), (0.4, -0.3, 1.1))
    assert [dimension.judge({"k": size}, "d", 3).verdict for size in sizes] == [HOLDS, PARTLY, FAILS, OPEN]
    verdicts = [
        drift.judge({"r": ratio}, found, 3).verdict for ratio, found in ((LOW, LOW), (LOW, MIDDLE), (HIGH, MIDDLE))
    ]
    assert verdicts == [HOLDS, PARTLY, FAILS]
    assert drift.judge({"r": MIDDLE}, MIDDLE, 3).verdict == FAILS  # a drift of at least a half is not stable
    rows = [{"loss": 3.0, "drift": 0.0}, {"loss": 1.0, "drift": 0.8}, {"loss": 0.5, "drift": 0.7}]
    assert [drift.drift_at(rows, fall) for fall in (1.0, 2.0, 2.25)] == pytest.approx([0.4, 0.8, 0.75])
    horizon_rows = [
        {"P": p, "T": t, "gap_by_seed": [3.0 * p**-0.5 * t**-0.25, 5.0 * p**-0.5 * t**-0.25]}
        for p in (1, 4)
        for t in (1, 9)
    ]
    assert horizon.exponents(horizon_rows)["P"] == pytest.approx((-0.5,) * 3)
    assert horizon.exponents(horizon_rows)["T"] == pytest.approx((-0.25,) * 3)
    scatter = {1: [0.1, 1.99**0.5], 4: [0.5, 0.5]}  # rms 1 and 1/2, where mean logarithms rise with P
    rows = [{"P": p, "T": t, "gap_by_seed": gaps} for p, gaps in scatter.items() for t in (1, 9)]
    assert horizon.exponents(rows)["P"][0] == pytest.approx(-0.5)
    table = [{"distribution": "g", "P": p, "final_l2_by_stream": gaps} for p, gaps in scatter.items()]
    assert language_model.rms_slope(table, ("g",))[0] == pytest.approx(-0.5)


def test_language_model_verdicts():
    root = ((-0.5, -0.6, -0.4), (-0.5, -0.8, -0.2), (0.0, -0.1, 0.1))
    assert [language_model.judge_root(slope, 3, (1, 50)).verdict for slope in root] == [HOLDS, OPEN, FAILS]
    gaps = ((0.1, 0.05, 0.15), (0.3, 0.2, 0.4), (0.9, 0.8, 1.0), (0.4, 0.2, 0.8))
    assert [language_model.judge_fifty({"g": gap}, 50, 3).verdict for gap in gaps] == [HOLDS, PARTLY, FAILS, OPEN]
    assert language_model.judge_fifty({"g": gaps[0], "r": gaps[3]}, 50, 3).verdict == OPEN
    alike, unlike = (1.0, 0.9, 1.1), (2.0, 1.5, 2.5)
    cases = ((alike, alike, LOW), (alike, alike, HIGH), (unlike, unlike, HIGH), (MIDDLE, MIDDLE, MIDDLE))
    verdicts = [language_model.judge_distributions(*case, 50, 3).verdict for case in cases]
    assert verdicts == [HOLDS, PARTLY, FAILS, FAILS]
    ends = [torch.tensor([float(k), 0.0]) for k in (0, 1, 3)]
    shifted = [end + torch.tensor([0.0, 2.0]) for end in ends]
    shifts = np.array([1.0, 2.0, 3.0])  # distances to the next stream of the same distribution
    assert language_model.crossing(ends, shifted)[0] == pytest.approx(np.exp(np.log(2 / shifts).mean()))


def test_nzk_verdicts():
    fine, off = ({"runs": 4000, "mean_z_max": z, "second_moment_z_max": 1.0} for z in (3.0, 50.0))
    same, larger = (4.0, 3.95, 4.05), (7.0, 6.9, 7.1)
    factors = [{"rademacher": same, "laplace": other} for other in (same, larger)]
    verdicts = [nzk.constancy(check, found, 100, None).verdict for check in (fine, off) for found in factors]
    assert verdicts == [HOLDS, PARTLY, PARTLY, FAILS]
    assert nzk.equal_factors(same, (4.2, 3.5, 5.0)) == OPEN
    assert [nzk.fewer_steps(*pair) for pair in ((5, 9), (9, 5), (9, None), (None, 5))] == [HOLDS, FAILS, HOLDS, FAILS]

    def run(median, risen):
        return {
            "lr": 1e-3,
            "steps": 10,
            "runs": 200,
            "median_loss_over_mean_path": median,
            "share_of_runs_above_their_start": risen,
        }

    on, none, partial = (1.0, 0.95, 1.05), (0.0, 0.0, 0.005), (0.5, 0.4, 0.6)
    assert nzk.attainability({"paper": run(on, none)}).verdict == HOLDS
    assert nzk.attainability({"paper": run(on, none), "public code": run(HIGH, partial)}).verdict == PARTLY
    assert nzk.attainability({"paper": run(HIGH, none), "public code": run(HIGH, partial)}).verdict == FAILS
    assert nzk.attainability({"paper": run((1.08, 1.02, 1.15), none)}).verdict == OPEN


def test_kerzoo_verdicts():
    slopes = {"MeZO": 2.0, "K3": 4.0, "K3, radius 1/2, literal": 2.0}
    verdicts = [
        estimator.judge_bias(slopes | change).verdict for change in ({}, {"K3, radius 1/2, literal": 4.0}, {"K3": 2.0})
    ]
    assert verdicts == [PARTLY, HOLDS, FAILS]
    wide = {"second_moment_ratio": 6.0, "bias_ratio": 0.0, "gain": 1.0}
    narrow = {"second_moment_ratio": 2.0, "bias_ratio": 0.3, "gain": 1.0}
    for change, verdict in (({}, HOLDS), ({"gain": 0.1}, PARTLY)):
        assert estimator.judge_shrinking([wide, narrow | change], [1.0, 0.5], (0.25, 7.4)).verdict == verdict
    worse = {"second_moment_ratio": 7.0, "bias_ratio": 0.0, "gain": 2.0}
    assert estimator.judge_shrinking([wide, worse], [1.0, 0.5], (0.25, 7.4)).verdict == FAILS
    assert [estimator.judge_order_five(gain).verdict for gain in (Fraction(1), Fraction(13, 7))] == [HOLDS, FAILS]

    def row(loss, iterations=MIDDLE):
        keys = ("final_loss", "final_loss_at_equal_effective_lr", "final_loss_at_best_lr")
        return dict.fromkeys(keys, loss) | {"iterations_to_first": iterations}

    assert [ablations.judge_order(row(MIDDLE), row(x), 6).verdict for x in (LOW, MIDDLE, HIGH)] == [HOLDS, OPEN, FAILS]
    rows = {0.5: row(LOW, HIGH), 1.0: row(MIDDLE, LOW), 2.0: row(HIGH)}
    assert ablations.judge_constant(rows, 6).verdict == HOLDS
    assert ablations.judge_constant(rows | {2.0: row(LOW)}, 6).verdict == PARTLY
    assert ablations.judge_constant({0.5: row(LOW, LOW), 1.0: row(HIGH, HIGH), 2.0: row(LOW)}, 6).verdict == FAILS
    pairs = [[row(LOW), row(x)] for x in (HIGH, LOW)]
    verdicts = [
        ablations.judge_eps({"fp32": a, "fp16": b}, 6).verdict for a, b in ((pairs[0],) * 2, (pairs[1], pairs[0]))
    ]
    assert verdicts == [HOLDS, PARTLY]
    assert ablations.judge_eps({"fp32": pairs[1], "fp16": [row(HIGH), row(LOW)]}, 6).verdict == FAILS


def test_kerzoo_costs_and_curves():
    def rows(iterations, seconds):
        shares = {"iterations_share": iterations, "seconds_share": seconds}
        longer = {"method": "MeZO at 4 lr", "iterations_share": (0.24, 0.2, 0.3), "seconds_share": (0.24, 0.2, 0.3)}
        return [longer, {"method": "KerZOO, journal average"} | shares]

    assert costs.judge_costs(rows(LOW, LOW)).verdict == HOLDS
    assert costs.judge_costs(rows((0.3, 0.25, 0.35), MIDDLE)).verdict == PARTLY
    assert costs.judge_costs(rows(HIGH, HIGH)).verdict == FAILS

    def named(kerzoo, mezo, longer):
        losses = {"KerZOO": kerzoo, "MeZO-3": mezo, "MeZO-3 at 4 lr": longer}
        return {name: {"final_loss": loss} for name, loss in losses.items()}

    cases = ((LOW, HIGH, HIGH), (LOW, HIGH, LOW), (HIGH, LOW, LOW), (MIDDLE, MIDDLE, MIDDLE))
    assert [costs.judge_three(named(*case)).verdict for case in cases] == [HOLDS, PARTLY, FAILS, OPEN]
    keys = (
        "same lr, over MeZO-1",
        "same effective lr, over MeZO-3",
        "same effective lr, radius one half, over MeZO-3",
        "best lrs and best variant, over MeZO-3",
        "best lrs, over MeZO-3",
    )
    nominal = dict.fromkeys(keys, HIGH) | {keys[0]: LOW}
    for ratios, headline, mechanism in (
        (dict.fromkeys(keys, LOW), HOLDS, HOLDS),
        (nominal, PARTLY, FAILS),
        (dict.fromkeys(keys, HIGH), FAILS, FAILS),
        (dict.fromkeys(keys, (0.8, 0.3, 1.3)), OPEN, OPEN),
    ):
        assert loss_curves.judge_iterations(ratios, True, "it").verdict == headline
        assert loss_curves.judge_mechanism(ratios, True).verdict == mechanism
    assert loss_curves.judge_iterations(nominal, False, "it").verdict == OPEN
    for low, high, verdict in ((-0.5, -0.1, HOLDS), (-0.2, 0.1, OPEN), (0.1, 0.2, FAILS)):
        gaps = {"task": ((low + high) / 2, low, high)}
        assert kerzoo_language_model.judge(gaps, 5, 60).verdict == verdict
    assert kerzoo_language_model.judge(gaps, 1, 60).verdict == NOT_RUN
    lags = ({"base": LOW, "best": LOW}, {"base": HIGH, "best": LOW}, {"base": HIGH}, {"base": MIDDLE})
    assert [loss_curves.judge_average(lag).verdict for lag in lags] == [HOLDS, PARTLY, FAILS, OPEN]
    assert loss_curves.over_data_sets(np.array([1.0, 4.0, 2.0, 2.0]), 2) == pytest.approx((2.0, 2.0, 2.0))


def test_accuracy_is_judged_by_the_share_of_rows():
    def rows(ahead, count, model="OPT-13B"):
        shared = {"table": "10", "model": model, "lora": False, "k_shot": None, "num_perturbations": None}
        for n in range(count):
            for method, score in (("mezo", 50.0), ("kerzoo", 51.0 if n < ahead else 49.0)):
                yield shared | {"task": str(n), "method": method, "measured": score}

    def verdict(rows, claim="kerzoo-accuracy", full=True):
        return accuracy.judge(list(rows), claim, ran_on="it", full=full).verdict

    assert [verdict(rows(n, 20)) for n in (20, 10, 0)] == [HOLDS, OPEN, FAILS]
    assert verdict(rows(20, 20), full=False) == NOT_RUN
    assert verdict(rows(20, 20), "kerzoo-roberta") == OPEN  # no such row
    assert verdict(rows(0, 20, "RoBERTa-large"), "kerzoo-roberta") == FAILS


def by(rows, key):
    return {row[key]: row for row in rows}


def verdicts_of(name, n):
    """Return the verdicts of an experiment's stored numbers, by claim."""
    if name == "entk/horizon":
        verdicts = [horizon.judge(horizon.exponents(n["rows"]), n["seeds"])]
    elif name == "entk/laws":
        verdicts = [distributions.judge_bias(n["rows"]), distributions.judge_distributions(n["rows"])]
    elif name == "entk/dimension":
        verdicts = [dimension.judge(n["slopes_from_width_32"], "d", n["seeds"])]
    elif name == "entk/model_sizes":
        verdicts = [model_sizes.judge(n["exponent"], len(n["sizes"]), n["gradients"])]
    elif name == "entk/trajectories":
        verdicts = [trajectories.judge(n["agreement"])]
    elif name == "entk/heatmaps":
        verdicts = [heatmaps.judge_denoising(n["error_at_125_over_1"], 10)]
    elif name == "kerzoo/constant":
        rows = by(n["rows"], "setting")
        verdicts = [ablations.judge_constant({f: rows[f"KerZOO, C = {4 * f:g}"] for f in (0.5, 1.0, 2.0)}, n["seeds"])]
    elif name == "kerzoo/order":
        rows = by(n["rows"], "setting")
        verdicts = [ablations.judge_order(rows["order 1"], rows["order 3"], n["seeds"])]
    elif name == "kerzoo/eps":
        names = "MeZO-1, eps = 0.001", "MeZO-1, eps = 1e-05"
        pairs = {p: [by(rows, "setting")[s] for s in names] for p, rows in n["rows"].items()}
        verdicts = [ablations.judge_eps(pairs, 6)]
    elif name == "kerzoo/memory_and_time":
        verdicts = [costs.judge_costs(n["rows"])]
    elif name == "kerzoo/three_perturbations":
        verdicts = [costs.judge_three(by(n["rows"], "method"))]
    elif name == "kerzoo/language_model":
        steps = max(n["steps"].values()) if isinstance(n["steps"], dict) else n["steps"]
        verdicts = [kerzoo_language_model.judge(n["gaps"], len(n["rows"][0]["test_loss"]), steps)]
    else:
        verdicts = [budget.judge_average(n["rows"]), budget.judge_alignment(n["rows"], n["distances"])]
    return {verdict.id: verdict for verdict in verdicts}


@pytest.mark.parametrize(
    "name",
    [
        *("entk/horizon", "entk/laws", "entk/dimension", "entk/heatmaps"),
        *("entk/model_sizes", "entk/trajectories"),
        *("kerzoo/constant", "kerzoo/order", "kerzoo/eps", "kerzoo/memory_and_time"),
        *("kerzoo/three_perturbations", "kerzoo/language_model", "multi_query/budget"),
    ],
)
def test_committed_verdicts_follow_from_committed_numbers(name):
    record = load_record(RESULTS / name)
    stored = {verdict["id"]: verdict["verdict"] for verdict in record["verdicts"]}
    for claim, verdict in verdicts_of(name, record["numbers"]).items():
        assert stored[claim] == verdict.verdict, verdict.reason
