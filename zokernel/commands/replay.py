"""Rebuild the weights of any step of a run from base and journal; save them as a model or an adapter.

zokernel replay --base smollm2 --journal runs/mine --output_dir rebuilt
zokernel replay --base smollm2 --journal runs/mine --output_dir rebuilt --step 500
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zokernel.commands.loading import add_loading_flags, loading_arguments
from zokernel.commands.parser import add_switch
from zokernel.commands.saving import check_new_folder, saved_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``zokernel replay``."""
    parser.add_argument("--base", required=True, help="what the run started from: a folder, 'smollm2' or a hub id")
    parser.add_argument("--journal", required=True, type=Path, help="a .zkj file, or the output_dir of the run")
    parser.add_argument("--output_dir", required=True, type=Path, help="where the model or adapter goes")
    parser.add_argument("--step", type=int, help="after how many steps (default: all)")
    add_loading_flags(parser, what="the base", default="that of the run")
    add_switch(parser, "--allow_other_backend", help="accept last bits rounded by another backend or processor")


def main(args: argparse.Namespace) -> int:
    """Carry out ``zokernel replay`` and return the exit code."""
    # transformers takes seconds to load, and --help needs none of it.
    from zokernel.commands.messages import quiet_transformers
    from zokernel.finetune.storage.replay import load_base, load_tokenizer_of_base
    from zokernel.journal import Journal, replay_

    quiet_transformers()
    check_new_folder(args.output_dir)
    journal, folder = Journal.read(args.journal), args.output_dir
    loading = loading_arguments(args)
    model = load_base(args.base, journal, **loading)
    tokenizer = load_tokenizer_of_base(args.base, journal, **loading)
    optimizer = replay_(
        dict(model.named_parameters()), journal, step=args.step, allow_other_backend=args.allow_other_backend
    )
    with saved_whole(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    what = "adapter" if hasattr(model, "peft_config") else "model"
    print(f"Saved in {folder}: the {what} after step {optimizer.step_count} of {journal.num_steps}.")
    return 0
