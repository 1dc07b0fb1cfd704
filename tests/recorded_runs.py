"""Small training runs with a journal, for tests that replay them."""

from __future__ import annotations

import torch
from method_cases import CASES
from torch import nn

from zokernel.journal import Event, JournalWriter, make_header, weights_sha256
from zokernel.journal.replay import record_of
from zokernel.optim import get_method

STEPS = 9
OTHER_CASES = {
    "fzoo_batch": ("fzoo", (0.05, 0.05, {"num_perturbations": 3})),
    "richardson_one": ("richardson", (0.05, 0.5, {"num_perturbations": 1})),
}
ALL = {name: case for name, case in (CASES | OTHER_CASES).items() if not get_method(case[0]).first_order}


NOT_ON_A_GRID = [
    *(
        "kerzoo_clip",
        "kerzoo_md_int8",
        "lozo_m",
        "low_rank_one_sided_adam",
        "mezo_momentum",
        "normalized_momentum",
        "subzero_plus",
        "r_adazo",
        "zo_adam",
        "zo_adamm",
        "zo_muon",
        "zo_sign",
    ),
]


def network(dtype=torch.float32, seed=0, device="cpu"):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2)).to(device, dtype)


def record_run(folder, name, *, dtype=torch.float32, steps=STEPS, device="cpu", **overrides):
    """Train a small network with a journal, learning rates and groups that change; return weights after every step."""
    method, (lr, _, options) = ALL[name]
    options = {**options, "lr": lr, **overrides}
    net = network(dtype, device=device)
    x, y = torch.randn(8, 5, dtype=dtype).to(device), torch.randint(0, 2, (8,)).to(device)
    base = weights_sha256(dict(net.named_parameters()))
    matrices = [(n, p) for n, p in net.named_parameters() if p.ndim > 1]
    vectors = [(n, p) for n, p in net.named_parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
    optimizer = get_method(method)(groups, **options)
    folder.mkdir(parents=True, exist_ok=True)
    journal = JournalWriter.create(folder / "journal.zkj", make_header(optimizer, method, options, base_sha256=base))
    weights, sizes = [snapshot(net)], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr / (1 + step)
        optimizer.step(lambda: nn.functional.cross_entropy(net(x), y))
        before = journal.size
        journal.append(record_of(optimizer))
        sizes.append(journal.size - before)
        weights.append(snapshot(net))
    journal.append(Event({"event": "end", "step": steps, "weights_sha256": weights_sha256(weights[-1])}))
    journal.close()
    return weights, sizes, optimizer


def snapshot(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def same(actual, expected):
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)
