"""A tokenizer with control tokens for chats, and chat templates, that several tests of chats share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import build

from zokernel.experiments.kerzoo.jobs import tiny_tokenizer

# ChatML as SmolLM2 writes it, which does not say what the assistant wrote, and with the markers that do.
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_tokenizer(template: str | None = MARKED) -> Any:
    """Return a byte-level tokenizer that knows ``<|im_start|>`` and ``<|im_end|>``, the end of a text, too."""
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = tiny_tokenizer(["good", "bad", "user", "assistant", "system", "film"], special)
    tokenizer.chat_template = template
    return tokenizer


def chat_model(folder: Path, template: str | None = MARKED, **options: int) -> Path:
    """Save a tiny Llama with :func:`chat_tokenizer` in a folder, and return the folder; options are its sizes."""
    tokenizer = chat_tokenizer(template)
    tokenizer.save_pretrained(folder)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    build("llama", **options, **ids).save_pretrained(folder)
    return folder


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Return a chat in which the user and the assistant take turns."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
