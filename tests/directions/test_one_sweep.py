"""One sweep of an in-place MeZO step goes through few files, so that a reader can follow it."""

from __future__ import annotations

import torch
from crossed_files import files_of

from zokernel.directions import Dense, make_restore

PATH = {
    "directions/weights/restore.py",
    "directions/base.py",
    "directions/families/dense.py",
    "directions/backends/numba/signs.py",
    "directions/backends/numba/threads.py",
}


def test_a_repeated_move_runs_through_five_files():
    weights = {"w": torch.zeros(70_000), "b": torch.nn.Parameter(torch.zeros(30, 40))}
    state = make_restore("fold", Dense("rademacher"), weights, seed=0)
    for step in range(2):  # loads compiled code and prepares the sweeps
        state.move_to(step, {0: 1e-3})
        state.move_to(step, {0: -1e-3})
        state.commit(step, {0: 1e-6}, decay=0.999)
    before = weights["w"].clone()
    assert files_of(lambda: state.move_to(2, {0: 1e-3})) == PATH
    assert files_of(lambda: state.move_to(2, {0: -1e-3})) == PATH
    assert files_of(lambda: state.commit(2, {0: 1e-6}, decay=0.999)) == PATH
    assert not torch.equal(weights["w"], before)
