"""What a model's folder holds: whether its files are whole, and how many bytes its weights take."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zokernel.data.decode import LFS_POINTER
from zokernel.errors import UsageError, first_line
from zokernel.files import read_json
from zokernel.finetune.run_files import RUN_FILE, run_folders

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def check_folder(folder: Path) -> None:
    """Check a local model's configuration and files before anything is read from them.

    Args:
        folder: The model's folder.

    Raises:
        UsageError: If it is a file, holds no model, or its files are pointers, cut off or missing.
    """
    if folder.is_file():
        hint = "a GGUF file is not read" if folder.suffix.lower() == ".gguf" else "it stays beside its config.json"
        raise UsageError(f"{folder} is a file: give the folder that holds the model ({hint}).")
    for file in sorted(folder.glob("*")):
        if file.is_file() and is_pointer(file):
            raise UsageError(
                f"{file} is a git-lfs pointer, not the file itself: run 'git lfs install' and 'git lfs pull' there."
            )
    config = folder / CONFIG
    if not config.exists():
        is_lost = is_run(folder) and any(folder.glob("*.safetensors"))
        advice = remedy(folder) if is_lost else "give a folder written by save_pretrained, or a hub id"
        raise UsageError(f"{folder} {_describe_contents(folder)}: {advice}.")
    settings = _read_json(config)
    if not isinstance(settings, dict) or not settings.get("model_type"):
        raise UsageError(f"{config} names no model_type, so it is not a model of transformers.")
    for file in weight_files(folder):
        check_weights(file)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a model's weights.

    Args:
        folder: A folder with a model.

    Raises:
        UsageError: If there are none, or the index names one that is missing.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        index = _read_json(folder / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names:
            raise UsageError(f"{folder / INDEX} does not say which file holds which weights: {remedy(folder)}.")
        files = [folder / name for name in sorted(set(names.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise UsageError(
                f"{folder} lacks {missing[0]}, which its index names ({len(missing)} of {len(files)} files are "
                f"missing): {remedy(folder) if is_run(folder) else 'download them'}."
            )
        return files
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    raise UsageError(
        f"{folder} holds no {WEIGHTS}"
        + (f", only {', '.join(others[:3])}" if others else ", so no weights")
        + (
            f": {remedy(folder)}."
            if is_run(folder)
            else ": download them, or write the model again with save_pretrained."
        )
    )


def check_weights(file: Path) -> None:
    """Check that a ``.safetensors`` file is whole.

    Raises:
        UsageError: If it is not.
    """
    if error := reading_error(file):
        raise UsageError(
            f"{file}, {file.stat().st_size:,} bytes long, is damaged or cut off ({first_line(error)}): "
            f"{remedy(file.parent)}."
        ) from error


def reading_error(file: Path) -> Exception | None:
    """Return why a ``.safetensors`` file cannot be read; None if it is whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            return None
    except (SafetensorError, OSError) as error:
        return error


def is_pointer(file: Path) -> bool:
    """Return whether git-lfs left a few lines of text in place of a file."""
    with file.open("rb") as opened:
        return opened.read(len(LFS_POINTER)) == LFS_POINTER


def tensor_types(files: Iterable[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of every tensor in ``.safetensors`` files by name, as their headers give them."""
    from safetensors import safe_open

    types = {}
    for file in files:
        with safe_open(file, "pt") as archive:
            for name in archive.keys():  # noqa: SIM118 (not a dictionary)
                part = archive.get_slice(name)
                types[name] = (str(part.get_dtype()), tuple(part.get_shape()))
    return types


def sort_metadata_(file: Path) -> None:
    """Sort the metadata of a ``.safetensors`` file by name, so that equal tensors with equal metadata are equal files.

    The library writes the tensors in one order, and the metadata in an order of chance.

    Args:
        file: The file, whose header is replaced by one of the same length.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> names, contents = [str(number) for number in range(9)], set()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for _ in range(9):
        ...         save_file({"w": torch.ones(2)}, file := Path(folder) / "w.safetensors", dict.fromkeys(names, "it"))
        ...         sort_metadata_(file)
        ...         contents.add(file.read_bytes())
        >>> len(contents)
        1
    """
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        metadata = header.pop("__metadata__", None)
        if not metadata:
            return
        sorted_header = {"__metadata__": dict(sorted(metadata.items()))} | header
        text = json.dumps(sorted_header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            opened.seek(8)
            opened.write(text)


def stored_tensors(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return what the header of a ``.safetensors`` file says of each tensor, and where the bytes of the first begin.

    Raises:
        UsageError: If the file is damaged or cut off.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(length))
        except ValueError:
            check_weights(file)
            raise
    header.pop("__metadata__", None)
    return header, 8 + length


def stored_bytes(tensors: Iterable[tuple[str, tuple[int, ...]]], itemsize: int) -> int:
    """Return how many bytes stored tensors take when loaded.

    Args:
        tensors: Type and shape of each.
        itemsize: Bytes of a number of those that are not quantized, whose type is chosen when they are loaded.

    Example:
        >>> stored_bytes([("U8", (100, 1)), ("BF16", (10,))], itemsize=4)
        140
    """
    total = 0
    for kind, shape in tensors:
        count = 1
        for length in shape:
            count *= length
        bits = int(re.search(r"\d+", kind + " 8").group())  # type: ignore[union-attr]
        chosen = kind in ("F64", "F32", "F16", "BF16")
        total += count * (itemsize if chosen else -(-bits // 8))
    return total


def _read_json(file: Path) -> Any:
    return read_json(file, advice=remedy(file.parent))


def remedy(folder: Path) -> str:
    """Return how a file of a model comes back that is damaged or missing, as a clause."""
    if not is_run(folder):
        return "download it again"
    if len(run_folders(folder)) > 1:  # a checkpoint, which is written once
        return "give the folder of the run, or another of its checkpoints"
    return "repeat the command of the run, which writes it again"


def is_run(folder: Path) -> bool:
    """Return whether a run of zokernel trained the model."""
    return any((place / RUN_FILE).is_file() for place in run_folders(folder))


def _describe_contents(folder: Path) -> str:
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if not names:
        return "is an empty folder"
    if ADAPTER in names:
        return f"holds an adapter, but no {ADAPTER_CONFIG}"
    if any(name.endswith(".safetensors") for name in names):
        return f"holds weights, but no {CONFIG}"
    checkpoints = sorted((n for n in names if re.fullmatch(r"checkpoint-\d+", n)), key=lambda n: int(n[11:]))
    if checkpoints:
        return f"holds no {CONFIG}, but checkpoints of a run ({folder / checkpoints[-1]} is the last)"
    if any(name.startswith("tokenizer") for name in names):
        return "holds a tokenizer, but no model"
    return f"holds no model (no {CONFIG})"
