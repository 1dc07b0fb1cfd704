"""No token, key or password that was given to a run is found in any file of its folder."""

from __future__ import annotations

import importlib.util
import json
import logging
import shlex
import sys

import pytest

from zokernel.cli import load, main
from zokernel.commands.messages import new_handler
from zokernel.errors import MissingDependencyError, UsageError
from zokernel.finetune import load_predictor
from zokernel.finetune.rewards.functions import load_reward
from zokernel.secrets import hide_in_text, hide_in_values, hide_in_words, is_secret

SECRET = "Marker-of-a-secret-7351"


def files_with(folder, secret):
    paths = [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    return [str(path.relative_to(folder)) for path in paths]


@pytest.mark.parametrize("way", ["flag", "dash", "equals", "file"])
def test_a_token_reaches_no_file_of_the_run(way, flags, tmp_path, capsys, caplog):
    token_flags = {
        "flag": ["--hub_token", SECRET],
        "dash": ["--hub-token", SECRET],
        "equals": [f"--hub_token={SECRET}"],
        "file": ["--config", str(tmp_path / "flags.yaml")],
    }[way]
    (tmp_path / "flags.yaml").write_text(f"hub_token: {SECRET}\n")
    if importlib.util.find_spec("tensorboard"):
        token_flags += ["--report_to", "tensorboard"]
    saving = ["--save_strategy", "steps", "--save_steps", "2", "--load_best_model_at_end", "false"]
    saving += ["--run_name", f"https://me:{SECRET}@host/run", "--save_total_limit", "2"]
    assert main(["finetune", *flags, *token_flags, *saving, "--max_steps", "2"]) == 0
    folder = tmp_path / "run"
    assert len(list(folder.rglob("*"))) > 10
    assert files_with(folder, SECRET) == []
    out = capsys.readouterr()
    assert SECRET not in out.out + out.err + caplog.text
    command = json.loads((folder / "metrics.json").read_text())["command"]
    if way != "file":
        assert "<hub_token>" in command  # what somebody has to fill in
    assert main(["finetune", *flags, *token_flags, *saving, "--max_steps", "2"]) == 0  # the same run, finished


def test_the_command_itself_keeps_the_token():
    args = load("finetune")[1].parse(["--hub_token", SECRET, "--output_dir", "x"])
    assert args.hub_token == SECRET
    assert args.command_line == "zokernel finetune --hub_token '<hub_token>' --output_dir x"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("hub_token", "token", "wandb-api-key", "api_key", "password", "db_passwd")),
        *((name, True) for name in ("client_secret", "access_key", "HF_TOKEN", "credentials")),
        *((name, False) for name in ("max_new_tokens", "num_virtual_tokens", "special_tokens_map", "tokenizer")),
        *((name, False) for name in ("include_num_input_tokens_seen", "label_column", "keyword", "secretary")),
    ],
)
def test_names_of_secrets(name, secret):
    assert is_secret(name) is secret


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--x", f"token={SECRET}"], ["--x", "token=<secret>"]),
        (["--x", f'{{"api_key": "{SECRET}", "n": 1}}'], ["--x", '{"api_key": "<secret>", "n": 1}']),
        (["--x", f"https://me:{SECRET}@host/a"], ["--x", "https://<login>@host/a"]),
        (["--x=hf_" + "a" * 34], ["--x=<token>"]),
        (["--template", "Token: {sentence} It was"], ["--template", "Token: {sentence} It was"]),
        (["--hub_token", SECRET, "--seed", "1"], ["--hub_token", "<hub_token>", "--seed", "1"]),
        (
            ["--reward_function", f"command:env JUDGE_API_KEY={SECRET} ./judge --token {SECRET} --top 3"],
            ["--reward_function", "command:env 'JUDGE_API_KEY=<secret>' ./judge --token '<token>' --top 3"],
        ),
        (
            [f"--reward_function=command:sh -c './judge --api-key {SECRET}'"],
            ["--reward_function=command:sh -c " + shlex.quote("./judge --api-key '<api_key>'")],
        ),
        (["--reward_function", "command:./judge  --ask 'Is it good?'"],) * 2,
        (["--method_args", "radius=0.5", "key=3"], ["--method_args", "radius=0.5", "key=3"]),
    ],
)
def test_command_lines_without_secrets(words, expected):
    assert hide_in_words(words) == expected


def test_settings_without_secrets():
    values = {
        "hub_token": SECRET,
        "data": {"password": SECRET, "rows": [f"token={SECRET}", 3]},
        "lr": 1e-3,
        "key": None,
    }
    hidden = {"hub_token": "<hub_token>", "data": {"password": "<password>", "rows": ["token=<secret>", 3]}}
    assert hide_in_values(values) == hidden | {"lr": 1e-3, "key": None}
    assert hide_in_text("see github_pat_" + "a1" * 12) == "see <token>"


def test_the_secrets_of_a_reward_command_reach_no_setting_name_or_error(tmp_path):
    command = f"command:{sys.executable} judge.py --token {SECRET}"
    hidden = f"command:{sys.executable} judge.py --token '<token>'"
    assert hide_in_values({"reward_function": [command, "json"]}) == {"reward_function": [hidden, "json"]}
    assert load_reward(command).name == hidden
    with pytest.raises(UsageError, match="is not a command") as error:
        load_reward(f"command:judge --token {SECRET} '")
    assert SECRET not in str(error.value)


TOKEN = "hf_" + "Ab1" * 12


@pytest.mark.parametrize("kind", ["prompt", "lora", "chat"])
def test_a_token_within_a_setting_reaches_no_file_and_no_line(kind, flags, tmp_path, capsys, caplog):
    words, address = list(flags), f"https://me:{SECRET}@x@host/run"
    if kind == "chat":
        path, start = tmp_path / "chats.jsonl", words.index("--train_file")
        row = [{"role": "user", "content": f"Say {TOKEN}"}, {"role": "assistant", "content": f"{TOKEN}."}]
        path.write_text((json.dumps({"messages": row}) + "\n") * 20)
        words[start : words.index("--output_dir")] = ["--train_file", str(path)]
        template = f"{{# {TOKEN} #}}{{% for m in messages %}}{TOKEN} {{{{ m['content'] }}}} {{% endfor %}}"
        words += ["--chat_template", template, "--assistant_only_loss", "false", "--max_new_tokens", "3"]
    else:
        words += ["--template", f"{TOKEN} {address} {{sentence}} It was", "--lora", str(kind == "lora").lower()]
        words += ["--num_demonstrations", "1"]
    words += ["--run_name", f"{address} {TOKEN}", "--hub_token", TOKEN, "--save_strategy", "steps", "--save_steps", "2"]
    assert main(["finetune", *words, "--max_steps", "2", "--load_best_model_at_end", "false"]) == 0
    folder = tmp_path / "run"
    names = {path.name for path in folder.rglob("*")}
    assert names > {"settings.json", "run.json", "journal.zkj", "README.md", "report.md", "training_args.json"}
    assert files_with(folder, SECRET) == files_with(folder, TOKEN) == []
    out = capsys.readouterr()
    output = out.out + out.err + caplog.text
    assert (SECRET in output, TOKEN in output) == (False, False)
    assert caplog.text.count("it is replaced by a placeholder in training and in every file") == 1
    placed = "chat_template.jinja" if kind == "chat" else "predictor.json"
    assert "<token>" in (folder / placed).read_text()
    row = "Hi" if kind == "chat" else {"sentence": "a good movie"}
    assert len(load_predictor(folder)([row])) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--train_file", f"https://me:{SECRET}@host/rows.csv"],
        ["--model_name_or_path", f"https://me:{SECRET}@host/model"],
        ["--dataset_name", f"https://me:{SECRET}@host/rows"],
        ["--adapter_name_or_path", f"https://me:{SECRET}@host/adapter"],
        ["--task_file", f"https://me:{SECRET}@host/task.yaml"],
        ["--config", f"https://me:{SECRET}@host/run.yaml"],
        ["--chat_template", f"https://me:{SECRET}@host/x.jinja"],
        ["--method", f"https://me:{SECRET}@host/method"],
        ["--hub_token", "x", SECRET],
    ],
)
def test_no_error_repeats_a_password(words, flags, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = flags
    if words[0] in ("--dataset_name", "--chat_template"):
        start = flags.index("--train_file")
        base = flags[:start] + flags[start + 6 :] if words[0] == "--dataset_name" else flags
    assert main(["finetune", *base, *words]) in (1, 2)
    output = capsys.readouterr()
    assert SECRET not in output.out + output.err
    unread = {
        "--hub_token": "The argument '<hub_token>' after --hub_token has no meaning here",
        "--chat_template": "--chat_template is for chats, instructions and texts",
    }
    assert unread.get(words[0], "<login>@host") in output.err


def test_errors_and_log_lines_hide_what_they_repeat(capsys):
    assert (
        str(UsageError(f"There is no file https://me:{SECRET}@host/a.")) == "There is no file https://<login>@host/a."
    )
    assert str(MissingDependencyError("x", "y", TOKEN)).startswith("<token> needs x")
    formatter = new_handler().formatter
    record = logging.LogRecord("zokernel", logging.INFO, "", 0, "from %s", (f"https://me:{SECRET}@host",), None)
    assert formatter.format(record) == "from https://<login>@host"


def test_columns_of_a_template_are_no_secrets():
    assert hide_in_values({"template": "token={word}"}) == {"template": "token={word}"}
    assert hide_in_text("ftp://me:a@b@host/x") == "ftp://<login>@host/x"
