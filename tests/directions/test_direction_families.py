"""Structured families: their scale facts (E|z|^2 = d, E[(g.z) z] = g) and what each promises."""

from __future__ import annotations

import math

import pytest
import torch

from zokernel.directions import (
    Blockwise,
    Dense,
    Directions,
    Flipout,
    LowRank,
    Orthogonal,
    Sparse,
    Subspace,
    get_directions,
)
from zokernel.directions.families.cone import Cone
from zokernel.directions.placement import place_all
from zokernel.errors import UsageError
from zokernel.optim import ZerothOrder

SHAPES = {"layers.0.weight": (12, 10), "layers.0.bias": (7,), "layers.1.weight": (6, 3, 2)}


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def flat(tensors):
    return torch.cat([tensors[name].flatten().double() for name in SHAPES])


# Every family with the coordinates that it moves, given the weights at step 0.
FAMILIES: dict[str, Directions] = {
    "flipout": Flipout(),
    "low_rank_new_in_every_direction": LowRank(2, refresh=0),
    "rank_one_new_in_every_direction": LowRank(1, distribution="rademacher", refresh=0),
    "dense": Dense("rademacher"),
    "sphere": Dense("sphere"),
    "sparse": Sparse(0.5),
    "sparse-gaussian": Sparse(0.25, distribution="gaussian"),
    "subspace": Subspace(rank=3, refresh=1),
    "subspace-left": Subspace(rank=3, refresh=1, sides="left"),
    "low_rank": LowRank(rank=2, refresh=1),
    "low_rank-square": LowRank(1, distribution="rademacher", refresh=1, most_square=True),
    "blockwise": Blockwise(Dense("uniform"), every=10**6),
    "orthogonal": Orthogonal(size=5),
}


def active(name, family, tensors):
    flags = {key: torch.ones_like(value, dtype=torch.bool) for key, value in tensors.items()}
    if name.startswith("sparse"):
        family.freeze(tensors)
        flags = {key: family.mask(key, value.shape) for key, value in tensors.items()}
    if name == "blockwise":
        flags["layers.1.weight"][:] = False
    return flat(flags).bool()


@pytest.mark.parametrize("name", FAMILIES)
def test_scale_facts(name):
    family, tensors = FAMILIES[name], weights()
    moves = active(name, family, tensors)
    gradient = torch.randn(moves.numel(), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws = 1500
    z = torch.stack([flat(family(tensors, seed=5, step=step, index=0)) for step in range(draws)])
    assert (z[:, ~moves] == 0).all()

    norms = z.square().sum(1)
    error = float(norms.std()) / math.sqrt(draws)
    assert abs(float(norms.mean()) - int(moves.sum())) <= 5 * error + 1e-3

    estimates = (z @ gradient)[:, None] * z
    expected = torch.where(moves, gradient, 0.0)
    score = (estimates.mean(0) - expected) / (estimates.std(0) / math.sqrt(draws)).clamp_min(1e-12)
    # 163 coordinates: the largest of as many standard normals exceeds 5 with probability 1e-4.
    assert score[moves].abs().max() < 5
    assert 0.7 < float(score[moves].square().mean()) < 1.4


@pytest.mark.parametrize("name", FAMILIES)
def test_add_agrees_with_the_direction_itself(name):
    family, tensors = FAMILIES[name], weights(torch.float64)
    if isinstance(family, Sparse):
        family.freeze(tensors)
    z = [family(tensors, seed=5, step=3, index=index) for index in (0, 6)]
    updated = {key: value.clone() for key, value in tensors.items()}
    scale = {key: [0.5 + k, -2.0] for k, key in enumerate(SHAPES)}
    family.add_(updated, scale, seed=5, step=3, index=[0, 6], decay=0.75)
    for key, old in tensors.items():
        expected = 0.75 * old + scale[key][0] * z[0][key] + scale[key][1] * z[1][key]
        torch.testing.assert_close(updated[key], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["flipout", "low_rank_new_in_every_direction", "rank_one_new_in_every_direction"])
def test_many_directions_added_as_one_product_are_their_sum(name):
    """To float32's rounding: 33 terms of up to 10, in sums of up to 50."""
    family, tensors = FAMILIES[name], weights()
    indices = [*range(3, 20), 1 << 16, *range(40, 55)]
    scales = [1.0 - 0.05 * n for n in range(len(indices))]
    expected = {key: 0.5 * value.double() for key, value in tensors.items()}
    for index, scale in zip(indices, scales, strict=True):
        for key, z in family(tensors, seed=5, step=3, index=index).items():
            expected[key] += scale * z.double()
    family.add_(tensors, scales, seed=5, step=3, index=indices, decay=0.5)
    for key, value in tensors.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=0, atol=33 * 50 * 2**-24)


@pytest.mark.parametrize("name", FAMILIES)
def test_backends_agree_to_the_bit(name):
    family = FAMILIES[name]
    results = []
    for backend in ("numba", "torch"):
        tensors = weights()
        if isinstance(family, Sparse):
            family.freeze(tensors)
        previous, family.backend = family.backend, backend
        try:
            family.add_(tensors, [0.1, 0.2], seed=5, step=1, index=[0, 3], decay=0.5)
        finally:
            family.backend = previous
        results.append(flat(tensors))
    assert torch.equal(*results)


# -------------------------------------------------------------------------------------------------- sparse


def test_sparse_mask_is_the_small_weights_of_unperturbed_tensors():
    tensors = weights()
    family = Sparse(0.25, distribution="gaussian").freeze(tensors)
    before = {name: family.mask(name, tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        inside, outside = tensor.abs()[before[name]], tensor.abs()[~before[name]]
        assert inside.numel() == round(0.25 * tensor.numel())
        assert inside.max() <= outside.min()
    assert family.dimension(tensors) == sum(int(mask.sum()) for mask in before.values())
    family.add_(tensors, 100.0, seed=0, step=0, index=0)
    plus = family(tensors, seed=0, step=0, index=0)
    assert all(torch.equal(plus[name] != 0, before[name]) for name in tensors)


def test_sparse_mask_is_taken_from_the_first_weights_seen_and_travels_in_the_state():
    tensors = weights()
    family = Sparse(density=0.5)
    first = family(tensors, seed=0, step=0, index=0)
    other = Sparse(density=0.5)
    other.load_state_dict(family.state_dict())
    shifted = {name: tensor + 10 for name, tensor in tensors.items()}
    reloaded = other(shifted, seed=0, step=0, index=0)
    assert all(torch.equal(first[name], reloaded[name]) for name in tensors)


def test_sparse_masks_of_a_checkpoint_are_moved_to_the_weights():
    """Checkpoints are read into host memory; the device meta stands for a GPU."""
    family, tensors = Sparse(0.5), {"w": torch.linspace(-1, 1, 20)}
    family.load_state_dict(Sparse(0.5).freeze(tensors).state_dict())
    (term,) = family.terms(place_all({"w": torch.empty(20, device="meta")}), seed=0, step=0, index=0)
    assert term.mask.device.type == "meta"


def test_sparse_mask_follows_elements_through_any_memory_layout():
    base = torch.randn(33, 20, generator=torch.Generator().manual_seed(0))
    plain, strided = {"w": base.t().contiguous()}, {"w": base.t()}
    for tensors in (plain, strided):
        Sparse(0.3, distribution="gaussian").add_(tensors, 0.5, seed=1, step=0, index=0)
    assert torch.equal(plain["w"], strided["w"])


# ------------------------------------------------------------------------------------------------ low rank


def test_low_rank_factors_have_their_own_seeds():
    family, params = LowRank(rank=2, refresh=10), {"w": torch.zeros(20, 15)}
    right = family.right("w", (20, 15), seed=1, step=0)
    assert torch.equal(right, family.right("w", (20, 15), seed=1, step=9))
    assert not torch.equal(right, family.right("w", (20, 15), seed=1, step=10))
    # Replay in any order, from a fresh object, at any step of the epoch.
    late = LowRank(rank=2, refresh=10)(params, seed=1, step=7, index=3)["w"]
    assert torch.equal(late, family(params, seed=1, step=7, index=3)["w"])
    left = family.left("w", (20, 15), seed=1, step=7, index=3)
    torch.testing.assert_close(late, left @ right / math.sqrt(2), rtol=1e-5, atol=1e-6)


def test_subspace_stays_for_an_epoch():
    family, params = Subspace(rank=2, refresh=10), {"w": torch.zeros(20, 15)}
    z = torch.cat([family(params, seed=1, step=step, index=0)["w"] for step in range(10)], dim=1)
    assert int(torch.linalg.matrix_rank(z)) == 2
    later = torch.cat([z, family(params, seed=1, step=10, index=0)["w"]], dim=1)
    assert int(torch.linalg.matrix_rank(later)) == 4
    basis = family.basis("w", "left", 20, 2, 1, 0, torch.device("cpu"))
    torch.testing.assert_close(basis.T @ basis, torch.eye(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [Subspace, LowRank])
def test_rank_is_capped_by_the_smaller_side(make):
    z = make(rank=50)({"w": torch.zeros(30, 4)}, seed=0, step=0, index=0)["w"]
    assert int(torch.linalg.matrix_rank(z)) == 4


# --------------------------------------------------------------------------------------- blocks and frames


def test_blocks_take_turns():
    tensors = {f"layers.{k}.w": torch.zeros(3) for k in (0, 10, 2)} | {"head": torch.zeros(2)}
    family = Blockwise(Dense("rademacher"), every=2)
    blocks = [
        [name for name, z in family(tensors, seed=0, step=step, index=0).items() if z.any()] for step in range(10)
    ]
    cycle = [["head"], ["layers.0.w"], ["layers.2.w"], ["layers.10.w"]]
    assert blocks == [cycle[step // 2 % 4] for step in range(10)]


def test_blocks_at_rest_still_decay():
    tensors = {"layers.0.w": torch.ones(3), "layers.1.w": torch.ones(3)}
    Blockwise(Dense()).add_(tensors, 0.0, seed=0, step=0, index=0, decay=0.5)
    assert all((tensor == 0.5).all() for tensor in tensors.values())


def test_a_full_frame_recovers_the_gradient_exactly():
    tensors = weights(torch.float64)
    dim = flat(tensors).numel()
    family = Orthogonal(size=dim)
    z = torch.stack([flat(family(tensors, seed=0, step=0, index=index)) for index in range(dim)])
    gradient = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((z @ gradient) @ z / dim, gradient, rtol=1e-5, atol=1e-5)


def test_frames_do_not_depend_on_the_order_of_tensors_and_differ_between_frames():
    tensors, family = weights(), Orthogonal(size=3)
    z = family(tensors, seed=0, step=0, index=1)
    backwards = Orthogonal(size=3)(dict(reversed(tensors.items())), seed=0, step=0, index=1)
    assert all(torch.equal(z[name], backwards[name]) for name in tensors)
    other = flat(family(tensors, seed=0, step=0, index=4))
    assert abs(float(flat(z) @ other)) < 0.6 * flat(z).numel()


def test_impossible_settings_are_refused():
    with pytest.raises(UsageError, match="density"):
        Sparse(density=0.0)
    with pytest.raises(UsageError, match="independent"):
        Sparse(distribution="sphere")
    with pytest.raises(UsageError, match="Rank 0"):
        LowRank(rank=0)
    with pytest.raises(UsageError, match="independent"):
        Subspace(distribution="sphere")
    with pytest.raises(UsageError, match="impossible"):
        Orthogonal(size=10)({"w": torch.zeros(4)}, seed=0, step=0, index=0)
    with pytest.raises(UsageError, match="at least 1 step"):
        Blockwise(Dense(), every=0)


def test_registry_makes_every_family():
    assert repr(get_directions("rademacher")) == "Dense('rademacher')"
    assert repr(get_directions("blockwise", inner="gaussian", every=3)) == "Blockwise(Dense('gaussian'), every=3)"
    assert repr(get_directions("low_rank", rank=4)) == "LowRank(rank=4, distribution='gaussian', refresh=50)"
    assert repr(get_directions("lowrank", rank=4)) == repr(get_directions("low_rank", rank=4))
    assert repr(get_directions("frames", size=3)) == repr(get_directions("orthogonal", size=3)) == "Orthogonal(size=3)"
    family = Orthogonal(2)
    assert get_directions(family) is family
    with pytest.raises(UsageError, match="already made"):
        get_directions(family, rank=2)


# ------------------------------------------------------------------------------------- common properties


def test_families_that_couple_tensors_declare_it():
    coupled = {name for name, family in FAMILIES.items() if family.couples_tensors}
    assert coupled == {"sphere", "blockwise", "orthogonal"}
    tensors = weights()
    for name, family in FAMILIES.items():
        family.prepare(tensors)
        whole = family(tensors, seed=5, step=1, index=0)
        apart = {key: family({key: value}, seed=5, step=1, index=0)[key] for key, value in tensors.items()}
        assert all(torch.equal(whole[key], apart[key]) for key in tensors) == (name not in coupled)


def test_blockwise_passes_on_what_the_inner_directions_need():
    tensors = weights()
    inner = Sparse(0.5)
    family = Blockwise(inner)
    family.prepare(tensors)
    assert family.state_dict()["masks"].keys() == tensors.keys()
    other = Blockwise(Sparse(0.5))
    other.load_state_dict(family.state_dict())
    assert all(torch.equal(other.inner.mask(k, v.shape), inner.mask(k, v.shape)) for k, v in tensors.items())
    assert (family.gain(), family.seeded) == (1.0, True)


def test_repr_rebuilds_the_same_family():
    for family in FAMILIES.values():
        rebuilt = eval(repr(family))
        assert repr(rebuilt) == repr(family)
        tensors = weights()
        z = [made(tensors, seed=5, step=1, index=2) for made in (rebuilt, family)]
        assert all(torch.equal(z[0][name], z[1][name]) for name in tensors)


def test_the_text_of_a_family_has_its_arguments_and_nests():
    for text, family in (
        ("low_rank(2, refresh=5)", "LowRank(rank=2, distribution='gaussian', refresh=5)"),
        ("lowrank(2)", "LowRank(rank=2, distribution='gaussian', refresh=50)"),
        ("gaussian(backend='torch')", "Dense('gaussian')"),
        ("blockwise", "Blockwise(Dense('rademacher'), every=1)"),
        ("blockwise(orthogonal(4), every=3)", "Blockwise(Orthogonal(size=4), every=3)"),
        ("blockwise('sparse(0.5)')", "Blockwise(Sparse(density=0.5, distribution='rademacher'), every=1)"),
        ("blockwise(inner=blockwise(gaussian))", "Blockwise(Blockwise(Dense('gaussian'), every=1), every=1)"),
    ):
        assert repr(get_directions(text)) == family
        assert repr(ZerothOrder([torch.ones(2, 2)], directions=text).directions) == family
    assert get_directions("low_rank(2)", refresh=5).refresh == 5
    for text, message in (
        ("blockwise(low_rank(2)", "not of the form name"),
        ("blockwise(cauchy(2))", "There is no family of directions 'cauchy': choose one of dense, .*, sphere"),
        ("low_rank(2, rate=3)", "The family of directions 'low_rank' cannot be made: .*'rate'"),
        (3, "3 is no family of directions: pass one such as Dense"),
        (Dense, "is no family of directions"),
    ):
        with pytest.raises(UsageError, match=message):
            get_directions(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Orthogonal(4.5), "a whole number of directions, at least 1, not 4.5"),
        (lambda: Orthogonal("4"), "at least 1, not '4'"),
        (lambda: LowRank(True), "Rank True and refresh interval 50"),
        (lambda: LowRank(2, refresh=0.0), "refresh interval 0.0 must be whole numbers"),
        (lambda: LowRank(2, most_square="no"), "most_square must be True or False, not 'no'"),
        (lambda: Sparse("half"), "density 'half'"),
        (lambda: Sparse(math.nan), "density nan"),
        (lambda: Blockwise(Dense(), every=0.5), "at least 1 step, and whole steps, not 0.5"),
        (lambda: Blockwise("dense"), "'dense' is no family of directions for the blocks"),
        (lambda: Cone(Dense(), "1"), "radians, not '1'"),
        (lambda: Dense(backend="cuda"), "no directions backend 'cuda'"),
    ],
)
def test_wrong_values_are_refused_when_a_family_is_made(make, message):
    with pytest.raises(UsageError, match=message):
        make()
