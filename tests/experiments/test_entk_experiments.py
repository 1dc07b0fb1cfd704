"""Every ZO-eNTK experiment at smoke scale: it finishes without a download and its numbers make sense."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zokernel.experiments import Config
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
