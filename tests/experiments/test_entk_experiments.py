"""Every ZO-eNTK experiment at smoke scale: it finishes without a download and its numbers make sense."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zokernel.errors import UsageError
from zokernel.experiments import Config
from zokernel.experiments.entk import belief_changes, model_sizes
from zokernel.experiments.entk.array_cache import ArrayCache
from zokernel.experiments.entk.lenet import lenet
from zokernel.experiments.entk.nets import tiny_language_model
from zokernel.experiments.entk.sentences import FIVE, Tail, language_task

CHECKS = {
    "entk/heatmaps": lambda n: n["errors"]["trained 4-9"]["125"][0] < n["errors"]["trained 4-9"]["1"][0],
    "entk/curves": lambda n: abs(n["mean_slope"][0] + 0.5) < 0.05 and 0.8 < n["ratio_rms"] < 1.2,
    "entk/laws": lambda n: n["largest_gap"] < 0.3 and len(n["rows"]) == 12,
    "entk/dimension": lambda n: all(row["kernel"] >= 2 and row["step"] >= 2 for row in n["rows"]),
    "entk/horizon": lambda n: all(-0.9 < power[0] < -0.1 for power in n["exponents"].values()),
    "entk/drift": lambda n: all(rows[0]["drift"] == 0 < rows[-1]["drift"] for rows in n["curves"].values()),
    "entk/model_sizes": lambda n: len(n["rows"]) == 6 and all(min(row["v_by_batch"]) > 1 for row in n["sizes"]),
    "entk/trajectories": lambda n: len(n["rows"]) == 6 and len(n["agreement"]) == 2,
    "entk/language_model": lambda n: n["pooled_slope"][0] < 0 and len(n["rows"][0]["relative_by_stream"]) == 2,
}


@pytest.mark.parametrize("name", CHECKS)
def test_smoke(name, smoke_run):
    record = smoke_run.record(name)
    assert CHECKS[name](record["numbers"]), record["numbers"]
    assert len(record["summary"]) > 50
    assert record["verdicts"]
    assert all((smoke_run.folder / name / f"{stem}.png").stat().st_size > 2000 for stem in record["figures"])


def test_lenet_is_the_papers():
    net = lenet()
    assert sum(p.numel() for p in net.parameters()) == 29_624
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    torch.testing.assert_close(lenet(3)[0].weight, lenet(3)[0].weight)


def test_the_cached_tail_is_the_whole_model():
    task = language_task(Config("smoke"), steps=1, batch_size=3)
    tail = Tail(task.model, 1)
    batch = task.batches[0]
    with torch.no_grad():
        whole = task.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, -1]
        torch.testing.assert_close(tail(tail.cache(task.model, batch)), whole)


def test_five_sentences_have_the_papers_labels():
    assert [label for _, label in FIVE] == [0, 1, 0, 1, 0]
    assert tiny_language_model("gpt2").get_output_embeddings().weight.shape[0] == 97
    assert np.isfinite(language_task(Config("smoke"), steps=1, batch_size=2).batches[0]["targets"].numpy()).all()


def test_model_sizes_measure_what_the_dense_jacobian_has():
    task, count = language_task(Config("smoke"), steps=2, batch_size=2), 200
    options = {"distribution": "gaussian", "eps": 1e-3, "seed": 0}
    gradient = belief_changes.gradients_of(task)
    changes = belief_changes.Changes(**belief_changes.measure(task, gradient, 2, count, **options))
    squares = belief_changes.measure_gradients(task, gradient)
    np.testing.assert_allclose(squares["gradient_sq"], changes.gradient_sq, rtol=1e-5)
    np.testing.assert_allclose(squares["change_sq"], changes.change_sq, rtol=1e-4)
    model = copy.deepcopy(task.model).double()
    names, weights = zip(*model.named_parameters(), strict=True)

    def observed(*values):
        arguments = {key: task.observed[key] for key in ("input_ids", "attention_mask")}
        logits = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (), arguments).logits
        return logits[:, -1].softmax(-1).flatten()

    parts = torch.autograd.functional.jacobian(observed, weights)
    jacobian = torch.cat([part.flatten(1) for part in parts], dim=1)
    for n, batch in enumerate(task.batches):
        loss = F.cross_entropy(belief_changes.last_logits(model, batch), batch["targets"])
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])
        assert changes.gradient_sq[n] == pytest.approx(gradient.square().sum().item(), rel=1e-4)
        assert changes.change_sq[n] == pytest.approx((jacobian @ gradient).square().sum().item(), rel=1e-3)
        ratios = np.square(changes.slopes[n]) / changes.gradient_sq[n]  # chi squared, one degree of freedom
        assert abs(ratios.mean() - 1) < 4 * np.sqrt(2 / count)
    sizes = np.diagonal(changes.gram)
    assert abs(sizes.mean() - jacobian.square().sum().item()) < 4 * sizes.std() / np.sqrt(count)


def test_model_sizes_errors_are_those_of_the_means_of_directions():
    rng = np.random.default_rng(0)
    directions, change, slopes = rng.normal(size=(6, 30)), rng.normal(size=(2, 30)), rng.normal(size=(2, 6))
    gram, along, squares = directions @ directions.T, change @ directions.T, np.square(change).sum(1)
    changes = belief_changes.Changes(slopes, gram, along, np.array([3.0, 4.0]), squares)
    for batch in range(2):
        for group in range(3):
            columns = slice(2 * group, 2 * group + 2)
            mean = (slopes[batch, columns, None] * directions[columns]).mean(0)
            expected = np.square(mean - change[batch]).sum() / squares[batch]
            assert changes.errors(2)[batch, group] == pytest.approx(expected)
    assert changes.variance(5.0) == pytest.approx(1 + 5 * np.array([3.0, 4.0]) / squares)
    pooled = model_sizes.pooled_variance(
        {"a": changes, "b": changes}, {"gradient_sq": changes.gradient_sq, "change_sq": squares}
    )
    assert pooled["v_by_batch"] == pytest.approx(changes.variance(np.diagonal(gram).mean()))


def test_the_exponent_of_sizes_is_that_of_the_law():
    def exponent(error):
        shared = {"jacobian_sq_relative_error": error}
        return model_sizes.size_exponent(
            [{"d": d, "v_by_batch": [3 * d**0.2, 5 * d**0.4]} | shared for d in (1e3, 1e5)]
        )

    sure, unsure = exponent(0.0), exponent(0.5)
    assert sure[0] == unsure[0] == pytest.approx(0.3)
    shared = 1.96 * 0.5 * np.sqrt(2) / np.log(100)  # of a line through two points
    assert (unsure[2] - 0.3) ** 2 == pytest.approx((sure[2] - 0.3) ** 2 + shared**2, rel=1e-3)
    exponents = [(0.0, -0.05, 0.05), (0.2, 0.1, 0.3), (0.2, -0.1, 0.6), (0.8, 0.6, 1.0), (-0.8, -1.0, -0.6)]
    verdicts = [model_sizes.judge(one, 3, 24).verdict for one in exponents]
    assert verdicts == ["holds", "holds under conditions", "not resolved", "does not hold", "does not hold"]
    assert model_sizes.judge(exponents[0], 2, 24).verdict == "not run here"


def test_model_sizes_take_the_gradient_of_a_batch_once(monkeypatch):
    batches, along_gradient = [], belief_changes.along_gradient

    def counted(task, batch):
        batches.append(id(batch))
        return along_gradient(task, batch)

    monkeypatch.setattr(belief_changes, "along_gradient", counted)
    options = {"models": ["16"], "directions": 4, "batches": 2, "gradients": 3}
    model_sizes.run(Config("smoke", options=options))
    assert len(batches) == len(set(batches)) == 3


def test_the_cache_belongs_to_one_model_and_one_set_of_sentences(tmp_path):
    """Numbers on other sentences are other numbers: a file is known by what it says, not by its name."""
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.tsv").write_text(f"sentence\tlabel\n{text}\t1\n")

    def place(model, folder):
        options = {"cache": "kept", "train_file": str(tmp_path / folder / "train.tsv")}
        return ArrayCache(Config("cpu", options=options), model).folder

    assert place("org/0.5b", "a") == place("org/0.5b", "c") == Path("kept/org--0.5b/train-bc1c314a")
    assert len({place("x/0.5b", "a"), place("y/0.5b", "a"), place("x/0.5b", "b")}) == 3
    assert ArrayCache(Config("smoke", options={"cache": "kept"}), "16").folder == Path("kept/16/random")
    assert ArrayCache(Config("cpu", options={"train_file": "none"}), "smollm2").folder is None
    with pytest.raises(UsageError, match="There is no file"):
        place("smollm2", "no")


def test_cached_results_count_the_seconds_they_took(tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, 0.0, 20.0])
    monkeypatch.setattr("zokernel.experiments.entk.array_cache.time.perf_counter", lambda: next(clock))
    for _ in range(2):
        cached = ArrayCache(Config("smoke", options={"cache": str(tmp_path)}), "16")
        assert cached("a", lambda: {"x": np.ones(2)})["x"].tolist() == [1, 1]
        assert list(cached("b", lambda: {"y": np.ones(2)})) == ["y"]
        assert cached.seconds == 120.0


def test_model_sizes_continue_from_the_cache(tmp_path, monkeypatch):
    options = {"models": ["16"], "directions": 4, "batches": 1, "gradients": 2, "cache": str(tmp_path)}
    first = model_sizes.run(Config("smoke", options=options))
    monkeypatch.setattr(belief_changes, "along_gradient", None)
    assert model_sizes.run(Config("smoke", options=options)).numbers == first.numbers
    result = model_sizes.run(Config("smoke", options=options | {"directions": [[4, 0]]}))
    assert result.numbers["rows"][0]["distribution"] == "gaussian"
    assert len(result.numbers["rows"]) == 1
