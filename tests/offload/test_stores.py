"""Weights in host memory, staged on a device, or replayed from the journal: the bits of the run in memory each time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_streamed_forward import FAMILIES, closure, resident, same, save, streamed, train, weights, with_lora

from zokernel.errors import RunError
from zokernel.finetune.models import streamed as loading
from zokernel.offload import Memory, Replayed, Staged, StreamedForward, streamed_blocks
from zokernel.optim import ZerothOrder
from zokernel.perturb import InForward

WAYS: dict[str, dict[str, Any]] = {
    "memory": {"where": "cpu"},
    "staged": {"where": "cpu"},
    "journal": {"updates": "journal"},
}
KINDS = {"memory": Memory, "staged": Staged, "journal": Replayed}


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "staged":  # the copies that a GPU needs, made on the CPU
        monkeypatch.setattr(loading, "host_store", Staged)
    return request.param


@pytest.fixture(params=["llama", "untied", "gpt2"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(FAMILIES[request.param], tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_parameters_are_trained_to_the_same_bits(saved: Path, way: str, dtype: torch.dtype) -> None:
    reference, model = resident(saved, dtype), streamed(saved, trains_weights=True, dtype=dtype, **WAYS[way])
    expected, _ = train(reference, InForward())
    blocks = streamed_blocks(model)
    assert blocks is not None
    assert type(blocks.store) is KINDS[way]
    losses, optimizer = train(model, StreamedForward(blocks, model, model.working_copy))
    assert losses == expected
    with torch.no_grad():  # without a perturbation too, as evaluations run
        assert closure(model)() == closure(reference)()
    assert same(weights(model), weights(reference))
    # What was asked for from outside is kept, and training goes on from there.
    assert optimizer.step(closure(model)) == train(resident(saved, dtype), InForward(), steps=6)[1].last_estimate.loss


@pytest.mark.parametrize("way", ["memory", "staged"], indirect=True)
def test_adapters_are_trained_to_the_same_bits(saved: Path, way: str) -> None:
    reference, model = with_lora(resident(saved)), with_lora(streamed(saved, trains_weights=False, **WAYS[way]))
    blocks = streamed_blocks(model)
    assert blocks is not None
    assert train(model, StreamedForward(blocks, model))[0] == train(reference, InForward())[0]
    assert same(weights(model), weights(reference))


def test_each_block_is_copied_in_once_per_pass_and_back_once_per_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "host_store", Staged)
    saved = save(FAMILIES["llama"], tmp_path / "model")
    for trains in (True, False):
        model = streamed(saved, trains_weights=trains, where="cpu")
        model = model if trains else with_lora(model)
        blocks = streamed_blocks(model)
        assert blocks is not None
        train(model, StreamedForward(blocks, model, blocks.store if trains else None))
        num_bytes = sum(unit.nbytes for unit in blocks.units if unit.is_block)
        passes = {blocks.passes[unit.name] for unit in blocks.units if unit.is_block}
        assert passes in ({5}, {6})  # the first step's losses may be taken once more
        assert blocks.bytes_read == num_bytes * passes.pop()
        assert blocks.store.bytes_written == (4 * num_bytes if trains else 0)  # the last update waits


def test_a_block_on_the_device_is_not_where_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "host_store", Staged)
    saved = save(FAMILIES["llama"], tmp_path / "model")
    model = streamed(saved, trains_weights=True, where="cpu")
    blocks = streamed_blocks(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    address, addresses = weight.data_ptr(), []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: addresses.append(weight.data_ptr()))
    with torch.no_grad():
        closure(model)()
        closure(model)()
    assert blocks is not None
    assert address not in addresses
    blocks.settle_all()
    assert weight.data_ptr() == address


def test_a_trainer_that_moves_the_model_leaves_staged_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "host_store", Staged)
    model = with_lora(streamed(save(FAMILIES["llama"], tmp_path / "model"), trains_weights=False, where="cpu"))
    model.to("meta")
    devices = {name: p.device.type for name, p in model.named_parameters()}
    blocks = {name for name in devices if ".layers." in name and "lora" not in name}
    assert {name for name, device in devices.items() if device == "cpu"} == blocks
    assert len(blocks) == 4 * 9
    assert {device for name, device in devices.items() if "lora" in name} == {"meta"}


def test_the_journal_writes_nothing_and_repeats_every_update(tmp_path: Path) -> None:
    saved = save(FAMILIES["llama"], tmp_path / "model")
    model = streamed(saved, trains_weights=True, updates="journal")
    blocks, store = streamed_blocks(model), model.working_copy
    assert blocks is not None
    before = (saved / "model.safetensors").read_bytes()
    _, optimizer = train(model, StreamedForward(blocks, model, store), steps=4)
    assert not (tmp_path / "copy").exists()
    assert store.replays == 4 * (1 + 2 + 3)  # four blocks; step t repeats t - 1 updates
    reference = resident(saved)
    train(reference, InForward(), steps=4)
    assert same(weights(model), weights(reference))
    assert (saved / "model.safetensors").read_bytes() == before
    assert list((tmp_path / "copy").iterdir()) == []  # the weights that were asked for are in files without a name
    bytes_written = store.bytes_written
    optimizer.step(closure(model))
    assert store.bytes_written == bytes_written > 0
    assert store.replays == 4 * (1 + 2 + 3 + 4)  # kept weights need no replay


def test_the_journal_reports_the_cost_of_its_replays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save(FAMILIES["untied"], tmp_path / "model")
    model = streamed(saved, trains_weights=True, updates="journal")
    with caplog.at_level("INFO", "zokernel.offload.replayed"):
        train(model, StreamedForward(streamed_blocks(model), model, model.working_copy), steps=18)
    steps = [line.split(" steps on each")[0].split()[-1] for line in caplog.messages if line.startswith("Journal:")]
    assert steps == ["8", "16"]


def test_the_journal_alone_continues_a_run(tmp_path: Path) -> None:
    saved = save(FAMILIES["untied"], tmp_path / "model")
    reference = resident(saved)
    expected, _ = train(reference, InForward(), steps=4)
    model = streamed(saved, trains_weights=True, updates="journal")
    optimizer = ZerothOrder(
        list(model.named_parameters()),
        lr=1e-2,
        estimator="two_point(1e-2, 3)",
        perturb=StreamedForward(streamed_blocks(model), model, model.working_copy),
        weight_decay=0.01,
    )
    for losses in expected[:3]:
        optimizer.replay(losses)
    optimizer.step(closure(model))
    assert optimizer.record() == expected[3]
    assert same(weights(model), weights(reference))


def test_an_interrupted_update_is_redone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save(FAMILIES["untied"], tmp_path / "model")
    model = streamed(saved, trains_weights=True, updates="journal")
    blocks, store = streamed_blocks(model), model.working_copy
    assert blocks is not None
    train(model, StreamedForward(blocks, model, store), steps=3)
    apply, calls = store.updates._apply, []

    def interrupted(store: Any, step: Any) -> None:
        apply(store, step)
        calls.append(step)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(store.updates, "_apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        closure(model)()
    reference = resident(saved)
    train(reference, InForward(), steps=3)
    assert same(weights(model), weights(reference))


def test_weights_of_another_type_are_replayed_from_converted_files(tmp_path: Path) -> None:
    saved = save(FAMILIES["llama"], tmp_path / "model")
    reference = resident(saved, torch.bfloat16)
    model = streamed(saved, trains_weights=True, dtype=torch.bfloat16, updates="journal")
    expected, _ = train(reference, InForward(), steps=3)
    losses, _ = train(model, StreamedForward(streamed_blocks(model), model, model.working_copy), steps=3)
    assert losses == expected
    assert same(weights(model), weights(reference))
    assert {path.suffixes[-2] for path in (tmp_path / "copy").iterdir()} == {".base"}


def test_files_get_their_names_when_what_they_hold_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, synced, sync = save(FAMILIES["llama"], tmp_path / "model"), [], os.fdatasync

    def noted(opened: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{opened}"))
        synced.append((path.name, path.with_suffix(".safetensors").exists()))
        sync(opened)

    monkeypatch.setattr(os, "fdatasync", noted)
    streamed(saved, trains_weights=True, dtype=torch.bfloat16, updates="journal")
    files = sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert len(files) > 2
    assert all(name.endswith(".base.safetensors") for name in files)
    assert sorted(synced) == [(name.replace(".safetensors", ".partial"), False) for name in files]


def test_the_last_version_that_cannot_be_written_is_named_before_weights_are_read(tmp_path: Path) -> None:
    saved = save(FAMILIES["llama"], tmp_path / "model")
    model = streamed(saved, trains_weights=True)
    blocks = streamed_blocks(model)
    assert blocks is not None
    unit = next(unit for unit in blocks.units if unit.is_block)
    path = tmp_path / "copy" / f"{unit.name}.weights.safetensors"
    path.mkdir()  # a file cannot take its place
    train(model, StreamedForward(blocks, model, model.working_copy), steps=1)
    with pytest.raises(RunError, match=f"{path} cannot be written .* choose another --offload_dir"):
        model.state_dict()
    path.rmdir()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_staged_weights_are_trained_to_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    saved, device = save(FAMILIES["wide"], tmp_path / "model"), torch.device("cuda", 0)
    reference = resident(saved, dtype).to(device)
    model = streamed(saved, trains_weights=True, dtype=dtype, where="cpu", device=device).to(device)
    blocks = streamed_blocks(model)
    assert blocks is not None
    assert type(blocks.store) is Staged
    assert next(iter(blocks.units[1].tensors.values())).is_pinned()
    expected, _ = train(reference, InForward())
    losses, _ = train(model, StreamedForward(blocks, model, model.working_copy))
    assert losses == expected
    assert same(weights(model), {name: tensor.cpu() for name, tensor in weights(reference).items()})
