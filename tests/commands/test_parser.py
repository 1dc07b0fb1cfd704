"""One parser for every subcommand: spellings of flags and switches, files of flags, mistakes."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from zokernel.cli import COMMANDS, load, main
from zokernel.commands.finetune_flags import OF_EVERY_COMMAND, declared_flags, refuse_unknown_flags
from zokernel.commands.parser import CommandParser, add_switch
from zokernel.errors import UsageError


@pytest.fixture
def parser():
    parser = CommandParser("test")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--output_dir")
    parser.add_argument("--steps", type=int, nargs="+", default=[1])
    parser.add_argument("--rate", type=float, required=True)
    add_switch(parser, "--full", help="all of it")
    return parser


@pytest.mark.parametrize(
    ("words", "full", "names"),
    [
        (["a"], False, ["a"]),
        (["--full"], True, []),
        (["--full", "a", "b"], True, ["a", "b"]),  # the switch leaves the argument after it alone
        (["a", "--full"], True, ["a"]),
        (["--full", "true", "a"], True, ["a"]),
        (["--full", "false", "a"], False, ["a"]),
        (["--full=False", "a"], False, ["a"]),
        (["--full", "--full", "no"], False, []),
    ],
)
def test_switches(parser, words, full, names):
    args = parser.parse(["--rate", "1", *words])
    assert (args.full, args.names) == (full, names)


def test_dashes_are_underscores_and_values_keep_theirs(parser):
    args = parser.parse(["--rate=1e-3", "--output-dir", "my-run", "--output_dir=other-run"])
    assert (args.output_dir, args.rate) == ("other-run", 1e-3)
    assert parser.parse(["--rate", "-1", "--output-dir=my-run"]).output_dir == "my-run"
    assert parser.parse(["--rate", "-1e-3"]).rate == -1e-3
    assert parser.parse(["--rate", "-.5", "--steps", "2"]).steps == [2]


def test_the_command_line_is_kept_as_it_was_typed(parser):
    assert parser.parse(["--output-dir", "a b", "--full", "--rate", "1"]).command_line == (
        "zokernel test --output-dir 'a b' --full --rate 1"
    )


def test_a_file_gives_flags_that_the_command_line_overrides(parser, tmp_path):
    (tmp_path / "flags.yaml").write_text("rate: 1e-3\nsteps: [2, 3]\nfull: true\noutput_dir: here\n")
    args = parser.parse(["--output_dir", "there", "--config", str(tmp_path / "flags.yaml")])
    assert (args.rate, args.steps, args.full, args.output_dir) == (1e-3, [2, 3], True, "there")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --rate: 'zokernel test --help' lists the flags"),
        (["--raet", "1"], r"There is no flag '--raet' \(did you mean --rate\?\)"),
        (["--steps", "2"], "the following arguments are required: --rate"),
        (["--rate", "x"], "argument --rate: invalid float value: 'x'"),
        (["--rate", "1", "--stps", "2"], r"There is no flag '--stps' \(did you mean --steps\?\)"),
        (["--rate", "1", "--zzz=3"], "There is no flag '--zzz': 'zokernel test --help' lists them"),
        (["--rate", "1", "--full=maybe"], "'maybe' is not true or false"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "missing.yaml"], "There is no config file missing.yaml"),
    ],
)
def test_mistakes_are_one_sentence(parser, words, message):
    with pytest.raises(UsageError, match=message):
        parser.parse(words)


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("predict --modle runs/a", "'--modle' (did you mean --model?)"),
        ("merge --modle runs/a --output_dir b", "'--modle' (did you mean --model?)"),
        ("kernel --modle lenet", "'--modle' (did you mean --model?)"),
    ],
)
def test_a_mistyped_flag_is_named_before_the_one_that_is_missing(command, flag, capsys):
    assert main(command.split()) == 2
    assert f"There is no flag {flag}" in capsys.readouterr().err


def test_an_unknown_key_of_a_file_is_refused(parser, tmp_path):
    (tmp_path / "flags.yaml").write_text("rates: 1\n")
    with pytest.raises(UsageError, match=r"sets 'rates', which is not a flag \(did you mean rate\?\)"):
        parser.parse(["--config", str(tmp_path / "flags.yaml")])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_keeps_the_protocol(name):
    command, parser = load(name)
    assert callable(command.main)
    assert parser.prog == f"zokernel {name}"
    assert parser.description == command.__doc__
    undocumented = [action.dest for action in parser._actions if not action.help]
    assert not undocumented
    for action in parser._actions:  # one spelling, one kind of switch
        assert not any("-" in option[2:] and "_" not in option for option in action.option_strings if len(option) > 2)
        assert action.nargs != 0 or action.dest in ("help", "help_all") or action.option_strings[0].startswith("--no_")


def test_the_switches_of_finetune_are_those_of_transformers():
    _, parser = load("finetune")
    assert parser.parse(["--lora"]).lora is True
    assert parser.parse(["--lora", "false"]).lora is False


def test_the_flags_of_finetune_are_read_from_sources():
    _, parser = load("finetune")
    options = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    common = {f"--{name}" for name in OF_EVERY_COMMAND}
    declared = {f"--{name}" for name in declared_flags()}
    assert {option for option in options if not option.startswith("--no_")} - common == declared
    for option in options:
        refuse_unknown_flags("finetune", [option.replace("_", "-"), "x", f"{option}=x"])


def test_a_mistyped_flag_of_finetune_is_named_before_libraries_are_loaded():
    code = """
import sys
from zokernel.cli import main
assert main(["finetune", "--template", "--{a} b", "--output_dri", "x"]) == 2
print([name for name in ("torch", "numba", "transformers") if name in sys.modules])
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
    assert finished.stderr == "zokernel: error: There is no flag '--output_dri' (did you mean --output_dir?).\n"


def test_help_that_needs_no_torch_loads_none():
    code = """
import sys
from zokernel.cli import load
for name in ("reproduce", "claims", "report", "replay", "journal", "fetch"):
    load(name)[1].format_help()
print([name for name in ("torch", "numba", "transformers", "matplotlib", "scipy", "datasets") if name in sys.modules])
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_debug_is_a_switch_of_every_command(capsys):
    assert main(["fetch", "gpt5", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["fetch", "--debug", "false", "gpt5"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("collecting", [True, False])
def test_no_garbage_is_collected_while_a_command_loads(collecting, monkeypatch, capsys):
    enabled = []
    monkeypatch.setattr("zokernel.cli.load", lambda name: (enabled.append(gc.isenabled()), load(name))[1])
    was_enabled = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        assert main(["claims", "entk-root-p"]) == 0
        assert enabled == [False]
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if was_enabled else gc.disable)()
