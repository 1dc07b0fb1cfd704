"""Fingerprints of weights: which base a journal belongs to, and whether a replay ended where the run did."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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


def stored_bits(tensor: Tensor) -> Iterator[Any]:
    """Return the bytes of a tensor, as buffers: one, or several of a quantized tensor (its integers, its scales).

    Args:
        tensor: A tensor of any type, on any device, not sharded.
    """
    return map(_bits, _plain(tensor))


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
        parts = _plain(tensor)
        return hashlib.sha256(b"".join(_bits(end) for p in parts for end in (p[:SAMPLE], p[-SAMPLE:]))).digest()

    return _combined(tensors, ends)


def frozen_sha256(parameters: Mapping[str, Tensor], trained: Collection[str]) -> str:
    """Return the :func:`sampled_sha256` of the parameters that are not trained: which base an adapter belongs to.

    The quantized weights of bitsandbytes are left out, which it may pack anew for the device in the first forward: see
    :func:`quantized_sha256`.  Embeddings and norms beside them tell bases apart.

    Args:
        parameters: All parameters by name.
        trained: Names of those that are trained.

    Returns:
        64 hexadecimal digits.
    """
    return sampled_sha256(
        {
            name: p
            for name, p in parameters.items()
            if name not in trained and not type(p).__module__.startswith("bitsandbytes")
        }
    )


def quantized_sha256(parameters: Mapping[str, Tensor]) -> str:
    """Return the same over the weights of bitsandbytes, integers and 4-bit scales as they were stored.

    Args:
        parameters: All parameters by name.

    Returns:
        64 hexadecimal digits; empty if there are no such weights, or they have been packed anew.
    """
    parts: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if type(parameter).__module__.startswith("bitsandbytes"):
            state = getattr(parameter, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                return ""
            parts[name] = parameter.data
            if state is not None:
                parts[f"{name}.absmax"] = state.absmax
    return sampled_sha256(parts) if parts else ""


def _combined(tensors: Mapping[str, Tensor], hashed: Callable[[Tensor], bytes]) -> str:
    names = sorted(tensors)
    # Sharded tensors are gathered by all processes together, which must be in the same order everywhere.
    sharded = any(hasattr(tensor, "full_tensor") for tensor in tensors.values())
    with ThreadPoolExecutor(1 if sharded else THREADS) as pool:
        digests = list(pool.map(lambda name: hashed(tensors[name]), names))
    total = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + digest)
    return total.hexdigest()


def _sha256(tensor: Tensor) -> bytes:
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    total = hashlib.sha256()
    for bits in stored_bits(tensor):
        total.update(bits)
    return total.digest()


def _plain(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors, flattened, that hold a tensor: several for one that is quantized."""
    tensor = tensor.detach()
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.reshape(-1)]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(tensor, name))]


def _bits(flat: Tensor) -> Any:
    return flat.cpu().contiguous().view(torch.uint8).numpy().data
