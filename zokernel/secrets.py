"""Tokens, keys and passwords are left out of everything that is written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

_NAME = r"(?:token|secret|password|passwd|passphrase|api_?key|access_?key|private_?key|credentials?)"
# hub_token, wandb-api-key, password; not max_new_tokens or special_tokens_map.
_SECRET_NAME = re.compile(rf"(?:^|.*[_-]){_NAME}$".replace("_?", "[_-]?"), re.IGNORECASE)
# Where a value holds a name and its secret: token=..., "api_key": "...".
_PAIR = re.compile(rf"""((?:^|[\s,;&?{{]|['"])[\w-]*{_NAME}['"]?\s*[=:]\s*['"]?)((?!{{)[^\s'"&,;}}]+)""", re.IGNORECASE)
# A login up to the last @ before the path, since a password may hold one; pathlib makes one slash of two.
_LOGIN = re.compile(r"""(\w{2,}:/{1,2})[^/\s"']+@""")
# Tokens that can be told by their beginning: Hugging Face, OpenAI, GitHub, GitLab, Slack, Amazon.
_SHAPES = re.compile(r"\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abps]-|AKIA)[\w-]{12,}")

_COMMAND = "command:"  # a reward function that is a program, with its variables and flags


def is_secret(name: str) -> bool:
    """Return whether a flag or setting of this name holds a secret.

    Example:
        >>> [is_secret(name) for name in ("hub_token", "api-key", "max_new_tokens", "token_type")]
        [True, True, False, False]
    """
    return _SECRET_NAME.match(name) is not None


def hide_in_text(text: str) -> str:
    """Return a text without the secrets that can be told from others: tokens of known shapes, logins in addresses.

    Example:
        >>> hide_in_text("https://me:secret@host/model")
        'https://<login>@host/model'
    """
    return _SHAPES.sub("<token>", _LOGIN.sub(r"\1<login>@", text))


def hide_in_words(words: Sequence[str]) -> list[str]:
    """Return a command line without its secrets.

    Example:
        >>> hide_in_words(["--hub_token", "abc", "--seed", "1", "--hub-token=abc", "--extra", "token=abc"])
        ['--hub_token', '<hub_token>', '--seed', '1', '--hub-token=<hub_token>', '--extra', 'token=<secret>']
    """
    hidden: list[str] = []
    secret = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            name = flag[2:].replace("-", "_")
            secret = f"<{name}>" if is_secret(name) else ""
            hidden.append(flag + equals + (secret if secret and equals else _hide_pairs(value)))
        else:
            hidden.append(secret or _hide_pairs(word))
    return hidden


def hide_in_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without their secrets, those within lists and mappings too.

    Example:
        >>> hide_in_values({"hub_token": "abc", "seed": 1, "extra": {"password": "abc"}})
        {'hub_token': '<hub_token>', 'seed': 1, 'extra': {'password': '<password>'}}
    """
    return {
        name: f"<{name}>" if isinstance(name, str) and is_secret(name) and value else _hide(value)
        for name, value in values.items()
    }


def _hide(value: Any) -> Any:
    if isinstance(value, Mapping):
        return hide_in_values(value)
    if isinstance(value, (list, tuple)):
        return [_hide(item) for item in value]
    return _hide_pairs(value) if isinstance(value, str) else value


def _hide_pairs(text: str) -> str:
    """Hide ``name=secret``, unless spaces show that it is a sentence, such as a template."""
    if text.startswith(_COMMAND):
        return hide_in_text(_COMMAND + _hide_in_command(text.removeprefix(_COMMAND)))
    is_sentence = re.search(r"\s", text) and not text.lstrip().startswith('{"')
    return hide_in_text(text if is_sentence else _PAIR.sub(r"\1<secret>", text))


def _hide_in_command(command: str) -> str:
    """Hide the secret flags and variables of a command line, and of one within it; one without any stays as it is."""
    try:
        words = shlex.split(command)
    except ValueError:  # no command that runs, but one that may be repeated in an error
        words = command.split()
    hidden = []
    for word in hide_in_words(words):
        name, equals, _ = word.partition("=")
        if equals and is_secret(name):
            hidden.append(f"{name}=<secret>")
        else:
            hidden.append(_hide_in_command(word) if re.search(r"\s", word) else word)
    return command if hidden == words else shlex.join(hidden)
