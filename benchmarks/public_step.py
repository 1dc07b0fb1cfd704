"""A whole training step against the public way of MeZO: same model, data, batch, label words and loss, in one run.

The public way, restated from its description: every example goes through the model once for each option, padded on the
left, with a KV cache; logits of all positions over the whole vocabulary, in fp32; a log-softmax of all of them, of
which the option's tokens are kept; four sweeps over the weights (+1, -2, +1, update), each of which draws
``torch.normal`` again from the step's seed and makes new tensors of weights.

    python benchmarks/public_step.py [--rounds 3] [--threads 2]

The losses of both at the same weights must agree to 1e-4 (in fp32), or nothing is timed.  The last contender is no
training step but a bound for one: the matrix products of two bf16 forwards, weights and inputs in bf16 beforehand.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import paired
import torch
import torch.nn.functional as F
from directions import machine, table
from step import make_optimizer
from torch import Tensor, nn

from zokernel.finetune.trainer.compile_blocks import compile_blocks

EPS, LR = 1e-3, 1e-6
AGREE = 1e-4


class PublicStep:
    """MeZO's step as its public code takes it.

    Args:
        model: The model, all of it trained.
        items: Encoded examples.
    """

    def __init__(self, model: nn.Module, items: list[dict[str, Any]]):
        self.model, self.items = model, items
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.device = self.trained[0].device
        self.seeds = torch.Generator().manual_seed(0)
        self.sweep_seconds = self.forward_seconds = 0.0

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, mask and which tokens belong to an option: (B * C, T), options of an example next to another."""
        rows = [(item["input_ids"], option) for item in self.items for option in item["option_ids"]]
        length = max(len(prompt) + len(option) for prompt, option in rows)
        ids = torch.full((len(rows), length), 2)
        mask, option_mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, option) in enumerate(rows):
            ids[row, length - len(prompt) - len(option) :] = torch.tensor([*prompt, *option])
            mask[row, length - len(prompt) - len(option) :] = 1
            option_mask[row, length - len(option) :] = True
        return ids.to(self.device), mask.to(self.device), option_mask.to(self.device)

    def loss(self) -> float:
        """Return the cross entropy of the options' mean log-probabilities."""
        start = time.perf_counter()
        with torch.inference_mode():
            ids, mask, option_mask = self.inputs()
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            logprobs = F.log_softmax(logits, dim=-1)
            is_option = option_mask[:, 1:]
            tokens = torch.gather(logprobs, 2, ids[:, 1:, None])[..., 0]
            scores = (tokens * is_option).sum(1) / is_option.sum(1)
            labels = torch.tensor([item["label"] for item in self.items], device=self.device)
            loss = F.cross_entropy(scores.view(len(self.items), -1), labels).item()
        self.forward_seconds += time.perf_counter() - start
        return loss

    @torch.no_grad()
    def sweep(self, seed: int, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace every weight by ``change(weight, z)``."""
        start = time.perf_counter()
        torch.manual_seed(seed)
        for p in self.trained:
            z = torch.normal(mean=0, std=1, size=p.data.size(), dtype=p.data.dtype, device=p.data.device)
            p.data = change(p.data, z)
        self.sweep_seconds += time.perf_counter() - start

    def __call__(self) -> None:
        """Take one step."""
        seed = int(torch.randint(10**9, (), generator=self.seeds))
        self.sweep(seed, lambda p, z: p + 1 * z * EPS)
        above = self.loss()
        self.sweep(seed, lambda p, z: p + -2 * z * EPS)
        below = self.loss()
        self.sweep(seed, lambda p, z: p + 1 * z * EPS)
        slope = (above - below) / (2 * EPS)
        self.sweep(seed, lambda p, z: p - LR * (slope * z + 0.0 * p))


def make_products(model: nn.Module, rows: int) -> Callable[[], None]:
    """Return a function that multiplies ``rows`` inputs by every matrix of the model's layers, in bf16, twice."""
    matrices = [m.weight.detach().bfloat16() for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    inputs = {matrix.shape[1]: torch.randn(rows, matrix.shape[1]).bfloat16() for matrix in matrices}

    @torch.no_grad()
    def products() -> None:
        for _ in range(2):
            for matrix in matrices:
                F.linear(inputs[matrix.shape[1]], matrix)

    return products


def own_contenders(
    model: nn.Module, batch: dict[str, Any], closures: dict[str, Callable[[], Tensor]]
) -> dict[str, Callable[[], Any]]:
    """Return zokernel's steps in both precisions and ways to perturb, a compiled one, and the bound."""
    contenders: dict[str, Callable[[], Any]] = {}
    for precision, closure in closures.items():
        for way in ("in_place", "in_forward"):
            optimizer = make_optimizer("mezo", 1, way, model, batch, bf16=precision == "bf16")
            contenders[f"{precision}, {way}"] = lambda o=optimizer, c=closure: o.step(c)  # type: ignore[misc]
    compiled = paired.load()
    compile_blocks(compiled)
    closure = paired.make_closure(compiled, batch, bf16=True)
    optimizer = make_optimizer("mezo", 1, "in_place", compiled, batch, bf16=True)
    contenders["bf16, in place, compiled"] = lambda: optimizer.step(closure)
    contenders["bf16, matrix products only"] = make_products(model, batch["input_ids"].numel())
    return contenders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    # Weights of their own, since the public way replaces the tensors.
    public = PublicStep(paired.load(), paired.examples(options.batch, 38))
    model, batch = paired.load(), paired.make_batch(options.batch)
    closures = {
        precision: paired.make_closure(model, batch, bf16=precision == "bf16") for precision in ("fp32", "bf16")
    }
    with torch.no_grad():
        losses = [public.loss(), *(float(closure()) for closure in closures.values())]
    difference = abs(losses[0] - losses[1])
    if not difference <= AGREE:
        raise SystemExit(
            f"The losses are {losses[0]:.6f} and {losses[1]:.6f}: the two steps would not be the same job."
        )
    print(
        f"Machine: {machine()}. Batch {options.batch}, {batch['input_ids'].shape[1]} tokens; {options.rounds} rounds."
    )
    print(f"Loss, public {losses[0]:.6f}, here {losses[1]:.6f}: {difference:.1e} apart (bf16 autocast {losses[2]:.6f})")
    contenders: dict[str, Callable[[], Any]] = {"public, fp32": public}
    contenders |= own_contenders(model, batch, closures)
    public.sweep_seconds = public.forward_seconds = 0.0
    times = paired.take_turns(contenders, options.rounds)
    rows = []
    for name, times_of_step in times.items():
        wall, cpu = paired.median_ratios(times["public, fp32"], times_of_step)
        rows.append([name, f"{paired.median_seconds(times_of_step):.3f}", f"{wall:.1f}x", f"{cpu:.1f}x"])
    print(table(["step", "s", "steps/s against public", "by CPU time"], rows))
    steps = options.rounds + 1
    print(
        f"Public step: two forwards {public.forward_seconds / steps:.2f} s, four sweeps "
        f"{public.sweep_seconds / steps:.2f} s ({public.sweep_seconds / public.forward_seconds:+.0%})"
    )


if __name__ == "__main__":
    main()
