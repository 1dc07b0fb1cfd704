"""Take the losses of a run in a pool of worker processes, one of which is killed on the way.

python examples/worker_pool.py --workers 3 --steps 60

A worker holds the base weights and reads the run's journal; it is sent two integers and answers with a loss.
"""

import argparse
import json
import queue
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import zokernel as zk
from zokernel.journal import Journal, ToldJournal, make_header, replay_, weights_sha256
from zokernel.journal.replay import replay_steps

LR, OPTIONS = 0.02, {"eps": 1e-3, "num_perturbations": 4, "momentum": 0.5, "perturb": "in_place:copy"}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 4))


class Loss:
    """The loss of a step's batch at any weights: a function of the step, so that every process takes the same."""

    def __init__(self):
        torch.set_num_threads(1)  # sums in the same order in every process
        self.model = network()
        self.teacher = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))

    def __call__(self, weights: dict[str, torch.Tensor], step: int) -> float:
        """Return the loss."""
        inputs = torch.randn(256, 32, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            logits = torch.func.functional_call(self.model, weights, inputs)
            return nn.functional.cross_entropy(logits, (inputs @ self.teacher).argmax(1)).item()


def work(folder: str) -> None:
    """Answer every point on standard input with its loss: this is all that a worker does."""
    loss = Loss()
    optimizer = replay_(load_file(Path(folder) / "base.safetensors"), Journal.read(folder))
    for line in sys.stdin:
        step, index = json.loads(line)
        if step > optimizer.step_count:
            replay_steps(optimizer, Journal.read(folder).steps[optimizer.step_count :])
        print(loss(optimizer.weights_at((step, index)), step), flush=True)


class Worker:
    """A worker process, as the coordinator sees it."""

    def __init__(self, folder: str):
        command = [sys.executable, __file__, "--work", folder]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, point: zk.optim.Point) -> float | None:
        """Return the loss at a point; None if the worker dies over it."""
        try:
            self.process.stdin.write(json.dumps(point) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return float(answer) if answer.endswith("\n") else None


def main(workers: int = 3, steps: int = 60, folder: str = "") -> dict:
    folder = folder or tempfile.mkdtemp()
    torch.manual_seed(0)
    model = network()
    base = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    save_file(base, Path(folder) / "base.safetensors")
    optimizer = zk.optim.MeZO(model, LR, **OPTIONS)
    header = make_header(optimizer, "mezo", OPTIONS, base_sha256=weights_sha256(base))
    journal = ToldJournal(Path(folder) / "journal.zkj", optimizer, header)  # or goes on where it ended

    pool: queue.Queue[Worker] = queue.Queue()
    started = [Worker(folder) for _ in range(workers)]
    for worker in started:
        pool.put(worker)
    lost: list[zk.optim.Point] = []

    def evaluate(point: zk.optim.Point) -> tuple[zk.optim.Point, float | None]:
        worker = pool.get()
        if point == (steps // 2, 1) and not lost:
            worker.process.kill()
        loss = worker(point)
        if loss is None:
            lost.append(point)
            if len(lost) > 3 * workers:
                raise SystemExit(f"{len(lost)} workers died: look at what they wrote above.")
            started.append(worker := Worker(folder))
        pool.put(worker)
        return point, loss

    with ThreadPoolExecutor(workers) as threads:
        while optimizer.step_count < steps:
            sent = [threads.submit(evaluate, point) for point in optimizer.ask()]  # those that were lost come again
            for future in as_completed(sent):
                point, loss = future.result()
                if loss is not None:
                    journal.tell({point: loss})
    for worker in started:
        worker.process.stdin.close()
        worker.process.wait()
    journal.close()

    loss, alone = Loss(), network()
    alone.load_state_dict(base)
    single = zk.optim.MeZO(alone, LR, **OPTIONS)
    for step in range(steps):
        single.step(lambda step=step: loss(dict(alone.named_parameters()), step))
    equal = all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters()))
    first, last = (loss(weights, steps) for weights in (base, dict(model.named_parameters())))
    print(f"loss {first:.3f} -> {last:.3f}; killed over {lost}; equal to one process to the bit: {equal}")
    return {"loss": (first, last), "lost": lost, "started": len(started), "equal": equal}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", default="", help="holds the base and the journal; a new one if not given")
    parser.add_argument("--work", metavar="FOLDER", help="be a worker of the run in this folder")
    arguments = vars(parser.parse_args())
    if folder := arguments.pop("work"):
        work(folder)
    else:
        main(**arguments)
