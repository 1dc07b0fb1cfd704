"""``--method auto``: what it chooses, what a user can still set, and that the run is an ordinary one."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune import ZOConfig
from zokernel.finetune.settings.auto import POLYAK_SHARE, SCHEDULE, WALK, cooldown_steps, learning_rate
from zokernel.finetune.settings.resolve import count_steps, resolve
from zokernel.journal import Journal


def arguments_with(folder, **options):
    """Return the arguments of a run on a hundred examples."""
    return resolve(ZOConfig(output_dir=str(folder), **options), trained="full parameters", num_examples=100).arguments()


@pytest.mark.parametrize(("batch", "count"), [(None, 2), (2, 2), (16, 8)])
def test_directions_grow_with_the_batch(tmp_path, batch, count):
    config = arguments_with(tmp_path, method="auto", per_device_train_batch_size=batch)
    assert (config.method, config.lr_scheduler_type) == ("forward_difference", SCHEDULE)
    assert (config.per_device_train_batch_size, config.num_perturbations) == (batch or 4, count)


def test_lora_draws_directions_for_every_example(tmp_path):
    """The rate is that of a walk along as many directions as the batch has examples."""
    by_example = {"trained": "LoRA", "num_examples": 100, "by_example": True}
    steps = {"method": "auto", "max_steps": 50, "gradient_accumulation_steps": 2}
    config = resolve(ZOConfig(output_dir=str(tmp_path), **steps), **by_example).arguments()
    assert (config.num_perturbations, config.method_options()["per_example"]) == (1, True)
    assert config.learning_rate == pytest.approx(learning_rate("LoRA", num_perturbations=8, steps=50))
    shared = [
        {**by_example, "by_example": False},
        {**by_example, "trained": "full parameters"},
    ]
    for case in shared:
        config = resolve(ZOConfig(output_dir=str(tmp_path), **steps), **case).arguments()
        assert (config.num_perturbations, config.method_options().get("per_example", False)) == (2, False)
    settings = ZOConfig(output_dir=str(tmp_path), **steps, method_args=["per_example=false"])
    config = resolve(settings, **by_example).arguments()
    assert (config.num_perturbations, config.method_options()["per_example"]) == (2, False)


def test_a_run_with_lora_takes_two_forwards_per_step(flags, tmp_path):
    assert main(["finetune", *flags, "--method", "auto", "--lora", "true"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["forwards_per_step"], metrics["forwards"]) == (2, 12)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    assert next(row["value"] for row in settings if row["name"] == "perturb") == "per_example"


def test_adapters_of_other_kinds_share_directions(flags, tmp_path):
    assert main(["finetune", *flags, "--method", "auto", "--lora", "true", "--use_dora", "true"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["forwards_per_step"] == 3


def test_settings_of_the_user_are_kept(tmp_path):
    options = {"num_perturbations": 5, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 3}
    config = arguments_with(tmp_path, method="auto", **options)
    assert {name: getattr(config, name) for name in options} == options


def test_other_methods_keep_their_defaults(tmp_path):
    config = arguments_with(tmp_path)
    assert (config.per_device_train_batch_size, config.lr_scheduler_type) == (16, "constant")
    assert (config.num_perturbations, config.method) == (1, "mezo")


@pytest.mark.parametrize(
    ("method", "full", "lora"),
    [
        ("mezo", 1e-5, 1e-3),
        ("grzo", 1e-6, 1e-5),
        ("r_adazo", 1e-5, 1e-3),
        ("es", 5e-4, 1e-3),
        ("eggroll", 5e-4, 1e-3),
        ("spsa_1_5", 5e-4, 1e-3),
        ("fzoo", 5e-5, 1e-3),
        ("zo_muon", 1e-2, 1e-2),
        ("adamw", 1e-5, 1e-4),
        ("sgd", 1e-3, 1e-2),
    ],
)
def test_a_rate_that_is_a_distance_is_the_methods_own(tmp_path, method, full, lora):
    """Z-scores, whitened slopes and orthogonal factors have a size of their own: 1e-5 would be no step."""
    config = ZOConfig(output_dir=str(tmp_path), method=method)
    rates = [resolve(config, trained=t, num_examples=100)["learning_rate"] for t in ("full parameters", "LoRA")]
    assert rates == [full, lora]
    plain = ZOConfig(output_dir=str(tmp_path), method="grzo", method_args=["whiten=false"])
    assert resolve(plain, trained="LoRA", num_examples=100)["learning_rate"] == 1e-3


def test_slopes_are_normalised_unless_told_otherwise(tmp_path):
    options = arguments_with(tmp_path, method="auto").method_options()
    assert (options["normalize"], options["polyak_share"]) == (True, POLYAK_SHARE)
    config = arguments_with(tmp_path, method="auto", method_args=["polyak_share=inf"])
    assert config.method_options()["polyak_share"] == math.inf
    assert arguments_with(tmp_path, method="auto", method_args=["beta=0.5"]).method_options()["beta"] == 0.5
    settings = {"method_args": ["normalize=false"], "learning_rate": 1e-5}
    assert arguments_with(tmp_path, method="auto", **settings).method_options()["normalize"] is False
    with pytest.raises(UsageError, match="give learning_rate too"):
        arguments_with(tmp_path, method="auto", method_args=["normalize=false"])


@pytest.mark.parametrize("schedule", [SCHEDULE, "linear", "cosine", "constant"])
@pytest.mark.parametrize(("count", "steps"), [(2, 27), (8, 300)])
def test_a_walk_at_the_default_rate_goes_as_far_in_any_run(count, steps, schedule):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(
        [torch.zeros(1)], lr=learning_rate("LoRA", num_perturbations=count, steps=steps, schedule=schedule)
    )
    schedule_options = (
        {"num_decay_steps": cooldown_steps(steps), "decay_type": "linear"} if schedule == SCHEDULE else None
    )
    scheduler = get_scheduler(schedule, optimizer, 0, steps, schedule_options)
    rates = torch.empty(steps)
    for step in range(steps):
        rates[step] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    # Normalised slopes of independent directions: each has mean square one, and z is +1 or -1.
    slopes = torch.randn(4000, steps, count)
    distances = (slopes.mean(-1) * rates).sum(-1)
    # 4000 walks know their mean square within 4 * sqrt(2 / 4000) = 9 %; the sum over t is m T within 3 / 2T = 6 %.
    assert float(distances.square().mean().sqrt()) == pytest.approx(WALK["LoRA"], rel=0.08)


def test_steps_are_counted_from_epochs_if_need_be(tmp_path):
    assert count_steps(70, 3, 8, 1000) == 70
    assert count_steps(-1, 3, 8, 100) == math.ceil(300 / 8)
    epochs = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    rate = learning_rate("full parameters", num_perturbations=2, steps=math.ceil(300 / 8))
    assert arguments_with(tmp_path, method="auto", **epochs).learning_rate == pytest.approx(rate)


def run(flags, *extra):
    assert main(["finetune", *flags, "--method", "auto", *extra]) == 0


def test_a_run_records_what_was_chosen(flags, tmp_path, caplog):
    index = flags.index("--learning_rate")
    run([*flags[:index], *flags[index + 2 :]])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["method"], metrics["forwards_per_step"], metrics["forwards"]) == ("forward_difference", 3, 18)
    rate = learning_rate("full parameters", num_perturbations=2, steps=6)
    assert metrics["learning_rate"] == pytest.approx(rate)
    # It stays for three fifths of the steps and falls to zero over the others, of which the first is still whole.
    expected = [rate * share for share in (1, 1, 1, 1, 2 / 3, 1 / 3)]
    rates = [step.learning_rates[0] for step in Journal.read(tmp_path / "run").steps]
    assert rates == pytest.approx(expected)
    run([*flags[:index], *flags[index + 2 :]])  # the same command again: finished, nothing is done
    assert "already holds this run, finished" in caplog.text


def test_an_adapter_is_rebuilt_from_its_journal(flags, tmp_path, tiny_lm_path):
    run(flags, "--lora", "true", "--save_strategy", "journal", "--load_best_model_at_end", "false")
    folder, rebuilt = tmp_path / "run", tmp_path / "rebuilt"
    command = ["replay", "--base", str(tiny_lm_path), "--journal", str(folder), "--output_dir", str(rebuilt)]
    assert main(command) == 0
    actual, expected = (load_file(place / "adapter_model.safetensors") for place in (rebuilt, folder))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
