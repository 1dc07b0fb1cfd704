"""Sweeps, steps, the public way, stacked losses and memory on a GPU, in one run: models of random weights.

Contenders take turns, a run is timed from an idle GPU to an idle GPU, and ratios are medians over rounds.

    python benchmarks/gpu.py [--only sweeps steps public stacked memory] [--shapes SmolLM2-135M Llama-3.2-1B]

``--device cpu`` runs the same on the CPU, which only checks that the benchmark works.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import Any

import paired
import stacked
import torch
from directions import table
from public_step import AGREE, PublicStep
from step import make_optimizer

from zokernel.directions import Dense, Directions, LowRank, make_restore
from zokernel.finetune.models.memory import PeakMemory
from zokernel.finetune.trainer.compile_blocks import compile_blocks
from zokernel.optim import get_method

SWEEPS = 10  # in one timed run
Items = list[dict[str, Any]]


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    try:
        import triton

        version = triton.__version__
    except ModuleNotFoundError:
        version = "none"
    return f"{name}; torch {torch.__version__}, triton {version}"


def compare_sweeps(device: str, shape: str, rounds: int) -> str:
    """Time sweeps over all weights against what public code does, and against ``add_`` of a constant."""
    model = paired.build(shape, device=device)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    halves = {name: p.bfloat16() for name, p in weights.items()}
    count = sum(p.numel() for p in weights.values())
    grid = make_restore("grid", Dense("rademacher"), {n: w.clone() for n, w in weights.items()}, seed=0)

    def eager() -> None:
        for p in weights.values():
            p.data.add_(torch.normal(0.0, 1.0, p.size(), dtype=p.dtype, device=p.device), alpha=1e-3)

    def fused(
        family: Directions, tensors: dict[str, torch.Tensor] = weights, directions: int = 1, **options: Any
    ) -> Any:
        steps, index = iter(range(10**9)), list(range(directions))
        scales = [1e-3] * directions
        return lambda: family.add_(tensors, scales, seed=0, step=next(steps), index=index, **options)

    limit, low = list(weights.values()), list(halves.values())
    steps = iter(range(10**9))
    contenders: dict[str, Callable[[], Any]] = {
        "add a constant, fp32 (limit)": lambda: torch._foreach_add_(limit, 1e-3),
        "eager normal, fp32": eager,
        **{law: fused(Dense(law)) for law in ("rademacher", "gaussian", "uniform", "sphere")},
        "rademacher, 8 directions": fused(Dense("rademacher"), directions=8),
        "gaussian, 8 directions": fused(Dense("gaussian"), directions=8),
        "rank 2": fused(LowRank(rank=2)),
        "rademacher, on a grid": lambda: grid.move_to(next(steps), {0: 1e-3}),
        "add a constant, bf16": lambda: torch._foreach_add_(low, 1e-3),
        "rademacher, bf16": fused(Dense("rademacher"), halves),
        "rademacher, bf16, stochastic": fused(Dense("rademacher"), halves, stochastic=True),
    }
    repeated = {name: lambda run=run: [run() for _ in range(SWEEPS)] for name, run in contenders.items()}
    times = paired.take_turns(repeated, rounds, warm_up=2)
    names = list(contenders)
    rows = []
    for name, times_of_sweep in times.items():
        base = times[names[0]]
        seconds = paired.median_seconds(times_of_sweep) / SWEEPS
        of_limit, _ = paired.median_ratios(times_of_sweep, base)
        width = 4 if "bf16" in name else 8
        rows.append([name, f"{1e3 * seconds:.2f}", f"{of_limit:.2f}", f"{width * count / seconds / 1e9:.0f}"])
    return table([f"sweep of {count / 1e6:.0f}M weights", "ms", "times of limit", "GB/s"], rows)


def measure_steps(device: str, shape: str, rounds: int, counts: Sequence[int], items: Items) -> str:
    """Time steps against their bare forwards."""
    batch = paired.make_batch(len(items), items=items, device=device)
    rows = []
    for train, methods in (("full", ("mezo", "kerzoo", "fzoo")), ("lora", ("mezo",))):
        model = paired.build(shape, device=device, lora=train == "lora")
        for precision in ("fp32", "bf16"):
            bf16 = precision == "bf16"
            closure = paired.make_closure(model, batch, bf16=bf16)
            for method in methods:
                for count in counts:
                    if method == "fzoo" and count == 1:
                        continue
                    ways = ("in_place", "in_forward", *(["stacked"] if train == "lora" else []))
                    optimizers = {way: make_optimizer(method, count, way, model, batch, bf16=bf16) for way in ways}
                    forwards = optimizers["in_place"].forwards_per_step

                    @torch.no_grad()
                    def bare(forwards: int = forwards, closure: Any = closure) -> None:
                        for _ in range(forwards):
                            float(closure())

                    contenders: dict[str, Any] = {"bare": bare}
                    contenders |= {way: lambda o=o, c=closure: o.step(c) for way, o in optimizers.items()}
                    times = paired.take_turns(contenders, rounds, warm_up=2)
                    cells = [f"{1e3 * paired.median_seconds(times['bare']):.1f}"]
                    for way in ("in_place", "in_forward", "stacked"):
                        ratio = paired.median_ratios(times[way], times["bare"])[0] if way in times else None
                        cells.append("" if ratio is None else f"{100 * (ratio - 1):+.1f}%")
                    rows.append([train, precision, method, str(count), *cells])
    return table(["trained", "precision", "method", "P", "forwards ms", "in place", "in forward", "stacked"], rows)


def compare_public(device: str, shape: str, rounds: int, items: Items) -> str:
    """Time a MeZO step against the public way of it, each in fp32 and in lower precision."""
    batch = paired.make_batch(len(items), items=items, device=device)
    public = {name: PublicStep(paired.build(shape, device=device, dtype=d), items) for name, d in DTYPES.items()}
    models = {name: paired.build(shape, device=device, dtype=d) for name, d in DTYPES.items()}
    closures = {bf16: paired.make_closure(models["fp32"], batch, bf16=bf16) for bf16 in (False, True)}
    with torch.no_grad():
        losses = public["fp32"].loss(), float(closures[False]())
    if not abs(losses[0] - losses[1]) <= AGREE:
        raise SystemExit(
            f"The losses are {losses[0]:.6f} and {losses[1]:.6f}: the two steps would not be the same job."
        )
    contenders: dict[str, Any] = {f"public, {name}": step for name, step in public.items()}
    for bf16, closure in closures.items():
        for way in ("in_place", "in_forward"):
            optimizer = make_optimizer("mezo", 1, way, models["fp32"], batch, bf16=bf16)
            name = f"{'bf16 autocast' if bf16 else 'fp32'}, {way}"
            contenders[name] = lambda o=optimizer, c=closure: o.step(c)  # type: ignore[misc]
    for name, mode in (("compiled", None), ("CUDA graphs", "reduce-overhead")):
        model = paired.build(shape, device=device)
        compile_blocks(model, mode=mode)
        closure = paired.make_closure(model, batch, bf16=True)
        optimizer = make_optimizer("mezo", 1, "in_place", model, batch, bf16=True)
        contenders[f"bf16 autocast, in place, {name}"] = lambda o=optimizer, c=closure: o.step(c)  # type: ignore[misc]
    closure = paired.make_closure(models["bf16"], batch, bf16=False)
    optimizer = make_optimizer("mezo", 1, "in_forward", models["bf16"], batch, bf16=False)
    contenders["bf16 weights, in_forward"] = lambda: optimizer.step(closure)
    times = paired.take_turns(contenders, rounds, warm_up=3)
    rows = []
    for name, times_of_step in times.items():
        ratios = [paired.median_ratios(times[f"public, {kind}"], times_of_step)[0] for kind in DTYPES]
        seconds = 1e3 * paired.median_seconds(times_of_step)
        rows.append([name, f"{seconds:.1f}", *(f"{ratio:.1f}x" for ratio in ratios)])
    header = ["step", "ms", "steps/s against public fp32", "against public bf16"]
    return f"Losses {losses[0]:.6f} and {losses[1]:.6f}.\n\n{table(header, rows)}"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compare_stacked(device: str, shape: str, rounds: int, items: Items) -> str:
    """Time all losses of a step in one forward against one after the other."""
    rows = []
    model = paired.build(shape, device=device, lora=True)
    for size in (1, 4):
        batch = paired.make_batch(size, items=items[:size], device=device)
        for count in (1, 3):
            for precision in ("fp32", "bf16"):
                cells = stacked.compare("lora", count, batch, model, precision, rounds)
                rows.append(["lora", str(size), str(count), precision, *cells])
    header = ["trained", "batch", "P", "precision", "loop s", "stacked s", "ratio", "of CPU time", "bound"]
    return table([*header, "losses differ by"], rows)


def measure_memory(device: str, shape: str, items: Items) -> str:
    """Peak of the allocator over two steps, against evaluating the same batch."""
    batch = paired.make_batch(len(items), items=items, device=device)
    rows = []
    settings: dict[str, tuple[str, str, dict[str, Any]]] = {
        "MeZO": ("mezo", "in_place", {}),
        "MeZO, in the forward": ("mezo", "in_forward", {}),
        "KerZOO": ("kerzoo", "in_place", {}),
        "FZOO": ("fzoo", "in_place", {}),
        "LOZO": ("lozo", "in_place", {}),
        "Sparse-MeZO": ("sparse_mezo", "in_place", {}),
        "MeZO with momentum": ("mezo", "in_place", {"momentum": 0.9}),
        "AdamW": ("adamw", "in_place", {}),
    }
    for bf16 in (False, True):
        for name, (method, way, options) in settings.items():
            model = paired.build(shape, device=device)
            closure = paired.make_closure(model, batch, bf16=bf16)
            with torch.no_grad():
                closure()
                gc.collect()
                with PeakMemory() as evaluating:
                    closure()
            if way == "in_forward":
                optimizer = make_optimizer(method, 1, way, model, batch, bf16=bf16)
            else:
                optimizer = get_method(method)(paired.trained(model), lr=1e-7, **options)
            with PeakMemory() as training:
                for _ in range(2):
                    optimizer.step(closure)
            peaks = evaluating.peak_bytes, training.peak_bytes
            precision = "bf16 autocast" if bf16 else "fp32"
            rows.append([precision, name, *(f"{peak / 2**20:.0f}" for peak in peaks), f"{peaks[1] / peaks[0]:.2f}x"])
            del model, closure, optimizer
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return table(["precision", "method", "evaluating MiB", "training MiB", "ratio"], rows)


SECTIONS: dict[str, Callable[[argparse.Namespace, str, Items], str]] = {
    "sweeps": lambda o, shape, items: compare_sweeps(o.device, shape, o.rounds),
    "steps": lambda o, shape, items: measure_steps(o.device, shape, o.rounds, o.perturbations, items),
    "public": lambda o, shape, items: compare_public(o.device, shape, o.rounds, items),
    "stacked": lambda o, shape, items: compare_stacked(o.device, shape, o.rounds, items),
    "memory": lambda o, shape, items: measure_memory(o.device, shape, items),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--shapes", nargs="+", choices=list(paired.SHAPES), default=list(paired.SHAPES))
    parser.add_argument("--perturbations", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=38, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    items = paired.random_examples(options.batch, options.length)
    print(f"Machine: {machine(options.device)}. {options.batch} x {options.length} tokens, {options.rounds} rounds.")
    for shape in options.shapes:
        for section in options.only:
            print(f"\n## {shape}: {section}\n\n{SECTIONS[section](options, shape, items)}", flush=True)


if __name__ == "__main__":
    main()
