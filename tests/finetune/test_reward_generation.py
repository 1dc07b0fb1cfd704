"""What a population writes in one batched generate, against the weights moved member after member."""

from __future__ import annotations

import math
import time

import pytest
import torch
from chats import chat_tokenizer
from models import build
from test_text_losses import loud

from zokernel.directions import Dense, LowRank
from zokernel.errors import UsageError
from zokernel.estimators import Population
from zokernel.finetune.rewards.functions import Reward, Rewards
from zokernel.finetune.rewards.generate import Sampling, generate, gumbel_noise
from zokernel.finetune.rewards.objective import RewardObjective
from zokernel.finetune.rewards.prompts import EncodedPrompt, PromptCollator, check_prompts, turn_ends
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.perturb import InPlace, PerExampleRows, Stacked
from zokernel.perturb.per_example import Examples

EPS, SAMPLES, LENGTH = 0.05, 3, 12


def tiny(family, *, lora):
    torch.manual_seed(0)
    model = loud(build(family, vocab_size=400, hidden_size=160)).eval()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def batch_of(tokenizer, texts=("good", "a bad film, is it", "the user")):
    prompts = [EncodedPrompt(tokenizer(text)["input_ids"], 7 * n, {"prompt": text}) for n, text in enumerate(texts)]
    return PromptCollator(tokenizer.pad_token_id)([vars(prompt) for prompt in prompts])


def objective_of(tokenizer, temperature, calls):
    def judge(prompts, completions, completion_ids):
        calls.extend(zip(prompts, completions, strict=True))
        return [float(sum(ids)) + 0.001 * len(p) for p, ids in zip(prompts, completion_ids, strict=True)]

    samples = SAMPLES if temperature else 1
    objective = RewardObjective(
        Rewards((Reward("sum", judge),), (0.01,)),
        tokenizer,
        LENGTH,
        samples=samples,
        temperature=temperature,
        ends=[tokenizer.eos_token_id],
    )
    objective.seed, objective.step = 5, 2
    return objective


def losses(perturb, model, directions, objective, batch, points):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    perturb.attach(trained, directions, seed=5)
    with torch.no_grad():
        values = perturb.losses(lambda: objective(model, batch), points, step=2)
        perturb.weights.restore()
    return values


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("family", "lora"), [("llama", False), ("llama", True), ("qwen2", False), ("opt", True)])
def test_a_population_writes_what_its_members_write_one_after_the_other(family, lora, temperature):
    tokenizer, model = chat_tokenizer(), tiny(family, lora=lora)
    directions = Dense("gaussian") if lora else LowRank(1, refresh=0)
    batch, points = batch_of(tokenizer), [{}, *Population(EPS, 3).points(seed=0, step=0)]
    texts, numbers = {}, {}
    for copies in (7, 3, 1):
        calls = []
        objective = objective_of(tokenizer, temperature, calls)
        stacked = Stacked(lambda k, o=objective: o.stacked(model, batch, k), max_copies=copies, max_bytes=1 << 30)
        if not lora:  # points without an offset have no factors of their own
            numbers[copies] = losses(stacked, model, directions, objective, batch, points[1:])
        else:
            numbers[copies] = losses(stacked, model, directions, objective, batch, points)
        texts[copies] = list(calls)
    calls = []
    objective = objective_of(tokenizer, temperature, calls)
    expected = losses(InPlace("copy"), model, directions, objective, batch, points if lora else points[1:])
    assert texts[7] == texts[3] == texts[1] == calls
    assert numbers[7] == pytest.approx(expected, abs=1e-9)
    assert len(set(expected)) > 3, "members do not all write the same"
    if temperature:
        first = [text for _, text in calls[:SAMPLES]]
        assert len(set(first)) == SAMPLES, "samples of a prompt differ"


def test_rows_are_bounded_and_results_do_not_depend_on_the_bound():
    tokenizer, model = chat_tokenizer(), tiny("llama", lora=False)
    batch = batch_of(tokenizer)
    most, results = [], []
    inner = model.generate
    model.generate = lambda **kwargs: most.append(len(kwargs["input_ids"])) or inner(**kwargs)
    for bound in (100, 6, 1):
        calls = []
        objective = objective_of(tokenizer, 1.0, calls)
        objective.max_rows = bound
        results.append((float(objective(model, batch)), list(calls)))
    assert results[0] == results[1] == results[2]
    assert most == [9, 6, 3, 3, 3, 3]


def test_directions_per_prompt():
    """Each prompt's answers at weights of its own, against the weights moved for one prompt after another."""
    tokenizer, model = chat_tokenizer(), tiny("llama", lora=False)
    batch, directions, calls = batch_of(tokenizer), LowRank(1, refresh=0), []
    objective = objective_of(tokenizer, 1.0, calls)
    rows = PerExampleRows(lambda: [Examples(3, lambda: objective.example_terms(model, batch)[:, 0])])
    actual = losses(rows, model, directions, objective, batch, [{0: EPS}])
    together = [text for _, text in calls]
    expected, texts = [], []
    params = dict(model.named_parameters())
    for prompt in range(3):
        calls.clear()
        base = {name: p.detach().clone() for name, p in params.items()}
        with torch.no_grad():
            directions.add_(params, EPS, seed=5, step=2, index=prompt)
            expected.append(float(objective.example_terms(model, batch)[prompt, 0]))
            texts += [text for _, text in calls[prompt * SAMPLES : (prompt + 1) * SAMPLES]]
            for name, p in params.items():
                p.copy_(base[name])
    assert together == texts
    assert actual == pytest.approx(expected, abs=1e-9)


def test_noise_is_a_function_of_seed_step_row_and_position():
    base = Sampling(1.0, seed=1, step=3)
    noise = gumbel_noise([4, 9], 2, 50, base)
    assert noise.shape == (2, 50)
    assert torch.equal(noise[:, :33], gumbel_noise([4, 9], 2, 33, base))
    for other in (
        gumbel_noise([5, 9], 2, 50, base)[0],
        gumbel_noise([4, 9], 3, 50, base)[0],
        gumbel_noise([4, 9], 2, 50, Sampling(1.0, seed=2, step=3))[0],
        gumbel_noise([4, 9], 2, 50, Sampling(1.0, seed=1, step=4))[0],
        noise[1],
    ):
        assert not torch.isclose(noise[0], other).any()


def test_noise_has_the_gumbel_distribution():
    """Mean 0.5772 and variance pi^2 / 6 of 400,000 draws, within four standard errors; finite throughout."""
    noise = gumbel_noise(range(40), 0, 10_000, Sampling(1.0)).double()
    count = noise.numel()
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.57722, abs=4 * math.pi / math.sqrt(6 * count))
    # The fourth central moment of the distribution is 27/5 of the squared variance.
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=4 * math.sqrt(4.4 / count))


def test_sampled_tokens_have_the_probabilities_of_the_model():
    """First tokens of 3,000 samples against the softmax at temperature 1.5: chi-squared below its mean plus 5 sigma."""
    tokenizer, model = chat_tokenizer(), tiny("llama", lora=False)
    ids = torch.tensor([tokenizer("good film")["input_ids"]])
    count, temperature = 3000, 1.5
    with torch.no_grad():
        expected = count * (model(ids).logits[0, -1].double() / temperature).softmax(-1)
    answers = generate(
        model,
        ids.repeat(count, 1),
        torch.ones_like(ids).repeat(count, 1),
        rows=range(count),
        max_new_tokens=1,
        ends=[],
        pad_token_id=0,
        sampling=Sampling(temperature),
    )
    counts = torch.bincount(torch.tensor([answer.tokens[0] for answer in answers]), minlength=len(expected)).double()
    often = expected >= 5
    assert often.sum() > 5
    groups = [(counts[often], expected[often]), (counts[~often].sum()[None], expected[~often].sum()[None])]
    chi2 = sum(float(((f - e) ** 2 / e).sum()) for f, e in groups)
    freedom = int(often.sum())
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_evaluations_decode_greedily_and_report_error_and_pass_rate():
    tokenizer, model = chat_tokenizer(), tiny("llama", lora=False)
    batch, calls = batch_of(tokenizer), []
    objective = objective_of(tokenizer, 1.0, calls)
    loss, outputs = objective.evaluate(model, batch)
    greedy = objective_of(tokenizer, 0.0, [])
    assert float(loss) == pytest.approx(float(greedy(model, batch)), rel=1e-6)
    assert [text for _, text in calls] == greedy.generate(model, batch)
    prediction = type("P", (), {"predictions": outputs["terms"].numpy()})
    assert "pass_rate" not in objective.metrics(prediction)
    assert objective.total_loss(prediction) == pytest.approx(float(loss), rel=1e-6)
    # Loss, the one function's value (its weight is 0.01, whatever was taken off the loss besides), and emptiness.
    rows = torch.tensor([[2.0, 1, 0], [1, 0, 0], [2, 1, 0], [0, 0, 1]])
    passed = type("P", (), {"predictions": rows.numpy()})
    metrics = objective.metrics(passed)
    assert metrics["reward"] == pytest.approx(0.005)
    assert metrics["pass_rate"] == 0.5
    assert metrics["empty_answers"] == 0.25
    assert metrics["reward_error"] == pytest.approx(0.01 * math.sqrt(1 / 3) / 2)


def test_a_reward_that_takes_longer_than_the_answers_is_named_once(monkeypatch, caplog):
    tokenizer, model = chat_tokenizer(), tiny("llama", lora=False)
    batch = batch_of(tokenizer)

    def dawdle(completions):
        time.sleep(0.3)
        return [0.0 for _ in completions]

    quick = Reward("quick", lambda completions: [0.0 for _ in completions])
    objective = objective_of(tokenizer, 0.0, [])
    objective.rewards = Rewards((quick, Reward("dawdle", dawdle)), (1.0, 1.0))
    objective(model, batch)
    assert not caplog.records, "a few seconds do not matter"
    assert objective.rewards.seconds["dawdle"] > 0.3 > objective.rewards.seconds["quick"]
    monkeypatch.setattr("zokernel.finetune.rewards.objective.SLOW", 0.5)
    objective._generation_seconds = -60.0  # as if the model were fast
    for _ in range(3):
        objective(model, batch)
    messages = [record.getMessage() for record in caplog.records if "Rewards have taken" in record.getMessage()]
    assert len(messages) == 1
    assert "dawdle takes most of it" in messages[0]


def test_a_template_that_alternates_roles_ends_an_answer_that_was_begun():
    alternating = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['role'] + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = chat_tokenizer(alternating)
    question = {"role": "user", "content": "good?"}
    chat = [question, {"role": "assistant", "content": "It is"}]
    assert turn_ends([{"prompt": [question]}], tokenizer) == [tokenizer.eos_token_id]
    assert turn_ends([{"prompt": chat}], tokenizer) == [tokenizer.eos_token_id]
    arguments = DataArguments(reward_function=["length:9"])
    check_prompts([{"prompt": chat}], tokenizer, arguments, kind="causal")
    # What no answer can follow is refused before the weights are loaded.
    tokenizer.chat_template = alternating.replace("eos_token", "raise_exception('no answers')")
    with pytest.raises(UsageError, match="does not take a chat with the roles user, assistant"):
        check_prompts([{"prompt": [question]}], tokenizer, arguments, kind="causal")
