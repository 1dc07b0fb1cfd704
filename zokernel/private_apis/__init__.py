"""Every private API of torch, transformers, accelerate, trl and the standard library that this package uses, and why.

What such an API does may change in any version, so nothing private is used anywhere else, and each of these has a test
that fails when it is gone or behaves otherwise.  A public API is used wherever all allowed versions have one.

There is one module per dependency.  Functions with a line "Private" in their docstring wrap a private function or
attribute.  Methods of ``Trainer`` that are overridden cannot be wrapped: :data:`TRAINER_HOOKS` lists them.
"""

from zokernel.private_apis.accelerate import cache_no_casts, compile_nothing, deal_batches, synchronise_no_gradients
from zokernel.private_apis.standard_library import exit_at_once, flags_of
from zokernel.private_apis.torch import (
    ModuleState,
    extension_file,
    flatten_and_unflatten,
    keep_in_place,
    note_step,
    shard_offset,
    standard_gamma,
    write_count,
)
from zokernel.private_apis.transformers import (
    SAVE_MODEL,
    TRAINER_HOOKS,
    Hook,
    attention_implementation,
    converts_weights,
    full_precision_suffixes,
    loop_sums,
    offloaded_parameter,
    repeated_blocks,
    set_loop_sums,
    set_train_batch_size,
    use_one_gpu,
)
from zokernel.private_apis.trl import count_tokens_once, set_trl_metrics, trl_metrics, trl_token_count

TESTED_VERSIONS = {
    "torch": ("2.11.0", "2.13.0"),
    "transformers": ("5.6.2", "5.23.0"),
    "accelerate": ("1.10.0", "1.15.0"),
    "peft": ("0.18.0", "0.21.2"),
    "trl": ("1.16.0", "1.16.0"),
}
"""The oldest and the newest version of each dependency that the tests of these APIs passed with."""

__all__ = [
    "SAVE_MODEL",
    "TESTED_VERSIONS",
    "TRAINER_HOOKS",
    "Hook",
    "ModuleState",
    "attention_implementation",
    "cache_no_casts",
    "compile_nothing",
    "converts_weights",
    "count_tokens_once",
    "deal_batches",
    "exit_at_once",
    "extension_file",
    "flags_of",
    "flatten_and_unflatten",
    "full_precision_suffixes",
    "keep_in_place",
    "loop_sums",
    "note_step",
    "offloaded_parameter",
    "repeated_blocks",
    "set_loop_sums",
    "set_train_batch_size",
    "set_trl_metrics",
    "shard_offset",
    "standard_gamma",
    "synchronise_no_gradients",
    "trl_metrics",
    "trl_token_count",
    "use_one_gpu",
    "write_count",
]
