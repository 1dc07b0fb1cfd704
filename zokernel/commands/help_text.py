"""``--help`` on one screen: the flags that matter, in groups, each with a value as one would type it."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from zokernel.private_apis import flags_of
from zokernel.readable import plural

WIDTH = 100
_LEFT = 38


@dataclass(frozen=True)
class Group:
    """A group of flags in a command's ``--help``.

    Attributes:
        title: Its heading.
        flags: By name, an example of the value (empty for a switch), and what the flag does; where that is empty, the
            help text of the flag is shown.
        example: Flags that go together.
    """

    title: str
    flags: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    example: str = ""


def short_help(parser: argparse.ArgumentParser, groups: Sequence[Group], own_defaults: Collection[str] = ()) -> str:
    """Return the help of a command: its description, the flags of some groups, and where the others are.

    Args:
        parser: The parser of the command.
        groups: The flags that are shown.
        own_defaults: Flags whose default in this command is another than their texts say.

    Returns:
        Text of at most 100 columns.

    Example:
        >>> parser = argparse.ArgumentParser("zokernel sum", description="Add numbers.", add_help=False)
        >>> _ = parser.add_argument("--start", type=int, default=0, help="what to begin with")
        >>> print(short_help(parser, [Group("numbers", {"start": ("5", "")})]), end="")
        Add numbers.
        <BLANKLINE>
        numbers
          --start 5                           what to begin with (default: 0)
    """
    # A switch that is on by default has a second action, --no_NAME.
    actions = {action.dest: action for action in reversed(flags_of(parser))}
    blocks = [(parser.description or "").strip().replace("``", "'")]
    for group in groups:
        head = group.title + (f": {group.example}" if group.example else "")
        rows = [
            _row(actions[name], example, without_default(text) if name in own_defaults else text)
            for name, (example, text) in group.flags.items()
        ]
        blocks.append("\n".join([head, *rows]))
    listed = {name for group in groups for name in group.flags} | {"help", "help_all", "config"}
    rest = [action for action in flags_of(parser) if action.dest not in listed]
    if rest:
        blocks.append(
            f"'{parser.prog} --help-all' lists {plural(len(rest), 'more flag')}. --config FILE reads flags from a "
            "YAML file."
        )
    return "\n\n".join(blocks) + "\n"


def without_default(text: str) -> str:
    """Return what a flag does without its default, or that it is required.

    Example:
        >>> without_default("folder of the results (required)"), without_default("steps (default: 1000, or fewer)")
        ('folder of the results', 'steps')
    """
    return re.sub(r" ?\((default:[^)]*|required)\)|; default:[^)]*(?=\))", "", text)


def with_default(action: argparse.Action, text: str | None) -> str:
    """Return what a flag does, and its default if it has one that is not said yet."""
    text = (text or "").strip()
    default = action.default
    if default is None or default is False or default == [] or default is argparse.SUPPRESS or "default:" in text:
        return text
    values = default if isinstance(default, (list, tuple)) else [default]
    default_text = " ".join(str(value).lower() if isinstance(value, bool) else str(value).strip() for value in values)
    text = text if text.endswith("...") else text.rstrip(" .,;:")  # the dots of an open list stay
    return f"{text} (default: {default_text})"


def _row(action: argparse.Action, example: str, text: str) -> str:
    name = action.option_strings[0] if action.option_strings else ""
    left = f"  {name} {example}".rstrip() if name else f"  {example}"
    description = with_default(action, text or (action.help or "").replace("%%", "%"))
    lines = textwrap.wrap(description, WIDTH - _LEFT, break_long_words=False, break_on_hyphens=False)
    if len(left) + 2 > _LEFT:
        lines.insert(0, "")
    return "\n".join(f"{left if n == 0 else '':<{_LEFT}}{line}".rstrip() for n, line in enumerate(lines or [""]))
