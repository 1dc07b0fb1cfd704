"""Kill a real fine-tuning run with SIGKILL at random instants, repeat the command, compare with an uninterrupted run.

    python benchmarks/kills.py --kills 3 --steps 20

Prints where each kill struck, whether the weights end bit-identical, the size of the journal and the cost of keeping
and of replaying it.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(folder: Path, args: argparse.Namespace) -> list[str]:
    return [
        *(sys.executable, "-m", "zokernel", "finetune", "--output_dir", str(folder)),
        *("--dataset_name", "movie-reviews", "--task", "movie-reviews", "--method", args.method),
        *("--max_steps", str(args.steps), "--per_device_train_batch_size", "4", "--max_length", "128"),
        *("--max_eval_samples", "16", "--max_test_samples", "16", "--eval_steps", str(max(1, args.steps // 2))),
        *("--save_strategy", args.save_strategy, "--load_best_model_at_end", "false", "--disable_tqdm", "true"),
    ]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--method", default="mezo")
    parser.add_argument("--save_strategy", default="journal", help="journal, steps or best")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    instants = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        start = time.perf_counter()
        subprocess.run(command(whole, args), check=True, capture_output=True)
        duration = time.perf_counter() - start
        print(f"uninterrupted: {args.steps} steps in {duration:.0f} s")
        for number in range(args.kills):
            # Some time after some step, each later than the last kill's: a process must be killed at work.
            step = round(args.steps * (number + instants.random()) / args.kills)
            pause = instants.uniform(0, 0.5) * duration / args.steps
            process = subprocess.Popen(command(killed, args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while steps_in(killed) < step and process.poll() is None:
                time.sleep(0.05)
            time.sleep(pause)
            process.kill()
            struck = process.wait() == -signal.SIGKILL
            print(
                f"kill {number + 1}: {'struck' if struck else 'too late'} with {steps_in(killed)} steps in the journal"
            )
        start = time.perf_counter()
        subprocess.run(command(killed, args), check=True, capture_output=True)
        print(f"continued to the end in {time.perf_counter() - start:.0f} s")
        same = sha256(whole / "model.safetensors") == sha256(killed / "model.safetensors")
        print(f"weights bit-identical: {same}")
        measure(whole)
        shutil.rmtree(scratch, ignore_errors=True)
    sys.exit(0 if same else 1)


def steps_in(folder: Path) -> int:
    from zokernel.journal import Journal

    return Journal.read(folder).num_steps if (folder / "journal.zkj").exists() else 0


def measure(folder: Path) -> None:
    """Print sizes, and the time of replay against that of the run's steps."""
    import json

    from zokernel.finetune import replay
    from zokernel.journal import Journal, JournalWriter
    from zokernel.journal.format import encode

    journal = Journal.read(folder)
    model = (folder / "model.safetensors").stat().st_size
    record = len(encode(journal.steps[0])) + 8
    print(f"journal: {journal.size:,} bytes, {record} of them a step; model: {model:,} bytes")
    start = time.perf_counter()
    replay("smollm2", journal)
    seconds = json.loads((folder / "metrics.json").read_text())["train_seconds"]
    print(f"replay with loading and hashing: {time.perf_counter() - start:.1f} s; the run's steps: {seconds:.1f} s")
    writer = JournalWriter.create(folder / "timing.zkj", {})
    for kind, sync in (("without", False), ("with", True)):
        start = time.perf_counter()
        for _ in range(200):
            writer.append(journal.steps[0])
            if sync:
                writer.sync()
        print(f"append {kind} a sync each: {(time.perf_counter() - start) / 200 * 1e6:.0f} microseconds")
    writer.close()


if __name__ == "__main__":
    main()
