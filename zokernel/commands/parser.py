"""The parser of every subcommand: the spelling of flags, switches, ``--config`` files and errors.

All commands spell their flags in the same way.  Underscores and dashes are the same, so ``--output-dir`` is
``--output_dir``.  A switch is ``--json``, ``--json true`` or ``--json false``.  ``--config FILE`` reads flags from a
YAML file, and flags on the command line override it.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, Protocol

from zokernel.commands.help_groups import HELP_GROUPS
from zokernel.commands.help_text import WIDTH, short_help, with_default, without_default
from zokernel.errors import UsageError
from zokernel.private_apis import flags_of
from zokernel.secrets import hide_in_words

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")
REPEATABLE = ("reward_function", "reward_weights")
_OTHERS = "transformers' TrainingArguments"
_NEGATIVE = re.compile(r"-(?:\d+\.?\d*|\.\d+|inf|nan)(?:e[-+]?\d+)?", re.IGNORECASE)
BOOLEANS = dict.fromkeys(TRUE, True) | dict.fromkeys(FALSE, False)


class Command(Protocol):
    """What every subcommand's module provides; its docstring is the description in ``--help``.

    The docstring says in one or two lines what the command does, then shows it in use.  The groups of flags are in
    :mod:`zokernel.commands.help_groups`.
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""

    def main(self, args: argparse.Namespace) -> int:
        """Run the command and return the exit code; ``args.command_line`` is what the user typed."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of a description, and show a default wherever there is one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=WIDTH)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = with_default(action, (action.help or "").replace("%%", "%"))
        if action.choices and action.metavar is None:
            text += f" [{', '.join(map(str, action.choices))}]"
        return text.replace("%", "%%")

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        metavar = action.metavar or (action.dest.upper() if action.choices else default_metavar)
        return lambda size: metavar if isinstance(metavar, tuple) else (metavar,) * size


class _HelpAll(argparse.Action):
    """``--help-all``: print all flags and stop."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.format_all(), end="")
        parser.exit()


class _Repeatable(argparse.Action):
    """A flag of several values that may also be given several times; a configuration file's values give way."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        seen = vars(namespace).setdefault("repeated", set())
        before = getattr(namespace, self.dest) or [] if self.dest in seen else []
        setattr(namespace, self.dest, [*before, *values])
        seen.add(self.dest)


class CommandParser(argparse.ArgumentParser):
    """The parser of one subcommand.

    Args:
        name: Name of the subcommand.
        description: Text above the flags in ``--help``.

    Example:
        >>> parser = CommandParser("claims")
        >>> add_switch(parser, "--json", help="print JSON")
        >>> _ = parser.add_argument("ids", nargs="*")
        >>> args = parser.parse(["--json", "nzk-acceleration"])
        >>> args.json, args.ids, args.command_line
        (True, ['nzk-acceleration'], 'zokernel claims --json nzk-acceleration')
        >>> parser.parse(["--json", "false"]).json
        False
    """

    def __init__(self, name: str, description: str | None = None):
        super().__init__(
            prog=f"zokernel {name}",
            usage=f"zokernel {name} [flags]",
            description=description,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self.help_groups = HELP_GROUPS.get(name)
        self.own_defaults: set[str] = set()
        self.add_argument("--help_all", action=_HelpAll, nargs=0, help="list all flags and stop")
        self.add_argument(
            "--config", type=Path, metavar="FILE", help="YAML file of flags; the command line overrides it"
        )

    def format_help(self) -> str:
        """Return the flags that matter, in groups."""
        return self.format_all() if self.help_groups is None else short_help(self, self.help_groups, self.own_defaults)

    def set_defaults(self, **kwargs: Any) -> None:
        """Set defaults of flags, whose help texts may have said others."""
        super().set_defaults(**kwargs)
        self.own_defaults |= kwargs.keys()
        for action in flags_of(self):
            if action.dest in kwargs and action.help:
                action.help = without_default(action.help)

    def format_all(self) -> str:
        """Return all flags."""
        return super().format_help()

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the command line on top of the file named by ``--config``.

        Args:
            argv: Arguments after the name of the subcommand.

        Returns:
            The flags by name, and ``command_line``, in which secrets are left out.

        Raises:
            UsageError: If a flag or a key of the file is unknown, or a value is not of its type.
        """
        words = self._spell_out(argv)
        config = self._config_of(words)
        if config is not None:
            self._read(config)
        unknown = self._unknown_words(words)
        if unknown:
            word = unknown[0]
            flag, place = word.partition("=")[0], list(argv).index(word) if word in argv else 0
            if flag.startswith("-"):
                raise unknown_flag_error(flag, self._names(), self.prog)
            flags = [before.partition("=")[0] for before in argv[:place] if before.startswith("--")]
            after = f" after {flags[-1]}" if flags else ""
            word = hide_in_words([*flags[-1:], word])[-1]
            raise UsageError(f"The argument {word!r}{after} has no meaning here: '{self.prog} --help' shows how.")
        args = self.parse_args(words)
        args.command_line = shlex.join([*self.prog.split(), *hide_in_words(argv)])
        return args

    def _unknown_words(self, words: Sequence[str]) -> list[str]:
        """Return the arguments that mean nothing, even where others are missing: a mistyped flag may be one of them."""
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        try:
            return self.parse_known_args(words)[1]
        finally:
            for action in required:
                action.required = True

    def error(self, message: str) -> NoReturn:
        """Raise a mistake as one sentence instead of two screens of usage."""
        raise UsageError(f"{message}: '{self.prog} --help' lists the flags.")

    @property
    def flags(self) -> list[str]:
        """The names of its flags, without dashes."""
        return [action.dest for action in self._actions if action.option_strings]

    def _spell_out(self, argv: Sequence[str]) -> list[str]:
        """Return the arguments with underscores in names of flags, and a value after every switch."""
        words: list[str] = []
        for n, word in enumerate(argv):
            name, equals, value = word.partition("=")
            if name.startswith("--") and name not in self._option_string_actions:
                name = "--" + name[2:].replace("-", "_")
            action = self._option_string_actions.get(name)
            bare = not equals and argv[n + 1 : n + 2] and argv[n + 1].lower() not in BOOLEANS
            # Without its value, a switch would take the next argument: report --serve runs/mine.
            bare = bare and (self._takes_words or argv[n + 1].startswith("-"))
            words.append(f"{name}=true" if bare and _is_switch(action) else name + equals + value)
            before = self._option_string_actions.get(words[-2]) if len(words) > 1 else None
            if before is not None and before.nargs is None and _NEGATIVE.fullmatch(word):
                words[-2:] = [f"{words[-2]}={word}"]  # which argparse takes for a flag: --learning_rate -1e-3
        return words

    @property
    def _takes_words(self) -> bool:
        """Whether there are arguments that belong to no flag."""
        return any(not action.option_strings for action in self._actions)

    @staticmethod
    def _config_of(words: Sequence[str]) -> Path | None:
        selector = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        selector.add_argument("--config", type=Path)
        try:
            return selector.parse_known_args(words)[0].config
        except argparse.ArgumentError:  # no file after it, which the parser of the command reports
            return None

    def _read(self, config: Path) -> None:
        from zokernel.finetune.settings.flag_files import nullable_settings, read_yaml  # takes seconds to load

        values = read_yaml(config)
        for key in values:
            if key not in self._names():
                suggestion = _suggest(key, self._names(), self.prog)
                raise UsageError(f"{config} sets {key!r}, which is not a flag{suggestion}.")
        nullable = nullable_settings()
        values = {key: value for key, value in values.items() if value is not None or key in nullable}
        self.set_defaults(**values)
        for action in self._actions:
            if action.dest in values:
                action.required = False

    def _names(self) -> list[str]:
        return [action.dest for action in self._actions if action.dest not in ("help", "help_all", "config")]


def unknown_flag_error(flag: str, names: Sequence[str], prog: str) -> UsageError:
    """Return the error of a flag that a command does not have.

    Args:
        flag: As it was typed.
        names: The flags that it has.
        prog: The command.
    """
    return UsageError(f"There is no flag {flag!r}{_suggest(flag.lstrip('-'), names, prog, prefix='--')}.")


def _suggest(name: str, names: Sequence[str], prog: str, *, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else f": '{prog} --help' lists them"


def _is_switch(action: argparse.Action | None) -> bool:
    return action is not None and action.nargs == "?" and action.const is True


def boolean(text: str) -> bool:
    """Read a boolean as transformers' parser does.

    Example:
        >>> boolean("true"), boolean("No")
        (True, False)
    """
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return BOOLEANS[text.lower()]


def boolean_or_text(text: str) -> bool | str:
    """Read a boolean where it is one."""
    return BOOLEANS.get(text.lower(), text)


def add_switch(parser: argparse.ArgumentParser, name: str, *, help: str) -> None:
    """Declare a flag that is false unless it is given: ``--json``, ``--json true`` or ``--json false``."""
    parser.add_argument(name, type=boolean, nargs="?", const=True, default=False, metavar="true|false", help=help)


def add_dataclasses(parser: argparse.ArgumentParser, *classes: Any) -> None:
    """Declare one flag for each field of dataclasses such as ``TrainingArguments``, as ``HfArgumentParser`` does.

    ``--help-all`` lists zokernel's own flags by class, and those of transformers after them.
    """
    from transformers.hf_argparser import HfArgumentParser, string_to_bool  # takes seconds to load

    from zokernel.finetune.settings.unsupported import ALWAYS, SCORED, ZEROTH_ORDER

    refused = ALWAYS | ZEROTH_ORDER | SCORED
    headings = {name: f"zokernel's {cls.__name__}" for cls in classes for name in _own_fields(cls)}
    groups = {title: parser.add_argument_group(title) for title in [*dict.fromkeys(headings.values()), _OTHERS]}

    class Declares(HfArgumentParser):
        def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
            title = headings.get(names[0].removeprefix("--").removeprefix("no_"), _OTHERS)
            if kwargs.get("type") is string_to_bool:
                kwargs["type"] = boolean
                kwargs |= {"nargs": "?", "const": True}  # also of what may be None
            if names[0].removeprefix("--") in refused and kwargs.get("nargs") == "?":
                kwargs["type"] = boolean_or_text  # whatever it is, the reason why it is refused is said
            if names[0].startswith("--no_") and kwargs.get("action") == "store_false":
                kwargs["help"] = f"Sets --{kwargs['dest']} to false."
            if names[0].removeprefix("--") in REPEATABLE:
                kwargs["action"] = _Repeatable
            # The spelling with dashes is understood everywhere, and need not be listed.
            return groups[title].add_argument(*([name for name in names if "-" not in name[2:]] or names), **kwargs)

    Declares(classes, add_help=False)


def _own_fields(cls: Any) -> list[str]:
    """Return the fields of a dataclass that one of zokernel's own classes declares."""
    return [
        name
        for base in reversed(cls.__mro__)
        if base.__module__.startswith("zokernel.")
        for name in getattr(base, "__annotations__", {})
    ]


def read_dataclasses(args: argparse.Namespace, *classes: Any) -> Any:
    """Return one object of each class from the flags that :func:`add_dataclasses` declared.

    Raises:
        UsageError: If a class refuses a value.
    """
    values = vars(args)
    try:
        return [cls(**{f.name: values[f.name] for f in fields(cls) if f.init}) for cls in classes]
    except UsageError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:  # what TrainingArguments refuses
        raise UsageError(" ".join(str(error).split())) from error
