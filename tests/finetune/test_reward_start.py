"""The penalty on leaving the starting weights: against plain float64 log-probabilities of the same answers."""

from __future__ import annotations

import math

import pytest
import torch
from chats import chat_tokenizer
from test_reward_generation import EPS, SAMPLES, batch_of, losses, objective_of, tiny

from zokernel.directions import Dense, LowRank
from zokernel.estimators import Population
from zokernel.finetune.rewards import start as start_module
from zokernel.finetune.rewards.start import Start, divergence, tokens_of
from zokernel.perturb import InForward, InPlace, Stacked

BETA = 0.7


def plain(model, prompt, answer, temperature):
    """Return log-probabilities of an answer's tokens, without padding, cache or batch, in float64."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double() / temperature
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return [float(row[token]) for row, token in zip(logprobs, answer, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize(("family", "lora"), [("llama", True), ("opt", True), ("gpt2", False)])
def test_the_penalised_losses_of_a_population_are_those_of_plain_forwards(family, lora, temperature):
    tokenizer, model = chat_tokenizer(), tiny(family, lora=lora)
    batch, recorded = batch_of(tokenizer), []
    objective = objective_of(tokenizer, temperature, [])
    directions = Dense("gaussian") if lora else LowRank(1, refresh=0)
    points = Population(EPS, 2).points(seed=0, step=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        base = {name: p.clone() for name, p in trained.items()}
        objective.beta, objective.start = BETA, Start(model)
        for p in trained.values():  # the run has gone on since
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        now = {name: p.clone() for name, p in trained.items()}

    sample_answers = objective._sample_answers

    def noted(*args, **kwargs):
        recorded.append(sample_answers(*args, **kwargs))
        return recorded[-1]

    objective._sample_answers = noted
    stacked = Stacked(lambda k: objective.stacked(model, batch, k), max_bytes=1 << 30)
    actual = losses(stacked, model, directions, objective, batch, points)
    (answers,) = recorded
    samples = SAMPLES if temperature else 1
    prompts = [ids for ids in tokens_of(batch["prompts"], batch["prompts_mask"]) for _ in range(samples)]
    expected, distances = [], []
    with torch.no_grad():
        for number, point in enumerate(points):
            answers_of_member = answers[number * len(prompts) : (number + 1) * len(prompts)]
            for name, p in trained.items():
                p.copy_(now[name])
            for index, offset in point.items():
                directions.add_(trained, offset, seed=5, step=2, index=index)
            tuned_logprobs = [
                plain(model, p, a.tokens + a.end, temperature or 1.0)
                for p, a in zip(prompts, answers_of_member, strict=True)
            ]
            for name, p in trained.items():
                p.copy_(base[name])
            start_logprobs = [
                plain(model, p, a.tokens + a.end, temperature or 1.0)
                for p, a in zip(prompts, answers_of_member, strict=True)
            ]
            deltas = [
                [s - m for m, s in zip(*pair, strict=True)] for pair in zip(tuned_logprobs, start_logprobs, strict=True)
            ]
            penalties = [sum(math.exp(d) - d - 1 for d in row) / len(row) for row in deltas]
            rewards = [
                0.01 * (float(sum(a.tokens)) + 0.001 * len(row["prompt"]))
                for a, row in zip(
                    answers_of_member, [row for row in batch["rows"] for _ in range(samples)], strict=True
                )
            ]
            expected.append(sum(BETA * d - r for d, r in zip(penalties, rewards, strict=True)) / len(answers_of_member))
            distances += penalties
        for name, p in trained.items():
            p.copy_(now[name])
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert min(distances) > 1e-4, "the weights have moved"
    for perturb in (InPlace("copy"), InForward()) if lora else ():
        assert losses(perturb, model, directions, objective, batch, points) == pytest.approx(expected, rel=1e-5)


def test_the_divergence_of_draws_is_the_divergence():
    """The mean over draws from p of e^delta - delta - 1 against sum p log(p / q), z below 4.5."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 50, dtype=torch.float64, generator=generator).log_softmax(-1)
    exact = float((p.exp() * (p - q)).sum())
    draws = torch.multinomial(p.exp(), 4000, replacement=True, generator=generator)
    values = torch.tensor([divergence([float(p[d])], [float(q[d])]) for d in draws], dtype=torch.float64)
    assert abs(float(values.mean()) - exact) < 4.5 * float(values.std()) / math.sqrt(len(values))
    assert float(values.min()) >= 0
    assert divergence([-1e4], [-1.0]) > 1e100, "no overflow"


def test_at_the_start_nothing_is_penalised_and_chunks_change_nothing(monkeypatch):
    tokenizer, model = chat_tokenizer(), tiny("llama", lora=True)
    batch = batch_of(tokenizer)
    objective = objective_of(tokenizer, 1.0, [])
    bare = float(objective(model, batch))
    objective.beta, objective.start = 10.0, Start(model)
    assert float(objective(model, batch)) == pytest.approx(bare, abs=1e-6)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(-1)
    penalised = float(objective(model, batch))
    assert penalised > bare + 0.01
    rows = []
    whole = Start._of_rows
    monkeypatch.setattr(
        Start, "_of_rows", lambda self, bare, pairs, *a: rows.append(len(pairs)) or whole(self, bare, pairs, *a)
    )
    for bound in (1, 1 << 30):
        monkeypatch.setattr(start_module, "MAX_LOGITS", bound)
        assert float(objective(model, batch)) == pytest.approx(penalised, rel=1e-6)
    assert rows == [1] * 9 + [9]
    metrics = objective.metrics(type("P", (), {"predictions": objective.evaluate(model, batch)[1]["terms"].numpy()}))
    assert metrics["kl"] > 0
    terms = objective.evaluate(model, batch)[1]["terms"].double()
    assert float(terms[:, 0].mean()) == pytest.approx(metrics["reward"] - 10 * metrics["kl"], rel=1e-5)
