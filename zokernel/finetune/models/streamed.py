"""Loading a model whose weights stay in files (``--offload disk``): built without weights, then given mapped ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.errors import UsageError
from zokernel.finetune.models.kind import auto_class
from zokernel.finetune.models.loaded import check_complete, stop_rescaling_
from zokernel.finetune.models.stored import weight_files
from zokernel.offload.blocks import Blocks, Unit, find_units
from zokernel.offload.mapping import MappedFile
from zokernel.offload.working_copy import WorkingCopy
from zokernel.private_apis import converts_weights, offloaded_parameter

_DTYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}


class Stored:
    """The tensors of a model's files, mapped.

    Args:
        folder: The folder that holds them.
    """

    def __init__(self, folder: Path):
        self.entries: dict[str, tuple[MappedFile, int, dict[str, Any]]] = {}
        told = hashlib.sha256()
        for path in weight_files(folder):
            file, status = MappedFile(path), path.stat()
            told.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
            with path.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            self.entries |= {key: (file, 8 + length, entry) for key, entry in header.items()}
        self.identity = told.hexdigest()

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self.entries[key][2]["shape"])

    def span(self, key: str) -> tuple[MappedFile, int, int]:
        """Return a tensor's file, and where in it the tensor begins and ends."""
        file, start, entry = self.entries[key]
        begin, end = entry["data_offsets"]
        return file, start + begin, start + end

    def tensor(self, key: str) -> Tensor:
        """Return a tensor, as it is stored."""
        file, begin, _ = self.span(key)
        kind = self.entries[key][2]["dtype"]
        if kind not in _DTYPES:
            raise UsageError(f"{key} is stored as {kind}, which is not streamed: leave out --offload.")
        return file.tensor(begin, self.shape(key), _DTYPES[kind])

    def fits(self, key: str, dtype: torch.dtype) -> bool:
        """Whether a tensor can be used where it is: it has this type, and its address is a multiple of its size."""
        file, begin, _ = self.span(key)
        return _DTYPES.get(self.entries[key][2]["dtype"]) == dtype and (file.address + begin) % dtype.itemsize == 0


class Converted:
    """Weights that transformers stores in another form than it computes with: the experts of Mixtral, one by one.

    It converts them a few at a time, into files of their own, when the first one is asked for.

    Args:
        kind: Class of the model.
        folder: Where its files are.
        dtype: Type of the weights.
        scratch: Where the files may be for a while.
    """

    def __init__(self, kind: Any, folder: Path, dtype: torch.dtype, scratch: Path):
        self._kind, self._folder, self._dtype, self._scratch = kind, folder, dtype, scratch / "converted"
        self._model: Any = None

    def __call__(self, name: str) -> Tensor:
        """Return a weight by its name in the model."""
        if self._model is None:
            self._model = self._kind.from_pretrained(
                self._folder,
                dtype=self._dtype,
                device_map={"": "disk"},
                offload_folder=str(self._scratch),
                use_safetensors=True,
            )
        return offloaded_parameter(self._model, name)

    def __enter__(self) -> Converted:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._model = None
        shutil.rmtree(self._scratch, ignore_errors=True)


def load_streamed(
    architecture: Any,
    folder: Path,
    dtype: torch.dtype,
    *,
    kind: Any,
    offload_dir: Path,
    trains_weights: bool,
    name: str,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Build a model on mapped files; its blocks are found by ``streamed_blocks``.

    Args:
        architecture: Its configuration.
        folder: Where its files are.
        dtype: Type in which the weights are held; files of another type are converted once, into ``offload_dir``.
        kind: Which kind of language model it is.
        offload_dir: Where working copies are kept.
        trains_weights: Whether the weights themselves are trained, not only an adapter.
        name: What the user calls the model.
        attn_implementation: Attention to use.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The model, in evaluation mode.

    Raises:
        UsageError: If its weights are not all in its files, or cannot be streamed.
    """
    from accelerate import init_empty_weights

    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with init_empty_weights(include_buffers=False):
        model: Any = auto_class(kind).from_config(
            architecture, dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
    model.tie_weights()
    if getattr(architecture, "quantization_config", None) is not None:
        raise UsageError(f"{name} is quantized, and quantized weights are not streamed: leave out --offload.")
    stored = Stored(folder)
    units = find_units(model)
    converts = converts_weights(model)
    keys = {} if converts else _stored_names(model, stored, name)
    direct = not (converts or trains_weights) and all(stored.fits(key, dtype) for key in keys.values())
    copy = None if direct else WorkingCopy(offload_dir, f"{stored.identity} {dtype} {type(model).__name__}")
    with Converted(type(model), folder, dtype, offload_dir) as converted:
        for unit in units:
            if copy is None:
                unit.tensors = {own: stored.tensor(keys[own]) for own in unit.names}
                unit.parts = _merged([stored.span(keys[own]) for own in unit.names])
            else:
                shapes = {own: tuple(model.get_parameter(own).shape) for own in unit.names}
                copy.place(unit, shapes, converted if converts else lambda own: stored.tensor(keys[own]), dtype)
    _assign(model, units)
    for key, buffer in model.named_buffers():
        if key in stored.entries:
            buffer.copy_(stored.tensor(key))
    model.working_copy = copy if trains_weights else None
    model.name_or_path = model.config.name_or_path = str(folder)
    stop_rescaling_(model)
    Blocks(model, units)
    return model.eval()


def _stored_names(model: Any, stored: Stored, name: str) -> dict[str, str]:
    """Return the name in the files of every parameter; tied ones need be there only once."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    found: dict[int, str] = {}
    used = set()
    wrong = []
    for own, parameter in parameters.items():
        for key in (own, own.removeprefix(prefix), prefix + own):
            if key in stored.entries:
                used.add(key)
                found.setdefault(id(parameter), key)
                if stored.shape(key) != tuple(parameter.shape):
                    wrong.append((own, stored.shape(key), tuple(parameter.shape)))
                break
    missing = [own for own, parameter in parameters.items() if id(parameter) not in found]
    buffers = {key for key, _ in model.named_buffers()}
    report = {
        "mismatched_keys": wrong,
        "missing_keys": missing,
        "unexpected_keys": stored.entries.keys() - used - buffers,
    }
    check_complete(model, report, name)
    return {own: found[id(parameter)] for own, parameter in parameters.items()}


def _assign(model: nn.Module, units: list[Unit]) -> None:
    """Put the mapped tensors of units in place of a model's parameters; tied ones stay one parameter."""
    empty = dict(model.named_parameters(remove_duplicate=False))
    made = {
        id(empty[own]): nn.Parameter(tensor, requires_grad=empty[own].requires_grad)
        for unit in units
        for own, tensor in unit.tensors.items()
    }
    for own, parameter in empty.items():
        owner, _, attribute = own.rpartition(".")
        setattr(model.get_submodule(owner), attribute, made[id(parameter)])
    for unit in units:
        unit.tensors = {own: made[id(empty[own])] for own in unit.tensors}


def _merged(spans: list[tuple[MappedFile, int, int]]) -> list[tuple[MappedFile, int, int]]:
    """Return stretches of files, those that lie one after the other as one."""
    found: list[tuple[MappedFile, int, int]] = []
    for file, begin, end in sorted(spans, key=lambda span: (span[0].address, span[1])):
        if found and found[-1][0] is file and found[-1][2] == begin:
            found[-1] = (file, found[-1][1], end)
        else:
            found.append((file, begin, end))
    return found
