"""Perturbation-parallel steps: two processes with one thread each against one process with one thread.

    python benchmarks/parallel.py                      # SmolLM2-135M with LoRA, P = 4, batch 4
    python benchmarks/parallel.py --full --steps 6

Both runs take the same steps; the benchmark checks that the losses are the same numbers, then prints seconds per step,
the speed-up and the bytes that each process sends.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def load(full: bool):
    from transformers import AutoModelForCausalLM

    from zokernel.data import fetch

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(fetch("smollm2"), dtype=torch.float32).eval()
    if full:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")).eval()


def train(rank: int, world: int, port: int, options: argparse.Namespace, queue) -> None:
    from zokernel.finetune.scoring.options import ScoredPositions
    from zokernel.optim import MeZO
    from zokernel.perturb import InForward, Parallel

    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model = load(options.full)
    perturb = Parallel("perturbation", InForward()) if world > 1 else InForward()
    optimizer = MeZO(model, lr=1e-6, num_perturbations=options.num_perturbations, perturb=perturb)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40000, (options.batch, 38), generator=generator)
    positions, labels = torch.full((options.batch, 1), 37), torch.zeros(options.batch, dtype=torch.long)

    def closure() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), ScoredPositions(model, positions):
            logits = model(input_ids=ids, use_cache=False).logits[:, 0, :2]
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    losses, seconds = [], []
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        losses.append(optimizer.step(closure))
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        bytes_sent = optimizer.perturb.bytes_sent // (options.steps + 1) if world > 1 else 0
        queue.put((losses, statistics.median(seconds[1:]), bytes_sent))
    if world > 1:
        dist.destroy_process_group()


def run(world: int, options: argparse.Namespace):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(train, (world, port, options, queue), nprocs=world, join=False)
    while not context.join(timeout=1):
        pass
    return queue.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="train all weights instead of a LoRA adapter")
    parser.add_argument("--num_perturbations", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    one_losses, one_process, _ = run(1, options)
    two_losses, two_processes, bytes_sent = run(2, options)
    assert one_losses == two_losses, "the runs differ"
    weights = "full" if options.full else "LoRA"
    run_name = f"{weights}, P = {options.num_perturbations}, batch {options.batch}"
    print(f"{run_name}: {one_process:.3f} s a step with one process,")
    print(
        f"{two_processes:.3f} s with two: {one_process / two_processes:.2f}x; each sends {bytes_sent} bytes per step "
        "(8 P); same losses to the bit"
    )


if __name__ == "__main__":
    main()
