"""Loading a model whose weights are streamed (``--offload``): built without weights, then given those of a store."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from zokernel.errors import UsageError
from zokernel.finetune.models.check_loaded import check_complete, stop_rescaling_
from zokernel.finetune.models.kind import Kind, auto_class
from zokernel.finetune.models.model_files import stored_tensors, weight_files
from zokernel.offload.base_files import base_file
from zokernel.offload.blocks import Blocks
from zokernel.offload.mapping import MappedFile
from zokernel.offload.replayed import Replayed
from zokernel.offload.staged import Staged
from zokernel.offload.store import Files, Memory, Span
from zokernel.offload.units import Unit, find_units
from zokernel.offload.working_copy import WorkingCopy
from zokernel.private_apis import converts_weights, keep_in_place, offloaded_parameter
from zokernel.process_memory import limit_heaps

_DTYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}


class StoredTensors:
    """The tensors of a model's files, mapped.

    Args:
        folder: The folder that holds them.
    """

    def __init__(self, folder: Path):
        self.entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        self._mapped: dict[Path, MappedFile] = {}
        digest = hashlib.sha256()
        for path in weight_files(folder):
            status = path.stat()
            digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
            tensors, start = stored_tensors(path)
            self.entries |= {key: (path, start, entry) for key, entry in tensors.items()}
        self.identity = digest.hexdigest()

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


class ConvertedWeights:
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

    def __enter__(self) -> ConvertedWeights:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._model = None
        shutil.rmtree(self._scratch, ignore_errors=True)


@dataclass(frozen=True)
class StreamingOptions:
    """Where the weights of a streamed model are held, and what becomes of their updates.

    Attributes:
        offload_dir: Where files of its own are kept.
        trains_weights: Whether the weights themselves are trained, not only an adapter.
        where: ``disk``: weights stay in files; ``cpu``: in host memory.
        updates: Of trained weights in files: ``disk`` writes them, ``journal`` repeats all of them on each read.
        device: Where the model computes, if weights are in host memory; the CPU if not given.
    """

    offload_dir: Path
    trains_weights: bool
    where: str = "disk"
    updates: str = "disk"
    device: torch.device | None = None

    @property
    def writes(self) -> bool:
        """Whether updated weights are written."""
        return self.trains_weights and self.updates == "disk"

    def make_store(self, identity: str) -> Memory | Files:
        """Return an empty store for the weights of a model.

        Args:
            identity: What tells its weights from others.
        """
        if self.where == "cpu":
            return host_store(self.device or torch.device("cpu"), identity)
        if self.writes:
            return WorkingCopy(self.offload_dir, identity)
        return Replayed(self.offload_dir, identity) if self.trains_weights else Files(identity)


def load_streamed(
    architecture: Any,
    folder: Path,
    dtype: torch.dtype,
    streaming: StreamingOptions,
    *,
    kind: Kind,
    name: str,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Build a model whose weights are in a store; its blocks are found by ``streamed_blocks``.

    Args:
        architecture: Its configuration.
        folder: Where its files are.
        dtype: Type in which the weights are held; files of another type are converted once, into ``offload_dir``.
        streaming: Where the weights are held, and what becomes of their updates.
        kind: Which kind of language model it is.
        name: What the user calls the model.
        attn_implementation: Attention to use.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The model, in evaluation mode.

    Raises:
        UsageError: If its weights are not all in its files, or cannot be streamed.
    """
    limit_heaps()  # every loss that shares a pass has a thread, and so a heap
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model = _without_weights(kind, architecture, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    if getattr(architecture, "quantization_config", None) is not None:
        raise UsageError(f"{name} is quantized, and quantized weights are not streamed: leave out --offload.")
    stored, units, converts = StoredTensors(folder), find_units(model), converts_weights(model)
    keys = {} if converts else _stored_names(model, stored, name)
    as_stored = not (converts or streaming.writes) and all(
        stored.fits(keys[own], dtype) for unit in units for own in unit.names
    )
    identity = f"{stored.identity} {dtype} {type(model).__name__}"
    store = streaming.make_store(identity)
    with ConvertedWeights(type(model), folder, dtype, streaming.offload_dir) as converted:
        load = converted if converts else lambda own: stored.tensor(keys[own])
        for unit in units:
            shapes = {own: tuple(model.get_parameter(own).shape) for own in unit.names}
            if isinstance(store, Memory):
                store.place(unit, shapes, load, dtype)
            elif as_stored:
                store.place(unit, {own: stored.span(keys[own]) for own in unit.names})
            else:
                store.place(unit, base_file(streaming.offload_dir, unit, identity, shapes, load, dtype))
    _assign(model, units)
    _copy_buffers(model, stored, keys)
    model.working_copy = store if streaming.trains_weights else None
    model.name_or_path = model.config.name_or_path = str(folder)
    stop_rescaling_(model)
    if store.moves:
        _keep_blocks_in_place(units)
    Blocks(model, units, store)
    return model.eval()


def _without_weights(kind: Kind, architecture: Any, **options: Any) -> Any:
    """Return a model of some kind whose weights have shapes and no memory."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = auto_class(kind).from_config(architecture, **options)
    model.tie_weights()
    return model


def _copy_buffers(model: nn.Module, stored: StoredTensors, keys: dict[str, str]) -> None:
    """Fill the buffers that a model saves from its files, where they are there."""
    for own, buffer in _persistent_buffers(model).items():
        if (key := keys.get(own, own)) in stored.entries:
            buffer.copy_(stored.read(key))


def _keep_blocks_in_place(units: list[Unit]) -> None:
    """Let a move of the model to a device leave the weights of blocks where their store has them."""
    for unit in units:
        for module in unit.modules if unit.is_block else []:
            keep_in_place(module, unit.tensors.values())


def host_store(device: torch.device, identity: str) -> Memory:
    """Return where weights in host memory are, for a model that computes on a device."""
    return Memory(identity) if device.type == "cpu" else Staged(device, identity)


def _stored_names(model: Any, stored: StoredTensors, name: str) -> dict[str, str]:
    """Return the name in the files of every parameter, and of buffers that are there.

    Tied parameters need be there only once.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = parameters | _persistent_buffers(model)
    prefix = f"{model.base_model_prefix}."
    keys: dict[int, str] = {}
    used = set()
    mismatched = []
    for own, tensor in tensors.items():
        for key in (own, own.removeprefix(prefix), prefix + own):
            if key in stored.entries:
                used.add(key)
                keys.setdefault(id(tensor), key)
                if stored.shape(key) != tuple(tensor.shape):
                    mismatched.append((own, stored.shape(key), tuple(tensor.shape)))
                break
    missing = [own for own, parameter in parameters.items() if id(parameter) not in keys]
    buffers = {key for key, _ in model.named_buffers()}
    report = {
        "mismatched_keys": mismatched,
        "missing_keys": missing,
        "unexpected_keys": stored.entries.keys() - used - buffers,
    }
    check_complete(model, report, name)
    return {own: keys[id(tensor)] for own, tensor in tensors.items() if id(tensor) in keys}


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a model saves; others it computes itself, whatever old files hold."""
    saved = model.state_dict(keep_vars=True)
    return {own: buffer for own, buffer in model.named_buffers(remove_duplicate=False) if own in saved}


def _assign(model: nn.Module, units: list[Unit]) -> None:
    """Put the mapped tensors of units in place of a model's parameters; tied ones stay one parameter."""
    empty = dict(model.named_parameters(remove_duplicate=False))
    assigned = {
        id(empty[own]): nn.Parameter(tensor, requires_grad=empty[own].requires_grad)
        for unit in units
        for own, tensor in unit.tensors.items()
    }
    for own, parameter in empty.items():
        owner, _, attribute = own.rpartition(".")
        setattr(model.get_submodule(owner), attribute, assigned[id(parameter)])
    for unit in units:
        unit.tensors = {own: assigned[id(empty[own])] for own in unit.tensors}
