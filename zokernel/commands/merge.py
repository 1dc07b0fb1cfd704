"""Merge a trained adapter into its base, and save a plain transformers model.

zokernel merge --model runs/lora --output_dir merged
zokernel merge --model runs/lora --base models/mine --output_dir merged
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zokernel._version import __version__
from zokernel.commands.loading import add_loading_flags
from zokernel.commands.saving import check_new_folder, saved_whole
from zokernel.errors import UsageError
from zokernel.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``zokernel merge``."""
    parser.add_argument("--model", required=True, help="the adapter: the output_dir of a run, or any peft folder")
    parser.add_argument("--output_dir", required=True, type=Path, help="where the merged model goes")
    parser.add_argument("--base", help="the model it was trained on (default: what the adapter names)")
    parser.add_argument("--dtype", help="storage of the merged weights (default: the run's, else float32)")
    add_loading_flags(parser, what="the base", default="that of the run")


def main(args: argparse.Namespace) -> int:
    """Carry out ``zokernel merge`` and return the exit code."""
    # transformers takes seconds to load, and --help needs none of it.
    from zokernel.commands.messages import quiet_transformers
    from zokernel.finetune.models.adapters import attach_adapter
    from zokernel.finetune.models.check import check_model
    from zokernel.finetune.models.load import load_pretrained
    from zokernel.finetune.models.merge import merge
    from zokernel.finetune.models.revision import with_revision
    from zokernel.finetune.models.same_base import other_base
    from zokernel.finetune.models.saved_adapter import MERGED_FILE, base_name, is_adapter, recorded_settings
    from zokernel.finetune.predictor_record import copy_record
    from zokernel.finetune.settings.arguments import ModelArguments

    quiet_transformers()
    folder = args.output_dir
    check_new_folder(folder)
    dtype = args.dtype or recorded_settings(Path(args.model).expanduser()).get("dtype", "float32")
    if args.base is not None:
        names = {"model_name_or_path": args.base, "adapter_name_or_path": args.model}
    elif Path(args.model).is_dir() and not is_adapter(args.model):
        raise UsageError(f"{args.model} holds no adapter: give the folder of a run with --lora true.")
    else:
        names = {"model_name_or_path": args.model}
    arguments = ModelArguments(**names, dtype=dtype, merge_adapter=True, trust_remote_code=args.trust_remote_code)
    checked = check_model(with_revision(arguments, args.model_revision))
    adapted = attach_adapter(load_pretrained(checked, checked.arguments), checked.arguments)
    arguments = checked.arguments
    base, adapter = arguments.model_name_or_path, str(arguments.adapter_name_or_path)
    if difference := other_base(adapted, adapter, base):
        raise UsageError(
            f"{base} is not the model that the adapter {adapter} was trained on ({difference}): give that one as "
            "--base."
        )
    model = merge(adapted)
    with saved_whole(folder) as scratch:
        model.save_pretrained(scratch)
        checked.tokenizer.save_pretrained(scratch)
        copy_record(adapter, scratch, arguments)
        write_json(scratch / MERGED_FILE, {"zokernel": __version__, "base": base_name(base)})
    print(f"Saved in {folder}: {base} with {args.model} merged into it.")
    return 0
