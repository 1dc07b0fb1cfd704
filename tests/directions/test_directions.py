"""Dense directions: the in-place protocol, and invariance to everything that must not matter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zokernel.directions import (
    Dense,
    Directions,
    get_directions,
)
from zokernel.directions.backends import dispatch, reference
from zokernel.directions.backends.numba import backend as numba_backend
from zokernel.directions.philox import stream_key
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Job, Noise
from zokernel.distributions import DIRECTION_DISTRIBUTIONS
from zokernel.errors import UsageError

DISTRIBUTIONS = sorted(DIRECTION_DISTRIBUTIONS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DRAW = {"seed": 11, "step": 5, "index": 2}
CPU = torch.device("cpu")


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (37, 53), "scalar": (), "norm": (640,), "empty": (0, 3), "conv": (4, 3, 2, 5)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def clone(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------ protocol


def test_every_family_has_the_common_properties():
    for name in ("dense", "sparse", "subspace", "low_rank", "blockwise"):
        family = get_directions(name)
        assert isinstance(family, Directions)
        assert (family.gain(), family.seeded, family.state_dict().keys() <= {"masks"}) == (1.0, True, True)


def test_sphere_has_radius_sqrt_d_over_all_tensors():
    tensors = example()
    z = Dense("sphere")(tensors, **DRAW)
    dim = sum(tensor.numel() for tensor in tensors.values())
    norm = sum(float(value.double().square().sum()) for value in z.values())
    assert norm == pytest.approx(dim, rel=1e-6)
    part = Dense("sphere")({"norm": tensors["norm"]}, **DRAW)["norm"]
    assert float(part.double().square().sum()) == pytest.approx(640, rel=1e-6)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_add_is_decay_theta_plus_scaled_directions(distribution, dtype):
    family, weights = Dense(distribution), example(dtype)
    scale = {name: [0.5 + k, -0.25] for k, name in enumerate(weights)}
    decay = {name: 1.0 - 0.1 * k for k, name in enumerate(weights)}
    z = [family(weights, seed=3, step=4, index=index) for index in (7, 1)]
    updated = clone(weights)
    family.add_(updated, scale, seed=3, step=4, index=[7, 1], decay=decay)
    for name, old in weights.items():
        a, b = scale[name]
        expected = decay[name] * old.double() + a * z[0][name].double() + b * z[1][name].double()
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(updated[name].double(), expected, rtol=4 * unit, atol=40 * unit)


def test_several_steps_in_one_sweep():
    weights = example(torch.float64)
    once, twice = clone(weights), clone(weights)
    Dense("gaussian").add_(once, [0.5, 2.0], seed=1, step=[3, 9], index=[0, 4])
    Dense("gaussian").add_(twice, 0.5, seed=1, step=3, index=0)
    Dense("gaussian").add_(twice, 2.0, seed=1, step=9, index=4)
    for name in weights:
        torch.testing.assert_close(once[name], twice[name], rtol=1e-14, atol=1e-14)


def test_a_tiny_decay_is_not_lost_to_the_rounding_of_its_factor():
    # float32(1 - 1e-9) is 1, so a product with the factor would not decay at all.
    weights = {"w": torch.full((100_000,), 1.0)}
    Dense("rademacher").add_(weights, 0.0, **DRAW, decay=1 - 1e-9, stochastic=True)
    # Each weight drops by 2^-24 with probability 2^24 * 1e-9 = 1.7 %.
    dropped = (weights["w"] < 1).double().mean()
    assert float(dropped) == pytest.approx(2**24 * 1e-9, abs=5 * math.sqrt(0.017 / 100_000))


# ---------------------------------------------------------------------------------------------- invariance


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numba_and_torch_backends_agree_to_the_bit(distribution, dtype):
    for stochastic in (False, True):
        results = []
        for backend in ("numba", "torch"):
            weights = example(dtype)
            weights["strided"] = torch.ones(60, 7, dtype=dtype).t()
            Dense(distribution, backend=backend).add_(
                weights, [0.7, -0.1], seed=2, step=1, index=[0, 9], decay=0.9, stochastic=stochastic
            )
            results.append(weights)
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@settings(max_examples=60, deadline=None)
@given(
    distribution=st.sampled_from(["rademacher", "gaussian", "uniform"]),
    start=st.integers(0, 3000) | st.integers(2**31 - 600, 2**31 + 600) | st.integers(2**40, 2**40 + 600),
    cuts=st.lists(st.integers(0, 2500), max_size=4),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_chunk_is_a_slice_of_the_whole(distribution, start, cuts, seed):
    noise = Noise(distribution, stream_key(seed, "w"), 3, 1)

    def generate(begin, end, backend):
        values = torch.zeros(end - begin)
        place = Placement("w", values, values, (2**41,), (begin,))
        dispatch.sweep([Job(place, (noise,), (1.0,))], backend)
        return values

    whole = generate(start, start + 2500, "numba")
    assert torch.equal(whole, generate(start, start + 2500, "torch"))
    edges = [0, *sorted(cuts), 2500]
    for begin, end in itertools.pairwise(edges):
        assert torch.equal(whole[begin:end], generate(start + begin, start + end, "numba"))


def test_positions_beyond_32_bits_do_not_wrap():
    def at(begin):
        values = torch.zeros(512)
        dispatch.sweep(
            [Job(Placement("w", values, values, (2**45,), (begin,)), (Noise("gaussian", (1, 2), 0, 0),), (1.0,))]
        )
        return values

    starts = [0, 2**31, 2**32, 2**33, 2**34, 2**40]
    values = [at(start) for start in starts]
    for i in range(len(starts)):
        for j in range(i):
            assert not torch.equal(values[i], values[j])


@settings(max_examples=25, deadline=None)
@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    order=st.permutations(["embed.weight", "scalar", "norm", "empty", "conv"]),
)
def test_order_of_tensors_does_not_matter(distribution, order):
    weights = example()
    expected = Dense(distribution)(weights, **DRAW)
    z = Dense(distribution)({name: weights[name] for name in order}, **DRAW)
    for name in order:
        torch.testing.assert_close(z[name], expected[name], rtol=3e-7 if distribution == "sphere" else 0, atol=0)


@settings(max_examples=30, deadline=None)
@given(distribution=st.sampled_from(DISTRIBUTIONS), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**63 - 1))
def test_dtype_only_rounds_the_direction(distribution, dtype, seed):
    shape = (23, 31)
    single = Dense(distribution)({"w": torch.zeros(shape)}, seed=seed, step=0, index=0)["w"]
    other = Dense(distribution)({"w": torch.zeros(shape, dtype=dtype)}, seed=seed, step=0, index=0)["w"]
    assert other.dtype == dtype
    assert torch.equal(other, single.to(dtype))


@settings(max_examples=30, deadline=None)
@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    view=st.sampled_from(["transpose", "columns", "rows", "permute", "offset"]),
    dtype=st.sampled_from(DTYPES),
    stochastic=st.booleans(),
)
def test_memory_layout_does_not_matter(distribution, view, dtype, stochastic):
    base = torch.randn(40, 36, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    views = {
        "transpose": base[..., 0].t(),
        "columns": base[:, 3:20, 1],
        "rows": base[::3],
        "permute": base.permute(2, 0, 1),
        "offset": base.flatten()[5:777],
    }
    target = views[view]
    untouched = base.clone()
    plain = {"w": target.clone(memory_format=torch.contiguous_format)}
    Dense(distribution).add_(plain, [0.3, 0.1], seed=1, step=0, index=[0, 1], decay=0.99, stochastic=stochastic)
    Dense(distribution).add_({"w": target}, [0.3, 0.1], seed=1, step=0, index=[0, 1], decay=0.99, stochastic=stochastic)
    assert torch.equal(target, plain["w"])
    assert int((base != untouched).sum()) <= target.numel()


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    first = Dense("gaussian")(example(), **DRAW)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    second = Dense("gaussian")(example(), **DRAW)
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------- shared memory


def test_tied_weights_move_once():
    weight = torch.zeros(10, 4)
    tied = {"embed": weight, "head": weight, "other": torch.zeros(3)}
    z = Dense("rademacher")(tied, **DRAW)
    assert torch.equal(z["embed"], z["head"])
    Dense("rademacher").add_(tied, 1.0, **DRAW)
    assert torch.equal(weight, z["embed"])


def test_views_of_one_buffer_move_apart():
    flat = torch.zeros(60)
    parts = {"a": flat[:24].view(4, 6), "b": flat[24:], "even": torch.zeros(8)}
    z = Dense("gaussian")(parts, **DRAW)
    Dense("gaussian").add_(parts, 1.0, **DRAW)
    assert torch.equal(flat, torch.cat([z["a"].flatten(), z["b"]]))
    columns = torch.zeros(5, 6)
    Dense("gaussian").add_({"left": columns[:, :2], "right": columns[:, 2:]}, 1.0, **DRAW)
    assert (columns != 0).all()


def test_overlapping_tensors_are_refused():
    flat = torch.zeros(60)
    with pytest.raises(UsageError, match="share some of their memory"):
        Dense().add_({"a": flat[:30], "b": flat[20:]}, 1.0, **DRAW)
    with pytest.raises(UsageError, match="expanded"):
        Dense().add_({"a": torch.zeros(1, 3).expand(4, 3)}, 1.0, **DRAW)
    assert (flat == 0).all()


def test_autograd_notices_the_change():
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    Dense().add_({"w": weight}, 1.0, **DRAW)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_inference_tensors_can_be_moved():
    with torch.inference_mode():
        weights = {"w": torch.zeros(5)}
        Dense().add_(weights, 1.0, **DRAW)
        assert (weights["w"].abs() == 1).all()


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": [1.0, 2.0], "index": 0}, "2 scales do not fit 1"),
        ({"scale": {"other": 1.0}, "index": 0}, "no scale for tensor 'w'"),
        ({"scale": 1.0, "index": 0, "decay": {}}, "no decay for tensor 'w'"),
        ({"scale": 1.0, "index": -1}, "index -1"),
        ({"scale": 1.0, "index": 2**32}, "index 4294967296"),
        ({"scale": [1.0, 1.0], "index": [0, 1], "step": [1]}, "1 steps do not fit 2"),
    ],
)
def test_requests_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        Dense().add_({"w": torch.zeros(3)}, **{"seed": 0, "step": 0, **arguments})


def test_unsuitable_tensors_and_names_are_refused():
    with pytest.raises(UsageError, match=r"torch\.int8"):
        Dense().add_({"w": torch.zeros(3, dtype=torch.int8)}, 1.0, **DRAW)
    with pytest.raises(UsageError, match="no distribution 'cauchy' of directions"):
        Dense("cauchy")
    with pytest.raises(UsageError, match="no directions backend"):
        Dense(backend="cuda").add_({"w": torch.zeros(3)}, 1.0, **DRAW)
    with pytest.raises(UsageError, match=r"no family of directions 'dens': choose one of dense, .*, sphere"):
        get_directions("dens")
    with pytest.raises(UsageError, match="cannot be made"):
        get_directions("dense", rank=3)


def test_sum_of_squares_matches_the_values():
    noises, sizes = [Noise("gaussian", stream_key(0, name), 1, 2) for name in ("v", "w")], [3, 700_001]
    z = Dense("gaussian")({"w": torch.zeros(700_001)}, seed=0, step=1, index=2)["w"].double()
    for backend in (numba_backend, reference):
        sums = backend.sums_of_squares(noises, sizes, CPU)
        assert sums[1] == pytest.approx(float(z.square().sum()), rel=1e-12)
        assert 0 < sums[0] < 30
