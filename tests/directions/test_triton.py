"""The Triton backend against the numba backend: by Triton's interpreter on the CPU, and on a GPU where there is one.

Each runs in a process of its own, since the interpreter is chosen before Triton is imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

COMMON = """
import functools
import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    # Most of the interpreter's time otherwise: it replaces the language by its own at every call of a function within a
    # kernel, and checks sums of integers for overflows that compiled kernels allow.
    interpreter._LangPatchScope.restore = lambda scope: None
    interpreter._patch_lang = functools.cache(interpreter._patch_lang)
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

import torch
from zokernel.directions import Dense, Orthogonal, LowRank, Sparse, make_restore
from zokernel.directions.backends import dispatch
from zokernel.directions.weights.copy_perturbed import Copier, copy_perturbed_rows
from zokernel.directions.placement import Placement, place_all
from zokernel.directions.terms import Job, Noise

def weights(dtype, backend="numba"):
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (17, 23), "scalar": (), "strided": (5, 9), "empty": (0,)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors = {name: tensor.to(device_of(backend)) for name, tensor in tensors.items()}
    return tensors | {"strided": tensors["strided"].t()}

def device_of(backend):
    return DEVICE if backend == "triton" else "cpu"

def compare(make, dtype, **options):
    results = []
    for backend in ("numba", "triton"):
        tensors = weights(dtype, backend)
        for step in (2, 7):  # the second time by the tables of the first
            make(backend).add_(tensors, [0.5, -0.3], seed=1, step=step, index=[0, 3], **options)
        results.append({name: tensor.cpu() for name, tensor in tensors.items()})
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), (make("auto"), dtype, options, name)
"""

CHECKS = {
    "distributions": """
for distribution in ("rademacher", "gaussian", "uniform"):
    compare(lambda backend: Dense(distribution, backend=backend), torch.float32, decay=0.9)
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
compare(lambda backend: Sparse(0.5, distribution="gaussian", backend=backend), torch.float32)
compare(lambda backend: LowRank(rank=3, backend=backend), torch.float32)
compare(lambda backend: Orthogonal(4, backend=backend), torch.float32)
""",
    "grid": """
results = []
for backend in ("numba", "triton"):
    tensors = {"w": weights(torch.float32, backend)["w"]}
    state = make_restore("grid", Dense("gaussian", backend=backend), tensors, seed=1)
    state.move_to(0, {0: 1e-3, 1: 1e-3})
    state.move_to(0, {0: -1e-3})
    state.commit(0, {0: 1e-6}, decay=0.999)
    results.append(tensors["w"].cpu())
assert torch.equal(*results)
""",
    "copies": """
def copies(make, backend, dtype, target_dtype):
    # Whole tensors of awkward sizes, copied twice by the same tables, and some rows, one of them twice.
    originals = {name: tensor for name, tensor in weights(dtype, backend).items() if name not in ("strided", "empty")}
    tensors = {name: tensor.clone() for name, tensor in originals.items()}
    family, device = make(backend), device_of(backend)
    if isinstance(family, Sparse):
        family.freeze(tensors)
    places = place_all(tensors)
    copier, targets = Copier(places), []
    for offsets in ({0: 0.5}, {2: -0.25}, {0: 0.5, 1: 0.125}):
        targets += [torch.empty(p.shape, dtype=target_dtype, device=device) for p in places]
        copier(family, targets[-len(places):], offsets, seed=3, step=4)
    matrix = places[0]
    rows = torch.empty(4, 23, dtype=dtype, device=device)
    copy_perturbed_rows(family, matrix, torch.tensor([5, 0, 16, 5], device=device), rows, {1: 0.5}, seed=3, step=4)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in originals.items())
    return [tensor.cpu() for tensor in (*targets, rows)]

makers = (lambda b: Dense("rademacher", backend=b), lambda b: Dense("gaussian", backend=b),
          lambda b: Dense("sphere", backend=b), lambda b: LowRank(rank=2, backend=b), lambda b: Sparse(backend=b))
for make in makers:
    for dtype, target in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16),
                          (torch.bfloat16, torch.bfloat16)):
        results = [copies(make, backend, dtype, target) for backend in ("numba", "triton")]
        for one, other in zip(*results):
            if "sphere" in repr(make("auto")):  # its norm is summed in another order
                torch.testing.assert_close(one, other)
            else:
                assert torch.equal(one, other), (make("auto"), dtype, target)
""",
    "freed": """
import weakref
import numpy as np

# Weights that were swept over are let go of, prepared sweeps or not.
family = Dense("gaussian", backend="triton")
array = np.zeros(500, np.float32)
gone = weakref.ref(array)
family.add_({"w": torch.from_numpy(array)}, 0.5, seed=1, step=2, index=0)
assert family._prepared and array.any()
del array
assert gone() is None
""",
    "positions": """
# Slices of huge tensors (64-bit positions), aligned and not, and a shard with gaps between its rows.
for distribution in ("rademacher", "gaussian"):
    for shape, size, offset in (((2**40,), (300,), (2**33 + 70,)), ((40, 2**35), (4, 50), (30, 2**34 + 5))):
        results = []
        for backend in ("numba", "triton"):
            values = torch.zeros(size, device=device_of(backend))
            place = Placement("w", values, values, shape, offset)
            dispatch.sweep([Job(place, (Noise(distribution, (7, 8), 1, 2),), (1.0,))], backend)
            results.append(values.cpu())
        assert torch.equal(*results), (distribution, shape)
""",
}


def run(checks, device, **environment):
    code = f"DEVICE = {device!r}\n" + COMMON + "".join(CHECKS[check] for check in checks)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.parametrize(
    "checks", [("distributions", "stochastic", "positions"), ("families", "grid", "copies", "freed")], ids="-".join
)
def test_interpreted_kernel_agrees_with_numba_to_the_bit(checks):
    run(checks, "cpu", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("check", [check for check in CHECKS if check != "freed"])
def test_gpu_agrees_with_numba_to_the_bit(check):
    run([check], "cuda")


def test_kernel_compiles_for_gpus_without_fused_multiply_adds():
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from zokernel.directions.backends.triton.kernels import sweep_kernel

    constants = {
        "TYPE": tl.float32, "TARGET": None, "WHOLE": True, "KIND": 0, "DISTRIBUTION": 1, "MASKED": False, "RULE": 0,
        "DECAYED": True, "WIDE": False, "DROP": 29, "HALF": False, "ROWS": 8, "COLUMNS": 64,
    }  # fmt: skip
    signature = {name: "*i64" for name in sweep_kernel.arg_names if name.endswith("_ptr")}
    signature |= dict.fromkeys(constants, "constexpr")
    values = {(sweep_kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(sweep_kernel, signature=signature, constexprs=values)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    assert "sqrt.rn.f32" in compiled.asm["ptx"]
    assert "fma.rn.f32" not in compiled.asm["ptx"]
    assert "ld.global.v4.b32" in compiled.asm["ptx"]  # whole segments are moved 16 bytes at a time
