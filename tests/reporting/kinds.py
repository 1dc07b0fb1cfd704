"""A tiny run of every kind whose page is tested: on labels, chats and rewards, from disk, continued, and gone wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chats import chat_model, turns
from interrupted import ctrl_c_in

from zokernel.cli import main

JUDGE = """
def high(completions, completion_ids, **columns):
    return [sum(ids) / (300 * max(1, len(ids))) for ids in completion_ids]
def any_high(completions, completion_ids, **columns):
    return [any(i > 100 for i in ids) for ids in completion_ids]
"""
CUT = 5  # the step that a run which is continued is cut off in


def _rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _labels(model: Path, data: Path) -> list[str]:
    files = [w for split in ("train", "validation", "test") for w in (f"--{split}_file", str(data / f"{split}.jsonl"))]
    return ["--model_name_or_path", str(model), *files, "--label_words", "bad", "good"]


class Kinds:
    """Makes runs in a folder, each once.

    Args:
        folder: Where they are.
        model: A tiny language model.
        data: Folder of rows with labels.
    """

    def __init__(self, folder: Path, model: Path, data: Path):
        self.folder, self._labels, self._made = folder, _labels(model, data), {}
        (folder / "chat-model").mkdir(exist_ok=True)
        self._chat_model = chat_model(folder / "chat-model", num_key_value_heads=2)

    def __call__(self, kind: str) -> Path:
        """Return the ``output_dir`` of a run."""
        if kind not in self._made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("ZOKERNEL_HOME", str(self.folder / "home"))
                getattr(self, kind)(self.folder / kind, patch)
            self._made[kind] = self.folder / kind
        return self._made[kind]

    def _finetune(self, out: Path, *flags: str, code: int = 0) -> None:
        words = ["--precision", "fp32", "--output_dir", str(out), *flags]
        assert main(["finetune", *words]) == code

    def classification(self, out: Path, patch: pytest.MonkeyPatch) -> None:
        """Labels, learned."""
        steps = ["--max_steps", "60", "--eval_steps", "15", "--learning_rate", "3e-3"]
        self._finetune(out, *self._labels, *steps, "--num_perturbations", "4", "--eps", "1e-2")

    def first_order(self, out: Path, patch: pytest.MonkeyPatch) -> None:
        """The same by backpropagation."""
        steps = ["--max_steps", "20", "--eval_steps", "5", "--learning_rate", "3e-3"]
        self._finetune(out, *self._labels, *steps, "--method", "adamw")

    def judged(self, out: Path, patch: pytest.MonkeyPatch) -> None:
        """The same model, not trained."""
        self._finetune(out, *self._labels, "--do_train", "false")

    def chat(self, out: Path, patch: pytest.MonkeyPatch) -> None:
        """Chats."""
        rows = [{"messages": turns(f"film {n}", "good good good")} for n in range(30)]
        data = _rows(self.folder / "chats.jsonl", rows)
        flags = ["--model_name_or_path", str(self._chat_model), "--train_file", data, "--max_new_tokens", "4"]
        flags += ["--max_steps", "12", "--learning_rate", "3e-3", "--eval_steps", "6", "--num_perturbations", "4"]
        self._finetune(out, *flags, "--per_device_train_batch_size", "4")

    def reward(self, out: Path, patch: pytest.MonkeyPatch) -> None:
        """Rewards for tokens with high numbers, and for any such token."""
        (self.folder / "judge.py").write_text(JUDGE)
        rows = [{"prompt": f"film {'good ' * (n % 3)}{n}"} for n in range(24)]
        data, judge = _rows(self.folder / "prompts.jsonl", rows), self.folder / "judge.py"
        flags = ["--model_name_or_path", str(self._chat_model), "--train_file", data, "--objective", "reward"]
        flags += ["--reward_function", f"{judge}:high", "--reward_function", f"{judge}:any_high"]
        flags += ["--max_new_tokens", "6", "--method", "es", "--num_perturbations", "6", "--eps", "0.05"]
        flags += ["--learning_rate", "0.05", "--max_steps", "12", "--eval_steps", "4"]
        self._finetune(out, *flags, "--per_device_train_batch_size", "4")

    def offload(self, out: Path, patch: pytest.MonkeyPatch) -> None:
        """Weights that stay in files."""
        steps = ["--max_steps", "6", "--eval_steps", "3", "--learning_rate", "1e-3", "--method", "mezo"]
        self._finetune(out, *self._labels, *steps, "--offload", "disk")

    def resumed(self, out: Path, patch: pytest.MonkeyPatch) -> None:
        """A run that Ctrl-C cut off, and that the same command continued."""
        flags = [*self._labels, "--max_steps", "12", "--eval_steps", "4", "--learning_rate", "1e-3"]
        with ctrl_c_in(patch, step=CUT):
            self._finetune(out, *flags, code=130)
        self._finetune(out, *flags)

    def cut(self, out: Path, patch: pytest.MonkeyPatch) -> None:
        """A run that Ctrl-C cut off."""
        with ctrl_c_in(patch, step=CUT):
            self._finetune(out, *self._labels, "--max_steps", "12", "--eval_steps", "4", code=130)

    def diverged(self, out: Path, patch: pytest.MonkeyPatch) -> None:
        """A learning rate far too large."""
        self._finetune(out, *self._labels, "--max_steps", "30", "--eval_steps", "10", "--learning_rate", "3")

    def not_learned(self, out: Path, patch: pytest.MonkeyPatch) -> None:
        """A learning rate far too small."""
        self._finetune(out, *self._labels, "--max_steps", "40", "--eval_steps", "20", "--learning_rate", "1e-9")


KINDS = (
    *("classification", "first_order", "judged", "chat", "reward", "offload", "resumed", "cut", "diverged"),
    "not_learned",
)
