r"""How fast directions are added to the weights of a 134.5M-parameter language model, against what public code does.

Everything is a ratio of times measured in turn in one process, on the tensors of SmolLM2-135M (random values: the
shapes are what matters).  Yardsticks:

* *eager*: ``p.data = p.data + scale * torch.normal(0, 1, p.size()) * eps`` over all tensors, one seeded stream;
* *limit*: ``p.add_(c)`` in place, the least that any update must read and write.

    python benchmarks/directions.py [--rounds 5] [--threads 2] [--only families] [--output docs/results/directions.md]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from zokernel.directions import Dense, Directions, get_directions, make_restore

Weights = dict[str, Tensor]
PAUSE = 0.1


def smollm2_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of SmolLM2-135M's parameters: 30 Llama layers of width 576, 9 heads over 3 key-value heads, tied head."""
    width, layers, heads, kv_heads, inner, vocabulary = 576, 30, 9, 3, 1536, 49152
    kv_width = width // heads * kv_heads
    layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def make_weights(dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.02 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in smollm2_shapes().items()
    }


def eager_sweep(weights: Weights, scale: float = 1.0, eps: float = 1e-3) -> None:
    torch.manual_seed(0)
    for p in weights.values():
        p.data = p.data + scale * torch.normal(0, 1, p.size(), dtype=p.dtype) * eps


def limit_sweep(weights: Weights) -> None:
    for p in weights.values():
        p.add_(1e-3)


def fused_sweep(family: Directions, weights: Weights, count: int = 1, **options: float | bool) -> Callable[[], None]:
    steps = iter(range(10**9))

    def sweep() -> None:
        index = list(range(count))
        family.add_(weights, [1e-3] * count, seed=0, step=next(steps), index=index, **options)  # type: ignore[arg-type]

    return sweep


def race(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Run all contenders in turn, ``rounds`` times after one warm-up, and return their times in seconds.

    A pause before each lets the last one's worker threads, which spin for a while after they finish, go to sleep.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(row) for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(f"| {line} |" for line in lines)


def compare_distributions(rounds: int) -> str:
    # The eager sweep replaces every tensor, so it works on weights of its own.
    weights, replaced = make_weights(), make_weights()
    contenders: dict[str, Callable[[], None]] = {
        "eager Gaussian": lambda: eager_sweep(replaced),
        "limit: in-place `x += c`": lambda: limit_sweep(weights),
    }
    contenders |= {
        distribution: fused_sweep(Dense(distribution), weights)
        for distribution in ("rademacher", "gaussian", "uniform", "sphere")
    }
    contenders["rademacher, with weight decay"] = fused_sweep(Dense("rademacher"), weights, decay=1 - 1e-6)
    times = race(contenders, rounds)
    eager, limit = times["eager Gaussian"], times["limit: in-place `x += c`"]
    rows = []
    for name, seconds in times.items():
        speedup = statistics.median(e / s for e, s in zip(eager, seconds))
        fraction = statistics.median(bound / s for bound, s in zip(limit, seconds))
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(seconds):.1f}",
                f"{1e3 * min(seconds):.1f}",
                f"{speedup:.1f}x",
                f"{min(eager) / min(seconds):.1f}x",
                f"{fraction:.2f}",
                f"{min(limit) / min(seconds):.2f}",
            ]
        )
    head = [
        "sweep over 134.5M fp32",
        "median ms",
        "best ms",
        "vs eager (median)",
        "(best)",
        "of limit (median)",
        "(best)",
    ]
    return table(head, rows)


def compare_variants(rounds: int) -> str:
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weights = make_weights(dtype)
        contenders: dict[str, Callable[[], None]] = {"limit": lambda weights=weights: limit_sweep(weights)}  # type: ignore[misc]
        for distribution in ("rademacher", "gaussian"):
            contenders[distribution] = fused_sweep(Dense(distribution), weights)
            contenders[f"{distribution}, 4 directions"] = fused_sweep(Dense(distribution), weights, count=4)
        if dtype != torch.float64:
            contenders["rademacher, stochastic rounding"] = fused_sweep(Dense("rademacher"), weights, stochastic=True)
        times = {name: min(seconds) for name, seconds in race(contenders, rounds).items()}
        name = str(dtype).removeprefix("torch.")
        rows += [
            [name, what, f"{1e3 * seconds:.1f}", f"{times['limit'] / seconds:.2f}"] for what, seconds in times.items()
        ]
    return table(["dtype", "sweep", "best ms", "of limit"], rows)


def compare_families(rounds: int) -> str:
    weights = make_weights()
    contenders: dict[str, Callable[[], None]] = {"limit": lambda: limit_sweep(weights)}
    for name in ("dense", "sparse", "low_rank", "subspace", "blockwise"):
        family = get_directions(name)
        contenders[repr(family)] = fused_sweep(family, weights)
    times = {name: min(seconds) for name, seconds in race(contenders, rounds).items()}
    rows = [[name, f"{1e3 * seconds:.1f}", f"{times['limit'] / seconds:.2f}"] for name, seconds in times.items()]
    return table(["family, fp32", "best ms", "of limit"], rows)


def compare_steps(rounds: int) -> str:
    """Time all sweeps of one two-point step, forward passes left out, in every restore mode."""
    weights = make_weights()

    def eager_step() -> None:
        for scale in (1.0, -2.0, 1.0, -1e-3):
            eager_sweep(weights, scale)

    contenders: dict[str, Callable[[], None]] = {"eager, 4 sweeps": eager_step}
    for mode in ("fold", "grid", "copy"):
        state, steps = make_restore(mode, Dense("rademacher"), make_weights(), seed=0), iter(range(10**9))

        def step(state=state, steps=steps) -> None:
            number = next(steps)
            state.move_to(number, {0: 1e-3})
            state.move_to(number, {0: -1e-3})
            state.commit(number, {0: -1e-6}, decay=1 - 1e-7)

        contenders[mode] = step
    times = {name: min(seconds) for name, seconds in race(contenders, rounds).items()}
    rows = [[name, f"{1e3 * s:.1f}", f"{times['eager, 4 sweeps'] / s:.1f}x"] for name, s in times.items()]
    return table(["one step, Rademacher", "best ms", "vs eager"], rows)


def peak_memory() -> str:
    """Extra resident memory at the peak of one sweep, in a fresh process for each."""
    rows = []
    # Low-rank and subspace factors are made in that sweep and then kept.
    for name in ("eager", "rademacher", "gaussian", "uniform", "sphere", "low_rank", "subspace"):
        code = f"import directions; print(directions.peak_of({name!r}))"
        rows.append([name, f"{float(run_python(code)):.1f}"])
    return table(["sweep", "peak extra MB"], rows)


def peak_of(name: str) -> float:
    """Return the rise of peak resident memory (MB) during one sweep, after a warm-up on a small tensor."""
    family = None if name == "eager" else get_directions(name)
    small = {"w": torch.zeros(300, 200), "v": torch.zeros(70_000)}
    weights, before = make_weights(), 0
    for tensors in (small, weights):
        # Resets the high-water mark, which making the weights has raised.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_kilobytes("VmRSS")
        if family is None:
            eager_sweep(tensors)
        else:
            family.add_(tensors, [1e-3], seed=0, step=0, index=[0])
    return (resident_kilobytes("VmHWM") - before) / 1024


def resident_kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def compile_cost() -> str:
    """Time of the first sweep in a fresh process, without and with compiled code on disk."""
    code = (
        "import time, torch; from zokernel.directions import Dense; w = {'w': torch.zeros(1000)}\n"
        "import zokernel.directions.backends.numba.math\n"
        "for distribution in ('rademacher', 'gaussian'):\n"
        "    start = time.perf_counter(); Dense(distribution).add_(w, 1.0, seed=0, step=0, index=0)\n"
        "    print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as folder:
        columns = [run_python(code, NUMBA_CACHE_DIR=folder).split() for _ in range(2)]
    rows = [
        [distribution, *(f"{float(column[k]):.2f}" for column in columns)]
        for k, distribution in enumerate(("rademacher", "others"))
    ]
    return table(["first sweep of a process", "nothing cached, s", "cached on disk, s"], rows)


def run_python(code: str, **environment: str) -> str:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); " + code
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout


def machine() -> str:
    import numba

    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    cores = os.cpu_count()
    return (
        f"{model}, {cores} cores, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, numba {numba.__version__}"
    )


SECTIONS: dict[str, tuple[str, Callable[[int], str]]] = {
    "distributions": ("Distributions", compare_distributions),
    "variants": ("Dtypes, several directions at once, rounding", compare_variants),
    "families": ("Families", compare_families),
    "steps": ("All sweeps of a step", compare_steps),
    "memory": ("Memory", lambda rounds: peak_memory()),
    "compilation": ("Compilation", lambda rounds: compile_cost()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times that every contender runs (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to run")
    parser.add_argument("--output", type=Path, help="also write the results to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = [f"# Directions: speed and memory\n\nMachine: {machine()}. {options.rounds} rounds; contenders take turns."]
    for name in ("", *options.only):
        if name:
            title, run = SECTIONS[name]
            parts.append(f"## {title}\n\n{run(options.rounds)}")
        print(parts[-1] + "\n", flush=True)
    if options.output:
        options.output.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
