"""Operations on watched tensors come to the handler, others do not, and the tensors are themselves again afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zokernel.perturb.intercept import Intercepted


def recorded(seen):
    def handler(func, args, kwargs):
        seen.append(func.__name__)
        return func(*args, **kwargs)

    return handler


def test_only_operations_on_values_of_watched_tensors_are_seen():
    weight, other, seen = nn.Parameter(torch.ones(2, 3)), torch.ones(4, 3), []
    with Intercepted([weight, weight], recorded(seen)):
        assert (weight.shape, weight.size(0), weight.dtype) == ((2, 3), 2, torch.float32)
        assert isinstance(weight, nn.Parameter)
        product = torch.nn.functional.linear(other, weight)
        total = (product * 2).sum() + torch.cat([other, weight]).sum()
    assert seen == ["linear", "cat"]
    assert type(weight) is nn.Parameter
    assert total.item() == 4 * 2 * 3 * 2 + 18


def test_what_the_handler_does_is_not_watched():
    weight = torch.full((3,), 2.0)
    with Intercepted(
        [weight], lambda func, args, kwargs: func(*[a * 10 if a is weight else a for a in args], **kwargs)
    ):
        assert torch.add(weight, 1.0).tolist() == [21.0] * 3


def test_classes_are_restored_after_an_error_and_by_nested_contexts():
    weight, outer, inner = torch.ones(2), [], []
    with Intercepted([weight], recorded(outer)):
        with pytest.raises(RuntimeError), Intercepted([weight], recorded(inner)):
            torch.mm(weight, weight)
        weight.sum()
    assert (outer, inner) == (["sum"], ["mm"])
    assert type(weight) is torch.Tensor
