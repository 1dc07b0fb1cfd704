"""A run is settled once: who decided what, what a continued run may change, and that nothing is written to what users
asked for."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from trainers import make_trainer

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune import ZOConfig
from zokernel.finetune.settings import flag_files
from zokernel.finetune.settings.config import faster_in_bf16
from zokernel.finetune.settings.record import SOURCES, Setting, first_difference, read_settings
from zokernel.finetune.settings.resolve import resolve
from zokernel.finetune.settings.zo_arguments import read_pairs
from zokernel.finetune.storage.run_folder import refuse_old_run
from zokernel.perturb import InForward


def settle(folder, *, trained="full parameters", command=(), low_precision="", **options):
    config = ZOConfig(output_dir=str(folder), **options)
    return resolve(config, trained=trained, num_examples=100, command=command, low_precision=low_precision)


def source(settings, name):
    return settings[name], settings.setting(name).source


def test_every_setting_records_who_decided(tmp_path):
    settings = settle(tmp_path, eps=1e-2, precision="fp32")
    assert source(settings, "eps") == (1e-2, "user")
    assert source(settings, "precision") == ("fp32", "user")
    assert source(settings, "num_perturbations") == (1, "default")
    assert source(settings, "learning_rate") == (1e-5, "auto")
    assert source(settle(tmp_path, trained="LoRA"), "learning_rate") == (1e-3, "auto")
    assert source(settle(tmp_path, trained="scales", method="qzo"), "learning_rate") == (1e-3, "auto")
    assert source(settle(tmp_path, trained="scales"), "learning_rate") == (1e-5, "auto")
    assert source(settle(tmp_path), "precision")[1] == "hardware"
    assert source(settle(tmp_path, method="auto"), "method") == ("forward_difference", "auto")
    assert {setting.source for setting in settings} <= set(SOURCES)


def test_flags_are_distinguished_from_recipes(tmp_path):
    command = ["finetune", "--config", "mezo-opt-sst2", "--max-steps", "7", "--eps=1e-2"]
    options = {"eps": 1e-2, "max_steps": 7, "learning_rate": 1e-6}
    settings = settle(tmp_path, command=command, **options)
    assert source(settings, "max_steps") == (7, "user")
    assert source(settings, "eps") == (1e-2, "user")
    assert source(settings, "learning_rate") == (1e-6, "recipe")
    assert source(settings, "momentum") == (0.0, "default")


def test_a_file_of_flags_is_read_once(tmp_path, monkeypatch):
    """The source of a setting comes from the file as it was when its values were read."""
    recipe, reads = tmp_path / "mine.yaml", []
    recipe.write_text("eps: 0.01\n")
    real = flag_files.read_mapping
    monkeypatch.setattr(flag_files, "read_mapping", lambda path, **how: reads.append(path) or real(path, **how))
    assert flag_files.read_yaml(recipe) == {"eps": 0.01}
    recipe.write_text("seed: 3\n")
    count = len(reads)
    settings = settle(tmp_path, command=["finetune", "--config", str(recipe)], eps=1e-2, seed=3)
    assert source(settings, "eps") == (1e-2, "recipe")
    assert source(settings, "seed") == (3, "default")
    assert len(reads) == count
    flag_files.read_yaml(recipe)
    assert source(settle(tmp_path, command=["finetune", f"--config={recipe}"], seed=3), "seed") == (3, "recipe")


def test_the_table_is_aligned_and_short(tmp_path):
    lines = settle(tmp_path, weight_decay=0.1).table().splitlines()
    assert len({line.rindex("  ") for line in lines}) <= 3
    assert [line.split()[0] for line in lines][:5] == ["setting", "method", "learning_rate", "eps", "num_perturbations"]
    assert any(line.split() == ["weight_decay", "0.1", "user"] for line in lines)
    assert not any(line.startswith(("adam_beta1", "fsdp")) for line in lines)


@pytest.mark.parametrize("settings", [{"method": "auto"}, {"auto_find_batch_size": True}, {"restore": "copy"}, {}])
def test_the_settings_of_the_user_are_never_modified(parts, tmp_path, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = make_trainer(parts, tmp_path, max_steps=2, learning_rate=None, save_strategy="journal", **settings)
    requested = trainer.settings.requested
    before = {name: repr(value) for name, value in vars(requested).items()}
    trainer.train()
    assert {name: repr(value) for name, value in vars(requested).items()} == before
    assert trainer.args is not requested
    recorded = json.loads((tmp_path / "settings.json").read_text())["settings"]
    assert {row["name"]: row["value"] for row in recorded} == trainer.settings.values()
    assert "auto" not in (trainer.settings["perturb"], trainer.settings["method"])


def test_late_decisions_make_new_records(tmp_path):
    settings = settle(tmp_path)
    late = settings.with_("hardware", per_device_train_batch_size=4)
    assert (settings["per_device_train_batch_size"], late["per_device_train_batch_size"]) == (16, 4)
    assert (late.arguments().per_device_train_batch_size, settings.requested.per_device_train_batch_size) == (4, None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"learning_rate": 2e-3}, "learning_rate: 0.001 there, 0.002 asked for"),
        ({"precision": "bf16"}, "precision: fp32 there, bf16 asked for"),
        ({"perturb": "in_place:copy"}, "perturb: auto there, in_place:copy asked for"),
        ({"weight_decay": 2.0}, "weight_decay: 0 there, 2 asked for"),
        ({"max_steps": 9}, None),
        ({"eval_steps": 9}, None),
        ({"per_device_eval_batch_size": 9}, None),
        ({"logging_steps": 9}, None),
    ],
)
def test_what_a_continued_run_may_change(tmp_path, change, expected):
    options = {"learning_rate": 1e-3, "precision": "fp32", "max_steps": 5}
    settle(tmp_path, **options).write(tmp_path)
    difference = first_difference(read_settings(tmp_path), settle(tmp_path, **(options | change)))
    if "precision" in change:
        assert difference in (expected, "bf16: false there, true asked for")
    else:
        assert difference == expected


def test_a_trainer_refuses_other_settings(parts, tmp_path):
    settings = {"save_strategy": "journal", "perturb": "in_place"}
    model = parts[0]
    start = {name: w.clone() for name, w in model.state_dict().items()}
    make_trainer(parts, tmp_path, max_steps=3, **settings).train()
    model.load_state_dict(start)
    other = make_trainer(parts, tmp_path, max_steps=5, **{**settings, "perturb": "in_forward"})
    with pytest.raises(UsageError, match=r"other settings \(perturb: in_place there, in_forward asked for\)"):
        other.train(resume_from_checkpoint=True)
    model.load_state_dict(start)
    longer = make_trainer(parts, tmp_path, max_steps=5, **settings)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 5


def test_runs_of_versions_without_a_record_are_refused_by_name(parts, tmp_path):
    trainer = make_trainer(parts, tmp_path / "python", max_steps=2, save_strategy="journal")
    trainer.train()
    (tmp_path / "python" / "settings.json").unlink()
    resumed = make_trainer(parts, tmp_path / "python", max_steps=4, save_strategy="journal")
    with pytest.raises(UsageError, match=r"holds a run of zokernel 0\.\d.*cannot continue.*zokernel replay"):
        resumed.train(resume_from_checkpoint=True)
    old = tmp_path / "command"
    old.mkdir()
    refuse_old_run(old)
    (old / "run.json").write_text(json.dumps({"zokernel": "0.1.0", "settings": {}}))
    with pytest.raises(UsageError, match=r"holds a run of zokernel 0\.1\.0"):
        refuse_old_run(old)


def test_the_command_refuses_an_old_folder_and_shows_its_settings(flags, tmp_path, capsys, caplog):
    old = tmp_path / "run"
    old.mkdir()
    (old / "run.json").write_text(json.dumps({"zokernel": "0.1.0", "settings": {"method": "mezo"}}))
    for extra in ([], ["--resume_from_checkpoint", "last"]):
        assert main(["finetune", *flags, *extra]) == 2
        assert "holds a run of zokernel 0.1.0" in capsys.readouterr().err
    with caplog.at_level("INFO"):
        assert main(["finetune", *flags, "--overwrite_output_dir", "true"]) == 0
    assert "Settings (all of them: settings.json):\nsetting  " in caplog.text
    assert "\nmethod  " in caplog.text
    assert read_settings(old)["learning_rate"] == Setting("learning_rate", 1e-3, "user")


def test_restore_is_deprecated(tmp_path):
    with pytest.warns(FutureWarning, match=r"restore grid is deprecated.*2027-06-01: use perturb in_place:grid"):
        config = ZOConfig(output_dir=str(tmp_path), restore="grid")
    assert (config.perturb, config.restore) == ("in_place:grid", None)
    with pytest.raises(UsageError, match="leave out restore"):
        ZOConfig(output_dir=str(tmp_path), restore="grid", perturb="in_forward")


def test_weights_in_bf16_are_perturbed_exactly_or_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(UsageError, match=r"bfloat16.*set perturb to in_forward"):
        settle(tmp_path, perturb="in_place", low_precision="torch.bfloat16")
    for perturb in ("auto", "in_forward"):
        assert settle(tmp_path, perturb=perturb, low_precision="torch.bfloat16")["perturb"] == "in_forward"


UNSUPPORTED = {
    **{"optim": "sgd", "optim_args": "a=1", "optim_target_modules": "all-linear", "adam_beta1": 0.5, "adam_beta2": 0.5},
    **{"adam_epsilon": 1e-3, "fp16": True, "bf16_full_eval": True, "fp16_full_eval": True, "ignore_data_skip": True},
    **{"max_grad_norm": 0.5, "neftune_noise_alpha": 5.0, "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 1},
    **{"ddp_broadcast_buffers": True, "ddp_static_graph": True, "use_liger_kernel": True},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_settings_that_would_be_ignored_are_refused_by_name(name, tmp_path):
    with pytest.raises(UsageError, match=rf"^{name}=.* cannot be honoured here"):
        ZOConfig(output_dir=str(tmp_path), **{name: UNSUPPORTED[name]})


def test_a_first_order_run_honours_settings_of_gradients(tmp_path):
    config = ZOConfig(output_dir=str(tmp_path), method="adamw", max_grad_norm=0.5, neftune_noise_alpha=5.0)
    assert (config.max_grad_norm, config.neftune_noise_alpha) == (0.5, 5.0)
    with pytest.raises(UsageError, match="adam_beta1"):
        ZOConfig(output_dir=str(tmp_path), method="adamw", adam_beta1=0.5)


@pytest.mark.parametrize(
    ("settings", "steps", "epochs"),
    [
        ({}, 1000, 3),
        ({"num_train_epochs": 1}, -1, 1),
        ({"num_train_epochs": 2, "max_steps": 7}, 7, 2),
        ({"num_train_epochs": 2, "max_steps": -1}, -1, 2),
    ],
)
def test_epochs_alone_count_epochs(settings, steps, epochs, tmp_path):
    config = ZOConfig(output_dir=str(tmp_path), **settings)
    assert (config.max_steps, config.num_train_epochs) == (steps, epochs)


def test_auto_perturbs_in_forward_under_bf16_autocast(parts, tmp_path, caplog):
    before = {name: w.clone() for name, w in parts[0].state_dict().items()}
    trainer = make_trainer(parts, tmp_path, precision="bf16", use_cpu=True, eps=1e-1, max_steps=1, learning_rate=0.0)
    with caplog.at_level("INFO"):
        trainer.train()
    assert isinstance(trainer.bare_optimizer.perturb, InForward)
    assert source(trainer.settings, "perturb") == ("in_forward", "auto")
    assert "perturb: in_forward, which is faster on a CPU under bf16 autocast (the same perturbed loss" in caplog.text
    # The check left the weights as they were.
    assert all(torch.equal(before[name], w) for name, w in parts[0].state_dict().items())


@pytest.mark.parametrize(
    ("units", "faster", "why"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True, "this CPU has bf16 units"),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, False, "without AMX an Intel CPU"),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC 9R14"}, True, "this CPU has bf16 units"),
        ({"avx512_bf16": True}, True, "this CPU has bf16 units"),
        ({"cpu_name": "Intel Xeon"}, False, "this CPU lacks bf16 units"),
        ({}, False, "this CPU lacks bf16 units"),
    ],
)
def test_auto_takes_bf16_where_it_is_faster(units, faster, why, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: units)
    actual, reason = faster_in_bf16(use_cpu=True)
    assert (actual, why in reason) == (faster, True)
    settings = {"output_dir": str(tmp_path), "use_cpu": True}
    assert ZOConfig(**settings, precision="auto").bf16 is faster
    assert ZOConfig(**settings, precision="bf16").bf16
    assert not ZOConfig(**settings, precision="fp32").bf16


def test_auto_stays_in_place_where_the_losses_differ(parts, tmp_path, caplog):
    model = parts[0]
    hidden = model.get_output_embeddings().weight.detach()  # another name for the same memory
    model.get_output_embeddings().forward = lambda x: x.to(hidden.dtype) @ hidden.T
    trainer = make_trainer(parts, tmp_path, precision="bf16", use_cpu=True, eps=1e-1, max_steps=2)
    with caplog.at_level("INFO"):
        trainer.train()
    assert trainer.bare_optimizer.perturb.name == "in_place"
    assert "perturb: in_place (the same perturbed loss" in caplog.text


def test_a_composed_method_trains(flags, tmp_path):
    parts = ["directions=low_rank(2)", "estimator=one_sided(1e-3, 8)", "update=adam"]
    extra = ["--method", "zeroth_order", "--save_strategy", "journal", "--method_args", *parts]
    assert main(["finetune", *flags, *extra]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["forwards_per_step"], metrics["forwards"]) == (9, 6 * 9)


def test_method_args_are_in_the_record(tmp_path):
    """The record held the method's default where --method_args had set another value."""
    config = ZOConfig(output_dir=str(tmp_path), method_args=["momentum=0.5", "eps=1e-2"])
    settings = resolve(config, trained="LoRA", num_examples=100)
    assert (settings["momentum"], settings["eps"]) == (0.5, 0.01)
    assert settings.setting("eps").source == "user"
    options = settings.arguments().method_options()
    assert (options["momentum"], options["eps"]) == (0.5, 0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method_args": ["eps=1e-2"], "eps": 1e-3}, "eps is given twice"),
        ({"method_args": ["seed=3"]}, "set seed"),
        ({"method_args": ["lr=0.5"]}, "set learning_rate"),
    ],
)
def test_a_setting_given_in_two_places_is_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        resolve(ZOConfig(output_dir=str(tmp_path), **options), trained="LoRA", num_examples=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"eps": 0.0}, "eps must be"),
        ({"method_args": ["momentum=2"]}, "momentum must be"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be"),
        ({"method": "zeroth_order", "method_args": ["directions=lowrnk(2)"]}, "choose one of"),
        ({"method": "zeroth_order", "method_args": ["update=adam + sign"]}, "one rule"),
        ({"method": "zo_adam", "perturb": "in_place:grid"}, "grid"),
        ({"method": "forward_gradient", "perturb": "in_forward"}, "leave out perturb"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(tmp_path, options, message):
    """A typo in a part was found after the zero-shot score, and locked the output folder."""
    with pytest.raises(UsageError, match=message):
        resolve(ZOConfig(output_dir=str(tmp_path), **options), trained="LoRA", num_examples=100)


@pytest.mark.parametrize("name", ["tensorbord", "", ["none", "nowhere"]])
def test_trackers_that_do_not_exist_are_named(name, tmp_path):
    with pytest.raises(UsageError, match=r"report_to (knows no|is empty)"):
        ZOConfig(output_dir=str(tmp_path), report_to=name)


@pytest.mark.parametrize(
    ("method", "pair", "message"),
    [
        ("mezo", "num_perturbations=3.0", "Option num_perturbations is a whole number, not '3.0'."),
        ("mezo", "total_steps=x", "Option total_steps is a whole number, not 'x'."),
        ("mezo", "total_steps=2.5", "Option total_steps is a whole number, not '2.5'."),
        ("kerzoo", "clip_radius=abc", "Option clip_radius is a number, not 'abc'."),
        ("kerzoo", "kernel_order=2.5", "Option kernel_order is a whole number, not '2.5'."),
        ("kerzoo", "kernel_constant=nan", "finite and not zero, not nan."),
        ("kerzoo", "kernel_constant=inf", "finite and not zero, not inf."),
        ("kerzoo", "radius=inf", "radius must be positive, not inf"),
        ("lozo", "refresh=0", "refresh must be a whole number of at least 1, not 0."),
        ("lozo_m", "refresh=0", "refresh must be a whole number of at least 1, not 0."),
        ("lozo", "rank=1.5", "Option rank is a whole number, not '1.5'."),
        ("lozo", "most_square=yes", "Option most_square is true or false, not 'yes'."),
        ("zeroth_order", "estimator=two_point(1e-3, 2.0)", "num_perturbations must be a whole number"),
        ("zeroth_order", "directions=orthogonal(4.5)", "at least 1, not 4.5."),
        ("zeroth_order", "directions=3", "'3' is not of the form name"),
    ],
)
def test_values_of_method_args_are_read_as_the_method_declares_them(method, pair, message, tmp_path):
    """Where the default was None, any text was taken, and the run failed in the middle, or with a traceback."""
    with pytest.raises(UsageError, match=re.escape(message)):
        resolve(ZOConfig(output_dir=str(tmp_path), method=method, method_args=[pair]), trained="LoRA", num_examples=9)


def test_options_without_a_default_are_read_as_numbers_or_none():
    assert read_pairs(["total_steps=9", "clip_radius=2", "clip=none", "kernel_constant=3"], "kerzoo") == {
        "total_steps": 9,
        "clip_radius": 2.0,
        "clip": "none",
        "kernel_constant": 3.0,
    }
    assert read_pairs(["total_steps=none"], "kerzoo") == {"total_steps": None}
    assert read_pairs(["directions=none", "update=adam"], "zeroth_order") == {"directions": None, "update": "adam"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_perturbations": 2.0}, "num_perturbations must be a whole number, not 2.0: write 2."),
        ({"max_steps": 1000.0}, "max_steps must be a whole number, not 1000.0: write 1000."),
        ({"per_device_train_batch_size": "4"}, "per_device_train_batch_size must be a whole number, not '4'."),
        ({"seed": 1.5}, "seed must be a whole number from 0 to 4294967295, not 1.5."),
        ({"eps": True}, "eps must be positive, not True."),
        ({"method_args": [3]}, "method_args is a list of key=value texts, not [3]."),
        ({"method_args": 3}, "method_args is a list of key=value texts, not 3."),
        ({"overwrite_output_dir": "false"}, "overwrite_output_dir must be true or false, not 'false'."),
        ({"freeze_vectors": "yes"}, "freeze_vectors must be true or false, not 'yes'."),
        ({"freeze_layers": None}, "freeze_layers is empty: give it a value, or leave it out."),
        ({"objective": None}, "objective is empty: give it a value, or leave it out."),
        ({"metric_for_best_model": 3}, "metric_for_best_model must be text, not 3."),
        ({"resume_from_checkpoint": [3]}, "resume_from_checkpoint must be text, not [3]."),
        ({"report_to": 3}, "report_to is a name or a list of names, not 3."),
    ],
)
def test_values_of_another_type_are_named(options, message, tmp_path):
    with pytest.raises(UsageError) as caught:
        ZOConfig(output_dir=str(tmp_path), **options)
    assert str(caught.value) == message
