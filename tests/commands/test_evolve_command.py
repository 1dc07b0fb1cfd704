"""``zokernel evolve``: predictions from files, from a module and from a language model; clear errors."""

import json

import numpy as np
import pytest
import torch

from zokernel.cli import main
from zokernel.dynamics import Evolution, simulate
from zokernel.errors import UsageError
from zokernel.kernels import jacobian_features
from zokernel.theory import process_moments

MODULE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

def two_outputs():
    return nn.Linear(3, 2)

def needs_argument(size):
    return nn.Linear(3, size)

def a_number():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 4))
    y = x.sum(1) + 0.1 * rng.normal(size=10)
    extra = rng.normal(size=(5, 4))
    np.savez("data.npz", features=x, targets=y, test_features=extra, test_targets=extra.sum(1))
    header = "a,b,c,d,target\n"
    (tmp_path / "data.csv").write_text(
        header + "\n".join(",".join(map(repr, [*r.tolist(), float(t)])) for r, t in zip(x, y, strict=True))
    )
    np.savez("inputs.npz", inputs=x[:, :3], targets=y)
    (tmp_path / "small_models.py").write_text(MODULE)
    return tmp_path


def evolve(*flags):
    return main(["evolve", *map(str, flags)])


def record(folder, name="runs/evolve"):
    return json.loads((folder / name / "evolution.json").read_text())


def test_features_file(folder, capsys):
    assert evolve("--features", "data.npz", "--steps", 10, 100, "--simulate", 400) == 0
    result = record(folder)
    with np.load("data.npz") as arrays:
        x, y = torch.as_tensor(arrays["features"]), torch.as_tensor(arrays["targets"])
    moments = process_moments("gaussian", 4, "zo_sgd")
    run = Evolution(torch.zeros(10), y, x @ x.T, result["learning_rate"], moments=moments)
    assert result["stability_limit"] == pytest.approx(run.stability_limit)
    assert result["learning_rate"] == pytest.approx(run.stability_limit / 2)
    np.testing.assert_allclose(result["losses"]["expected_loss"], run.expected_loss([0, 10, 100]), rtol=1e-6)
    simulated, error = result["losses"]["simulated_mean"][1], result["losses"]["simulated_error"][1]
    assert abs(simulated - result["losses"]["expected_loss"][1]) < 4 * error
    assert result["losses"]["expected_test_loss"][2] > result["losses"]["test_loss_of_mean_path"][2] >= 0
    assert result["best_num_perturbations"] in {row["num_perturbations"] for row in result["per_query"]}
    assert (folder / "runs/evolve/evolution.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert "mean-square limit" in text
    assert "<- fewest" in text


def test_table_and_npz_agree(folder):
    evolve("--features", "data.npz", "--output_dir", "one")
    evolve("--features", "data.csv", "--output_dir", "two", "--target_column", "target")
    one, two = record(folder, "one"), record(folder, "two")
    assert one["stability_limit"] == pytest.approx(two["stability_limit"])
    np.testing.assert_allclose(one["losses"]["expected_loss"], two["losses"]["expected_loss"])


def test_an_unstable_learning_rate_is_reported(folder, capsys):
    assert evolve("--features", "data.npz", "--learning_rate", 5.0, "--target_loss", 0.1) == 0
    result = record(folder)
    assert result["stable"] is False
    assert result["steps_to_target"] is None
    assert result["losses"]["expected_loss"][-1] is None
    assert "UNSTABLE" in capsys.readouterr().out


@pytest.mark.parametrize("law", ["rademacher", "sphere", "laplace"])
def test_other_laws(folder, law):
    assert evolve("--features", "data.npz", "--distribution", law, "--steps", 50, "--simulate", 300) == 0
    losses = record(folder)["losses"]
    assert abs(losses["simulated_mean"][1] - losses["expected_loss"][1]) < 4 * losses["simulated_error"][1]


def test_module_with_and_without_offset(folder):
    flags = ("--model_name_or_path", "small_models:build", "--train_file", "inputs.npz")
    assert evolve(*flags, "--output_dir", "with", "--simulate", 20, "--steps", 5) == 0
    assert evolve(*flags, "--output_dir", "without", "--no_offset") == 0
    import small_models

    with np.load("inputs.npz") as arrays:
        x, y = torch.as_tensor(arrays["inputs"]).float(), torch.as_tensor(arrays["targets"])
    linear = jacobian_features(small_models.build(), x)
    for name, start in (("with", linear.outputs), ("without", linear.features @ linear.theta)):
        expected = float((start.double() - y).square().mean() / 2)
        assert record(folder, name)["losses"]["expected_loss"][0] == pytest.approx(expected, rel=1e-5)
    assert record(folder, "with")["parameters"] == 41


@pytest.fixture
def language_model(folder):
    import tokenizers
    import transformers

    words = ["<unk>", "a", "good", "bad", "film", "It", "was", "great", "terrible"]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "reviews.csv").write_text("sentence,label\na good film,1\na bad film,0\ngood good film,1\nbad film,0\n")
    return folder


def test_language_model(language_model):
    flags = ("--model_name_or_path", "model", "--train_file", "reviews.csv")
    assert evolve(*flags, "--simulate", 50, "--steps", 20) == 0
    result = record(language_model)
    assert result["examples"] == 4
    assert result["rank"] == 4
    assert evolve(*flags, "--trainable_parameters", "lm_head", "--output_dir", "head") == 0
    assert record(language_model, "head")["parameters"] == 9 * 16
    assert evolve(*flags, "--trainable_parameters", "nothing") == 2
    assert evolve(*flags, "--trainable_parameters", "(") == 2
    assert evolve(*flags, "--template", "{sentence} It was", "--label_words", "terrible", "great") == 0
    repeated = record(language_model)
    assert repeated["losses"]["expected_loss"][0] == result["losses"]["expected_loss"][0]
    assert evolve(*flags, "--label_words", "great", "great") == 2
    assert evolve(*flags, "--text_column", "review") == 2
    assert evolve(*flags, "--no_offset") == 2
    (language_model / "empty").mkdir()
    assert evolve("--model_name_or_path", "./empty", "--train_file", "reviews.csv") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--template", "It was"), "must name columns in braces"),
        (("--template", "{review} It was"), "has no column 'review' (it has sentence, label): name one of these with "),
        (("--template", "{Sentence} It was"), "'Sentence' (it has sentence, label): did you mean 'sentence' (in --te"),
        (("--text_column", "sentences"), "'sentences' (it has sentence, label): did you mean 'sentence' (in --text_c"),
        (("--text_column", "review"), "'review' (it has sentence, label): name one of these with --text_column."),
        (("--label_column", "Label"), "'Label' (it has sentence, label): did you mean 'label' (in --label_column)?"),
        (("--label_words", "good film", "bad"), "'good film' is 2 tokens"),
        (("--max_examples", "1"), "all have label 1: shuffle them"),
    ],
)
def test_flags_a_language_model_cannot_use_are_refused(flags, message, language_model, capsys):
    assert evolve("--model_name_or_path", "model", "--train_file", "reviews.csv", *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("old", ["data.npz", "inputs.npz"])
def test_an_ending_may_be_in_upper_case(old, folder):
    (folder / old).rename(folder / "UPPER.NPZ")
    source = ("--features",) if old == "data.npz" else ("--model_name_or_path", "small_models:build", "--train_file")
    assert evolve(*source, "UPPER.NPZ") == 0


@pytest.mark.parametrize("flag", ["--features", "--train_file"])
def test_a_damaged_archive_is_named(flag, tmp_path, capsys):
    path = tmp_path / "cut.npz"
    np.savez(path, features=np.ones((4, 3)), targets=np.ones(4), inputs=np.ones((4, 3)))
    path.write_bytes(path.read_bytes()[:200])
    model = ("--model_name_or_path", "torch.nn:Identity") if flag == "--train_file" else ()
    assert evolve(*model, flag, path) == 2
    assert "cut.npz is not a readable .npz file of plain arrays" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "either --features"),
        (("--features", "data.npz", "--model_name_or_path", "x:y"), "either --features"),
        (("--features", "absent.npz"), "no file"),
        (("--features", "text.npz"), "not a readable .npz"),
        (("--features", "inputs.npz"), "no array features"),
        (("--features", "nan.npz"), "finite"),
        (("--features", "words.csv"), "not a number"),
        (("--features", "data.csv", "--target_column", "z"), "no column 'z' (it has a, b, c, d, target): name"),
        (("--features", "data.csv", "--target_column", "Target"), "did you mean 'target' (in --target_column)?"),
        (("--features", "uneven.npz"), "do not match"),
        (("--features", "data.npz", "--learning_rate", "-1"), "positive"),
        (("--features", "data.npz", "--distribution", "cauchy"), "choose one of"),
        (("--features", "data.npz", "--distribution", "student_t(4)"), "no moment of order 4"),
        (("--features", "data.npz", "--coupling", "both"), "coupling"),
        (("--features", "data.npz", "--num_perturbations", "0"), "positive whole number"),
        (("--features", "data.npz", "--steps", "-1"), "zero or more"),
        (("--features", "data.npz", "--simulate", "1"), "at least 2"),
        (("--features", "data.npz", "--target_loss", "0"), "cannot be reached"),
        (("--features", "data.npz", "--max_examples", "0"), "at least 1"),
        (("--features", "badtest.npz"), "do not fit"),
        (("--model_name_or_path", "small_models:build"), "--train_file"),
        (("--model_name_or_path", "small_models:absent", "--train_file", "inputs.npz"), "cannot be imported"),
        (("--model_name_or_path", "small_models:needs_argument", "--train_file", "inputs.npz"), "without arguments"),
        (("--model_name_or_path", "small_models:a_number", "--train_file", "inputs.npz"), "nn.Module"),
        (("--model_name_or_path", "small_models:two_outputs", "--train_file", "inputs.npz"), "returns one"),
        (("--model_name_or_path", "small_models:build", "--train_file", "data.npz"), "inputs and targets"),
    ],
)
def test_bad_requests_are_one_sentence_and_exit_code_2(folder, capsys, flags, message):
    rng = np.random.default_rng(0)
    (folder / "text.npz").write_text("not an archive")
    (folder / "words.csv").write_text("a,target\nx,1\n")
    np.savez("nan.npz", features=np.array([[np.nan, 1.0]]), targets=np.ones(1))
    np.savez("uneven.npz", features=np.ones((3, 2)), targets=np.ones(2))
    good = rng.normal(size=(3, 2))
    np.savez("badtest.npz", features=good, targets=np.ones(3), test_features=np.ones((2, 5)), test_targets=np.ones(2))
    assert evolve(*flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_one_example_works(folder):
    np.savez("one.npz", features=np.array([[1.0, 2.0]]), targets=np.ones(1))
    assert evolve("--features", "one.npz", "--steps", 3) == 0
    assert record(folder)["rank"] == 1


def test_simulation_in_a_basis_of_the_span():
    """The kernel's eigenvectors and the number of parameters are enough to simulate Gaussian directions."""
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, f0 = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(x @ x.T)
    basis = vectors * values.sqrt()
    moments = process_moments("gaussian", 30, "shared")
    run = Evolution(f0, y, x @ x.T, 1.0, moments=moments)
    lr = 0.2 * run.stability_limit
    simulated = simulate(basis, y, f0, lr, [4], coupling="shared", runs=20_000, seed=1, dim=30)
    z = (simulated.losses.mean() - run.at(lr).expected_loss(4)) / (simulated.losses.std() / 20_000**0.5)
    assert z.abs() < 3
    with pytest.raises(UsageError, match="cannot stand for"):
        simulate(basis, y, f0, lr, [4], distribution="rademacher", dim=30)


def test_a_loss_reached_before_training_diverges_is_reported(folder, capsys):
    features = np.diag(np.sqrt([20.0] * 8 + [0.2] * 2))
    np.savez("slow.npz", features=features, targets=np.array([1e-3] * 8 + [1.0] * 2))
    limit = 0.09983987251339
    flags = ("--features", "slow.npz", "--learning_rate", 1.001 * limit, "--target_loss", 0.095)
    assert evolve(*flags) == 0
    result = record(folder)
    assert (result["stable"], result["steps_to_target"], result["queries_to_target"]) == (False, 83, 166)
    assert "is reached in expectation after 83 steps, 166 loss evaluations (the floor is 0), before it diverges" in (
        capsys.readouterr().out
    )
