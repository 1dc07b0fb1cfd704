"""Moments of the distributions of random vectors in their limits, and where there is none."""

from __future__ import annotations

import math

import pytest
import torch

from zokernel.distributions import Distribution
from zokernel.errors import UsageError


def test_student_t_without_end_is_the_gaussian():
    for z in (Distribution.parse("student_t(inf)"), Distribution("student_t", df=math.inf)):
        assert [z.moment(order) for order in (2, 4, 6, 8)] == [1.0, 3.0, 15.0, 105.0]
        draws = z.sample(5, 3, torch.Generator().manual_seed(0))
        assert torch.equal(draws, Distribution("gaussian").sample(5, 3, torch.Generator().manual_seed(0)))
    nearly = Distribution.parse("student_t(1e9)")
    assert nearly.kurtosis == pytest.approx(3.0, rel=1e-7)


def test_coordinates_with_different_moments_have_no_common_moment():
    """A regression: it was the moment of a standard coordinate, 1 where the matrix has 4."""
    for z in (Distribution("gaussian", covariance=((4.0, 0.0), (0.0, 1.0))), Distribution("gaussian", mean=(3.0, 0.0))):
        with pytest.raises(UsageError, match="second_moment_matrix"):
            z.moment(2)
    z = Distribution("laplace", mean=(1.0, 0.0), covariance=((4.0, 1.0), (1.0, 2.0)))
    assert z.second_moment_matrix(2).tolist() == [[5.0, 1.0], [1.0, 2.0]]
