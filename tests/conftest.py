"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Decided before anything starts threads: the suite shares two cores with whatever else runs.
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of the real SmolLM2-135M, fetched on first use."""
    from zokernel.data import fetch

    return fetch("smollm2")


@pytest.fixture(scope="session")
def movie_reviews_path() -> Path:
    """Folder of the movie reviews, fetched on first use."""
    from zokernel.data import fetch

    return fetch("movie-reviews")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Official SST-2, TREC and RTE splits beside the checkout, standing in for a user's files."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the data folder beside the checkout is not there")
    return folder
