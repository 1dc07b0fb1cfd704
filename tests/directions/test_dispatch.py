"""The compiled CPU engine: the same bits on any threads, by any loop, prepared or not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zokernel.directions import Dense, LowRank
from zokernel.directions.backends import dispatch
from zokernel.directions.backends.numba import backend as numba_backend
from zokernel.directions.backends.numba import kernels as numba_kernels
from zokernel.directions.backends.numba import math as numba_math
from zokernel.directions.backends.numba import threads as numba_threads
from zokernel.directions.placement import Placement, place_all
from zokernel.directions.terms import Job, Rule
from zokernel.directions.weights.copy_perturbed import copy_perturbed

DRAW = {"seed": 11, "step": 5, "index": 2}


def test_threads_do_not_matter():
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            weights = {"w": torch.zeros(1_500_001), "v": torch.zeros(333)}
            Dense("sphere").add_(weights, 0.1, **DRAW)
            results.append(weights)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_sums_of_signs_have_the_bits_of_the_general_loop(count, monkeypatch):
    scales, key = [0.1 * (-3) ** i for i in range(count)], {"seed": 3, "step": 1, "index": list(range(count))}
    results = []
    for general in (False, True):
        if general:
            monkeypatch.setattr(numba_backend, "_is_plain_signs", lambda term: False)
        weights = {"views": torch.linspace(-1, 1, 5001)[3:], "rows": torch.linspace(2, 3, 231).view(7, 33)}
        Dense("rademacher").sweep_(weights, scales, rule=Rule.NEAREST, decay=0.99, **key)
        Dense("rademacher").sweep_(weights, scales, rule=Rule.NEAREST, **key)
        results.append(weights)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=0)


def make_varied_weights():
    torch.manual_seed(0)
    table = torch.randn(40, 70)
    weights = {"table": table, "tied": table, "columns": torch.randn(30, 50).T, "odd": torch.randn(777)[3:]}
    return weights | {"parameter": torch.nn.Parameter(torch.randn(5)), "none": torch.zeros(0)}


def test_prepared_sweeps_have_the_bits_of_others(monkeypatch):
    prepared, plain = (make_varied_weights() for _ in range(2))
    directions, unprepared, names = Dense("rademacher"), Dense("rademacher"), list(prepared)
    monkeypatch.setattr(unprepared, "_sweep_prepared", lambda tensors, sweep: False)
    for step in range(4):
        for count in (1, 3):
            scales = [0.1 * (step + 1) * (-1) ** i for i in range(count)]
            by_name = {name: [scale * (1 + n) for scale in scales] for n, name in enumerate(names)}
            decays = {name: 1 - 0.01 * n for n, name in enumerate(names)}
            key = {"seed": step % 2, "index": [7 * i for i in range(count)]}
            for several in ({"scale": scales}, {"scale": by_name, "decay": decays}):
                options = {"step": [step + i for i in range(count)], **several, **key}
                directions.add_(prepared, **options)
                unprepared.add_(plain, **options)
    assert directions._prepared
    assert not unprepared._prepared
    assert all(torch.equal(prepared[name], plain[name]) for name in names)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_low_rank_sweeps_and_copies_have_the_bits_of_the_reference(rank):
    """Ranks odd and even, rows longer than a strip, and a shard that begins in the middle of the matrix."""
    generator = torch.Generator().manual_seed(0)
    whole = {"w": torch.randn(11, 23, generator=generator), "long": torch.randn(7, 5001, generator=generator)}
    swept, copied = [], []
    for backend in ("numba", "torch"):
        family = LowRank(rank=rank, backend=backend)
        weights = {name: tensor.clone() for name, tensor in whole.items()}
        family.add_(weights, 0.3, seed=1, step=2, index=3, decay=0.9)
        local = whole["long"][2:5].clone()
        place = Placement("long", local, local, (7, 5001), (2, 0))
        (term,) = family.terms([place], seed=1, step=2, index=3)
        dispatch.sweep([Job(place, (term,), (0.7,))], backend)
        swept.append([*weights.values(), local])
        assert all((a != b).any() for a, b in zip(weights.values(), whole.values(), strict=True))
    for dtype in (torch.float32, torch.bfloat16):
        targets = [torch.empty_like(tensor, dtype=dtype) for tensor in whole.values()]
        copy_perturbed(LowRank(rank=rank), place_all(whole), targets, {3: 0.3}, seed=1, step=2)
        copied.append(targets)
    expected = {name: tensor.clone() for name, tensor in whole.items()}
    LowRank(rank=rank, backend="torch").add_(expected, 0.3, seed=1, step=2, index=3)
    assert all(map(torch.equal, *swept))
    assert all(map(torch.equal, copied[0], expected.values()))
    assert all(map(torch.equal, copied[1], [tensor.bfloat16() for tensor in expected.values()]))


def test_a_prepared_sweep_follows_weights_that_move():
    weights, directions = {"w": torch.zeros(1000)}, Dense("rademacher")
    directions.add_(weights, 1.0, **DRAW)
    old, weights["w"] = weights["w"], torch.zeros(1000)
    directions.add_(weights, 1.0, **DRAW)
    assert torch.equal(weights["w"], old)
    weights["w"] = torch.zeros(20, 50).T
    directions.add_(weights, 1.0, **DRAW)
    assert torch.equal(weights["w"], directions({"w": torch.zeros(50, 20)}, **DRAW)["w"])


@pytest.mark.parametrize("missing", ["symbol", "threads of a fork"])
def test_a_pool_of_threads_gives_the_same_bits_as_torchs_own(missing, monkeypatch):
    def swept_weights():
        weights = {"w": torch.zeros(300_001), "h": torch.zeros(70_001, dtype=torch.bfloat16)}
        Dense("gaussian").add_(weights, 0.5, seed=1, step=2, index=0)
        Dense("rademacher").add_(weights, 0.25, seed=1, step=2, index=1)
        return weights

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    expected = swept_weights()
    if missing == "symbol":
        monkeypatch.setattr(numba_threads, "_torch_team", lambda: None)
    else:
        monkeypatch.setattr(numba_threads, "_PROCESS", -1)
    actual = swept_weights()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert any(key[1] == 3 for key in numba_threads._pools)


def test_a_forked_process_moves_weights_too():
    """OpenMP's threads do not survive a fork, so waiting for them would hang (torch's own operations do)."""
    script = (
        "import os, torch; from zokernel.directions import Dense; torch.set_num_threads(2)\n"
        "before, after = {'w': torch.zeros(1 << 20)}, {'w': torch.zeros(1 << 20)}\n"
        "move = lambda weights: Dense('rademacher').add_(weights, 1.0, seed=0, step=0, index=0)\n"
        "move(before); child = os.fork()\n"
        "if child == 0:\n"
        "    move(after); os._exit(0 if after['w'].numpy().tobytes() == before['w'].numpy().tobytes() else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60)
    assert process.stdout.strip() == "0", process.stderr


def test_compiled_code_on_disk_is_found_by_the_contents_of_its_sources(monkeypatch):
    assert numba_math._sources() in numba_kernels.run_segments.py_func.__qualname__
    before = numba_math._sources()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "signs.py"))
    assert numba_math._sources.__wrapped__() != before
