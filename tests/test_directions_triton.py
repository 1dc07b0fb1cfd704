"""The Triton backend, run by Triton's interpreter on the CPU in a process of its own, against the numba backend."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

COMMON = """
import torch
from zokernel.directions import Dense, Frames, LowRank, Sparse, engine, make_restore
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Job, Noise

def weights(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (17, 23), "scalar": (), "strided": (5, 9), "empty": (0,)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return made | {"strided": made["strided"].t()}

def compare(make, dtype, **options):
    results = []
    for backend in ("numba", "triton"):
        tensors = {name: tensor.clone() for name, tensor in weights(dtype).items()}
        make(backend).add_(tensors, [0.5, -0.3], seed=1, step=2, index=[0, 3], **options)
        results.append(tensors)
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), (make("auto"), dtype, options, name)
"""

CHECKS = {
    "laws": """
for law in ("rademacher", "gaussian", "uniform"):
    compare(lambda backend: Dense(law, backend=backend), torch.float32, decay=0.9)
compare(lambda backend: Dense("rademacher", backend=backend), torch.float64)
for dtype in (torch.bfloat16, torch.float16):
    compare(lambda backend: Dense("gaussian", backend=backend), dtype)
""",
    "stochastic": """
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    compare(lambda backend: Dense("rademacher", backend=backend), dtype, stochastic=True)
""",
    "families": """
compare(lambda backend: Dense("sphere", backend=backend), torch.float64)
compare(lambda backend: Sparse("gaussian", density=0.5, backend=backend), torch.float32)
compare(lambda backend: LowRank(rank=3, backend=backend), torch.float32)
compare(lambda backend: Frames(4, backend=backend), torch.float32)
""",
    "grid": """
results = []
for backend in ("numba", "triton"):
    tensors = {"w": weights(torch.float32)["w"].clone()}
    state = make_restore("grid", Dense("gaussian", backend=backend), tensors, seed=1)
    state.move_to(0, {0: 1e-3, 1: 1e-3})
    state.move_to(0, {0: -1e-3})
    state.commit(0, {0: 1e-6}, decay=0.999)
    results.append(tensors["w"])
assert torch.equal(*results)
""",
    "positions": """
# Slices of huge tensors (64-bit positions), aligned and not, and a shard with gaps between its rows.
for law in ("rademacher", "gaussian"):
    for shape, size, offset in (((2**40,), (300,), (2**33 + 70,)), ((40, 2**35), (4, 50), (30, 2**34 + 5))):
        results = []
        for backend in ("numba", "triton"):
            values = torch.zeros(size)
            place = Placement("w", values, values, shape, offset)
            engine.sweep([Job(place, (Noise(law, (7, 8), 1, 2),), (1.0,))], backend)
            results.append(values)
        assert torch.equal(*results), (law, shape)
""",
}


@pytest.mark.parametrize("checks", [("laws", "stochastic", "positions"), ("families", "grid")], ids="-".join)
def test_interpreted_kernel_agrees_with_numba_to_the_bit(checks):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMMON + "".join(CHECKS[check] for check in checks)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_kernel_compiles_for_gpus_without_fused_multiply_adds():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from zokernel.directions.triton_kernels import sweep_kernel

    constants = {
        "KIND": 0, "LAW": 1, "MASKED": False, "ALIGNED": True, "RULE": 0, "DECAYED": True, "WIDE": False, "DROP": 29,
        "HALF": False, "ROWS": 4, "COLUMNS": 64,
    }  # fmt: skip
    pointers = {"x": "fp32", "job": "fp64", "round": "i64", "counter": "i64", "scale": "fp64", "mask": "u8"}
    pointers |= {"first": "fp32", "second": "fp32", "peak": "fp32"}
    signature = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()}
    signature |= dict.fromkeys(("num_terms", "rank", "columns"), "i32")
    signature |= dict.fromkeys(("count", "start", "run", "run_stride", "numel"), "i64")
    signature |= dict.fromkeys(constants, "constexpr")
    values = {(sweep_kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(sweep_kernel, signature=signature, constexprs=values)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    assert "sqrt.rn.f32" in compiled.asm["ptx"]
    assert "fma.rn.f32" not in compiled.asm["ptx"]
