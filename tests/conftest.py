"""Fixtures shared by the whole suite."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# Before torch loads its OpenMP: threads that spin while they wait stall each other when the cores are shared with
# other programs (25 times slower forwards, measured).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from skips import pytest_sessionfinish  # noqa: F401, a hook

# A suite started in the background inherits an ignored SIGINT; the tests of Ctrl-C need the usual one.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(2, os.cpu_count() or 1) // WORKERS))


class Imported:
    """What was imported is hidden from the garbage collector.

    Every trainer runs it several times, and each time it looked at all objects of all libraries for half a second.

    Attributes:
        hidden: The number of imported modules when this was last done.
    """

    hidden = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Generator[None, object, object]:
        """Collect no garbage while tests, and with them the libraries, are imported."""
        gc.disable()
        result = yield
        gc.enable()
        self.hide()
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        """Hide what a test was the first to import."""
        result = yield
        if len(sys.modules) > self.hidden + 20:
            self.hide()
        return result

    def hide(self) -> None:
        gc.collect()
        gc.freeze()
        self.hidden = len(sys.modules)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Imported())


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of the real SmolLM2-135M, fetched on first use."""
    from zokernel.data import fetch

    return fetch("smollm2")


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path, None, None]:
    """Folder of the code that comes with models: one for the process, which imports from the first one alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("modules")
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def movie_reviews_path() -> Path:
    """Folder of the movie reviews, fetched on first use."""
    from zokernel.data import fetch

    return fetch("movie-reviews")


class SmokeRun:
    """Every experiment at smoke scale, run once a session, whichever test in whichever process asks first.

    Attributes:
        folder: The output folder of ``zokernel reproduce``.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def record(self, name: str) -> dict[str, Any]:
        """Return ``result.json`` of an experiment, running it if that has not been done yet."""
        from zokernel.experiments import Config
        from zokernel.experiments.runner import run_all
        from zokernel.experiments.storage import load_record

        with (self.folder / f".{name.replace('/', '-')}").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if load_record(self.folder / name) is None:
                (outcome,) = run_all([name], Config("smoke"), self.folder)
                assert outcome.state == "finished", (self.folder / name / "error.txt").read_text()
        record = load_record(self.folder / name)
        assert record is not None
        return record


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> SmokeRun:
    """The smoke-scale results that the tests of experiments, claims, reports and documentation share."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if WORKERS > 1 else folder) / "smoke"
    folder.mkdir(exist_ok=True)
    return SmokeRun(folder)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Official SST-2, TREC and RTE splits beside the checkout, standing in for a user's files."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the data folder beside the checkout is not there")
    return folder


@pytest.fixture(scope="session")
def tiny_lm_path(tmp_path_factory) -> Path:
    """Folder of a tiny random Llama and a byte-level tokenizer that knows a few whole words."""
    from models import save_plain_llama

    return save_plain_llama(tmp_path_factory.mktemp("tiny-lm"))


@pytest.fixture(scope="session")
def tiny_reviews_path(tmp_path_factory) -> Path:
    """Folder with train/validation/test .jsonl whose label is written in the sentence: easy to learn."""
    import json
    import random

    folder = tmp_path_factory.mktemp("tiny-reviews")
    generator = random.Random(0)
    for split, size in (("train", 64), ("validation", 24), ("test", 24)):
        rows = []
        for _ in range(size):
            label = generator.randrange(2)
            filler = " ".join(generator.choice(["movie", "a", "the"]) for _ in range(generator.randrange(1, 4)))
            rows.append({"sentence": f"{filler} {('bad', 'good')[label]}", "label": label})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def parts(tiny_lm_path, tiny_reviews_path):
    """Model, tokenizer and encoded splits, fresh for every test."""
    from trainers import load_parts

    return load_parts(tiny_lm_path, tiny_reviews_path)


@pytest.fixture
def flags(tiny_lm_path, tiny_reviews_path, tmp_path, monkeypatch):
    """Flags of a small run; later flags override earlier ones."""
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    return [
        *("--model_name_or_path", str(tiny_lm_path)),
        *("--train_file", str(tiny_reviews_path / "train.jsonl")),
        *("--validation_file", str(tiny_reviews_path / "validation.jsonl")),
        *("--test_file", str(tiny_reviews_path / "test.jsonl")),
        *("--label_words", "bad", "good"),
        *("--output_dir", str(tmp_path / "run")),
        *("--max_steps", "6", "--learning_rate", "1e-3", "--precision", "fp32"),
    ]


@pytest.fixture(scope="session")
def run_folders(tmp_path_factory, tiny_lm_path, tiny_reviews_path, smoke_run) -> dict[str, Path]:
    """One finished run of every kind that ``zokernel report`` knows."""
    import runs

    def new(name: str) -> Path:
        return tmp_path_factory.mktemp(name)

    for name in ("entk/horizon", "nzk/linear_d2", "kerzoo/estimator"):
        smoke_run.record(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOKERNEL_HOME", str(new("home")))
        return {
            "finetune": runs.finetune(new("finetune") / "run", tiny_lm_path, tiny_reviews_path),
            "plan": runs.plan(new("plan"), tiny_lm_path, tiny_reviews_path),
            "kernel": runs.kernel(new("kernel")),
            "evolve": runs.evolve(new("evolve")),
            "reproduce": smoke_run.folder,
        }
