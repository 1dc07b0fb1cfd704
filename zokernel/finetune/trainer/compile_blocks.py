r"""``--torch_compile``: the repeated blocks of the model are compiled, and nothing else.

Blocks have the same code, so they share one compiled graph, which takes seconds where the unrolled model takes minutes.
The weights are inputs of the graph: moving them in place needs no new one.  The LM head stays outside, since it sees
other positions and other rows in every batch.

``--torch_compile_mode reduce-overhead`` replays CUDA graphs of the blocks on a GPU, one for each block and shape.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from zokernel.errors import UsageError
from zokernel.private_apis import repeated_blocks

logger = logging.getLogger(__name__)


def compile_blocks(model: nn.Module, *, backend: str = "inductor", mode: str | None = None) -> int:
    """Compile the blocks of a model of transformers in place: names, weights and class stay as they are.

    Args:
        model: The model, or a peft wrapper of one.
        backend: Backend of ``torch.compile``.
        mode: Mode of ``torch.compile``.

    Returns:
        How many modules were compiled.

    Raises:
        UsageError: If the model does not say which of its modules are repeated.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
        >>> compile_blocks(LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)), backend="eager")
        3
    """
    kinds = repeated_blocks(model)
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise UsageError(f"{type(model).__name__} names no repeated blocks to compile: leave out torch_compile.")
    for block in blocks:
        block.compile(backend=backend, mode=mode)
    if mode is not None:
        # The graphs of one forward share memory, which they may overwrite in the next one and not before.
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    logger.info("Compiled on their first forwards: %d x %s.", len(blocks), ", ".join(sorted(kinds)))
    return len(blocks)
