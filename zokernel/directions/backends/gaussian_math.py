r"""Constants shared by every backend that turns random bits into numbers, so that they agree to the last bit.

Box-Muller on two 32-bit words :math:`w_0, w_1` gives two standard normals :math:`r \cos a, r \sin a` with

.. math:: r = \sqrt{-2 \log u},\quad u = (\lfloor w_0 / 2 \rfloor + 1/2)\, 2^{-31},\quad a = 2 \pi w_1 2^{-32} .

Everything is float32 arithmetic without fused multiply-adds, in one fixed order: polynomials instead of library calls
let compilers vectorize it, and make the bits the same on every machine.

* :math:`\log u = e \log 2 + \log(1 + f)`, mantissa in :math:`[\sqrt{1/2}, \sqrt 2)`,
  :math:`\log(1+f) = f - f^2/2 + f^3 P(f)` with a degree-7 minimax :math:`P` (relative error :math:`2^{-27}`);
* the top two bits of the rounded angle are the quadrant (exact), the rest an angle :math:`x` in
  :math:`[-\pi/4, \pi/4]`, with :math:`\sin x = x + x^3 S(x^2)`, :math:`\cos x = 1 - x^2/2 + x^4 C(x^2)`, minimax of
  degree 2 (absolute errors :math:`2^{-28}` and :math:`2^{-33}`).

The largest possible value is :math:`\sqrt{-2 \log 2^{-32}} = 6.66`.
"""

from __future__ import annotations

import math

LOG_COEFFICIENTS = (
    -0.07634495198726654,
    0.12761574983596802,
    -0.13160182535648346,
    0.14201758801937103,
    -0.16623356938362122,
    0.20001226663589478,
    -0.2500081956386566,
    0.3333333134651184,
)
SIN_COEFFICIENTS = (-0.0001951729936990887, 0.008332177996635437, -0.16666655242443085)
COS_COEFFICIENTS = (2.4438451872373624e-05, -0.001388736767694354, 0.04166664555668831)

LOG_2 = math.log(2.0)
ANGLE_UNIT = 2 * math.pi / 2**32
UNIFORM_UNIT = 2.0**-31
UNIFORM_SCALE = math.sqrt(3.0) * 2.0**-31

SQRT_HALF_BITS = 0x3F3504F3

GAUSSIAN_BOUND = 6.66044
"""No Gaussian coordinate is larger in absolute value."""

# Elements to blocks of random words.  Rademacher: one bit per element, 128 elements per block.  Others: one word per
# element, laid out in planes (64 blocks make 256 elements; word k of block l is element 64 k + l), so that
# vector lanes run over consecutive blocks and are stored to consecutive elements.
BITS_PER_BLOCK = 128
PLANE = 64
GROUP = 4 * PLANE
