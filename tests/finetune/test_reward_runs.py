"""Whole runs on rewards: prompts as texts and as chats, resumed and replayed to the same bits, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from interrupted import ctrl_c_in
from safetensors.torch import load_file

from zokernel.cli import main
from zokernel.commands.messages import new_handler
from zokernel.commands.report import read
from zokernel.finetune.rewards import generate
from zokernel.journal import Journal


def without(flags, *names):
    places = [flags.index(name) for name in names]
    return [word for n, word in enumerate(flags) if n not in places and n - 1 not in places]


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def setting(folder, name):
    rows = json.loads((folder / "settings.json").read_text())["settings"]
    return next(row["value"] for row in rows if row["name"] == name)


def same(left, right, name="model.safetensors"):
    left, right = load_file(left / name), load_file(right / name)
    return all(torch.equal(left[key], right[key]) for key in left)


def test_a_reward_rises_and_the_report_says_so(reward_flags, tmp_path):
    extra = ["--max_steps", "16", "--reward_function", f"{tmp_path}/judge.py:high", "--reward_function", "length:30"]
    assert (
        main(
            [
                "finetune",
                *without(reward_flags, "--reward_function"),
                *extra,
                "--reward_weights",
                "1",
                "--reward_weights",
                "0.1",
            ]
        )
        == 0
    )
    metrics = metrics_of(tmp_path / "run")
    before, after = metrics["before"], metrics["after"]
    assert after["reward"] > before["reward"] + 0.1
    assert before["loss"] == pytest.approx(-before["reward"], rel=1e-5)
    assert before["reward_error"] >= 0
    assert "pass_rate" not in before
    assert metrics["metric"] == "reward"
    assert metrics["forwards"] == 16 * 12
    assert setting(tmp_path / "run", "perturb") == "stacked"
    assert [sample["answer"][:7] for sample in metrics["samples"]] == ["level: "] * 3
    report = (tmp_path / "run" / "report.md").read_text()
    assert (
        f"Reward on {metrics['num_test']} examples the run never trained on went from {before['reward']:.3f}" in report
    )
    assert "(nats)" not in report
    assert f"({after['reward'] - before['reward']:+.3f})" in report


@pytest.mark.parametrize("lora", [True, False])
def test_populations_answer_chats_in_one_generate_and_sample(reward_flags, tmp_path, monkeypatch, lora):
    rows = []
    real = generate.generate
    monkeypatch.setattr(
        "zokernel.finetune.rewards.objective.generate",
        lambda *args, copies=1, **kwargs: (
            rows.append((copies, len(kwargs["rows"]))) or real(*args, copies=copies, **kwargs)
        ),
    )
    extra = ["--train_file", str(tmp_path / "chats.jsonl"), "--num_generations", "2", "--temperature", "1.0"]
    extra += ["--max_steps", "2", "--lora", "true"] if lora else ["--max_steps", "2", "--method", "eggroll"]
    extra += ["--per_device_eval_batch_size", "16", "--per_device_train_batch_size", "2"]
    assert main(["finetune", *reward_flags, *extra]) == 0
    assert setting(tmp_path / "run", "perturb") == "stacked"
    training = [found for found in rows if found[0] > 1 and found[1] > 1]
    # 12 members with 2 prompts of 2 samples: at most 16 rows are 4 members.
    assert training == [(4, 4)] * 6


def test_every_kind_of_method_learns_from_rewards(reward_flags, tmp_path):
    for method in ("mezo", "grzo", "forward_difference", "rloo", "zo_sign"):
        out = tmp_path / method
        options = ["--method", method, "--max_steps", "2", "--output_dir", str(out), "--num_perturbations", "2"]
        options += ["--method_args", "whiten=false"] if method == "grzo" else []
        assert main(["finetune", *reward_flags, *options]) == 0
        assert Journal.read(out).num_steps == 2
        assert setting(out, "perturb") == ("per_example" if method == "grzo" else "stacked")


def test_members_that_answer_one_after_the_other_earn_the_same(reward_flags, tmp_path):
    extra = ["--max_steps", "1", "--num_generations", "2", "--temperature", "1.0"]
    for perturb in ("stacked", "in_place:copy", "in_forward"):
        out = str(tmp_path / perturb)
        assert main(["finetune", *reward_flags, *extra, "--perturb", perturb, "--output_dir", out]) == 0
    first = Journal.read(tmp_path / "stacked").steps[0].losses
    assert len(set(first)) > 1
    assert Journal.read(tmp_path / "in_place:copy").steps[0].losses == pytest.approx(first, abs=1e-6)
    assert Journal.read(tmp_path / "in_forward").steps[0].losses == pytest.approx(first, abs=1e-6)


def test_the_reason_why_members_cannot_answer_together_names_a_flag(reward_flags, caplog):
    caplog.set_level("INFO", logger="zokernel")
    assert main(["finetune", *reward_flags, "--max_steps", "1", "--lora", "true", "--use_dora", "true"]) == 0
    record = next(record for record in caplog.records if "one member after the other" in record.getMessage())
    assert "no form for several copies of the weights: use perturb='in_place')." in record.getMessage()
    formatter = new_handler().formatter
    assert "no form for several copies of the weights: use --perturb in_place)." in formatter.format(record)


def test_a_run_is_resumed_and_replayed_to_the_same_bits_without_generation(reward_flags, tmp_path, monkeypatch):
    whole = [*reward_flags, "--save_strategy", "journal", "--load_best_model_at_end", "false"]
    whole += ["--num_generations", "2", "--temperature", "1.0", "--method", "eggroll", "--num_perturbations", "2"]
    assert main(["finetune", *whole]) == 0
    cut = [*whole, "--output_dir", str(tmp_path / "cut")]
    with ctrl_c_in(monkeypatch, step=4):
        assert main(["finetune", *cut]) == 130
    calls = tmp_path / "calls.txt"
    calls.unlink()
    assert main(["finetune", *cut]) == 0
    assert same(tmp_path / "cut", tmp_path / "run")
    # Four members of 4 prompts with 2 answers, of which 32 rows are one generate; 4 steps are taken, 4 replayed.
    assert calls.read_text().splitlines().count("32") == 4
    base, out = reward_flags[1], tmp_path / "rebuilt"
    calls.unlink()
    assert main(["replay", "--base", base, "--journal", str(tmp_path / "run"), "--output_dir", str(out)]) == 0
    assert not calls.exists()
    assert same(out, tmp_path / "run")


def test_a_reward_that_fails_in_a_run_loses_nothing(reward_flags, tmp_path, capsys):
    judge = tmp_path / "judge.py"
    right = judge.read_text()
    scored = "    return [sum(ids)"
    assert scored in right
    failing = scored.replace("return [", "global count; count += 1; return [float('nan') if count > 6 else ")
    judge.write_text("count = 0\n" + right.replace(scored, failing))
    assert main(["finetune", *reward_flags, "--load_best_model_at_end", "false"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'The reward high returned nan for a completion of the row {"prompt"' in error
    num_steps = Journal.read(tmp_path / "run").num_steps
    assert 1 <= num_steps < 8
    words = (
        f"The run stopped after step {num_steps} of 8, with an error: {error.removeprefix('zokernel: error: ')} Once"
    )
    assert read(tmp_path / "run").alert == f"{words} that is mended, the same command continues it."
    judge.write_text(right)
    assert main(["finetune", *reward_flags, "--load_best_model_at_end", "false"]) == 0
    assert "stopped_by" not in json.loads((tmp_path / "run" / "run.json").read_text())
    whole = [*reward_flags, "--load_best_model_at_end", "false", "--output_dir", str(tmp_path / "whole")]
    assert main(["finetune", *whole]) == 0
    assert same(tmp_path / "run", tmp_path / "whole")


def test_pass_rates_and_evaluation_alone(reward_flags, tmp_path):
    judge = f"{tmp_path}/judge.py:any_good"
    flags = [*without(reward_flags, "--reward_function"), "--reward_function", judge]
    assert main(["finetune", *flags, "--do_train", "false"]) == 0
    before = metrics_of(tmp_path / "run")["before"]
    assert before["pass_rate"] == before["reward"] == -before["loss"]
    assert f"{100 * before['pass_rate']:.1f} % pass" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--objective", "cross_entropy"], "--reward_function is for --objective reward"),
        (["--num_generations", "4"], "are all the same at --temperature 0"),
        (["--reward_weights", "1", "2"], "1 reward functions and 2 --reward_weights"),
        (["--reward_function", "exact_match:gold"], "reads the column 'gold', and the rows have prompt, level, review"),
        (["--reward_function", "jsn"], "There is no reward 'jsn'"),
        (["--perturb", "sideways"], "perturb must be one of"),
        (["--template", "{level}"], "--template does not go with --objective reward"),
        (["--packing", "true"], "--packing is for chats"),
        (["--calibrate", "true"], "--calibrate compares label words"),
        (["--chat_template", "chatml"], "does not apply to prompts that are plain texts"),
        (["--prompt_tuning", "true"], "--prompt_tuning puts virtual tokens"),
        (["--temperature", "-1"], "temperature must be"),
        (["--beta", "-0.1"], "beta must be at least 0, not -0.1"),
        (["--num_generations", "0"], "num_generations must be"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(wrong, message, reward_flags, tmp_path, capsys):
    extra = []
    if "cross_entropy" in wrong:
        (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n' * 6)
    assert main(["finetune", *reward_flags, *extra, *wrong]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_rows_without_a_prompt_are_named(reward_flags, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text('{"prompt": "a"}\n{"prompt": [{"content": "b"}]}\n')
    assert main(["finetune", *reward_flags]) == 2
    assert "The train split, line 2: A message in 'prompt' has no 'role'" in capsys.readouterr().err
    (tmp_path / "texts.jsonl").write_text('{"question": "a"}\n')
    assert main(["finetune", *reward_flags]) == 2
    assert "has no row with a prompt (its columns are question)" in capsys.readouterr().err


def test_first_order_methods_are_refused_on_rewards(reward_flags, capsys):
    flags = without(reward_flags, "--method", "--num_perturbations", "--eps")
    assert main(["finetune", *flags, "--method", "adamw"]) == 2
    assert "reward has no gradient for adamw to follow" in capsys.readouterr().err


def test_trainers_that_sample_point_to_rewards():
    from transformers import Trainer

    from zokernel.errors import UsageError
    from zokernel.finetune import zeroth_order

    class GRPOTrainer(Trainer):
        def _generate_and_score_completions(self, inputs):
            return inputs

    with pytest.raises(UsageError, match=r"GRPOTrainer samples .*--objective reward --reward_function file.py:name"):
        zeroth_order(GRPOTrainer)
