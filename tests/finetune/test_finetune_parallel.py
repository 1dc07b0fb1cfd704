"""Several processes train one model: the same weights on all of them, and as one process would have made."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import killing
import pytest
import torch
from forked import context
from ranks import environment, free_port, spawn
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from trainers import load_parts, make_trainer

from zokernel.errors import UsageError
from zokernel.finetune.trainer.processes import make_parallel

STEPS = 6


def train(parts, folder, **settings):
    settings = {
        "max_steps": STEPS,
        "num_perturbations": 4,
        "logging_steps": 2,
        "per_device_eval_batch_size": 4,
        **settings,
    }
    trainer = make_trainer(parts, folder, **settings)
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.bare_model.named_parameters()}, trainer


def run_rank(rank, port, folder, tiny_lm_path, tiny_reviews_path):
    torch.set_num_threads(1)
    os.environ.update(environment(rank, 2, port))
    results = {}
    for mode, size in (("perturbation", 8), ("data", 4)):
        parts = load_parts(tiny_lm_path, tiny_reviews_path, torch.float64)
        weights, trainer = train(
            parts, folder / mode, zo_parallel=mode, per_device_train_batch_size=size, train_sampling_strategy="random"
        )
        metrics = trainer.evaluate()
        results[mode] = (
            weights,
            trainer.parallel.bytes_sent,
            type(trainer.model_wrapped).__name__,
            metrics["eval_loss"],
        )
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_lm_path, tiny_reviews_path):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(run_rank, free_port(), folder, tiny_lm_path, tiny_reviews_path, size=2)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_perturbation_parallel_is_the_run_of_one_process(ranks, tmp_path, tiny_lm_path, tiny_reviews_path):
    parts = load_parts(tiny_lm_path, tiny_reviews_path, torch.float64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected, trainer = train(parts, tmp_path, train_sampling_strategy="random")
    torch.set_num_threads(threads)
    for weights, bytes_sent, wrapper, loss in (rank["perturbation"] for rank in ranks[1]):
        assert same_bits(weights, expected)
        # P = 4 directions have 8 ends, of which each process sends the losses of 4, and the weight of its batch.
        assert bytes_sent == STEPS * 8 * (4 + 1)
        assert wrapper == "LlamaForCausalLM"  # no gradient machinery around it
        assert loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_data_parallel_ranks_agree_and_see_a_batch_twice_as_large(ranks):
    first, second = (rank["data"] for rank in ranks[1])
    assert same_bits(first[0], second[0])
    assert first[1] == STEPS * 8 * (8 + 1)
    reference = ranks[1][0]["perturbation"][0]
    # The two halves make up the batch of the run with one batch of eight: the same step up to rounding.
    for name, weight in reference.items():
        torch.testing.assert_close(first[0][name], weight, rtol=0, atol=1e-6)


def test_the_log_counts_the_bytes(ranks):
    rows = [json.loads(line) for line in (ranks[0] / "data" / "steps.jsonl").read_text().splitlines()]
    assert [row["bytes_sent"] for row in rows] == [8 * (8 + 1) * (step + 1) for step in range(STEPS)]


def worker(argv, log, home, pids):
    (pids / os.environ["RANK"]).write_text(str(os.getpid()))
    killing.run(argv, log, None, home)


def elastic_run(argv, log, pids):
    """Do what torchrun does in its process, but fork the processes that train from a server that has all imports."""
    context()
    pids.mkdir()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=2,
        run_id=log.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="forkserver",
    )
    return elastic_launch(config, worker)(argv, str(log), os.environ["ZOKERNEL_HOME"], pids)


def test_a_killed_rank_is_restarted_and_the_run_ends_the_same(tmp_path, tiny_lm_path, tiny_reviews_path, monkeypatch):
    """torchrun's elastic agent restarts the processes; they continue from the journal."""
    steps = 150
    flags = [
        *("--model_name_or_path", str(tiny_lm_path), "--train_file", str(tiny_reviews_path / "train.jsonl")),
        *("--validation_file", str(tiny_reviews_path / "validation.jsonl"), "--label_words", "bad", "good"),
        *("--precision", "fp32", "--per_device_train_batch_size", "8", "--max_steps", str(steps)),
        *("--learning_rate", "1e-3", "--eval_strategy", "no", "--save_strategy", "journal", "--num_perturbations", "2"),
    ]
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    one, two = tmp_path / "one", tmp_path / "two"
    single = killing.start(["finetune", *flags, "--output_dir", str(one)], tmp_path / "log")
    single.join()
    assert single.exitcode == 0, (tmp_path / "log").read_text()
    together = ["finetune", *flags, "--zo_parallel", "perturbation", "--output_dir", str(two)]
    log, rows, pids = tmp_path / "together", two / "steps.jsonl", tmp_path / "pids"
    deadline = time.monotonic() + 120
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(elastic_run, together, log, pids)
        while not (rows.exists() and len(rows.read_text().splitlines()) >= 10):
            assert not run.done(), (run.exception(), log.read_text())
            assert time.monotonic() < deadline
            time.sleep(0.01)
        victim = int((pids / "1").read_text())
        os.kill(victim, signal.SIGKILL)
        run.result(timeout=240)
    assert int((pids / "1").read_text()) != victim
    assert "are taken from the journal" in log.read_text()
    left, right = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name, weight in left.items():
        torch.testing.assert_close(right[name], weight, rtol=0, atol=1e-6)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="zo_parallel must be one of"):
        make_parallel("model", None, lambda: 1.0)
    assert make_parallel("data", None, lambda: 1.0) is None
