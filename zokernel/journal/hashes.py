"""Fingerprints of weights: which base a journal belongs to, and whether a replay ended where the run did."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

THREADS = 4
SAMPLE = 4096


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, dtypes, shapes and bits of all tensors, in order of their names.

    Each tensor is hashed by itself, several at a time, and the hash of the hashes returned.

    Args:
        tensors: Tensors by name, on any device.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> one = weights_sha256({"w": torch.zeros(2)})
        >>> one == weights_sha256({"w": torch.zeros(2)}) != weights_sha256({"w": -torch.zeros(2)})
        True
    """
    return _combined(tensors, _sha256)


def sampled_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the same over the beginning and the end of each tensor only: tells models apart, at no cost.

    Args:
        tensors: Tensors by name, on any device.

    Returns:
        64 hexadecimal digits.
    """

    def ends(tensor: Tensor) -> bytes:
        if hasattr(tensor, "full_tensor"):
            return b"sharded"
        flat = tensor.detach().reshape(-1)
        return _sha256(torch.cat([flat[:SAMPLE], flat[-SAMPLE:]]))

    return _combined(tensors, ends)


def _combined(tensors: Mapping[str, Tensor], hashed: Callable[[Tensor], bytes]) -> str:
    names = sorted(tensors)
    # Sharded tensors are gathered by all processes together, which must be in the same order everywhere.
    sharded = any(hasattr(tensor, "full_tensor") for tensor in tensors.values())
    with ThreadPoolExecutor(1 if sharded else THREADS) as pool:
        digests = list(pool.map(lambda name: hashed(tensors[name]), names))
    total = hashlib.sha256()
    for name, digest in zip(names, digests):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + digest)
    return total.hexdigest()


def _sha256(tensor: Tensor) -> bytes:
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()
