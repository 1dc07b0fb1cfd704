"""``--push_to_hub`` uploads the finished folder once, and obstacles are reported before the run."""

from __future__ import annotations

import json
from pathlib import Path

from hub_data import tiny_model
from hub_runs import Run
from hub_server import Hub
from test_hub_errors import READER, ROWS, one_sentence

WRITER = "hf_writerwriterwriter"
FINISHED = {
    *("README.md", "report.md", "metrics.json", "loss.png", "steps.jsonl", "settings.json", "run.json"),
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("predictor.json", "training_args.json", "journal.zkj"),
}


def test_the_finished_folder_is_uploaded(hub: Hub, run: Run, tmp_path: Path):
    hub.users = {READER: ("ada", "read"), WRITER: ("bob", "write")}
    hub.add("models", "org/tiny", tiny_model(tmp_path / "model"))
    hub.add("models", "org/theirs", {}, owner="org")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def command(name: str, *flags: str) -> list[str]:
        words = ["finetune", "--output_dir", str(tmp_path / name), "--use_cpu", "true", "--max_steps", "2"]
        words += ["--template", "{sentence} It was", "--label_words", "bad", "good", "--precision", "fp32"]
        return [*words, "--train_file", str(rows), "--model_name_or_path", "org/tiny", *flags]

    push, token = ("--push_to_hub", "true"), ("--hub_token", WRITER)
    wrong = {
        push: ("--push_to_hub needs an access token", "'hf auth login'"),
        (*push, "--hub_token", READER): ("may read and not write",),
        (*push, "--hub_token", "hf_wrongwrongwrong"): ("does not accept your access token (--hub_token)",),
        (*push, *token, "--hub_model_id", "org/theirs"): ("does not allow this", "rights to write"),
        (*push, *token, "--hub_model_id", "org/new"): ("does not allow this", "rights to write"),
        (*push, *token, "--hub_strategy", "checkpoint"): ("--hub_strategy checkpoint", "finished folder"),
        (*push, *token, "--hub_always_push", "true"): ("--hub_always_push",),
        (*push, *token, "--do_train", "false"): ("--do_train false",),
        ("--hub_model_id", "bob/new"): ("--hub_model_id has no effect without --push_to_hub",),
    }
    steps = (
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--hub_model_id",
        "bob/mine",
        "--hub_private_repo",
        "true",
    )
    cases = [command("mine", *push, *token, *steps), command("later"), command("later", *push, *token)]
    results = run(hub.endpoint, *[command("wrong", *flags) for flags in wrong], *cases)
    for result, expected in zip(results[: len(wrong)], wrong.values(), strict=True):
        one_sentence(result, *expected)
    assert [result["code"] for result in results[len(wrong) :]] == [0, 0, 0], results[len(wrong) :]

    mine, later = hub.repos["models", "bob/mine"], hub.repos["models", "bob/later"]
    assert sorted(mine.uploads) == sorted(FINISHED), "each file once"
    assert mine.private
    assert not later.private
    assert sorted(later.uploads) == sorted(FINISHED), "a finished run is uploaded by the same command"
    for name, repository in (("mine", mine), ("later", later)):
        for path in FINISHED:
            assert repository.files[path] == (tmp_path / name / path).read_bytes()
            assert WRITER.encode() not in repository.files[path]
    assert (tmp_path / "mine" / "checkpoint-2").is_dir(), "checkpoints stay"
    assert not any(WRITER in result["output"] for result in results)
    assert ("models", "org/new") not in hub.repos


def test_files_of_an_earlier_run_go_in_the_commit_of_the_next(hub: Hub, run: Run, tmp_path: Path):
    hub.users = {WRITER: ("bob", "write")}
    hub.add("models", "org/tiny", tiny_model(tmp_path / "model"))
    mine = {"notes.md": "mine", "eval/model.safetensors": "theirs", ".gitattributes": ""}
    older = {
        "model.safetensors": "old",
        "config.json": "{}",
        "run.json": "{}",
        "model-00001-of-00002.safetensors": "old",
    }
    hub.add("models", "bob/ours", mine | older, owner="bob")
    hub.add("models", "bob/theirs", mine | {"model.safetensors": "theirs", "config.json": "{}"}, owner="bob")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def command(name: str, *flags: str) -> list[str]:
        words = ["finetune", "--output_dir", str(tmp_path / name), "--use_cpu", "true", "--max_steps", "2"]
        words += ["--template", "{sentence} It was", "--label_words", "bad", "good", "--precision", "fp32"]
        words += ["--train_file", str(rows), "--model_name_or_path", "org/tiny", "--push_to_hub", "true"]
        return [*words, "--hub_token", WRITER, "--hub_model_id", f"bob/{name}", *flags]

    lora = ("--lora", "true", "--lora_target_modules", "all-linear")
    ours, repeated = run(hub.endpoint, command("ours", *lora), command("ours", *lora))
    (theirs,) = run(hub.endpoint, command("theirs", *lora))  # log lines are those of a process's first command
    assert [result["code"] for result in (ours, theirs, repeated)] == [0, 0, 0], (ours, theirs, repeated)
    deleted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors"]
    repository = hub.repos["models", "bob/ours"]
    assert sorted(repository.deleted) == deleted
    assert repository.commits == 2, "the deletion is part of the upload; the same run again deletes nothing"
    assert mine.keys() <= repository.files.keys()
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json"} <= repository.files.keys()
    assert "deleted by the upload, since they belong to an earlier run: " in ours["output"]
    other = hub.repos["models", "bob/theirs"]
    assert other.deleted == []
    assert other.files["model.safetensors"] == b"theirs"
    assert (
        "no run of zokernel wrote, and they stay beside the new ones: config.json, model.safetensors."
        in theirs["output"]
    )
