"""What a model wrote before and after training, side by side, for a reader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

MAX_CHARACTERS = 600  # of each text


class Prompt(Protocol):
    """A held-out prompt, and the answer in its row."""

    @property
    def prompt(self) -> str:
        """The text that the model was asked with."""

    @property
    def answer(self) -> str:
        """The answer in the data."""


def pair_samples(prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str]) -> list[dict[str, Any]]:
    """Return prompts and what was written after them, as ``metrics.json`` holds them."""
    return [
        {"prompt": sample.prompt, "answer": sample.answer, "before": first, "after": last}
        for sample, first, last in zip(prompts, before, after)
    ]


def samples_section(samples: Sequence[dict[str, Any]], *, trained: bool) -> str:
    r"""Return the part of ``report.md`` that shows them; empty if there are none.

    Args:
        samples: What :func:`pair_samples` returned.
        trained: Whether there is something after training to show.

    Example:
        >>> text = samples_section([{"prompt": "1+1", "answer": "2", "before": "3", "after": "2"}], trained=True)
        >>> text.splitlines()[2:8]
        ['Prompt:', '', '    1+1', '', 'Before training:', '']
    """
    if not samples:
        return ""
    parts = []
    for sample in samples:
        answers = {"Before training": sample["before"], "After training": sample["after"]}
        if not trained:
            answers = {"Written": sample["before"]}
        data = {"In the data": sample["answer"]} if sample["answer"] else {}
        texts = {"Prompt": sample["prompt"], **answers, **data}
        parts.append("\n\n".join(f"{name}:\n\n{_indented(text)}" for name, text in texts.items()))
    return "## Samples\n\n" + "\n\n---\n\n".join(parts) + "\n\nGreedy decoding of held-out prompts.\n"


def _indented(text: str) -> str:
    """Return a text as a block of code, so that nothing in it is read as markup."""
    text = text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..."
    return "\n".join(f"    {line}" for line in (text or "(nothing)").splitlines())
