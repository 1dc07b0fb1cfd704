"""Loading a model whose weights are streamed (``--offload``): built without weights, then given those of a store."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from zokernel.errors import UsageError
from zokernel.finetune.models.kind import auto_class
from zokernel.finetune.models.loaded import check_complete, stop_rescaling_
from zokernel.finetune.models.stored import stored_tensors, weight_files
from zokernel.offload.base_files import base_file
from zokernel.offload.blocks import Blocks
from zokernel.offload.mapping import MappedFile
from zokernel.offload.replayed import Replayed
from zokernel.offload.staged import Staged
from zokernel.offload.store import Files, Memory, Span
from zokernel.offload.units import Unit, find_units
from zokernel.offload.working_copy import WorkingCopy
from zokernel.private_apis import converts_weights, keep_in_place, offloaded_parameter

_DTYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}


class Stored:
    """The tensors of a model's files, mapped.

    Args:
        folder: The folder that holds them.
    """

    def __init__(self, folder: Path):
        self.entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        self._mapped: dict[Path, MappedFile] = {}
        told = hashlib.sha256()
        for path in weight_files(folder):
            status = path.stat()
            told.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
            tensors, start = stored_tensors(path)
            self.entries |= {key: (path, start, entry) for key, entry in tensors.items()}
        self.identity = told.hexdigest()

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self.entries[key][2]["shape"])

    def span(self, key: str) -> Span:
        """Return where a tensor is."""
        path, start, entry = self.entries[key]
        if entry["dtype"] not in _DTYPES:
            raise UsageError(f"{key} is stored as {entry['dtype']}, which is not streamed: leave out --offload.")
        return Span(path, start + entry["data_offsets"][0], self.shape(key), _DTYPES[entry["dtype"]])

    def tensor(self, key: str) -> Tensor:
        """Return a tensor, as it is stored."""
        span = self.span(key)
        if span.path not in self._mapped:
            self._mapped[span.path] = MappedFile(span.path)
        return self._mapped[span.path].tensor(span.begin, span.shape, span.dtype)

    def read(self, key: str) -> Tensor:
        """Return a copy of a tensor, of whatever type."""
        with safe_open(self.entries[key][0], framework="pt") as file:
            return file.get_tensor(key)

    def fits(self, key: str, dtype: torch.dtype) -> bool:
        """Whether a tensor can be used where it is: it has this type, and its place is a multiple of its size."""
        _, start, entry = self.entries[key]
        begin = start + entry["data_offsets"][0]
        return _DTYPES.get(entry["dtype"]) == dtype and begin % dtype.itemsize == 0


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
    where: str = "disk",
    updates: str = "disk",
    device: torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Build a model whose weights are in a store; its blocks are found by ``streamed_blocks``.

    Args:
        architecture: Its configuration.
        folder: Where its files are.
        dtype: Type in which the weights are held; files of another type are converted once, into ``offload_dir``.
        kind: Which kind of language model it is.
        offload_dir: Where files of its own are kept.
        trains_weights: Whether the weights themselves are trained, not only an adapter.
        name: What the user calls the model.
        where: ``disk``: weights stay in files; ``cpu``: in host memory.
        updates: Of trained weights in files: ``disk`` writes them, ``journal`` repeats all of them on each read.
        device: Where the model computes, if weights are in host memory; the CPU if not given.
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
    writes = trains_weights and updates == "disk"
    weights = [own for unit in units for own in unit.names]
    direct = not (converts or writes) and all(stored.fits(keys[own], dtype) for own in weights)
    identity = f"{stored.identity} {dtype} {type(model).__name__}"
    store: Memory | Files
    if where == "cpu":
        store = host_store(device or torch.device("cpu"), identity)
    elif writes:
        store = WorkingCopy(offload_dir, identity)
    else:
        store = Replayed(offload_dir, identity) if trains_weights else Files(identity)
    with Converted(type(model), folder, dtype, offload_dir) as converted:
        load = converted if converts else lambda own: stored.tensor(keys[own])
        for unit in units:
            shapes = {own: tuple(model.get_parameter(own).shape) for own in unit.names}
            if isinstance(store, Memory):
                store.place(unit, shapes, load, dtype)
            elif direct:
                store.place(unit, {own: stored.span(keys[own]) for own in unit.names})
            else:
                store.place(unit, base_file(offload_dir, unit, identity, shapes, load, dtype))
    _assign(model, units)
    for own, buffer in _persistent_buffers(model).items():
        if (key := keys.get(own, own)) in stored.entries:
            buffer.copy_(stored.read(key))
    model.working_copy = store if trains_weights else None
    model.name_or_path = model.config.name_or_path = str(folder)
    stop_rescaling_(model)
    if store.moves:
        for unit in units:
            for module in unit.modules if unit.is_block else []:
                keep_in_place(module, unit.tensors.values())
    Blocks(model, units, store)
    return model.eval()


def host_store(device: torch.device, identity: str) -> Memory:
    """Return where weights in host memory are, for a model that computes on a device."""
    return Memory(identity) if device.type == "cpu" else Staged(device, identity)


def _stored_names(model: Any, stored: Stored, name: str) -> dict[str, str]:
    """Return the name in the files of every parameter, and of buffers that are there.

    Tied parameters need be there only once.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = parameters | _persistent_buffers(model)
    prefix = f"{model.base_model_prefix}."
    found: dict[int, str] = {}
    used = set()
    wrong = []
    for own, tensor in named.items():
        for key in (own, own.removeprefix(prefix), prefix + own):
            if key in stored.entries:
                used.add(key)
                found.setdefault(id(tensor), key)
                if stored.shape(key) != tuple(tensor.shape):
                    wrong.append((own, stored.shape(key), tuple(tensor.shape)))
                break
    missing = [own for own, parameter in parameters.items() if id(parameter) not in found]
    buffers = {key for key, _ in model.named_buffers()}
    report = {
        "mismatched_keys": wrong,
        "missing_keys": missing,
        "unexpected_keys": stored.entries.keys() - used - buffers,
    }
    check_complete(model, report, name)
    return {own: found[id(tensor)] for own, tensor in named.items() if id(tensor) in found}


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a model saves; others it computes itself, whatever old files hold."""
    saved = model.state_dict(keep_vars=True)
    return {own: buffer for own, buffer in model.named_buffers(remove_duplicate=False) if own in saved}


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
