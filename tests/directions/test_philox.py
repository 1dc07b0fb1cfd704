"""The generator against published vectors, and the independence of its streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zokernel.directions.backends.numba.math import fill_words
from zokernel.directions.philox import philox4x32, stream_key
from zokernel.errors import UsageError

# Known answers of Philox4x32-10 published with Random123: counter, key -> output.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def torch_words(counter, key):
    return tuple(int(word) for word in philox4x32(tuple(torch.tensor(c) for c in counter), key))


def numba_words(counter, key):
    words = np.zeros((4, 1), np.uint32)
    block = np.uint64(counter[0] | counter[1] << 32)
    fill_words(words, block, 1, np.uint64(counter[2]), np.uint64(counter[3]), np.uint64(key[0]), np.uint64(key[1]))
    return tuple(int(word) for word in words[:, 0])


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_known_answers(counter, key, output):
    assert torch_words(counter, key) == output
    assert numba_words(counter, key) == output


word32 = st.integers(0, 2**32 - 1)


@settings(max_examples=50, deadline=None)
@given(counter=st.tuples(word32, word32, word32, word32), key=st.tuples(word32, word32))
def test_backends_agree_on_every_block(counter, key):
    assert torch_words(counter, key) == numba_words(counter, key)


seeds = st.integers(0, 2**63 - 1)
names = st.text(max_size=40)


@settings(max_examples=300, deadline=None)
@given(a=st.tuples(seeds, names), b=st.tuples(seeds, names))
def test_streams_of_different_seed_or_name_have_different_keys(a, b):
    assert (stream_key(*a) == stream_key(*b)) == (a == b)


@settings(max_examples=100, deadline=None)
@given(seed=seeds, name=names, draw=st.tuples(word32, word32), other=st.tuples(word32, word32))
def test_no_two_draws_of_a_tensor_share_a_block(seed, name, draw, other):
    # For one key Philox permutes its counters, so equal outputs mean equal (block, step, index).
    key = stream_key(seed, name)
    assert (numba_words((0, 0, *draw), key) == numba_words((0, 0, *other), key)) == (draw == other)


def test_no_repeats_where_a_linear_seed_formula_repeats():
    linear = {seed * (index + 17) + index for seed in range(2000) for index in range(10)}
    assert len(linear) < 0.8 * 20000
    block = {numba_words((0, 0, 0, index), stream_key(seed, "w")) for seed in range(2000) for index in range(10)}
    assert len(block) == 20000


def test_purposes_have_their_own_streams():
    keys = {stream_key(1, "w", purpose) for purpose in ("direction", "rounding", "lowrank-left", "lowrank-right")}
    assert len(keys) == 4


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(UsageError, match="seed"):
        stream_key(seed, "w")


def test_streams_of_neighbouring_names_are_uncorrelated():
    # 10^6 products of independent signs: the mean is within five standard errors, 5 / 1000.
    from zokernel.directions import Dense

    params = {f"layer.{k}": torch.zeros(1_000_000) for k in range(2)}
    z = Dense("rademacher")(params, seed=0, step=0, index=0)
    later = Dense("rademacher")(params, seed=0, step=1, index=0)
    assert abs((z["layer.0"] * z["layer.1"]).mean()) < 5e-3
    assert abs((z["layer.0"] * later["layer.0"]).mean()) < 5e-3
    assert abs((z["layer.0"][1:] * z["layer.0"][:-1]).mean()) < 5e-3
