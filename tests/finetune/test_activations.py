"""The estimated activations of a step are what torch allocates, for the actual rows and not the longest allowed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from zokernel.cli import main
from zokernel.finetune.models.memory_setups import BLOCK, THREAD, Sizes, measure
from zokernel.finetune.scoring import language_head
from zokernel.finetune.scoring.options import scored_logits
from zokernel.finetune.trainer.activations import scored_of, tokens_of

FACTOR = 1.5


def allocated(run: Callable[[], object]) -> int:
    """Return the most bytes that are allocated at a time while a function runs."""
    with torch.no_grad():
        run()  # tables that are made once
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    events = profiler.profiler.kineto_results.events()
    held = most = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += size
        most = max(most, held)
    return most


@pytest.mark.parametrize(("rows", "tokens"), [(4, 12), (8, 48), (4, 400)])
@pytest.mark.parametrize("task", ["options", "text"])
def test_the_estimate_of_a_forward_matches_what_is_allocated(tiny_lm_path, task, rows, tokens):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32).eval()
    ids = torch.randint(5, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "options":
        batch["positions"] = torch.full((rows, 1), tokens - 1)
        measured = allocated(lambda: scored_logits(model, batch).float())
    else:
        batch |= {"positions": torch.arange(tokens - 1).expand(rows, -1), "targets": ids[:, 1:]}
        measured = allocated(lambda: language_head.token_losses(model, batch))
    estimate = measure(model.config, torch.float32).activations(tokens_of(batch), scored=scored_of(batch))
    assert 1 / FACTOR < estimate / measured < FACTOR, (estimate, measured)


def test_logits_are_counted_for_as_many_positions_as_are_taken_together():
    sizes = Sizes(0, 0, 0, 4, hidden=64, widest=288, vocabulary=50_000, cached=0)
    assert language_head.BLOCK == BLOCK == 512
    assert sizes.activations(4096) == 4096 * 64 * 4 + 512 * 50_000 * 8
    assert sizes.activations(4096, scored=2) == 4096 * (4 * 64 + 288) * 4
    assert sizes.activations(100, scored=100, losses=8) == 800 * 64 * 4 + 512 * 50_000 * 8
    one, border = sizes.activations(4096), 2 * 4096 * 64 * 4
    assert sizes.streamed(4096, losses=3) == one + 2 * THREAD + 3 * border
    small = sizes.activations(10, scored=1)
    assert sizes.streamed(10, losses=3, scored=1) == 3 * (small + 2 * 10 * 64 * 4)


def test_a_run_reports_the_memory_of_its_own_rows(flags, tmp_path, caplog):
    """Not rows as long as they might be: no run is refused, or warned of, for a length that no row has."""
    extra = ["--max_length", "2000000", "--max_steps", "1", "--method", "mezo"]
    messages = []
    for name, offload in (("memory", []), ("disk", ["--offload", "disk", "--lora", "true"])):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert main(["finetune", *flags, *extra, *offload, "--output_dir", str(tmp_path / name)]) == 0
        messages.append(next(line for line in caplog.messages if line.startswith("Activations:")))
        if offload:
            assert "2 losses per step of 16 rows of 128 tokens" in caplog.text
    matches = [
        re.search(r"about ([\d.]+) ([KM])iB.*of at most ([\d,]+) tokens, of which (\d+) are scored", t)
        for t in messages
    ]
    assert all(matches)
    sizes = [(float(m[1]) / {"K": 1024, "M": 1}[m[2]], int(m[3]), int(m[4])) for m in matches]
    assert sizes[0][1:] == sizes[1][1:]
    mebibytes, tokens, scored = sizes[0]
    assert scored == 16
    assert 16 * 4 < tokens < 16 * 32
    assert mebibytes < 1
    assert "(1 loss at a time of at most" in messages[0]
    assert re.search(r"of which [1-9][\d.]* KiB are kept between blocks \(2 losses of at most", messages[1])
