"""Which weights a run begins with, told from samples of the model's files: before it is loaded, at no cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from zokernel.finetune.models.check import CheckedModel
from zokernel.finetune.models.model_files import stored_tensors, weight_files
from zokernel.journal.hashes import SAMPLE

STARTING_WEIGHTS = "starting_weights"
_PARTS = 1024  # of a GGUF file, whose tensors are not told apart


def starting_weights(model: CheckedModel) -> dict[str, str]:
    """Return what tells the weights that a run begins with from others, for its record.

    Args:
        model: The model, not yet loaded.

    Returns:
        A hash under :data:`STARTING_WEIGHTS`; nothing if the model is on the hub, where its revision names it.
    """
    folder, adapter = Path(model.path), Path(model.arguments.adapter_name_or_path or "-").expanduser()
    if not folder.is_dir():
        return {}
    gguf = model.arguments.gguf_file
    digests = [stored_sha256([folder / gguf] if gguf else weight_files(folder))]
    if adapter.is_dir():
        digests.append(stored_sha256(sorted(adapter.glob("*.safetensors"))))
    return {STARTING_WEIGHTS: f"sha256 {' and '.join(digest[:16] for digest in digests)}"}


def stored_sha256(files: Iterable[Path]) -> str:
    """Return a SHA-256 over names, types, shapes, and the first and last 4096 bytes of all tensors in files.

    Equal tensors are equal, however many ``.safetensors`` files they are in.  Files of other kinds count as 1024 parts.

    Args:
        files: The files, of which a few kilobytes per tensor are read.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "model.safetensors"
        ...     save_file({"w": torch.zeros(9999)}, file)
        ...     before = stored_sha256([file])
        ...     save_file({"w": torch.ones(9999)}, file)
        ...     stored_sha256([file]) == before
        False
    """
    total, tensors = hashlib.sha256(), []
    for file in files:
        with file.open("rb", buffering=0) as opened:
            for name, begin, end in _tensors(file) if file.suffix == ".safetensors" else _parts(file):
                ends = b""
                for at in (begin, max(begin, end - SAMPLE)):
                    opened.seek(at)
                    ends += opened.read(min(SAMPLE, end - begin))
                tensors.append((name, ends))
    for name, ends in sorted(tensors):
        total.update(f"{name}\n".encode() + hashlib.sha256(ends).digest())
    return total.hexdigest()


def _tensors(file: Path) -> Iterator[tuple[str, int, int]]:
    """Return name, type and shape of each tensor of a ``.safetensors`` file as one text, and where its bytes lie."""
    tensors, start = stored_tensors(file)
    for name, entry in tensors.items():
        begin, end = entry["data_offsets"]
        yield f"{name} {entry['dtype']} {entry['shape']}", start + begin, start + end


def _parts(file: Path) -> Iterator[tuple[str, int, int]]:
    """Return equal parts of a file in the same form."""
    size = file.stat().st_size
    for part in range(_PARTS):
        yield f"{part} of {size} bytes", size * part // _PARTS, size * (part + 1) // _PARTS
