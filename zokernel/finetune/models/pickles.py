"""Pickled weights are never loaded: loading one can run any code."""

from __future__ import annotations

from pathlib import Path

from zokernel.errors import UsageError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def refuse_pickles(folder: str | Path, *, what: str) -> None:
    """Refuse a local folder whose only weights are pickles, which can run any code when loaded.

    Args:
        folder: A model's or adapter's folder; hub ids and folders with safetensors pass.
        what: What it is, for the message.

    Raises:
        UsageError: If it has pickled weights and no others.
    """
    pickles = [path.name for pattern in PICKLES for path in sorted(Path(folder).glob(pattern))]
    pickles = [name for name in pickles if name != "training_args.bin"]
    if pickles and not list(Path(folder).glob("*.safetensors")):
        raise UsageError(
            f"The {what} in {folder} is a pickle ({pickles[0]}), and loading one can run any code: convert it to "
            "safetensors first (save_pretrained writes it) on a machine where that does not matter."
        )
