"""Examples for masked language models: the text with one mask, and what may stand in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.base import Task
from zokernel.finetune.tasks.control_tokens import ControlTokens
from zokernel.finetune.tasks.encoded import (
    Context,
    Encoded,
    choices_and_answers,
    keep_end,
    keep_start,
    refuse_empty_option,
)


def encode_masked(
    task: Task, rows: Sequence[Row], tokenizer: Any, *, max_length: int, context: Context, only_answer: bool
) -> list[Encoded]:
    """Tokenize the text with one mask, and every option on its own as it would stand after a space.

    Args:
        task: Template and options.
        rows: The table.
        tokenizer: A fast tokenizer with a mask token.
        max_length: Longest sequence; the longer side of the mask loses tokens at its far end.
        context: Text put before every example.
        only_answer: Encode the right option alone.

    Returns:
        One :class:`Encoded` per row, with a mask.

    Raises:
        UsageError: If the tokenizer has no mask token, or an option has no token.
    """
    mask_id = tokenizer.mask_token_id
    if mask_id is None:
        raise UsageError("The tokenizer has no mask token: use a masked language model, or a template without {mask}.")
    clozes = [(context.text + before, after) for before, after in map(task.cloze, rows)]
    options, correct = choices_and_answers(
        [task.fillers(row) for row in rows], [task.correct(row) for row in rows], only_answer
    )
    controls = ControlTokens(tokenizer)
    hidden = map(task.cloze, controls.shadows(rows))
    mask = tokenizer.mask_token
    all_ids, all_offsets = controls(
        [f"{before}{mask}{after}" for before, after in clozes],
        [f"{context.shadow}{before}{mask}{after}" for before, after in hidden],
    )
    token_cache: dict[str, list[int]] = {}
    examples = []
    for number, (choices, right) in enumerate(zip(options, correct)):
        ids, offsets = all_ids[number], all_offsets[number]
        boundary = len(clozes[number][0])
        at = next(i for i, token in enumerate(ids) if token == mask_id and offsets[i][1] > boundary)
        for text in choices:
            if text not in token_cache:
                # Label words are the user's own; an option from a column stays text.
                token_cache[text] = tokenizer(
                    f" {text}", add_special_tokens=False, split_special_tokens=not task.fixed_options
                )["input_ids"]
                refuse_empty_option(text, token_cache[text])
        option_ids = [token_cache[text] for text in choices]
        room = max_length - max(map(len, option_ids))
        prompt_ids, suffix_ids = ids[:at], ids[at + 1 :]
        # Whichever side of the mask is longer gives way: the published templates have the mask at either end.
        if len(suffix_ids) > len(prompt_ids):
            suffix_ids = keep_start(suffix_ids, room - len(prompt_ids), tokenizer)
        else:
            prompt_ids = keep_end(prompt_ids, room - len(suffix_ids), tokenizer)
        lost = len(ids) - 1 - len(prompt_ids) - len(suffix_ids)
        examples.append(Encoded(prompt_ids, option_ids, right[0], tuple(suffix_ids), mask_id, right, lost=lost))
    return examples
