"""``zokernel kernel`` on a user's network and on a language model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from zokernel.cli import main


@pytest.fixture
def user_model(tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))\n"
        "def number():\n"
        "    return 3\n"
    )
    for name, seed in (("o", 1), ("u", 2)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(seed).standard_normal((1, 3)).astype(np.float32))
    return tmp_path


def test_a_users_network(user_model, capsys):
    out = user_model / "out"
    inputs = ["--x_o", str(user_model / "o.npy"), "--x_u", str(user_model / "u.npy"), "--output_dir", str(out)]
    assert (
        main(["kernel", "--model", f"{user_model / 'nets.py'}:build", *inputs, "--num_perturbations", "5", "50"]) == 0
    )
    assert "directions for 10%" in capsys.readouterr().out
    record = json.loads((out / "kernel.json").read_text())
    assert [row["P"] for row in record["rows"]] == [5, 50]
    assert torch.tensor(record["kernel"]).shape == (4, 4)
    assert (out / "heatmaps.png").stat().st_size > 1000
    assert (out / "curve.png").stat().st_size > 1000


def test_a_language_model_with_label_words(tiny_lm_path, tmp_path, capsys):
    flags = ["--model_name_or_path", str(tiny_lm_path), "--x_o", "good movie It was", "--x_u", "bad movie It was"]
    flags += ["--label_words", "terrible", "great", "--output_dir", str(tmp_path), "--num_perturbations", "3", "20"]
    assert main(["kernel", *flags]) == 0
    record = json.loads((tmp_path / "kernel.json").read_text())
    assert record["outputs"] == ["terrible", "great"]
    assert 0 < record["rho"] <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "missing.py:build"}, "not FILE.py:FUNCTION"),
        ({"--model": "NETS:other"}, "has no function 'other'"),
        ({"--model": "NETS:number"}, "must return an nn.Module"),
        ({"--x_o": "nothing.npy"}, "There is no file nothing.npy"),
    ],
)
def test_mistakes(user_model, capsys, change, message):
    nets = str(user_model / "nets.py")
    flags = {
        "--model": f"{nets}:build",
        "--x_o": str(user_model / "o.npy"),
        "--x_u": str(user_model / "u.npy"),
    } | change
    flags["--model"] = flags["--model"].replace("NETS", nets)
    assert main(["kernel", *(word for pair in flags.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err
