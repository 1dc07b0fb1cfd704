"""What the hub refuses, or fails to send, becomes one sentence that says what to do; models come before data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import pytest
from hub_data import tiny_model
from hub_runs import Run
from hub_server import Hub

READER = "hf_readerreaderreader"
ROWS = [{"sentence": f"word {number}", "label": number % 2} for number in range(20)]
WAIT = {"Retry-After": "120"}


def parquet() -> bytes:
    buffer = io.BytesIO()
    datasets.Dataset.from_list(ROWS).to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture
def filled(hub: Hub, tmp_path: Path) -> Hub:
    """A hub with repositories that fail in every way, each named after its own."""
    hub.users = {READER: ("ada", "read")}
    model, rows = tiny_model(tmp_path / "model"), parquet()
    data = {f"data/{split}-00000-of-00001.parquet": rows for split in ("train", "validation")}
    two = {f"{name}/train-00000-of-00001.parquet": rows for name in "ab"}
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in "ab")
    pickled = {name: content for name, content in model.items() if not name.endswith(".safetensors")}
    ways: dict[str, dict[str, Any]] = {
        "gated": {"gated": True},
        "private": {"private": True, "owner": "bob"},
        "busy": {"status": 429, "headers": WAIT},
        "down": {"status": 503},
        "cut": {"cuts": 99},
        "fine": {},
    }
    for name, options in ways.items():
        hub.add("models", f"org/{name}", model, **options)
        hub.add("datasets", f"org/{name}-rows", data, **options)
    hub.add("models", "org/pickled", pickled | {"pytorch_model.bin": b"pickle"})
    hub.add("datasets", "org/script-rows", {"script-rows.py": "raise RuntimeError", "README.md": "# Rows"})
    hub.add("datasets", "org/broken-rows", {"data/train-00000-of-00001.parquet": rows[: len(rows) // 2]})
    hub.add("datasets", "org/two-rows", two | {"README.md": f"---\nconfigs:\n{configs}---\n"})
    hub.add("datasets", "org/empty-rows", {"README.md": "# Nothing"})
    return hub


def command(folder: Path, model: str, rows: str, *flags: str) -> list[str]:
    words = ["finetune", "--output_dir", str(folder / "out"), "--overwrite_output_dir", "true", "--use_cpu", "true"]
    words += ["--template", "{sentence} It was", "--label_words", "bad", "good", "--do_train", "false"]
    return [*words, "--precision", "fp32", "--model_name_or_path", model, "--dataset_name", rows, *flags]


def one_sentence(result: dict[str, Any], *expected: str) -> None:
    """Check that a command failed with one sentence, the last line, that holds what is expected."""
    last_line = result["output"].strip().splitlines()[-1]
    assert result["code"] in (1, 2), result["output"]
    assert last_line.startswith("zokernel: error: ")
    assert last_line.endswith((".", ")."))
    assert "Traceback" not in result["output"]
    assert all(word in last_line for word in expected), last_line
    assert result["waited"] < 20  # seconds, which the child is spared


def test_what_the_hub_refuses_is_one_sentence(filled: Hub, run: Run, tmp_path: Path):
    page, fine = f"{filled.endpoint}/org/gated", "org/fine-rows"
    models = {
        ("org/gated",): ("gated", f"ask for access at {page}", "'hf auth login'"),
        ("org/private",): ("The hub has no model 'org/private'", "private"),
        ("org/fin",): ("no model 'org/fin' (close: org/fine)",),
        ("nowhere",): ("The hub has no model 'nowhere'",),
        ("org/fine", "--model_revision", "v9"): ("has no revision 'v9': there are main.",),
        ("org/busy",): ("too many requests", "120 s"),
        ("org/down",): ("503 Service Unavailable (The server is tired)", "HF_HUB_OFFLINE=1"),
        ("org/fine", "--adapter_name_or_path", "org/gated"): ("Model 'org/gated' is gated",),
        ("org/pickled",): ("org/pickled", "pytorch_model.bin", "safetensors"),
    }
    rows = {
        ("org/gated-rows",): ("gated", f"{filled.endpoint}/datasets/org/gated-rows", "'hf auth login'"),
        ("org/fine-row",): ("no data set 'org/fine-row' (close: org/fine-rows",),
        ("org/fine-rows", "--dataset_revision", "v9"): ("has no revision 'v9': there are main.",),
        ("org/busy-rows",): ("too many requests", "120 s"),
        ("org/down-rows",): ("503 Service Unavailable (The server is tired)",),
        ("org/script-rows",): ("made by a script (script-rows.py)", "--dataset_revision refs/convert/parquet"),
        ("org/broken-rows",): ("damaged Parquet file",),
        ("org/two-rows",): ("several configurations", "--dataset_config (a, b)"),
        ("org/two-rows", "--dataset_config", "c"): ("no configuration 'c': there are a, b.",),
        ("org/empty-rows",): ("holds no files",),
        ("not an id!",): ("'organization/name'",),
    }
    cases: list[Any] = [command(tmp_path, model, fine, *flags) for model, *flags in models]
    cases += [command(tmp_path, "org/fine", name, *flags) for name, *flags in rows]
    words = ["--x_o", "a", "--x_u", "b", "--label_words", "bad", "good"]
    cases.append(["kernel", "--model_name_or_path", "org/down", *words, "--output_dir", str(tmp_path / "kernel")])
    other_command = ("503 Service Unavailable",)
    token, without = command(tmp_path, "org/fine", fine), len(cases)
    cases += [{"HF_TOKEN": "hf_wrongwrongwrongwrong"}, token, {"HF_TOKEN": READER}]
    cases += [command(tmp_path, "org/gated", fine), command(tmp_path, "org/fine", "org/gated-rows")]
    may_not = "gated, and your account may not read it"
    with_token = [
        ("does not accept your access token (HF_TOKEN)", f"{filled.endpoint}/settings/tokens"),
        (may_not, f"ask for access at {page}"),
        (may_not, f"ask for access at {filled.endpoint}/datasets/org/gated-rows"),
    ]
    results = run(filled.endpoint, *cases)
    assert len(results) == without + len(with_token)
    for result, expected in zip(results, [*models.values(), *rows.values(), other_command, *with_token], strict=True):
        one_sentence(result, *expected)
        assert READER not in result["output"]
        assert "hf_wrong" not in result["output"]
    paths = [path for _, path, _ in filled.requests]
    first_rows = next(number for number, path in enumerate(paths) if "/datasets/" in path)
    assert any("org/down/" in path for path in paths[:first_rows]), "models are checked before data are read"


def test_a_lost_connection_and_what_is_cached(filled: Hub, run: Run, tmp_path: Path):
    cut = [command(tmp_path, "org/cut", "org/fine-rows"), command(tmp_path, "org/fine", "org/cut-rows")]
    other = command(tmp_path, "org/fine", "org/two-rows", "--dataset_config", "a")
    for kind, name in (("models", "org/cut"), ("datasets", "org/cut-rows")):
        filled.repos[kind, name].cuts = 7  # all tries of the first command, and the first of the next
    model, rows, *retries = run(filled.endpoint, *cut, *cut)
    one_sentence(model, "connection broke in the middle of a file", "model 'org/cut'", "repeat the command")
    one_sentence(rows, "connection broke in the middle of a file", "data set 'org/cut-rows'", "repeat the command")
    assert [result["code"] for result in retries] == [0, 0], retries

    count = len(filled.requests)
    *cached, missing = run(filled.endpoint, *cut, other, HF_HUB_OFFLINE="1")
    assert [result["code"] for result in cached] == [0, 0], cached
    one_sentence(missing, "Data set 'org/two-rows' is not in the cache", "HF_HUB_OFFLINE=1", "unset it")
    assert len(filled.requests) == count, "offline means offline"

    unreachable = "http://127.0.0.1:9"
    *cached, missing = run(unreachable, *cut, other)
    assert [result["code"] for result in cached] == [0, 0], cached
    output = "".join(result["output"] for result in cached)
    assert output.count(f"The hub {unreachable} cannot be reached") == 1
    assert "HF_HUB_OFFLINE=1 does so at once" in output
    assert all(result["waited"] < 15 for result in cached)
    one_sentence(missing, f"The hub {unreachable} cannot be reached", "data set 'org/two-rows'")


def test_a_full_disk_is_named(tmp_path: Path):
    from zokernel.data.hub import explain
    from zokernel.errors import RunError

    full = OSError(28, "No space left on device", str(tmp_path))
    explanation = explain(full, "org/fine")
    assert isinstance(explanation, RunError)
    message = f"The hub's cache cannot be written ({tmp_path}: No space left on device): free some"
    assert str(explanation).startswith(message)


def test_a_hint_is_left_out_if_the_hub_does_not_answer_and_a_mistake_is_not_hidden(monkeypatch):
    from zokernel.data.hub_repository import Repository
    from zokernel.data.hub_requests import transport_error

    repository = Repository("org/fine")
    hints = {
        "list_repo_refs": repository.revisions,
        "list_models": repository.close_names,
        "list_repo_files": repository.other_weights_hint,
    }
    for method, hint in hints.items():
        for answer in (transport_error()("refused"), OSError("no cache"), ValueError("not JSON")):
            monkeypatch.setattr(f"huggingface_hub.HfApi.{method}", Mock(side_effect=answer))
            assert not hint()
        monkeypatch.setattr(f"huggingface_hub.HfApi.{method}", Mock(side_effect=TypeError("a mistake")))
        with pytest.raises(TypeError, match="a mistake"):
            hint()


def test_other_errors_are_not_explained():
    from zokernel.data.hub import explain

    assert explain(KeyError("hidden_size"), "org/fine") is None
