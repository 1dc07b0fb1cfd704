"""Compiled building blocks of the CPU backend: Philox, the distributions, 16-bit floats and stochastic rounding.

Written for LLVM's vectorizer: flat loops over arrays in cache, no branches on data, float32 polynomials.  Philox keeps
its 32-bit words in 64-bit lanes, where one vector multiply yields the whole product.  Compiled code is cached on disk.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from zokernel.directions import philox
from zokernel.directions.backends import gaussian_math as gm

logger = logging.getLogger(__name__)

SIGNS = 32
"""Elements that one word of sign bits serves."""

_M0, _M1 = np.uint64(philox.MULTIPLIER_0), np.uint64(philox.MULTIPLIER_1)
_W0, _W1 = np.uint64(philox.WEYL_0), np.uint64(philox.WEYL_1)
_LOW = np.uint64(philox.MASK_32)
_S32 = np.uint64(32)

_LOG = tuple(np.float32(c) for c in gm.LOG_COEFFICIENTS)
_SIN = tuple(np.float32(c) for c in gm.SIN_COEFFICIENTS)
_COS = tuple(np.float32(c) for c in gm.COS_COEFFICIENTS)
_LOG_2 = np.float32(gm.LOG_2)
_ANGLE_UNIT = np.float32(gm.ANGLE_UNIT)
_UNIFORM_SCALE = np.float32(gm.UNIFORM_SCALE)
_HALF_UNIT = np.float32(gm.UNIFORM_UNIT)
_HALF, _ONE, _MINUS_TWO = np.float32(0.5), np.float32(1.0), np.float32(-2.0)
_SQRT_HALF_BITS = np.int32(gm.SQRT_HALF_BITS)
_I23 = np.int32(23)
_U1, _U30 = np.uint32(1), np.uint32(30)
_EIGHTH = np.uint32(1 << 29)
_SIGN = np.uint32(0x80000000)


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Compile without the interpreter lock and cache on disk: beside the package, else in the user's cache folder.

    Args:
        function: The function.
        options: Further options of numba's ``njit``.

    Returns:
        The compiled function.
    """
    return cached(njit, function, nogil=True, **options)


def cached(decorator: Callable[..., Any], function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Compile with a decorator of numba's, cached on disk where a folder for it is writable.

    Args:
        decorator: numba's ``njit`` or ``cfunc``.
        function: The function.
        args: Arguments of the decorator.
        options: Keyword arguments of the decorator.

    Returns:
        The compiled function.
    """
    # numba looks at the function's own file, not at those it calls into: after an update it would find old code.
    function.__qualname__ = f"{function.__name__}_{_sources()}"
    try:
        return decorator(*args, cache=True, **options)(function)
    except RuntimeError:
        logger.info("%s is compiled in every process: no folder for numba's cache is writable", function.__name__)
        return decorator(*args, **options)(function)


@cache
def _sources() -> str:
    """Return a digest of all files that compiled code is made of."""
    folder, directions = Path(__file__).parent, Path(__file__).parents[2]
    shared = ("backends/gaussian_math.py", "philox.py", "terms.py")
    files = [*sorted(folder.glob("*.py")), *map(directions.joinpath, shared)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a scalar function that is merged into its callers, so that their loops vectorize.

    Args:
        function: The function.

    Returns:
        The compiled function.
    """
    return compiled(function, forceinline=True)


@cast(Callable[..., Any], intrinsic)
def pointer_to(typingctx: Any, address: Any, dtype: Any) -> Any:
    """Reinterpret an integer address as a pointer to ``dtype`` (torch and numba share memory this way)."""
    pointer = types.CPointer(dtype.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.uint64, dtype), codegen


@cast(Callable[..., Any], intrinsic)
def bitcast(typingctx: Any, value: Any, dtype: Any) -> Any:
    """Reinterpret the bits of a scalar as another type of the same width."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[0], context.get_value_type(dtype.dtype))

    return dtype.dtype(value, dtype), codegen


@inlined
def philox_block(block, step, index, key0, key1):
    """One block of Philox4x32-10; every argument and result is a 32-bit word in a uint64 (``block``: 64 bits)."""
    c0, c1, c2, c3 = block & _LOW, block >> _S32, step, index
    k0, k1 = key0, key1
    for _ in range(philox.ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _S32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _S32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@compiled
def fill_words(words, first_block, count, step, index, key0, key1):
    """Write the four words of ``count`` consecutive blocks into the rows of ``words`` (4, >= count)."""
    w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
    for b in range(count):
        a0, a1, a2, a3 = philox_block(first_block + np.uint64(b), step, index, key0, key1)
        w0[b] = np.uint32(a0)
        w1[b] = np.uint32(a1)
        w2[b] = np.uint32(a2)
        w3[b] = np.uint32(a3)


@inlined
def normal_pair(word_a, word_b):
    """Box-Muller: two uint32 words to two float32 normals (gaussian_math has the formulas)."""
    u = (np.float32(np.int32(word_a >> _U1)) + _HALF) * _HALF_UNIT
    bits = bitcast(u, np.int32)
    exponent = np.int32(np.int32(bits - _SQRT_HALF_BITS) >> _I23)
    f = bitcast(np.int32(bits - np.int32(exponent << _I23)), np.float32) - _ONE
    p = _LOG[0]
    p = p * f + _LOG[1]
    p = p * f + _LOG[2]
    p = p * f + _LOG[3]
    p = p * f + _LOG[4]
    p = p * f + _LOG[5]
    p = p * f + _LOG[6]
    p = p * f + _LOG[7]
    f2 = f * f
    log_u = (f + (f2 * f * p - _HALF * f2)) + np.float32(exponent) * _LOG_2
    radius = np.sqrt(_MINUS_TWO * log_u)

    quadrant = np.uint32(np.uint32(word_b + _EIGHTH) >> _U30)
    x = np.float32(np.int32(np.uint32(word_b - np.uint32(quadrant << _U30)))) * _ANGLE_UNIT
    y = x * x
    sine = x + x * y * ((_SIN[0] * y + _SIN[1]) * y + _SIN[2])
    cosine = (_ONE - _HALF * y) + y * y * ((_COS[0] * y + _COS[1]) * y + _COS[2])
    odd = (quadrant & _U1) != 0
    first = sine if odd else cosine
    second = cosine if odd else sine
    first_sign = np.uint32(np.uint32(quadrant + _U1) << _U30) & _SIGN
    second_sign = np.uint32(quadrant << _U30) & _SIGN
    first = bitcast(np.uint32(bitcast(first, np.uint32) ^ first_sign), np.float32)
    second = bitcast(np.uint32(bitcast(second, np.uint32) ^ second_sign), np.float32)
    return radius * first, radius * second


@inlined
def uniform(word):
    """One uint32 word to a float32 uniform on [-sqrt(3), sqrt(3)]."""
    return (np.float32(np.int32(word)) + _HALF) * _UNIFORM_SCALE


def _splat(builder: Any, value: ir.Value, width: int) -> ir.Value:
    vector, lane = ir.VectorType(value.type, width), ir.IntType(32)
    blank = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(blank, value, ir.Constant(lane, 0))
    return builder.shuffle_vector(first, blank, ir.Constant(ir.VectorType(lane, width), [0] * width))


def _signed_vector(builder: Any, word: ir.Value, scale: ir.Value) -> ir.Value:
    """A vector of ``scale`` (clear bit) and ``-scale`` (set bit): one blend by a bit mask on machines that have it."""
    mask = builder.bitcast(word, ir.VectorType(ir.IntType(1), SIGNS))
    return builder.select(mask, _splat(builder, builder.fneg(scale), SIGNS), _splat(builder, scale, SIGNS))


@cast(Callable[..., Any], intrinsic)
def store_signs(typingctx: Any, address: Any, word: Any, scale: Any) -> Any:
    """Write 32 float32 of magnitude ``scale``, signed by the bits of ``word``, to memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        value = _signed_vector(builder, args[1], args[2])
        builder.store(value, builder.inttoptr(args[0], value.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint32, types.float32), codegen


@cast(Callable[..., Any], intrinsic)
def add_signs_to(typingctx: Any, address: Any, word: Any, scale: Any, shift: Any) -> Any:
    """Turn 32 float32 x in memory into ``x + (shift x + s)``, s being ``scale`` signed by the bits of ``word``.

    With ``None`` for shift the product is left out.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        change = _signed_vector(builder, args[1], args[2])
        pointer = builder.inttoptr(args[0], change.type.as_pointer())
        x = builder.load(pointer, align=4)
        if shift != types.none:
            change = builder.fadd(builder.fmul(_splat(builder, args[3], SIGNS), x), change)
        builder.store(builder.fadd(x, change), pointer, align=4)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint32, types.float32, shift), codegen


@cast(Callable[..., Any], intrinsic)
def copy_signs_to(typingctx: Any, source: Any, target: Any, word: Any, scale: Any) -> Any:
    """Write 32 float32 ``x + s`` to ``target``, x read from ``source`` and s being ``scale`` signed by ``word``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        moved = _moved_vector(builder, args[0], args[2], args[3])
        builder.store(moved, builder.inttoptr(args[1], moved.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint32, types.float32), codegen


@cast(Callable[..., Any], intrinsic)
def copy_signs_to_bfloat16(typingctx: Any, source: Any, target: Any, word: Any, scale: Any) -> Any:
    """Do the same, rounded to the nearest bfloat16 (ties to even); the weights must be finite."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        words = ir.VectorType(ir.IntType(32), SIGNS)
        bits = builder.bitcast(_moved_vector(builder, args[0], args[2], args[3]), words)
        sixteen, one, below_half = (ir.Constant(words, [value] * SIGNS) for value in (16, 1, 0x7FFF))
        odd = builder.and_(builder.lshr(bits, sixteen), one)
        rounded = builder.lshr(builder.add(bits, builder.add(below_half, odd)), sixteen)
        half = builder.trunc(rounded, ir.VectorType(ir.IntType(16), SIGNS))
        builder.store(half, builder.inttoptr(args[1], half.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint32, types.float32), codegen


def _moved_vector(builder: Any, address: ir.Value, word: ir.Value, scale: ir.Value) -> ir.Value:
    change = _signed_vector(builder, word, scale)
    return builder.fadd(builder.load(builder.inttoptr(address, change.type.as_pointer()), align=4), change)


@inlined
def from_bfloat16(bits):
    """Bits of a bfloat16 (uint16) to float32."""
    return bitcast(np.uint32(np.uint32(bits) << np.uint32(16)), np.float32)


@inlined
def to_bfloat16(x):
    """A float32 to the bits of the nearest bfloat16 (ties to even)."""
    bits = bitcast(x, np.uint32)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & _U1))
    # Rounding could carry a NaN's mantissa into infinity, so NaN is set apart.
    result = rounded if np.uint32(bits & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000) else np.uint32(0x7FC00000)
    return np.uint16(result >> np.uint32(16))


@inlined
def from_float16(bits):
    """Bits of a float16 (uint16) to float32, subnormals included."""
    wide = np.uint32(bits)
    magnitude = np.uint32(np.uint32(wide & np.uint32(0x7FFF)) << np.uint32(13))
    # Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalizes subnormals in one go.
    scaled = bitcast((bitcast(magnitude, np.float32) * np.float32(2.0**112)), np.uint32)
    special = np.uint32(magnitude | np.uint32(0x7F800000))
    value = special if magnitude >= np.uint32(0x0F800000) else scaled
    return bitcast(np.uint32(value | np.uint32(np.uint32(wide & np.uint32(0x8000)) << np.uint32(16))), np.float32)


@inlined
def to_float16(x):
    """A float32 to the bits of the nearest float16 (ties to even)."""
    bits = bitcast(x, np.uint32)
    sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & _U1)
    normal = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))
    # Below 2^-14 the unit is 2^-24: adding 0.5 in float32 leaves exactly that many bits, rounded by the addition.
    subnormal = np.uint32(bitcast((bitcast(magnitude, np.float32) + _HALF), np.uint32) - np.uint32(0x3F000000))
    half = normal if magnitude >= np.uint32(0x38800000) else subnormal
    half = half if magnitude < np.uint32(0x47800000) else np.uint32(0x7C00)
    half = half if magnitude <= np.uint32(0x7F800000) else np.uint32(0x7E00)
    return np.uint16(half | sign)


@inlined
def stochastic_bits(y, word, drop):
    """Round a float64 stochastically to ``53 - drop`` significant bits, using a 32-bit random word."""
    bits = bitcast(y, np.int64)
    noise = np.int64(np.uint64(word)) << np.int64(drop - 32) if drop > 32 else np.int64(word >> np.uint32(32 - drop))
    rounded = ((bits + noise) >> np.int64(drop)) << np.int64(drop)
    finite = (bits & np.int64(0x7FF0000000000000)) != np.int64(0x7FF0000000000000)
    return bitcast((rounded if finite else bits), np.float64)


__all__ = [
    "SIGNS",
    "add_signs_to",
    "bitcast",
    "cached",
    "carray",
    "compiled",
    "copy_signs_to",
    "copy_signs_to_bfloat16",
    "fill_words",
    "from_bfloat16",
    "from_float16",
    "inlined",
    "normal_pair",
    "philox_block",
    "pointer_to",
    "stochastic_bits",
    "store_signs",
    "to_bfloat16",
    "to_float16",
    "uniform",
]
