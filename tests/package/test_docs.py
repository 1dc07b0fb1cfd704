"""Every code block of README and documentation runs, or says in its title why it cannot; then it is parsed."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from zokernel.cli import load, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# What a title begins with when a block is not run here.
NOT_RUN = ("needs ", "runs until ", "about ", "a fresh checkout")
FENCE = re.compile(r"^(`{3,})[ \t]*(\w*)([^\n]*)\n(.*?)^\1[ \t]*$", re.DOTALL | re.MULTILINE)
# What the reader of a page has already: a model, a loader, a network.
SETUP = {
    "optimizers.md": """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
loader = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(2)]
def loss_of(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
def losses_of(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
""",
    "any-trainer.md": """
import models
model = models.build("llama", vocab_size=320)
tokenizer = models.tiny_tokenizer(["bad", "good"], {"eos_token": "<eos>", "pad_token": "<eos>"})
""",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str
    code: str

    @property
    def runs(self) -> bool:
        """Whether the tests run it."""
        return not self.title.startswith(NOT_RUN)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]*)"', match.group(3))
        line = text[: match.start()].count("\n") + 1
        blocks.append(Block(page, line, match.group(2), title.group(1) if title else "", match.group(4)))
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON_PAGES = sorted({block.page for block in BLOCKS if block.language == "python"})
BASH_PAGES = sorted({block.page for block in BLOCKS if block.language == "bash"})


def commands_of(code: str) -> list[list[str]]:
    """Split a shell block into commands, without comments and with continued lines joined."""
    script = code.replace("\\\n", " ")
    return [words for line in script.splitlines() if (words := shlex.split(line, comments=True))]


def is_shell(block: Block) -> bool:
    """Bash blocks, and blocks without a language whose first word is one of ours."""
    first = block.code.split(maxsplit=1)[:1]
    return block.language in ("bash", "console") or (not block.language and first in (["zokernel"], ["make"], ["pip"]))


def test_no_block_is_of_an_unknown_kind():
    languages = {"python", "bash", "yaml", "diff", ""}
    assert [str(block) for block in BLOCKS if block.language not in languages] == []
    assert len(PYTHON_PAGES) >= 10
    assert len(BASH_PAGES) >= 6
    titled = [block for block in BLOCKS if not block.runs]
    assert all(len(block.title) > 12 for block in titled), "a block that does not run says why"


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    for name, value in rendezvous.items():
        monkeypatch.setenv(name, value)
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec(SETUP.get(page.name, ""), namespace)
    for block in blocks_of(page):
        if block.language == "python":
            code = compile(block.code, str(block), "exec")
            if block.runs:
                exec(code, namespace)


@pytest.fixture
def workplace(tmp_path, monkeypatch, tiny_lm_path, tiny_reviews_path):
    """A folder with the files that the pages name, in small; and how a command is made to run there."""
    reviews = [json.loads(line) for line in (tiny_reviews_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "reviews.tsv").write_text(
        "sentence\tlabel\n" + "".join(f"{row['sentence']}\t{row['label']}\n" for row in reviews)
    )
    tickets = [{"subject": row["sentence"], "priority": ("low", "high")[row["label"]]} for row in reviews]
    (tmp_path / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tickets))
    questions = [{"prompt": f"Is it {word}?", "completion": f" It is {word}."} for word in ("good", "bad") * 8]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "judge.py").write_text(
        "def valid(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "nets.py").write_text("import torch\n\ndef build():\n    return torch.nn.Linear(3, 4)\n")
    generator = np.random.default_rng(0)
    for name in ("observed", "updated"):
        np.save(tmp_path / f"{name}.npy", generator.standard_normal((1, 3)).astype(np.float32))
    x = generator.standard_normal((12, 4))
    np.savez(tmp_path / "features.npz", features=x, targets=x.sum(1))
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    tiny = ["--model_name_or_path", str(tiny_lm_path), "--precision", "fp32"]
    words = ["--label_words", "bad", "good"]
    extra = {
        "finetune": [
            *tiny,
            "--max_steps",
            "2",
            "--eval_steps",
            "1",
            "--max_eval_samples",
            "8",
            "--max_test_samples",
            "8",
        ],
        "plan": [*tiny, *words, "--num_probes", "8", "--update_examples", "2", "--observe_examples", "1"],
    }

    def added(command: list[str]) -> list[str]:
        """Return the flags that make a command small."""
        if "--memory" in command:  # reads no data
            return ["--model_name_or_path", str(tiny_lm_path)]
        if "questions.jsonl" in command:
            return [*extra[command[0]], "--max_new_tokens", "4"]
        return extra[command[0]] + words * (command[0] == "finetune") if command[0] in extra else []

    return added


@pytest.mark.parametrize("page", BASH_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_shell_blocks_run_in_order(page, workplace, capsys):
    for block in blocks_of(page):
        if block.language != "bash" or not block.runs:
            continue
        for words in commands_of(block.code):
            assert words[0] == "zokernel", f"{block}: {words[0]} cannot run here; say so in the title"
            code = main([*words[1:], *workplace(words[1:])])
            assert code == 0, f"{block}: {shlex.join(words)}\n{capsys.readouterr().err}"


def test_the_reward_of_the_guide_takes_texts_and_chats():
    (judge,) = (block for block in blocks_of(ROOT / "docs/guide/rewards.md") if "def valid(" in block.code)
    names: dict = {}
    exec(judge.code, names)
    texts = ['{"name": "Ada"}', "{}", "7", "Ada"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert names["valid"](texts) == names["valid"](chats) == [1.0, 0.5, 0.0, 0.0]


def parse(command: str, argv: list[str]) -> None:
    """Parse a command's flags with its own parser, without running it."""
    load(command)[1].parse(argv)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if is_shell(block) and (not block.language or not block.runs)], ids=str
)
def test_shell_blocks_that_do_not_run_are_right(block, workplace, capsys):
    """Commands parse; make targets, files and tools that they name exist."""
    for words in commands_of(block.code):
        if words[0] == "zokernel":
            try:
                parse(words[1], words[2:])
            except SystemExit as stop:
                pytest.fail(f"{block}: {shlex.join(words)}: {stop}\n{capsys.readouterr().err}")
        elif words[:1] == ["torchrun"] and "zokernel" in words:
            command = words[words.index("zokernel") + 1 :]
            parse(command[0], command[1:])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        else:
            assert words[0] in ("pip", "torchrun", "accelerate", "git"), f"{block}: {words[0]}"


def test_generated_pages_are_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.delitem(sys.modules, "publish", raising=False)
    publish = importlib.import_module("publish")
    for path, text in publish.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"run python docs/publish.py: {path.name} is old"


def test_committed_results_are_small():
    size = sum(path.stat().st_size for path in (ROOT / "docs" / "results").rglob("*") if path.is_file())
    assert size < 5_000_000


def test_publishing_copies_rounds_and_refreshes(smoke_run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.delitem(sys.modules, "publish", raising=False)
    publish = importlib.import_module("publish")
    smoke_run.record("entk/horizon")
    source = tmp_path / "run"
    shutil.copytree(smoke_run.folder / "entk" / "horizon", source / "entk" / "horizon")
    record = json.loads((source / "entk/horizon/result.json").read_text())
    record["config"]["options"] = {"train_file": "/home/someone/sst2/train.tsv", "seeds": 3}
    (source / "entk/horizon/result.json").write_text(json.dumps(record))
    seconds = tmp_path / "seconds.json"
    seconds.write_text("{}")
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(publish, "SECONDS", seconds)
    assert publish.copy_results(source) == ["entk/horizon"]
    published = json.loads((tmp_path / "results/entk/horizon/result.json").read_text())
    power = smoke_run.record("entk/horizon")["numbers"]["exponents"]["P"][0]
    assert published["numbers"]["exponents"]["P"][0] == float(f"{power:.6g}")
    assert published["config"]["options"] == {"train_file": "sst2/train.tsv", "seeds": 3}
    assert published["command"].endswith("--seed 0 --set train_file=sst2/train.tsv --set seeds=3")
    old, new = source / "entk/horizon/horizon.png", tmp_path / "results/entk/horizon/horizon.png"
    assert 1000 < new.stat().st_size < old.stat().st_size
    assert set(json.loads(seconds.read_text())["entk/horizon"]) == {"smoke"}
