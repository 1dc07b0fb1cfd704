"""Operations on watched tensors come to the handler, others do not, and the tensors are themselves again afterwards."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from zokernel.perturb.intercept import VALUES, Intercepted, attribute_of


def recorded(names):
    def handler(func, args, kwargs):
        names.append(func.__name__)
        return func(*args, **kwargs)

    return handler


def test_only_operations_on_values_of_watched_tensors_are_seen():
    weight, other, names = nn.Parameter(torch.ones(2, 3)), torch.ones(4, 3), []
    with Intercepted([weight, weight], recorded(names)):
        assert (weight.shape, weight.size(0), weight.dtype) == ((2, 3), 2, torch.float32)
        assert isinstance(weight, nn.Parameter)
        product = torch.nn.functional.linear(other, weight)
        total = (product * 2).sum() + torch.cat([other, weight]).sum()
    assert names == ["linear", "cat"]
    assert type(weight) is nn.Parameter
    assert total.item() == 4 * 2 * 3 * 2 + 18


def attributes():
    """Return the names of all attributes of a tensor that are computed when they are read."""
    kinds = (types.GetSetDescriptorType, types.MemberDescriptorType, property)
    return [name for name in dir(torch.Tensor) if isinstance(getattr(torch.Tensor, name, None), kinds)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_attributes_that_share_the_memory_of_a_tensor_are_seen(dtype):
    """Also those that a later version of torch may have."""
    weight, names = nn.Parameter(torch.ones(2, 3, dtype=dtype)), []
    address, sharing = weight.data_ptr(), set()
    for name in attributes():
        try:
            value = getattr(weight, name)
        except (RuntimeError, AttributeError):
            continue
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == address:
            sharing.add(name)

    def handler(func, args, kwargs):
        names.append(attribute_of(func))
        return func(*args, **kwargs)

    with Intercepted([weight], handler):
        for name in attributes():
            try:
                getattr(weight, name)
            except (RuntimeError, AttributeError):
                continue
    assert sharing <= VALUES
    assert {"T", "mT", "data", "real"} <= sharing
    assert sharing <= set(names) <= VALUES


def test_shapes_types_and_gradients_are_those_of_the_tensor():
    weight, names = nn.Parameter(torch.ones(2, 3)), []
    weight.grad = torch.zeros(2, 3)
    with Intercepted([weight], recorded(names)):
        assert (weight.ndim, weight.device.type, weight.type()) == (2, "cpu", "torch.FloatTensor")
        assert weight.grad is not None
        assert weight.is_leaf
        weight.requires_grad = False
        weight.grad = None
        assert names == []
        assert weight.type(torch.float64).dtype == torch.float64
        assert names == ["type"]
    assert (weight.requires_grad, weight.grad) == (False, None)


def test_what_the_handler_does_is_not_watched():
    weight = torch.full((3,), 2.0)
    with Intercepted(
        [weight], lambda func, args, kwargs: func(*[a * 10 if a is weight else a for a in args], **kwargs)
    ):
        assert torch.add(weight, 1.0).tolist() == [21.0] * 3


def test_classes_are_restored_after_an_error_and_by_nested_contexts():
    weight, outer, inner = torch.ones(2), [], []
    with Intercepted([weight], recorded(outer)):
        with pytest.raises(RuntimeError, match="must be a matrix"), Intercepted([weight], recorded(inner)):
            torch.mm(weight, weight)
        weight.sum()
    assert (outer, inner) == (["sum"], ["mm"])
    assert type(weight) is torch.Tensor
