r"""Parts of an update: what happens between the gradient estimate and the weights.

An update is a list of parts.  Some change the coefficients of the estimate (:class:`Normalized`,
:class:`PolyakBound`, :class:`Clip`, :class:`ClipSlopes`, :class:`SignOfProjections`, :class:`CurvatureWeights`).  One,
the rule, turns the estimate into a step (:class:`SGD`, :class:`Sign`, :class:`Adam`).  Others look at what has moved
(:class:`IterateAverage`, which :func:`iterate_average` makes).

With coefficients only, the step stays :math:`\theta \leftarrow \theta - \eta \sum_p c_p z_p` and is made in the sweep
that restores the weights.  Rules that treat every coordinate on its own (momentum, Adam, the sign of the estimate) take
the estimate as tensors, a few parameters at a time.

Example:
    >>> from zokernel.optim.updates import SGD, Normalized
    >>> [Normalized(0.9), SGD(momentum=0.9)]
    [Normalized(beta=0.9), SGD(momentum=0.9)]
"""

from __future__ import annotations

from zokernel._lazy import lazy_exports

__all__, __getattr__, __dir__ = lazy_exports(__name__)  # the names of __init__.pyi
