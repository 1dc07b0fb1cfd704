"""``--help`` of every command: short, true, and in groups; ``--help-all`` for the rest."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from zokernel.cli import COMMANDS, load, main
from zokernel.commands.help_groups import HELP_GROUPS
from zokernel.commands.help_text import WIDTH, Group, short_help, with_default
from zokernel.commands.parser import CommandParser

LONGEST = {"finetune": 90, "demo": 90, "plan": 60}


@pytest.fixture(scope="module")
def helps():
    return {name: load(name)[1].format_help().splitlines() for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_the_screen(helps, name):
    lines = helps[name]
    assert len(lines) <= LONGEST.get(name, 45)
    assert max(map(len, lines)) <= WIDTH == 100


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_a_command_in_two_lines_and_shows_an_example(helps, name):
    lines = helps[name]
    assert 1 <= lines.index("") <= 2
    assert lines[lines.index("") + 1].startswith(f"zokernel {name}")
    titles = [group.title for group in HELP_GROUPS.get(name, ())]
    assert [line.partition(":")[0] for line in lines if line.partition(":")[0] in titles] == titles


@pytest.mark.parametrize("name", [name for name in COMMANDS if name in HELP_GROUPS])
def test_every_shown_flag_exists_and_accepts_its_example(name):
    parser = load(name)[1]
    flags = [(flag, value) for group in HELP_GROUPS[name] for flag, (value, _) in group.flags.items()]
    assert len(dict(flags)) == len(flags)
    positional = [value for flag, value in flags if not _action(parser, flag).option_strings]
    for action in parser._actions:
        action.required = False
    for flag, value in flags:
        option = f"--{flag}" if flag != "options" else "--set"
        if _action(parser, flag).option_strings:
            args = parser.parse([*positional, option, *shlex.split(value)])
            assert getattr(args, flag) not in (None, [])


def _action(parser, flag):
    (action,) = [a for a in parser._actions if a.dest == flag and a.option_strings[:1] != [f"--no_{flag}"]]
    return action


def test_the_examples_of_groups_use_flags_that_exist():
    parser = load("finetune")[1]
    for group in HELP_GROUPS["finetune"]:
        assert group.example.startswith("--")
        assert parser.parse(shlex.split(group.example)).command_line


@pytest.mark.parametrize(
    ("command", "flags"),
    [("finetune", ["--lora", "--load_in_4bit", "--quantization", "--train", "--offload"]), ("plan", ["--memory"])],
)
def test_flags_for_holding_weights_are_in_the_short_help(command, flags, helps):
    shown_flags = {line.split()[0] for line in helps[command] if line.startswith("  --")}
    assert shown_flags.issuperset(flags)


def test_finetune_shows_about_forty_of_its_flags(capsys):
    names = [flag for group in HELP_GROUPS["finetune"] for flag in group.flags]
    assert len(names) == len(set(names))
    assert 36 <= len(names) <= 46
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--num_perturbations 8 " in out
    assert "--do_train false " in out
    assert "--adam_beta1" not in out


@pytest.mark.parametrize("flag", ["--help-all", "--help_all"])
def test_help_all_lists_every_flag_and_where_it_comes_from(flag, capsys):
    parser = load("finetune")[1]
    with pytest.raises(SystemExit) as stop:
        main(["finetune", flag])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    missing = [option for option in parser._option_string_actions if option.startswith("--") and option not in out]
    assert not missing
    own_flags, inherited = out.split("transformers' TrainingArguments:")
    assert "--method METHOD" in own_flags
    assert "--learning_rate LEARNING_RATE" in own_flags  # its default is zokernel's
    assert "--hub_token HUB_TOKEN" in inherited
    assert "--weight_decay WEIGHT_DECAY" in inherited
    assert max(map(len, out.splitlines())) <= 110


def test_shown_defaults_are_those_of_the_parser():
    parser = CommandParser("test", "Do it.")
    parser.add_argument("--seed", type=int, default=0, help="seed of 5 %% of it")
    parser.add_argument("--rate", type=float, help="rate (default: what fits)")
    parser.add_argument("--words", nargs="+", default=[" a", " b"], help="words.")
    text = short_help(parser, [Group("all", {"seed": ("1", ""), "rate": ("2", ""), "words": ("a b", "")})])
    assert text.splitlines()[2:6] == [
        "all",
        "  --seed 1                            seed of 5 % of it (default: 0)",
        "  --rate 2                            rate (default: what fits)",
        "  --words a b                         words (default: a b)",
    ]


def test_without_a_command_all_are_listed(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 45
    assert max(map(len, out.splitlines())) <= WIDTH
    commands = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert commands == list(COMMANDS)
    assert "zokernel finetune --train_file" in out


def test_help_of_a_command_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["help", "claims"])
    assert capsys.readouterr().out.startswith("List the papers' claims: the verdict on each")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("finetun", "did you mean finetune?"), ("jurnal", "did you mean journal?"), ("xyzzy", "choose one of finetune")],
)
def test_an_unknown_command_gets_a_suggestion(name, hint, capsys):
    assert main([name]) == 2
    message = capsys.readouterr().err
    assert f"There is no command {name!r}" in message
    assert hint in message


@pytest.mark.parametrize("seconds", [0.5, 1.0])
def test_ctrl_c_while_libraries_load_is_one_line(seconds):
    code = "import sys; from zokernel.cli import main; print('here', flush=True); sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "finetune", "--help-all"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    time.sleep(seconds / 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "zokernel: interrupted.\n")


@pytest.mark.parametrize("end", ["", ".", ",", ";", ": ", " ,"])
def test_a_default_follows_a_text_that_ends_in_anything(end):
    parser = CommandParser("x", "")
    action = parser.add_argument("--steps", default=3)
    assert with_default(action, f"how many{end}") == "how many (default: 3)"
    assert with_default(action, "2, 3, ...") == "2, 3, ... (default: 3)"
    assert with_default(parser.add_argument("--off", default=False), "or not,") == "or not,"


@pytest.mark.parametrize("way", ["format_help", "format_all"])
def test_a_command_that_overrides_defaults_shows_its_own(way):
    from zokernel.commands.demo import DEFAULTS

    parser = load("demo")[1]
    help_text = getattr(parser, way)()
    for flag, value in DEFAULTS.items():
        match = re.search(rf"^  --{flag} .*?(?=^  -|^\S|\Z)", help_text, re.DOTALL | re.MULTILINE)
        if match is None:  # it is in --help-all alone
            assert way == "format_help"
            continue
        text = " ".join(match[0].split())
        assert text.count("(default:") == 1
        assert f"(default: {value})" in text
        assert "(required)" not in text
