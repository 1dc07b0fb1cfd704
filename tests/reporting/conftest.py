"""Fixtures of the tests of reports."""

from __future__ import annotations

import pytest
from kinds import Kinds


@pytest.fixture(scope="session")
def kinds(tmp_path_factory, tiny_lm_path, tiny_reviews_path):
    """A function that returns the folder of a tiny run of a kind, made on first use."""
    return Kinds(tmp_path_factory.mktemp("kinds"), tiny_lm_path, tiny_reviews_path)
