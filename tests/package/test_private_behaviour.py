"""What each function on private APIs of torch, transformers, accelerate and trl promises still holds."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ranks import spawn
from torch import nn

from zokernel import private_apis

transformers = pytest.importorskip("transformers")

# transformers


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return {"loss": (self.weight * x).square().mean()}


def plain_trainer(folder, **arguments):
    data = [{"x": torch.tensor([1.0 + n])} for n in range(8)]
    options = {"max_steps": 2, "logging_steps": 2, "learning_rate": 0.0, "save_strategy": "no", "use_cpu": True}
    arguments = transformers.TrainingArguments(
        folder, report_to=[], disable_tqdm=True, **(options | {"per_device_train_batch_size": 4} | arguments)
    )
    return transformers.Trainer(Squares(), arguments, train_dataset=data)


class BeginsWith(transformers.TrainerCallback):
    def __init__(self):
        self.trainer, self.sums, self.seen = None, None, []

    def on_train_begin(self, *args, **kwargs):
        if self.sums is not None:
            private_apis.set_loop_sums(self.trainer, self.sums)

    def on_step_end(self, *args, **kwargs):
        self.seen.append({name: float(value) for name, value in private_apis.loop_sums(self.trainer).items()})


def logged_loss(folder, sums):
    callback, trainer = BeginsWith(), plain_trainer(folder)
    callback.trainer, callback.sums = trainer, sums
    trainer.add_callback(callback)
    mean = trainer.train().training_loss
    return trainer.state.log_history[0]["loss"], mean, callback.seen


def test_sums_of_the_loop_are_read_and_set(tmp_path):
    plain, plain_mean, states = logged_loss(tmp_path, None)
    assert states[1]["tr_loss"] == pytest.approx(2 * plain, rel=1e-3), "the loop no longer sums losses in _tr_loss"
    assert states[1]["last_logged"] == 0
    sums = {"tr_loss": torch.tensor(100.0), "last_logged": 0}
    loss, mean, _ = logged_loss(tmp_path, sums)
    assert loss == pytest.approx(plain + 100 / 2, rel=1e-3), "the first log line ignores what was set"
    assert mean == pytest.approx(plain_mean, rel=1e-3), "the mean of a call has losses of steps before it"
    sums = {"tr_loss": torch.tensor(0.0), "last_logged": 1}
    assert logged_loss(tmp_path, sums)[0] == pytest.approx(2 * plain, rel=1e-3), "the step of the last log is ignored"


def test_the_size_of_micro_batches_can_be_set_before_the_loop(tmp_path):
    trainer = plain_trainer(tmp_path)
    private_apis.set_train_batch_size(trainer, 2)
    trainer.train()
    assert trainer.model.sizes == [2, 2], "the loop no longer reads batches of Trainer._train_batch_size"


def tiny_llama(**options):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes, **options))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_named(attention):
    model = tiny_llama(attn_implementation=attention)
    assert private_apis.attention_implementation(model) == attention
    model.set_attn_implementation("eager")
    assert private_apis.attention_implementation(model) == "eager"


def test_other_models_name_no_attention():
    assert private_apis.attention_implementation(nn.Linear(2, 2)) is None


def test_what_bitsandbytes_leaves_is_named():
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16)
    assert private_apis.full_precision_suffixes(transformers.T5ForConditionalGeneration(config)) == {"wo"}
    models = (tiny_llama(), nn.Linear(2, 2))
    assert all(private_apis.full_precision_suffixes(model) == set() for model in models)


def test_repeated_blocks_are_named():
    peft = pytest.importorskip("peft")
    assert private_apis.repeated_blocks(tiny_llama()) == {"LlamaDecoderLayer"}
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert private_apis.repeated_blocks(adapted) == {"LlamaDecoderLayer"}
    assert private_apis.repeated_blocks(nn.Linear(2, 2)) == set()


def test_conversions_of_weights_are_known(tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    for kind, converted in (("Llama", False), ("GPTNeoX", True)):
        model_class = getattr(transformers, f"{kind}ForCausalLM")
        model = model_class(getattr(transformers, f"{kind}Config")(**sizes))
        model.save_pretrained(tmp_path / kind)
        for loaded in (model, model_class.from_pretrained(tmp_path / kind)):
            assert private_apis.converts_weights(loaded) is converted
    assert not private_apis.converts_weights(nn.Linear(1, 1))


# accelerate, whose state is one per process


def fresh(code: str) -> dict:
    """Return what a fresh process prints as JSON."""
    code = "import json, torch\nfrom accelerate import Accelerator\nfrom zokernel import private_apis\n" + code
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_accelerate_compiles_nothing_and_wraps_nothing_and_caches_no_casts():
    result = fresh("""
accelerator = Accelerator(cpu=True, mixed_precision="bf16", dynamo_backend="eager")
def compiled():
    return type(accelerator.prepare_model(torch.nn.Linear(2, 2), evaluation_mode=True)).__name__ == "OptimizedModule"
def caches():
    with accelerator.autocast():
        return torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
before = compiled(), caches()
private_apis.compile_nothing(accelerator)
private_apis.cache_no_casts(accelerator)
after = compiled(), caches()
calls = []
accelerator.prepare_model = lambda model, device_placement=None, evaluation_mode=False: calls.append(evaluation_mode)
private_apis.synchronise_no_gradients(accelerator)
model = torch.nn.Linear(2, 2)
accelerator.prepare(model, torch.optim.SGD(model.parameters()))
print(json.dumps({"before": before, "after": after, "calls": calls}))
""")
    assert result["before"] == [True, [True, True]]
    assert result["after"][0] is False, "accelerate compiles in spite of state.dynamo_plugin"
    assert result["after"][1] == [True, False], "accelerate ignores autocast_handler"
    assert result["calls"] == [True], "prepare no longer calls prepare_model of the same object"


def test_batches_are_dealt_anew():
    data_loader = pytest.importorskip("accelerate.data_loader")
    plain = torch.utils.data.DataLoader(range(12), batch_size=2)
    loader = data_loader.prepare_data_loader(plain, num_processes=4, process_index=3)
    assert next(iter(loader)).tolist() == [6, 7]
    assert private_apis.deal_batches(loader, 2, 1)
    assert [batch.tolist() for batch in loader] == [[2, 3], [6, 7], [10, 11]], "accelerate deals by other attributes"
    assert not private_apis.deal_batches(plain, 2, 1)


def test_one_gpu_of_several_is_used(tmp_path):
    options = {"use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4}
    arguments = transformers.TrainingArguments(str(tmp_path), **options)
    assert (private_apis.use_one_gpu(arguments), arguments.n_gpu) == (0, 0), "no GPU, so none is used"
    arguments._n_gpu = 3
    assert arguments.train_batch_size == 12, "several GPUs are counted otherwise"
    assert (private_apis.use_one_gpu(arguments), arguments.n_gpu, arguments.train_batch_size) == (3, 1, 4)


# trl


def test_losses_that_trl_notes_are_taken_back_and_tokens_counted_once(tmp_path):
    pytest.importorskip("trl")
    from trainer_cases import CASES

    kind, kwargs = CASES["supervised_finetuning"](tmp_path)
    trainer = kind(**kwargs)
    trainer.model.train()  # trl notes losses of evaluations elsewhere
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = int(batch["attention_mask"].sum())
    trainer.compute_loss(trainer.model, dict(batch))
    assert private_apis.trl_token_count(trainer) == tokens, "trl counts tokens elsewhere"
    metrics = private_apis.trl_metrics(trainer)
    for _ in range(3):
        trainer.compute_loss(trainer.model, dict(batch))
    assert private_apis.trl_token_count(trainer) == 4 * tokens
    assert len(private_apis.trl_metrics(trainer)["_metrics"]["train"]["entropy"]) == 4
    private_apis.count_tokens_once(trainer, tokens, 3)
    assert private_apis.trl_token_count(trainer) == 2 * tokens
    assert private_apis.trl_metrics(trainer)["_metrics"]["train"]["num_tokens"] == [2 * tokens]
    private_apis.set_trl_metrics(trainer, metrics)
    assert private_apis.trl_metrics(trainer) == metrics
    logged = trainer.state.log_history
    trainer.log({})
    assert logged[-1]["num_tokens"] == tokens, "trl logs something else"


def test_other_trainers_note_nothing(tmp_path):
    trainer = plain_trainer(tmp_path)
    private_apis.count_tokens_once(trainer, 0, 2)
    assert (private_apis.trl_metrics(trainer), private_apis.trl_token_count(trainer)) == ({}, 0)


# torch


def test_writes_are_counted():
    weight = nn.Parameter(torch.ones(3))
    counts = [private_apis.write_count(weight)]
    (weight * 2).sum().item()
    assert private_apis.write_count(weight) == counts[0], "reading counts as writing"
    with torch.no_grad():
        for write in (lambda: weight.add_(1), lambda: weight.detach()[1:].zero_(), lambda: weight.copy_(weight + 1)):
            write()
            counts.append(private_apis.write_count(weight))
    assert all(after > before for before, after in pairwise(counts)), f"writes are not counted: {counts}"


def test_a_schedule_sees_steps_that_are_taken_otherwise():
    for counts_step in (True, False):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        if counts_step:
            private_apis.note_step(optimizer)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            schedule.step()
        assert bool(warned) == (not counts_step)


def test_gamma_draws_from_the_given_generator():
    shapes = torch.full((40_000,), 2.5, dtype=torch.float64)
    state = torch.get_rng_state()
    draws = private_apis.standard_gamma(shapes, torch.Generator().manual_seed(1))
    repeated = private_apis.standard_gamma(shapes, torch.Generator().manual_seed(1))
    assert torch.equal(draws, repeated)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    # Mean k; variance k, of which the estimate has variance (2 k^2 + 6 k) / n.  At z = 4.
    assert abs(draws.mean() - 2.5) < 4 * (2.5 / 40_000) ** 0.5
    assert abs(draws.var() - 2.5) < 4 * ((2 * 2.5**2 + 6 * 2.5) / 40_000) ** 0.5


def test_containers_are_flattened_and_rebuilt():
    flatten, unflatten = private_apis.flatten_and_unflatten()
    pair = namedtuple("pair", "first second")
    tensors = [torch.ones(n) for n in range(4)]
    tree = ((tensors[0], [tensors[1], 2]), {"key": pair(tensors[2], None), "more": (tensors[3],)})
    leaves, structure = flatten(tree)
    assert [id(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)] == [id(tensor) for tensor in tensors]
    rebuilt = unflatten([n for n, _ in enumerate(leaves)], structure)
    assert isinstance(rebuilt[1]["key"], pair)
    assert rebuilt[0] == (0, [1, 2])
    assert rebuilt[1]["more"] == (len(leaves) - 1,)


def offsets(rank: int, folder: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    whole = torch.zeros(5, 3)
    shard_offsets = [
        private_apis.shard_offset(distribute_tensor(whole, mesh, [kind])) for kind in (Shard(0), Shard(1), Replicate())
    ]
    Path(folder, f"{rank}.json").write_text(json.dumps(shard_offsets))


def test_offsets_of_uneven_shards(tmp_path):
    spawn(offsets, str(tmp_path), size=2)
    per_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert per_rank == [[[0, 0], [0, 0], [0, 0]], [[3, 0], [0, 2], [0, 0]]]


def test_the_flags_of_a_parser_are_listed():
    import argparse

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--one")
    parser.add_argument("two")
    assert [flag.dest for flag in private_apis.flags_of(parser)] == ["one", "two"]


def test_a_process_ends_at_once_without_its_handlers():
    import subprocess

    code = "import atexit; from zokernel import private_apis; atexit.register(print, 1); private_apis.exit_at_once(7)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (7, "")


def test_the_extension_of_torch_is_a_file_that_is_loaded():
    file = Path(private_apis.extension_file())
    assert file.is_file()
    if sys.platform == "linux":
        assert str(file.resolve()) in Path("/proc/self/maps").read_text(), "another file than the one that is loaded"


def test_the_state_of_modules_is_exchanged():
    layer = nn.Linear(2, 2)
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda *_: calls.append("first"))
    base = private_apis.ModuleState([layer])
    changed = base.copy()
    changed.install()
    handle = layer.register_forward_hook(lambda *_: calls.append("own"), always_call=True)
    layer.forward = lambda x: -x
    layer.training = False
    changed = private_apis.ModuleState([layer])
    base.install()
    x = torch.ones(1, 2)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert (calls, layer.training) == (["first"], True)
    changed.install()
    assert torch.equal(layer(x), -x)
    assert (calls, layer.training) == (["first", "first", "own"], False)
    handle.remove()
    layer(x)
    assert calls == ["first", "first", "own", "first"]


def test_a_single_weight_is_read_through_conversions(tmp_path):
    sizes = {"num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 40}
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, **sizes
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    expected = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    on_disk = transformers.MixtralForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=str(tmp_path / "scratch")
    )
    for name, tensor in expected.items():
        assert torch.equal(private_apis.offloaded_parameter(on_disk, name), tensor), name


def test_some_parameters_stay_when_a_module_is_moved():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    private_apis.keep_in_place(model, [model[0].weight, model[1].bias])
    weight = model[0].weight
    model.to(torch.float64)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name for name, dtype in types.items() if dtype == torch.float32} == {"0.weight", "1.bias"}
    assert types["1.running_mean"] == types["0.bias"] == torch.float64
    assert model[0].weight is weight
    assert list(dict(model[0].named_parameters())) == ["weight", "bias"]
