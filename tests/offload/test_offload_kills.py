"""Processes killed while they update weights in files: the next one goes on to the bits of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import torch
import transformers
from test_streamed_forward import closure, resident, same, save, streamed, train, weights

from zokernel.offload import StreamedForward, streamed_blocks
from zokernel.optim import ZerothOrder
from zokernel.perturb import InForward

KILLS = int(os.environ.get("ZOKERNEL_KILLS", "10"))  # benchmarks ask for more
STEPS = 12


def child(folder: str, journal: str) -> None:
    """Train as the trainer does: a step's losses are kept first, its updates made when the blocks are read next."""
    torch.set_num_threads(1)
    saved, record = Path(folder), Path(journal)
    model = streamed(saved, trains_weights=True)
    blocks = streamed_blocks(model)
    optimizer = ZerothOrder(
        list(model.named_parameters()),
        lr=1e-2,
        estimator="two_point(1e-2, 3)",
        perturb=StreamedForward(blocks, model, model.working_copy),
        weight_decay=0.01,
    )
    lines = record.read_text().splitlines(keepends=True) if record.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    record.write_text("".join(whole)) if len(whole) < len(lines) else None
    for line in whole:
        optimizer.replay(json.loads(line))
    with record.open("a") as file:
        while optimizer.step_count < STEPS:
            optimizer.step(closure(model))
            os.write(file.fileno(), (json.dumps(optimizer.record()) + "\n").encode())
    blocks.settle_all()
    model.working_copy.wait()


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as the children have
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_kills_during_updates_leave_no_trace(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    saved, journal = save(config, tmp_path / "model"), tmp_path / "losses"
    reference = resident(saved)
    expected, _ = train(reference, InForward(), steps=STEPS)
    instants, kills, versions = random.Random(1), 0, set()
    while True:
        process = forked.context().Process(target=child, args=(str(saved), str(journal)))
        process.start()
        if kills < KILLS:
            before = len(journal.read_text().splitlines()) if journal.exists() else 0
            while process.is_alive() and (not journal.exists() or len(journal.read_text().splitlines()) <= before):
                time.sleep(1e-3)  # until it has taken a step of its own, so that updates are under way
            process.join(instants.uniform(0, 0.03))
            process.kill()
        process.join()
        files = sorted((tmp_path / "copy").glob("*.weights.*"))
        versions.add(tuple(file.suffix for file in files))
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            continue
        assert process.exitcode == 0
        assert [json.loads(line) for line in journal.read_text().splitlines()] == expected
        model = streamed(saved, trains_weights=True)
        blocks = streamed_blocks(model)
        assert blocks is not None
        perturb = StreamedForward(blocks, model, model.working_copy)
        trained = list(model.named_parameters())
        optimizer = ZerothOrder(trained, lr=1e-2, estimator="two_point(1e-2, 3)", perturb=perturb, weight_decay=0.01)
        for losses in expected:
            optimizer.replay(losses)
        assert same(weights(model), weights(reference))
        assert model.working_copy.bytes_written == 0  # all of it was there
        if kills >= KILLS:
            break
        journal.unlink()
    assert len(versions) > 1  # some were killed while a new version was being written
