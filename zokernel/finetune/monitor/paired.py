r"""Changes of the held-out loss since before training, by example: most of the noise of an evaluation cancels.

Example i has a sum of losses :math:`s_i` over :math:`n_i` terms (1, or its scored tokens).  The loss is
:math:`\sum_i s_i / \sum_i n_i`, and with :math:`d_i = s_i - s_i^0`

.. math:: \Delta = \frac{\sum_i d_i}{\sum_i n_i}, \qquad
          SE^2 = \frac{N}{N - 1}\, \frac{\sum_i (d_i - \Delta\, n_i)^2}{\big(\sum_i n_i\big)^2} .
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from zokernel.files import read_json, write_text

START_FILE = "held-out-start.json"
_WITHOUT = "remove it, and evaluations go on without the change since the start"
CHANGE, ERROR = "loss_change", "loss_change_error"


def paired_change(before_N2: Tensor, after_N2: Tensor) -> tuple[float, float]:
    r"""Return the change of a mean loss and its standard error, from the losses of the same examples.

    Args:
        before_N2: Each example's sum of losses, and how many terms that is over.
        after_N2: The same at other weights.

    Returns:
        :math:`\Delta` and SE; SE is infinite for a single example.

    Example:
        >>> before = torch.tensor([[0.5, 1.0], [0.9, 1.0], [0.7, 1.0]])
        >>> change, error = paired_change(before, before - torch.tensor([[0.1, 0.0], [0.2, 0.0], [0.3, 0.0]]))
        >>> round(change, 3), round(error, 4)  # 0.1 / sqrt(3)
        (-0.2, 0.0577)
    """
    before, after = before_N2.double(), after_N2.double()
    changes_N, counts_N = after[:, 0] - before[:, 0], before[:, 1]
    size, total = len(changes_N), float(counts_N.sum())
    change = float(changes_N.sum()) / total
    if size < 2:
        return change, math.inf
    squares = float((changes_N - change * counts_N).square().sum())
    return change, math.sqrt(size / (size - 1) * squares) / total


class StartLosses:
    """Keeps the losses of the held-out examples before training, in memory and in the run's folder.

    Args:
        folder: The run's folder.
        writes: Whether this process writes there.
    """

    def __init__(self, folder: Path, *, writes: bool):
        self._path, self._writes = folder / START_FILE, writes
        self._terms_N2: Tensor | None = None

    def keep(self, terms_N2: Tensor) -> None:
        """Keep the losses of an evaluation before the first step."""
        self._terms_N2 = terms_N2.double()
        if self._writes:
            write_text(self._path, json.dumps(self._terms_N2.tolist()) + "\n")

    def change(self, terms_N2: Tensor, *, continues: bool) -> dict[str, float]:
        """Return the change since the start and its error by name; nothing if the start is not known.

        Args:
            terms_N2: The losses of a later evaluation.
            continues: Whether an earlier process began the run, which may have kept them.
        """
        if self._terms_N2 is None and continues:
            self._terms_N2 = self._read()
        start = self._terms_N2
        if start is None or not torch.equal(start[:, 1], terms_N2[:, 1].double().to(start.device)):
            return {}
        change, error = paired_change(start, terms_N2)
        return {CHANGE: change, ERROR: error} if math.isfinite(change) and math.isfinite(error) else {}

    def _read(self) -> Tensor | None:
        if not self._path.exists():
            return None
        return torch.tensor(read_json(self._path, advice=_WITHOUT), dtype=torch.float64).view(-1, 2)
