"""Fixtures that the tests of fine-tuning share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

JUDGE = """
import pathlib
def high(completions, completion_ids, **columns):
    with pathlib.Path(__file__).with_name("calls.txt").open("a") as log:
        print(len(completions), file=log)
    return [sum(ids) / (300 * max(1, len(ids))) for ids in completion_ids]
def any_good(completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return ["good" in text for text in texts]
"""


@pytest.fixture(scope="session")
def chat_model_path(tmp_path_factory) -> Path:
    """Folder of a tiny random Llama whose tokenizer knows chats."""
    from chats import chat_model

    return chat_model(tmp_path_factory.mktemp("chat-lm"))


@pytest.fixture
def reward_flags(chat_model_path, tmp_path, monkeypatch) -> list[str]:
    """Flags of a small run on rewards for high token ids; later flags override earlier ones, but add rewards.

    ``judge.py`` holds the rewards, and notes beside it how many completions each call was asked about.  The prompts are
    texts in ``texts.jsonl``, and the same as chats in ``chats.jsonl``.
    """
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    (tmp_path / "judge.py").write_text(JUDGE)
    rows = [{"prompt": f"film {'good ' * (n % 3)}{n}", "level": n, "review": "so so"} for n in range(24)]
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    for name, content in (("texts", rows), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    words = ["--model_name_or_path", str(chat_model_path), "--train_file", str(tmp_path / "texts.jsonl")]
    words += ["--objective", "reward", "--reward_function", f"{tmp_path}/judge.py:high", "--max_new_tokens", "6"]
    words += ["--method", "es", "--num_perturbations", "6", "--eps", "0.05", "--learning_rate", "0.05"]
    words += ["--max_steps", "8", "--eval_steps", "4", "--per_device_train_batch_size", "4", "--precision", "fp32"]
    return [*words, "--logging_steps", "1", "--output_dir", str(tmp_path / "run")]
