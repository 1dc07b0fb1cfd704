"""No token, key or password that was given to a run is found in any file of its folder."""

from __future__ import annotations

import importlib.util
import json

import pytest

from zokernel.cli import load, main
from zokernel.secrets import hide_in_text, hide_in_values, hide_in_words, is_secret

SECRET = "Marker-of-a-secret-7351"


def files_with(folder, secret):
    found = [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    return [str(path.relative_to(folder)) for path in found]


@pytest.mark.parametrize("way", ["flag", "dash", "equals", "file"])
def test_a_token_reaches_no_file_of_the_run(way, flags, tmp_path, capsys, caplog):
    given = {
        "flag": ["--hub_token", SECRET],
        "dash": ["--hub-token", SECRET],
        "equals": [f"--hub_token={SECRET}"],
        "file": ["--config", str(tmp_path / "flags.yaml")],
    }[way]
    (tmp_path / "flags.yaml").write_text(f"hub_token: {SECRET}\n")
    if importlib.util.find_spec("tensorboard"):
        given += ["--report_to", "tensorboard"]
    saving = ["--save_strategy", "steps", "--save_steps", "2", "--load_best_model_at_end", "false"]
    saving += ["--run_name", f"https://me:{SECRET}@host/run", "--save_total_limit", "2"]
    assert main(["finetune", *flags, *given, *saving, "--max_steps", "2"]) == 0
    folder = tmp_path / "run"
    assert len(list(folder.rglob("*"))) > 10
    assert files_with(folder, SECRET) == []
    out = capsys.readouterr()
    assert SECRET not in out.out + out.err + caplog.text
    command = json.loads((folder / "metrics.json").read_text())["command"]
    if way != "file":
        assert "<hub_token>" in command  # what somebody has to fill in
    assert main(["finetune", *flags, *given, *saving, "--max_steps", "2"]) == 0  # the same run, finished


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
    ("words", "shown"),
    [
        (["--x", f"token={SECRET}"], ["--x", "token=<secret>"]),
        (["--x", f'{{"api_key": "{SECRET}", "n": 1}}'], ["--x", '{"api_key": "<secret>", "n": 1}']),
        (["--x", f"https://me:{SECRET}@host/a"], ["--x", "https://<login>@host/a"]),
        (["--x=hf_" + "a" * 34], ["--x=<token>"]),
        (["--template", "Token: {sentence} It was"], ["--template", "Token: {sentence} It was"]),
        (["--hub_token", SECRET, "--seed", "1"], ["--hub_token", "<hub_token>", "--seed", "1"]),
        (["--method_args", "radius=0.5", "key=3"], ["--method_args", "radius=0.5", "key=3"]),
    ],
)
def test_command_lines_without_secrets(words, shown):
    assert hide_in_words(words) == shown


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
