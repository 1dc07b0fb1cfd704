"""Scripts in processes of their own, forked from a server that has imported torch but nothing that reads our settings.

transformers, the hub's libraries and zokernel are imported by every process itself, with the environment, the folder
and the streams that it is given: what they say, read and leave is that of a fresh process.  It starts in three seconds
instead of nine.  A test of how long imports take, of what they load, or of the first lines of all needs a fresh one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

IMPORTED = (
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "numba", "pandas", "PIL.Image", "pyarrow.compute"),
    *("scipy.optimize", "sympy", "torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.fsdp"),
    *("torch.distributed.checkpoint", "torch.distributed.tensor", "triton", "yaml"),
)
LONGEST = 240  # seconds that a process may take
SETTINGS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "NUMBA_NUM_THREADS": "1"}


def run(
    words: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    standard_input: str = "",
    standard_output: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Python on a script, as ``subprocess.run`` does.

    Args:
        words: The path of a script, or ``-m`` and the name of a module, then its arguments.
        environment: All variables of the process.
        folder: Its working folder.
        standard_input: What it reads.
        standard_output: A file or a pipe with a name that it writes to, instead of what is returned.

    Returns:
        Its exit code, output and errors.
    """
    with tempfile.TemporaryDirectory() as name:
        streams = [Path(name) / stream for stream in ("input", "output", "errors")]
        streams[0].write_text(standard_input)
        paths = [streams[0], standard_output or streams[1], streams[2]]
        job = {
            "words": list(words),
            "environment": dict(environment),
            "folder": str(folder),
            "paths": [*map(str, paths)],
        }
        code = _server().ask(job)
        output, errors = (path.read_text() if path.exists() else "" for path in streams[1:])
    return subprocess.CompletedProcess(list(words), code, output, errors)


class Server:
    """The server of this process, which ends with it."""

    def __init__(self) -> None:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], env=os.environ | SETTINGS, **pipes)
        atexit.register(self.stop)

    def ask(self, job: dict[str, Any]) -> int:
        """Return the exit code of a process; a server that was not waited for is not asked again."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], LONGEST)[0]:
                raise TimeoutError(f"{job['words']} had not ended after {LONGEST} seconds")
            return int(self.process.stdout.readline())
        except BaseException:
            self.process.kill()
            _server.cache_clear()
            raise

    def stop(self) -> None:
        self.process.communicate()


_server = cache(Server)


def serve(jobs: IO[str], answers: IO[str]) -> list[str]:
    """Fork a process for every line of ``jobs`` and answer with its exit code; return its words in the process."""
    for line in iter(jobs.readline, ""):
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            become(job)
            return job["words"]
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.write(f"{code}\n")
        answers.flush()
    return []


def become(job: dict[str, Any]) -> None:
    """Take over the environment, the folder and the streams of a job."""
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    for number, (path, flags) in enumerate(zip(job["paths"], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        opened = os.open(path, flags | (os.O_CREAT if flags else 0), 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)


def execute(words: list[str]) -> int:
    """Do what Python does with these words, and return its exit code."""
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    sys.path[0] = os.getcwd() if module else str(Path(words[0]).resolve().parent)
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(code: int) -> None:
    """End the process without taking apart, for seconds, the modules that it shares with the server."""
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        traceback.print_exc()
        code = 120  # as Python
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    words = serve(sys.stdin, sys.stdout)
    if words:
        end(execute(words))
