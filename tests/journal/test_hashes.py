"""Fingerprints of weights: of the same bits as ever, and of tensors that are made of others."""

import hashlib

import pytest
import torch

from zokernel.journal.hashes import SAMPLE, frozen_sha256, sampled_sha256, stored_bits, weights_sha256


class Quantized(torch.Tensor):
    """Integers and scales, as quantization libraries wrap them: no operation, no storage of its own."""

    def __new__(cls, integers, scales):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=torch.float32)

    def __init__(self, integers, scales):
        self.integers, self.scales = integers, scales

    def __tensor_flatten__(self):
        return ["integers", "scales"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].integers, args[0].scales)
        raise NotImplementedError(func)


def by_hand(name, tensor, content):
    entry = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
    return hashlib.sha256(entry + hashlib.sha256(content).digest()).hexdigest()


def test_a_plain_tensor_is_hashed_by_its_bytes():
    tensor = torch.arange(3 * SAMPLE, dtype=torch.float32).reshape(3, SAMPLE)
    content = tensor.numpy().tobytes()
    assert weights_sha256({"w": tensor}) == by_hand("w", tensor, content)
    ends = content[: 4 * SAMPLE] + content[-4 * SAMPLE :]
    assert sampled_sha256({"w": tensor}) == by_hand("w", tensor, ends)


@pytest.mark.parametrize("hashed", [weights_sha256, sampled_sha256])
def test_a_quantized_tensor_is_hashed_by_all_that_it_is_made_of(hashed):
    integers, scales = torch.arange(-6, 6, dtype=torch.int8).reshape(3, 4), torch.tensor([1.0, 2.0, 4.0])
    tensor = Quantized(integers, scales)
    content = integers.numpy().tobytes() + scales.numpy().tobytes()
    assert b"".join(bytes(part) for part in stored_bits(tensor)) == content
    if hashed is weights_sha256:
        assert hashed({"w": tensor}) == by_hand("w", tensor, content)
    one = hashed({"w": tensor})
    assert one == hashed({"w": torch.nn.Parameter(Quantized(integers.clone(), scales.clone()), requires_grad=False)})
    assert one != hashed({"w": Quantized(integers + 1, scales)})
    assert one != hashed({"w": Quantized(integers, 2 * scales)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint8], ids=str)
@pytest.mark.parametrize("hashed", [weights_sha256, sampled_sha256])
def test_tensors_of_every_type_are_hashed(hashed, dtype):
    tensor = torch.arange(12).to(dtype)
    changed = tensor.clone()
    changed.view(torch.uint8)[-1] ^= 1
    assert hashed({"w": tensor}) == hashed({"w": tensor.clone()}) != hashed({"w": changed})


def test_the_frozen_hash_leaves_out_trained_weights_and_what_a_forward_repacks():
    class Params4bit(torch.nn.Parameter):
        pass

    Params4bit.__module__ = "bitsandbytes.nn.modules"
    norm, trained = torch.ones(4), torch.zeros(4)
    packed = Params4bit(torch.arange(8, dtype=torch.uint8), requires_grad=False)
    weights = {"norm": norm, "trained": trained, "packed": packed}
    digest = frozen_sha256(weights, ["trained"])
    assert digest == sampled_sha256({"norm": norm})
    repacked = Params4bit(torch.arange(8, dtype=torch.uint8).flip(0).reshape(2, 4), requires_grad=False)
    assert digest == frozen_sha256({**weights, "trained": trained + 1, "packed": repacked}, ["trained"])
    assert digest != frozen_sha256({**weights, "norm": 2 * norm}, ["trained"])
