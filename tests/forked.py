"""Processes forked from one server that has imported everything, so that each costs a second, not ten.

The server imports this module too, which sets up what every process would set up for itself.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

IMPORTED = [
    "matplotlib.pyplot",
    "peft",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "zokernel.cli",
    "zokernel.directions.backends.numba.backend",
    "zokernel.commands.finetune",
    "zokernel.finetune.trainer.zo_trainer",
    "forked",  # prepares what the others have imported
]
IN_SERVER = "ZOKERNEL_TESTS_FORK_SERVER"


def context() -> Any:
    """Return a context of multiprocessing whose processes come from the server; each computes with one thread."""
    server_context = multiprocessing.get_context("forkserver")
    server_context.set_forkserver_preload(IMPORTED)
    # The server has these of its own: numba, for one, does not let a process change its mind about threads.
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", IN_SERVER: "1"}
    with mock.patch.dict(os.environ, PYTHONPATH=paths, **settings):
        forkserver.ensure_running()
    return server_context


def prepare() -> None:
    """Do once, in the server, what every process would do at its first use of numba and of transformers."""
    from numba.core.registry import cpu_target
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    cpu_target.target_context.refresh()
    get_checkpoint_conversion_mapping("llama")
    gc.collect()
    gc.freeze()  # a process's own collections leave alone what the server made


if os.environ.pop(IN_SERVER, None):
    prepare()
