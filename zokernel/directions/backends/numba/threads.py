r"""Compiled loops on the threads that torch's own operations run on.

OpenMP keeps its threads awake for milliseconds after an operation, ready for the next one, and a second pool of threads
would compete with them for the cores: between matrix products on two cores, copying weights took 350 picoseconds a
weight in a pool of Python's threads and 210 on torch's.  So loops are handed to the OpenMP runtime that torch is linked
with.  Without one, or after a fork (which OpenMP's threads do not survive), a pool of Python's threads takes over.

A loop is a function of the address of an *order*: the tables that it works on, and shares of the rows chosen from
them.  Each thread takes one share after another until none is left.  The loops themselves are in ``signs``, ``factors``
and ``kernels``; they are written out one by one because numba's cache on disk finds no closure over a compiled function
again.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic

from zokernel.directions.backends.gaussian_math import GROUP
from zokernel.directions.backends.numba.math import cached, inlined, pointer_to
from zokernel.private_apis import extension_file
from zokernel.process_memory import release_code

logger = logging.getLogger(__name__)

Loop = Callable[[Any], None]
SHARES_PER_THREAD = 8
TABLES = ("segments", "chosen", "bounds", "jobs", "terms", "results", "targets")
"""Addresses in an order: of the tables, of float32 or float64 results, and of the addresses written to."""
ORDER = np.dtype([(name, np.uint64) for name in ("taken", "num_shares", "num_rows", "half", *TABLES)])


def carry_out(
    loop: Loop, segments: np.ndarray, chosen: np.ndarray, tables: Mapping[str, np.ndarray], *, half: bool = False
) -> None:
    """Run a loop over some segments on as many threads as ``torch.get_num_threads()``.

    Args:
        loop: Function of an order's address; it is compiled on first use.
        segments: (n,) of SEGMENT.
        chosen: (k,) int64, the rows of ``segments`` to work on.
        tables: The loop's other tables by name, in memory order.
        half: Whether copies are bfloat16.
    """
    if not chosen.size:
        return
    bounds = _cut(segments["length"][chosen])
    arrays = {"segments": segments, "chosen": chosen, "bounds": bounds, **tables}
    order = np.zeros(1, ORDER)
    order["num_shares"], order["num_rows"], order["half"] = len(bounds) - 1, len(segments), half
    for name, array in arrays.items():
        order[name] = array.ctypes.data
    _run(_compiled(loop), order.ctypes.data, len(bounds) - 1)


def _cut(length: np.ndarray) -> np.ndarray:
    """Return where to cut rows into shares of about equal length."""
    total, threads = np.cumsum(length), torch.get_num_threads()
    shares = 1 if threads == 1 else min(threads * SHARES_PER_THREAD, 1 + int(total[-1]) // (GROUP * 128))
    inner = np.searchsorted(total, np.arange(1, shares) * (total[-1] / shares))
    return np.concatenate([[0], inner, [len(length)]]).astype(np.int64)


_PROCESS = os.getpid()


@cache
def _torch_team() -> Any:
    """Return OpenMP's ``GOMP_parallel`` as torch itself calls it; ``None`` if torch is linked with no such function."""
    try:
        # Looked up among what torch is linked with: another copy of the library would start threads of its own.
        parallel = ctypes.CDLL(extension_file()).GOMP_parallel
    except (AttributeError, OSError):
        logger.info("torch's OpenMP threads cannot be called: directions use threads of their own.")
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _run(entry: Any, order: int, num_shares: int) -> None:
    threads = torch.get_num_threads()
    if threads == 1 or num_shares == 1:
        entry.ctypes(order)
        return
    team = _torch_team() if os.getpid() == _PROCESS else None
    if team is not None:
        team(entry.address, order, threads, 0)
        return
    # Keyed by process: a pool's threads do not survive a fork either.
    pool = _pools.get((os.getpid(), threads))
    if pool is None:
        pool = _pools[os.getpid(), threads] = ThreadPoolExecutor(threads - 1, "zokernel-directions")
    futures = [pool.submit(entry.ctypes, order) for _ in range(threads - 1)]
    entry.ctypes(order)
    for future in futures:
        future.result()


@cache
def _compiled(loop: Loop) -> Any:
    """Compile a loop as a C function, or load it compiled."""
    entry = cached(cfunc, loop, types.void(types.uint64))
    release_code("libllvmlite")
    return entry


@cast(Callable[..., Any], intrinsic)
def take_share(typingctx: Any, address: Any) -> Any:
    """Take a share of an order that no thread has taken yet; from ``num_shares`` on there is none left."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        # An order begins with the number of shares taken: add one atomically, return what it was.
        word = ir.IntType(64)
        return builder.atomic_rmw("add", builder.inttoptr(args[0], word.as_pointer()), word(1), "monotonic")

    return types.uint64(types.uint64), codegen


@inlined
def table(address, dtype, rows):
    """Return the table at an address.  Only existing rows are read, so ``rows`` may be larger than their number."""
    return carray(pointer_to(address, dtype), int(rows))


@inlined
def rows_of(order, share):
    """Return the rows chosen for a share."""
    bounds = table(order.bounds, np.int64, order.num_shares + np.uint64(1))
    begin, end = bounds[share], bounds[share + np.uint64(1)]
    return table(order.chosen, np.int64, end)[begin:]
