"""Chat templates: which one a run uses, and which tokens of a rendered chat the assistant wrote."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zokernel.errors import UsageError, first_line
from zokernel.finetune.tasks.template import without_secrets

logger = logging.getLogger(__name__)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Said by zokernel predict, too, which has no such flag.
TRAIN_WITH = "train with one (--chat_template of 'zokernel finetune': a file, the template itself, or chatml)"
_BUILT_IN = {"chatml": CHATML}
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def choose_chat_template(tokenizer: Any, choice: str | None) -> None:
    """Let a tokenizer use the chat template that was asked for, if one was.

    Args:
        tokenizer: The tokenizer, changed in place, so that the template is saved with it.
        choice: A file, the name of one of the tokenizer's templates, ``chatml``, or the template itself.

    Raises:
        UsageError: If there is no such template.
    """
    if choice is None:
        return
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, Mapping) else {}
    path = Path(choice).expanduser()
    if "{{" in choice or "{%" in choice:
        tokenizer.chat_template = choice
    elif choice in own:
        tokenizer.chat_template = own[choice]
    elif path.is_file():
        tokenizer.chat_template = path.read_text(encoding="utf-8-sig")
    elif choice in _BUILT_IN:
        tokenizer.chat_template = _BUILT_IN[choice]
    else:
        names = ", ".join([*own, *_BUILT_IN])
        raise UsageError(
            f"There is no chat template {choice!r}: give --chat_template a file, the template itself, or one of the "
            f"names {names}."
        )
    tokenizer.chat_template = without_secrets(tokenizer.chat_template, "chat template")


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(tokenizer.chat_template)


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """Apply the chat template.

    Args:
        tokenizer: The tokenizer.
        messages: The chat.
        **options: As for ``apply_chat_template``.

    Returns:
        The text, or the tokens if ``tokenize`` is true.

    Raises:
        UsageError: If there is no template, or it does not take this chat.
    """
    if not has_chat_template(tokenizer):
        raise UsageError(f"The tokenizer has no chat template, which chats need: {TRAIN_WITH}.")
    try:
        return tokenizer.apply_chat_template(list(messages), **{"tokenize": False, "return_dict": False, **options})
    except Exception as error:  # a template may fail in any way, and raises its own errors for chats it refuses
        roles = ", ".join(str(message["role"]) for message in messages)
        raise UsageError(
            f"The chat template does not take a chat with the roles {roles} ({first_line(error)}): change the chat, or "
            "train with another template (--chat_template of 'zokernel finetune')."
        ) from error


def assistant_tokens(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[bool]:
    """Return which tokens of a rendered chat the assistant wrote.

    A template with ``{% generation %}`` says so itself.  Otherwise the chat is rendered up to each of the assistant's
    messages, with the prompt for it, and up to its end; what lies between is the assistant's, without white space at
    the end.  Messages of weight 0 are not counted.

    Args:
        tokenizer: The tokenizer.
        messages: The chat.
        **options: As for ``apply_chat_template``, such as ``tools``.

    Returns:
        One truth value per token of the whole chat.

    Raises:
        UsageError: If the template renders the beginning of a chat otherwise when more follows.
    """
    if _MARKED.search(str(tokenizer.chat_template)) and all(message.get("weight", 1) for message in messages):
        return [bool(mark) for mark in _render_marked(tokenizer, messages, options)["assistant_masks"]]
    whole = render(tokenizer, messages, **options)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("weight", 1):
            continue
        until = render(tokenizer, messages[: number + 1], **options)
        if number:
            before = render(tokenizer, messages[:number], add_generation_prompt=True, **options)
        else:
            before = _opening(tokenizer, until, options)
        if not (whole.startswith(before) and whole.startswith(until) and until.startswith(before)):
            raise UsageError(
                "The chat template renders the beginning of a chat otherwise when more follows, so it does not tell "
                "what the assistant wrote: give --chat_template one that marks it with {% generation %} and "
                "{% endgeneration %}, or set --assistant_only_loss false."
            )
        spans.append((len(before), len(until.rstrip())))
    offsets = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [any(start < end and begin < end and stop > start for start, end in spans) for begin, stop in offsets]


def _opening(tokenizer: Any, rendered: str, options: Mapping[str, Any]) -> str:
    """Return a chat that the assistant begins up to its first word; all of it if that is not found."""
    question = [{"role": "user", "content": "?"}]
    without_prompt, with_prompt = (
        render(tokenizer, question, add_generation_prompt=p, **options) for p in (False, True)
    )
    opening = with_prompt[len(without_prompt) :] if with_prompt.startswith(without_prompt) else ""
    begin = rendered.find(opening) if opening else -1
    return rendered[: begin + len(opening)] if begin >= 0 else rendered


def _render_marked(tokenizer: Any, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Any:
    return render(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options)
