"""A hub on this machine, and child processes that use it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import preloaded
import pytest
from hub_runs import Run
from hub_server import Hub

CHILD = Path(__file__).with_name("hub_child.py")


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub without repositories."""
    with Hub() as server:
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run commands (lists of words) or load tasks (names) in one child process; dictionaries change its environment."""

    def run_(endpoint: str, *cases: Any, **environment: str) -> list[dict[str, Any]]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_OFF"))}
        clean |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "ZOKERNEL_HOME": str(tmp_path / "zk"),
            "HF_HUB_DISABLE_XET": "1",
        }
        clean |= {"NO_PROXY": "127.0.0.1,localhost", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        child = preloaded.run(
            [str(CHILD)], standard_input=json.dumps(cases), environment=clean | environment, folder=tmp_path
        )
        assert child.returncode == 0, child.stderr[-3000:]
        return json.loads(child.stdout.splitlines()[-1])

    return run_
