"""What every user meets first: import, command line, and the README's code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from zokernel.cli import COMMANDS, main
from zokernel.errors import missing_extra

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_import_and_help_load_nothing_heavy():
    heavy = "('torch', 'numba', 'transformers', 'matplotlib', 'scipy', 'datasets')"
    code = f"""
import sys, zokernel, zokernel.cli
zokernel.cli.main([])
print([name for name in {heavy} if name in sys.modules])
"""
    finished = run_python(code)
    assert finished.stdout.strip().endswith("[]"), finished.stdout + finished.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the caches are those of torch's builds for Linux")
def test_batches_of_many_lengths_do_not_fill_the_memory():
    code = """
import psutil, zokernel.cli
zokernel.cli.main([])
import torch
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    weights = [torch.randn(size, 576).bfloat16() for size in (192, 576, 1536)]
    def forward(tokens):
        for weight in weights:
            torch.nn.functional.linear(torch.ones(tokens, 576, dtype=torch.bfloat16), weight)
        return psutil.Process().memory_info().rss / 2**20
    start = forward(400)
    print(max(map(forward, range(1, 300))) - start)
else:
    print(0)
"""
    finished = run_python(code)
    assert finished.returncode == 0, finished.stderr
    assert float(finished.stdout.split()[-1]) < 100  # MiB; with the caches as torch leaves them, several hundred


def test_the_readme_loop_runs_without_transformers_and_learns():
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    finished = run_python(f"import sys\nsys.modules['transformers'] = None\n{block}")
    assert finished.returncode == 0, finished.stderr
    match = re.search(r"loss ([\d.]+) after (\d+) forward passes", finished.stdout)
    assert float(match.group(1)) < 0.45  # ln 2 = 0.69 at the start
    assert int(match.group(2)) == 500 * 8


@pytest.mark.parametrize(
    ("missing", "code", "subject"),
    [
        ("accelerate", "cli.main(['finetune', '--train_file', 'a.csv', '--output_dir', 'run'])", "'zokernel finetune'"),
        ("transformers", "cli.main(['plan', '--train_file', 'a.csv'])", "'zokernel plan'"),
        ("transformers", "print(get(zokernel.finetune, 'zeroth_order'))", "zokernel.finetune.zeroth_order"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(missing, code, subject):
    finished = run_python(f"""
import sys
sys.modules[{missing!r}] = None
import zokernel
from zokernel import cli, errors
def get(package, name):
    try:
        return getattr(package, name)
    except errors.MissingDependencyError as error:
        return error
{code}
""")
    assert finished.returncode == 0, finished.stderr
    sentence = f"{subject} needs {missing}, which is not installed: pip install 'zokernel[finetune]'."
    assert sentence in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
@pytest.mark.parametrize(
    "words",
    [
        "finetune --help",
        "demo --help",
        "plan --help",
        "plan --memory true --model_name_or_path gpt2",
        "predict --model run --file rows.csv",
        "merge --model run --output_dir merged",
        "replay --base base --journal run --output_dir replayed",
    ],
)
def test_a_missing_package_is_named_before_anything_heavy_is_imported(missing, words):
    finished = run_python(f"""
import sys
sys.modules[{missing!r}] = None
from zokernel import cli
code = cli.main({words.split()})
print(code, [name for name in ("torch", "numba", "transformers") if sys.modules.get(name)])
""")
    message = (
        f"'zokernel {words.split()[0]}' needs {missing}, which is not installed: pip install 'zokernel[finetune]'."
    )
    assert finished.stderr == f"zokernel: error: {message}\n"
    assert finished.stdout == "1 []\n"


def test_a_module_that_no_extra_brings_is_not_explained():
    assert missing_extra(ModuleNotFoundError(name="nowhere"), "This") is None


def test_every_command_has_a_module_and_help(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"zokernel {command}" in capsys.readouterr().out.replace("zokernel finetune", f"zokernel {command}")


def test_wrong_commands_are_usage_errors(capsys):
    assert main(["finetoon"]) == 2
    assert "There is no command 'finetoon'" in capsys.readouterr().err
    assert main([]) == 2


def test_fetch_lists_and_refuses_unknown_names(capsys):
    assert main(["fetch"]) == 0
    assert "smollm2" in capsys.readouterr().out
    assert main(["fetch", "gpt5"]) == 2
    assert "choose one of" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.search(r"zokernel \d+\.\d+", capsys.readouterr().out)


def test_every_dependency_is_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[><=\[; ]", item)[0].lower() for group in groups for item in group}
    assert names - pinned <= {"zokernel", "triton"}  # every GPU build of torch brings its own triton
