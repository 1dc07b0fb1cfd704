r"""Philox4x32-10, the counter-based generator under every direction, and the keys that give each tensor its own stream.

A counter-based generator is a function: 128 bits of counter and 64 bits of key go in, 128 random bits come out.  There
is no state, so any element of any direction can be computed alone, in any order, on any device:

* key: a 64-bit BLAKE2b hash of (seed, tensor name, purpose);
* counter: (element block, low word; element block, high word; step; index).

Philox is a bijection of the counter for each key, so two (step, index, block) of one tensor never share a block of
bits; different (seed, name) collide only if their hashes do.  Linear formulas such as ``seed * (i + 17) + i`` repeat.

Reference: Salmon et al. (2011), Parallel Random Numbers: As Easy as 1, 2, 3, SC '11, doi:10.1145/2063384.2063405.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from torch import Tensor

from zokernel.errors import UsageError
from zokernel.values import plain_number

ROUNDS = 10
MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
MASK_32 = 0xFFFFFFFF

MAX_SEED = 2**63
MAX_COUNT = 2**32


def check_seed(seed: int) -> int:
    """Return a seed as Python's own integer; refuse one that does not fit the key of a stream.

    Raises:
        UsageError: If it is out of range or not an integer.
    """
    seed = plain_number("seed", seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < MAX_SEED:
        raise UsageError(f"The seed {seed!r} must be an integer from 0 to 2^63 - 1.")
    return seed


@lru_cache(maxsize=65536, typed=True)
def stream_key(seed: int, name: str, purpose: str = "direction") -> tuple[int, int]:
    """Return the Philox key of one tensor's stream.

    Args:
        seed: Seed of the run, in [0, 2^63).
        name: The tensor's name.
        purpose: What the numbers are for; directions, rounding and factors of one tensor must not share bits.

    Returns:
        Two 32-bit words.

    Raises:
        UsageError: If the seed is out of range or not an integer.

    Example:
        >>> stream_key(0, "weight") == stream_key(0, "bias")
        False
    """
    seed = check_seed(seed)
    digest = hashlib.blake2b(
        seed.to_bytes(8, "little") + name.encode(), digest_size=8, person=purpose.encode()[:16]
    ).digest()
    word = int.from_bytes(digest, "little")
    return word & MASK_32, word >> 32


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four 32-bit output words of Philox4x32-10 for each counter (torch reference).

    Args:
        counter: Four int64 tensors of one shape, each holding a 32-bit word.
        key: Two 32-bit words.

    Returns:
        Four int64 tensors of 32-bit words.

    Example:
        >>> import torch
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> [hex(word) for word in philox4x32((zero, zero, zero, zero), (0, 0))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # A 32 x 32 bit product wraps modulo 2^64 in int64, and the high word survives an arithmetic shift and a mask.
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & MASK_32) ^ c1 ^ k0,
            product_1 & MASK_32,
            ((product_0 >> 32) & MASK_32) ^ c3 ^ k1,
            product_0 & MASK_32,
        )
        k0, k1 = (k0 + WEYL_0) & MASK_32, (k1 + WEYL_1) & MASK_32
    return c0, c1, c2, c3
