"""Models and inputs that every kernel is checked on, built afresh for each test, in float64.

Each case gives ``model``, ``x_o``, ``x_u`` and what to ask for; ``dense_jacobian`` is the naive reference: one
``torch.autograd.grad`` for each output, no functional transforms, no batching.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import models
import torch
from torch import Tensor, nn

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "attn_implementation": "eager"}
STARTS = {"bos_token_id": 0, "eos_token_id": 0}


@dataclass
class Case:
    model: Any
    x_o: Any
    x_u: Any
    outputs: list[int] | None = None
    params: dict[str, Tensor] | None = None
    # forward(params or None, x) -> (R, V) logits, written out by hand for the reference
    forward: Callable[[Any], Tensor] | None = None
    methods: list[str] = field(default_factory=lambda: ["contraction", "ntk_vp"])


class Features(nn.Module):
    """A model with dict inputs whose forward takes keywords."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, a, b):
        return torch.tanh(self.left(a)) * self.right(b)


class TiedNet(nn.Module):
    """A two-layer network whose second weight is the first one, transposed."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.encoder(x)))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.recurrent, self.out = kind(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(self.recurrent(x)[0][:, -1])


class Attention(nn.Module):
    """One block of causal self-attention written out, with a residual connection."""

    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(4, 12), nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        query, key, value = self.mix(self.norm(x)).chunk(3, -1)
        scores = (query @ key.transpose(1, 2) / 2).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1) > 0, -1e9)
        return self.out((x + scores.softmax(-1) @ value).mean(1))


class ResidualConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.skip, self.out = nn.Conv2d(2, 3, 1), nn.Linear(3, 2)

    def forward(self, x):
        hidden = self.second(torch.tanh(self.first(x))) + self.skip(x)
        return self.out(torch.nn.functional.silu(hidden).mean((2, 3)))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(9, 3, mode="mean"), nn.Linear(3, 2)

    def forward(self, ids):
        return self.out(torch.tanh(self.bag(ids)))


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def mlp(sizes=(5, 7, 3), activation=nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in pairwise(sizes):
        layers += [nn.Linear(width, following), activation()]
    return nn.Sequential(*layers[:-1])


def group_norm_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def tiny_gpt2(vocab_size: int = 23, **overrides: Any) -> nn.Module:
    return models.build("gpt2", vocab_size=vocab_size, **({**SMALL, "n_positions": 16, **STARTS} | overrides)).eval()


def tiny_llama(vocab_size: int = 23, **overrides: Any) -> nn.Module:
    settings = {**SMALL, "intermediate_size": 12, "tie_word_embeddings": False, **STARTS} | overrides
    return models.build("llama", vocab_size=vocab_size, **settings).eval()


def tiny_bert(vocab_size: int = 23) -> nn.Module:
    settings = {**SMALL, "intermediate_size": 12, "num_hidden_layers": 1, "max_position_embeddings": 16}
    return models.build("bert", vocab_size=vocab_size, **settings).eval()


def tiny_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tokens(*rows: list[int]) -> dict[str, Tensor]:
    """Rows of token ids, padded on the right with an attention mask."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def last_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits at the last attended token of right-padded rows."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return logits[torch.arange(len(logits)), batch["attention_mask"].sum(1) - 1]


def _module_case(model: nn.Module, x_o: Any, x_u: Any, **options: Any) -> Case:
    return Case(model.double().eval(), x_o, x_u, forward=options.pop("forward", None) or model, **options)


def _lm_case(model: nn.Module, x_o: Any, x_u: Any, **options: Any) -> Case:
    model = model.double().eval()
    return Case(model, x_o, x_u, forward=lambda x: last_logits(model, x), **options)


def _frozen_mlp() -> Case:
    net = mlp()
    net[0].weight.requires_grad_(False)
    return _module_case(net, _x(2, 5), _x(1, 5))


def _function_case() -> Case:
    params = {"w": _x(3, 4, seed=5), "b": _x(3, seed=6)}
    return Case(lambda p, x: torch.sin(x @ p["w"].T + p["b"]), _x(2, 4), _x(2, 4, seed=1), params=params)


def _masked_lm() -> Case:
    model = tiny_bert().double()
    batch_o = tokens([2, 5, 7, 3]) | {"positions": torch.tensor([1])}
    batch_u = tokens([2, 9, 4, 3]) | {"positions": torch.tensor([2])}

    def forward(batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits[torch.arange(len(logits)), batch["positions"]]

    return Case(model, batch_o, batch_u, forward=forward, methods=["contraction", "ntk_vp", "lm_head"])


def _sequence_case() -> Case:
    from zokernel.kernels import teacher_forcing

    model = tiny_gpt2().double().eval()
    batch_o, _ = teacher_forcing([[3, 4, 5]], [[6, 7]])
    batch_u, _ = teacher_forcing([[8, 9]], [[10, 11]])

    def forward(batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits[0, batch["positions"][0]]

    return Case(model, batch_o, batch_u, forward=forward, outputs=[6, 7, 10])


def _x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HEADED = ["contraction", "ntk_vp", "lm_head"]

CASES: dict[str, Callable[[], Case]] = {
    "mlp, one pair": lambda: _module_case(mlp(), _x(1, 5), _x(1, 5, seed=1)),
    "mlp, batches": lambda: _module_case(mlp(), _x(3, 5), _x(2, 5, seed=1)),
    "conv with GroupNorm": lambda: _module_case(group_norm_net(), _x(2, 1, 7, 7), _x(1, 1, 7, 7, seed=1)),
    "frozen layer": _frozen_mlp,
    "keyword inputs": lambda: _module_case(
        (net := Features()),
        {"a": _x(2, 4), "b": _x(2, 2)},
        {"a": _x(1, 4, seed=1), "b": _x(1, 2, seed=1)},
        forward=lambda x: net(**x),
    ),
    "tied weights": lambda: _module_case(TiedNet(), _x(2, 4), _x(1, 4, seed=1)),
    "bare function": _function_case,
    "GRU": lambda: _module_case(Recurrent(), _x(2, 5, 4), _x(1, 5, 4, seed=1)),
    "attention": lambda: _module_case(Attention(), _x(2, 3, 4), _x(1, 3, 4, seed=1)),
    "residual conv": lambda: _module_case(ResidualConv(), _x(1, 2, 5, 5), _x(2, 2, 5, 5, seed=1)),
    "EmbeddingBag": lambda: _module_case(Bag(), ids([1, 2, 2], [3, 8, 0]), ids([2, 5, 6]), methods=["contraction"]),
    "tied GPT-2": lambda: _lm_case(tiny_gpt2(), tokens([1, 2, 3, 2]), tokens([2, 4, 5]), methods=HEADED),
    "untied GPT-2, ragged batch": lambda: _lm_case(
        tiny_gpt2(tie_word_embeddings=False), tokens([1, 2, 3], [4, 5]), tokens([2, 4, 5]), methods=HEADED
    ),
    "candidate outputs": lambda: _lm_case(
        tiny_gpt2(), tokens([1, 2, 3]), tokens([7, 4, 5]), outputs=[4, 9, 1], methods=HEADED
    ),
    "LoRA only": lambda: _lm_case(tiny_lora(), tokens([1, 2, 3]), tokens([2, 4, 5])),
    "masked LM": _masked_lm,
    "whole sequence": _sequence_case,
}


def build(name: str) -> Case:
    """Build a case with fixed weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CASES[name]()


def dense_jacobian(case: Case, batch: Any) -> Tensor:
    """The reference: one autograd.grad for each logit, (R V, d)."""
    if case.params is not None:
        leaves = [tensor.clone().requires_grad_() for tensor in case.params.values()]
        logits = case.model(dict(zip(case.params, leaves, strict=True)), batch)
    else:
        leaves = [p for p in case.model.parameters() if p.requires_grad]
        logits = case.forward(batch)
    if case.outputs is not None:
        logits = logits[:, case.outputs]
    rows = []
    for logit in logits.flatten():
        grads = torch.autograd.grad(logit, leaves, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(leaves, grads, strict=True)])
        )
    return torch.stack(rows)
