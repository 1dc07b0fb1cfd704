"""Tasks of reasoning-gym as rewards that bring their prompts; a small stand-in where it is not installed."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from chats import chat_tokenizer
from models import build

from zokernel.cli import main
from zokernel.errors import RunError, UsageError
from zokernel.finetune.rewards.functions import load_reward
from zokernel.finetune.rewards.reasoning import make_prompts


def stand_in():
    """A module with the part of reasoning-gym's interface that is used, and one task: the sum of two numbers."""
    gym, factory, utils = (types.ModuleType(f"reasoning_gym{end}") for end in ("", ".factory", ".utils"))

    def create_dataset(name, *, size, seed):
        for n in range(seed, seed + size):  # neighbouring seeds share entries
            a, b = 7 * n % 50, n % 9
            facts = {"source_dataset": name, "terms": (a, b)}
            yield {"question": f"{a} + {b} =", "answer": str(a + b), "metadata": facts}

    def score(answer, entry):
        return 1.0 if answer == str(sum(entry["metadata"]["terms"])) else 0.01

    def extract_answer(completion):
        _, tag, rest = completion.partition("<answer>")
        return rest.partition("</answer>")[0] if tag else None

    gym.create_dataset, gym.get_score_answer_fn = create_dataset, lambda name: score
    factory.DATASETS, utils.extract_answer = {"chain_sum": None}, extract_answer
    return {module.__name__: module for module in (gym, factory, utils)}


@pytest.fixture
def gym(monkeypatch):
    for name, module in stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)


def test_answers_are_scored_by_the_task(gym):
    reward = load_reward("reasoning_gym:chain_sum")
    row = {"prompt": "4 + 5 =", "answer": "9", "metadata": {"terms": [4, 5]}}
    written_out = row | {"metadata": json.dumps(row["metadata"])}
    texts = [" 9\n", "It is <answer>9</answer>.", "10", "9 or so"]
    assert reward(["4 + 5 ="] * 4, texts, [row] * 4) == [1.0, 1.0, 0.01, 0.01]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    prompt = [{"role": "user", "content": "4 + 5 ="}]
    assert reward([prompt] * 4, chats, [written_out] * 4) == [1.0, 1.0, 0.01, 0.01]
    assert reward.needs() == ["answer", "metadata"]


def test_prompts_are_made_and_no_split_shares_one(gym):
    splits = make_prompts("chain_sum", train=1200, test=150)
    questions = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(questions) == len(set(questions)) == 450, "all of the 50 times 9 sums there are"
    assert [len(splits[split]) for split in ("test", "validation", "train")] == [150, 100, 200]
    assert splits["test"][8] == {"prompt": "6 + 8 =", "answer": "14", "metadata": splits["test"][8]["metadata"]}
    assert make_prompts("chain_sum", train=1200, test=150) == splits


def test_a_missing_task_or_library_is_named_in_one_sentence(monkeypatch, gym):
    with pytest.raises(UsageError, match=r"reasoning-gym has no task 'chain_sun': .* such as chain_sum"):
        load_reward("reasoning_gym:chain_sun")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        RunError, match=r"reasoning_gym:countdown needs reasoning-gym.*pip install 'zokernel\[reasoning"
    ):
        load_reward("reasoning_gym:countdown")


def test_a_run_needs_no_data(gym, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    build("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    words = ["--model_name_or_path", str(tmp_path / "model"), "--reward_function", "reasoning_gym:chain_sum"]
    words += [
        "--objective",
        "reward",
        "--method",
        "es",
        "--num_perturbations",
        "2",
        "--max_steps",
        "2",
        "--lora",
        "true",
    ]
    words += ["--max_new_tokens", "3", "--max_test_samples", "8", "--max_eval_samples", "4", "--precision", "fp32"]
    assert main(["finetune", *words, "--output_dir", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["num_test"] == 8
    assert metrics["task"] == "reasoning_gym:chain_sum"
    assert metrics["before"]["reward"] == pytest.approx(0.01)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert main(["finetune", *words, "--output_dir", str(tmp_path / "other")]) == 1
    assert "needs reasoning-gym, which is not installed: pip install" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("task", ["countdown", "gsm_symbolic", "chain_sum"])
def test_the_library_itself(task):
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (pip install 'zokernel[reasoning]')")
    rows = make_prompts(task, train=20, validation=10, test=5)
    assert [len(rows[split]) for split in ("train", "validation", "test")] == [20, 10, 5]
    sample = rows["test"]
    reward, prompts = load_reward(f"reasoning_gym:{task}"), [row["prompt"] for row in sample]
    assert reward(prompts, [row["answer"] for row in sample], sample) == [1.0] * 5
    assert reward(prompts, [f"Well: <answer>{row['answer']}</answer>" for row in sample], sample) == [1.0] * 5
    assert max(reward(prompts, ["no idea"] * 5, sample)) < 0.1
