"""Text that is learned as it is: chats, prompts with completions, instructions, and documents."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.base import Task, is_missing, log_left_out, place_of

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]

# ShareGPT's names of the speakers, and those of the chat templates.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
_EXTRAS = ("tools", "chat_template_kwargs")
# The columns that each form reads; the first ones name the form, the others may be absent.
FORM_COLUMNS = {
    "messages": ("messages", "conversations", "system", *_EXTRAS),
    "prompt-completion": ("prompt", "completion", "system", *_EXTRAS),
    "instruction": ("instruction", "output", "input", "system", "history"),
    "text": ("text",),
}
COLUMNS_OF_TEXT = "messages; prompt and completion; instruction, input and output; or text"


@dataclass(frozen=True)
class TextTask(Task):
    """Language modelling: the loss is that of the tokens that count, and there are no options.

    Rows are read into one of four forms, whose columns are trl's where trl has them: ``messages``; ``prompt`` and
    ``completion``, each a text or messages; ``instruction``, ``input`` and ``output`` (Alpaca); or ``text``.

    Args:
        template: Empty; the text of a row needs none.
        form: ``messages``, ``prompt-completion``, ``instruction`` or ``text``.

    Example:
        >>> rows = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]
        >>> TextTask(form="messages").read(rows, where="train")[0]["messages"][1]
        {'role': 'assistant', 'content': 'Hello'}
    """

    kind: ClassVar[str] = "text"

    template: str = ""
    form: str = "text"
    label_column: str = ""
    metric: str = "perplexity"
    loss: str = "answer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", ())

    def read(self, rows: Sequence[Row], *, where: str) -> list[Row]:
        """Return the rows in the task's form; those without text are left out and counted.

        Raises:
            UsageError: If a row is in another form (its line is named), or nothing is left.
        """
        form = _FORMS[self.form]
        kept: list[Row] = []
        empty: list[str] = []
        unusual: dict[str, str] = {}
        for number, row in enumerate(rows):
            place = place_of(rows, number)
            try:
                converted = form(row)
            except UsageError as error:
                raise UsageError(f"{where}, {place}: {error}") from error
            if converted is None and (other := _other_form(row, self.form)):
                rest = "those before it have" if number else "the run learns from"
                raise UsageError(
                    f"{where}, {place}: this row has {_quoted_columns(other)}, and {rest} {_quoted_columns(self.form)}"
                    ": put the two kinds in files of their own."
                )
            if converted is None:
                empty.append(place)
            else:
                kept.append(converted)
                for role in _roles(converted) - set(KNOWN_ROLES):
                    unusual.setdefault(role, place)
        for role, place in unusual.items():
            logger.warning("%s, %s: %r is not a usual role; it is left to the chat template.", where, place, role)
        if not kept:
            raise UsageError(
                f"{where} has no row with text to learn in {_quoted_columns(self.form)}"
                f"{_describe_absent(rows, self.form)}."
            )
        log_left_out(where, "text", empty)
        return kept

    def required_columns(self) -> tuple[str, ...]:
        """Return no column: :meth:`read` knows what a row must have."""
        return ()

    def options(self, row: Row) -> tuple[str, ...]:
        """Refuse: there are no options.

        Raises:
            UsageError: Always.
        """
        raise UsageError("Chats, instructions and texts have no options: they are scored by the loss of their tokens.")

    fillers = options

    def correct(self, row: Row) -> tuple[int, ...]:
        """Return the one text there is."""
        return (0,)


def _quoted_columns(form: str) -> str:
    """Return the columns of a form in words."""
    return " and ".join(map(repr, columns_of_form(form)))


def columns_of_form(form: str) -> tuple[str, ...]:
    """Return the columns that every row of a form has."""
    return FORM_COLUMNS[form][: 1 if form in ("messages", "text") else 2]


def _describe_absent(rows: Sequence[Row], form: str) -> str:
    """Return which columns of a form no row has, and which there are instead; empty if all are there."""
    present = list(dict.fromkeys(str(name) for row in rows for name in row))
    absent = [repr(name) for name in columns_of_form(form) if name not in present]
    if not absent or (form == "messages" and "conversations" in present):
        return ""
    return f": it has no column {' or '.join(absent)}, and its columns are {', '.join(map(repr, present)) or 'none'}"


def read_as(form: str, row: Row) -> Row | None:
    """Return a row in a form, or None if it has no text there.

    Raises:
        UsageError: If a cell holds something else.
    """
    return _FORMS[form](row)


def _messages_row(row: Row) -> Row | None:
    """Return ``messages`` and what goes with them, whatever their column and keys are called."""
    column = "messages" if not is_missing(row.get("messages")) else "conversations"
    messages = messages_of(row.get(column), column)
    if not messages:
        return None
    return {"messages": _with_system(messages, row.get("system")), **_extras(row)}


def _prompt_row(row: Row) -> Row | None:
    """Return ``prompt`` and ``completion``, both texts or both messages."""
    parts = [row.get("prompt"), row.get("completion")]
    if any(map(is_missing, parts)):
        return None
    chats = [_is_chat(part) for part in parts]
    if all(chats):
        messages = [messages_of(part, name) for part, name in zip(parts, ("prompt", "completion"))]
        if not all(messages):
            return None
        return {"prompt": _with_system(messages[0], row.get("system")), "completion": messages[1], **_extras(row)}
    if any(chats):
        raise UsageError("'prompt' and 'completion' must both be texts, or both be lists of messages.")
    prompt, completion = (_text(part, name) for part, name in zip(parts, ("prompt", "completion")))
    system = row.get("system")
    if not is_missing(system) and str(system).strip():
        prompt = f"{system}\n{prompt}"
    return {"prompt": prompt, "completion": completion} if completion.strip() else None


def _instruction_row(row: Row) -> Row | None:
    """Return Alpaca's columns (``system`` and ``history`` as LLaMA-Factory has them)."""
    if is_missing(row.get("instruction")) or is_missing(row.get("output")):
        return None
    texts = {name: _text(row[name], name) for name in ("instruction", "output")}
    if not texts["instruction"].strip() or not texts["output"].strip():
        return None
    for name in ("input", "system"):
        value = row.get(name)
        texts[name] = "" if is_missing(value) else _text(value, name)
    history = row.get("history")
    turns = [] if is_missing(history) or not history else history
    if not isinstance(turns, (list, tuple)) or any(not isinstance(t, (list, tuple)) or len(t) != 2 for t in turns):
        raise UsageError("'history' must be a list of [instruction, answer] pairs.")
    return {**texts, "history": [[str(question), str(answer)] for question, answer in turns]}


def _text_row(row: Row) -> Row | None:
    value = row.get("text")
    if is_missing(value):
        return None
    text = _text(value, "text")
    return {"text": text} if text.strip() else None


def _other_form(row: Row, form: str) -> str | None:
    """Return another form that a row without text in this one has, if it has one."""
    for other, read in _FORMS.items():
        if other != form:
            try:
                if read(row) is not None:
                    return other
            except UsageError:
                continue
    return None


_FORMS: dict[str, Callable[[Row], Row | None]] = {
    "messages": _messages_row,
    "prompt-completion": _prompt_row,
    "instruction": _instruction_row,
    "text": _text_row,
}


def messages_of(value: object, column: str) -> Messages:
    """Return the messages in a cell as templates take them; none if one of them is empty.

    Args:
        value: A list of ``role``/``content`` or ``from``/``value`` mappings, or JSON of one.
        column: Its name, for messages.

    Raises:
        UsageError: If it is something else.
    """
    if is_missing(value):
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{column!r} holds a text that is not a JSON list of messages: write each cell as "
                '[{"role": "user", "content": "..."}].'
            ) from error
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{column!r} must hold a list of messages, each with a role and a content.")
    messages = [_message(message, column) for message in value]
    return [message for message in messages if message is not None] if all(m is not None for m in messages) else []


def _message(value: object, column: str) -> dict[str, Any] | None:
    if not isinstance(value, Mapping):
        raise UsageError(f"A message in {column!r} is {value!r:.60}, not a mapping with 'role' and 'content'.")
    names = {"from": "role", "value": "content"} if "role" not in value else {}
    # Tables give every message every key, empty where it had none.
    message = {names.get(str(key), str(key)): part for key, part in value.items() if part is not None}
    if "role" not in message:
        raise UsageError(f"A message in {column!r} has no 'role' (it has {', '.join(map(str, value))}).")
    role = message["role"] = ROLES.get(str(message["role"]), str(message["role"]))
    close = difflib.get_close_matches(role.lower(), KNOWN_ROLES, n=1, cutoff=0.75)
    if role not in KNOWN_ROLES and close:
        raise UsageError(f"A message in {column!r} has the role {role!r}: did you mean {close[0]!r}?")
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = message["content"] = _join_parts(content)
    if content is None or (isinstance(content, str) and not content.strip()):
        if message.get("tool_calls"):
            return {**message, "content": content or ""}
        # Some chats begin with an empty system message; another message without text is no turn.
        return {**message, "content": ""} if message["role"] == "system" else None
    if not isinstance(content, str):
        raise UsageError(f"The content of a message in {column!r} is {content!r:.60}, not a text.")
    _check_weight(message, column)
    return message


def _check_weight(message: dict[str, Any], column: str) -> None:
    """Keep ``weight`` 0 of a message that is not to be learned (OpenAI's key; Axolotl's is ``train``: false)."""
    weights = [message.pop(key) for key in ("weight", "train") if key in message]
    for value in weights:
        if value not in (0, 1):
            raise UsageError(f"A message in {column!r} has the weight {value!r:.40}: it is learned (1) or not (0).")
    if not all(weights):
        message["weight"] = 0


def _join_parts(parts: Sequence[Any]) -> str:
    """Return the text of a content that is given in parts."""
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UsageError(f"A message holds a part of type {kind!r}: only text is trained on.")
    return "".join(str(part.get("text") or "") for part in parts)


def _roles(row: Row) -> set[str]:
    """Return the roles in a row that was read."""
    parts = [row[name] for name in ("messages", "prompt", "completion") if isinstance(row.get(name), list)]
    return {str(message["role"]) for part in parts for message in part}


def _is_chat(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(part, Mapping) for part in value)


def _text(value: object, column: str) -> str:
    if isinstance(value, (list, tuple, Mapping, bytes)):
        raise UsageError(f"Column {column!r} holds {value!r:.60}, not a text.")
    return str(value)


def _with_system(messages: Messages, system: object) -> Messages:
    """Put the text of a ``system`` column in front, if there is one and the messages have none."""
    if is_missing(system) or not str(system).strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": str(system)}, *messages]


def _extras(row: Row) -> dict[str, Any]:
    """Return ``tools`` and ``chat_template_kwargs``, which are handed to the template."""
    extras: dict[str, Any] = {}
    for name in _EXTRAS:
        value = row.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else None
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"{name!r} holds a text that is not JSON: write it as JSON, or leave it empty."
                ) from error
        if not is_missing(value) and value:
            extras[name] = value
    return extras
