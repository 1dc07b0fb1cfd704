"""Examples as tokens: prompt and options split by character position."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.base import Task
from zokernel.finetune.tasks.control_tokens import ControlTokens
from zokernel.finetune.tasks.encoded import Context, Encoded, choices_and_answers, keep_end, refuse_empty_option
from zokernel.finetune.tasks.masked import encode_masked
from zokernel.finetune.tasks.seq2seq import Decoder, encode_seq2seq, fill_in_answer

logger = logging.getLogger(__name__)

SEPARATOR = "\n\n"  # between demonstrations


def encode(
    task: Task,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int = 2048,
    masked: bool = False,
    decoder: Decoder | None = None,
    context: str = "",
    context_shadow: str | None = None,
    only_answer: bool = False,
) -> list[Encoded]:
    """Tokenize every example with every option, splitting prompt from option by character position.

    Splitting by position is right for every tokenizer; the difference of token counts, as public code takes it, assumes
    that the prompt's tokens are a prefix of the whole text's.

    Args:
        task: Template and options.
        rows: The table.
        tokenizer: A fast tokenizer of transformers.
        max_length: Longest sequence; longer prompts lose tokens at the front (a leading special token is kept).
        masked: Whether the options stand in place of a mask.
        decoder: How a sequence-to-sequence model frames the texts that it writes: what ``decoder_of`` returns.
        context: Text put before every prompt, such as :func:`demonstrations`.
        context_shadow: The same text from rows whose control tokens are hidden, to tell them from the template's own;
            without it, all of them stay text unless the template has some.
        only_answer: Encode the right option alone, which is all that a loss on the answer needs.

    Returns:
        One :class:`Encoded` per row.

    Raises:
        UsageError: If the tokenizer gives no character offsets, a label is none of the options, or one has no token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError("The tokenizer gives no character offsets: use a fast tokenizer (AutoTokenizer's default).")
    if not rows:
        return []
    if context_shadow is None:
        context_shadow = ControlTokens(tokenizer).shadow_of_context(context, task)
    before = Context(context, context_shadow)
    if masked:
        return encode_masked(task, rows, tokenizer, max_length=max_length, context=before, only_answer=only_answer)
    if decoder is not None:
        return encode_seq2seq(
            task, rows, tokenizer, decoder, max_length=max_length, context=before, only_answer=only_answer
        )
    return _encode_causal(task, rows, tokenizer, max_length=max_length, context=before, only_answer=only_answer)


def _encode_causal(
    task: Task, rows: Sequence[Row], tokenizer: Any, *, max_length: int, context: Context, only_answer: bool
) -> list[Encoded]:
    """Tokenize examples for a causal language model; see :func:`encode`."""
    controls = ControlTokens(tokenizer)
    prompts = [context.text + task.prompt(row) for row in rows]
    right_ones = [task.correct(row) for row in rows]
    options, correct = choices_and_answers([task.options(row) for row in rows], right_ones, only_answer)
    texts = [prompt + option for prompt, choices in zip(prompts, options) for option in choices]
    hidden = controls.shadows(rows)
    hidden_options, _ = choices_and_answers([task.options(row) for row in hidden], right_ones, only_answer)
    shadows = [
        context.shadow + task.prompt(row) + option for row, choices in zip(hidden, hidden_options) for option in choices
    ]
    all_ids, all_offsets = controls(texts, shadows)
    tokenized = zip(all_ids, all_offsets)
    examples = []
    for row, prompt, choices, right in zip(rows, prompts, options, correct):
        splits = []
        for option in choices:
            ids, offsets = next(tokenized)
            splits.append(_split(ids, offsets, len(prompt)))
            refuse_empty_option(option, splits[-1][1])
        whole, option_ids = _share_prompt(splits)
        prompt_ids = keep_end(whole, max_length - max(map(len, option_ids)), tokenizer)
        if not prompt_ids:
            raise UsageError(f"The prompt {prompt!r} has no token before its options: begin the template with text.")
        lost = len(whole) - len(prompt_ids)
        references = task.references(row)
        examples.append(Encoded(prompt_ids, option_ids, right[0], correct=right, references=references, lost=lost))
    return examples


def _share_prompt(splits: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of the prompt that all options share, and the tokens of each option after them.

    An option may pull the prompt's last characters into its first token, each in its own way.

    Args:
        splits: Tokens of the prompt and of the option, for each option.
    """
    prompt_ids = splits[0][0]
    common = min(_common_prefix(prompt_ids, other) for other, _ in splits)
    return prompt_ids[:common], [head[common:] + tail for head, tail in splits]


def demonstrations(
    task: Task,
    rows: Sequence[Row],
    *,
    masked: bool = False,
    seq2seq: bool = False,
    shadows: Sequence[Row] | None = None,
) -> str:
    r"""Return solved examples as the text to put before a prompt (in-context learning).

    Args:
        task: Template and options.
        rows: The examples to show.
        masked: Whether to use the wording for masked language models.
        seq2seq: Whether the answer goes in place of T5's ``<extra_id_0>``, if the template has one.
        shadows: The same rows with other text, which is what is shown; the answers stay those of ``rows``.

    Returns:
        The examples with their right answers, each followed by an empty line; empty if there are none.

    Example:
        >>> from zokernel.finetune.tasks import get_task
        >>> demonstrations(get_task("sst2"), [{"sentence": "A joy .", "label": 1}])
        'A joy . It was great\n\n'
    """
    texts = []
    for row, shadow in zip(rows, shadows or rows):
        if masked:
            before, after = task.cloze(shadow)
            space = "" if not before or before[-1].isspace() else " "
            texts.append(before + space + task.fillers(shadow)[task.label(row)] + after)
            continue
        answer = task.options(shadow)[task.label(row)].rstrip("\n")
        texts.append(fill_in_answer(task, shadow, answer) if seq2seq else task.prompt(shadow) + answer)
    return "".join(text + SEPARATOR for text in texts)


def _split(ids: list[int], offsets: list[tuple[int, int]], boundary: int) -> tuple[list[int], list[int]]:
    """Split tokens at a character: the option starts with the first token that reaches beyond the prompt."""
    cut = next((i for i, (_, end) in enumerate(offsets) if end > boundary), len(ids))
    last = max((i for i, (start, end) in enumerate(offsets) if end > start), default=-1) + 1  # drop a trailing EOS
    return ids[:cut], ids[cut:last]


def _common_prefix(left: list[int], right: list[int]) -> int:
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)


def report_label_words(examples: Sequence[Encoded], task: Any) -> bool:
    """Log which label words are more than one token, and return whether all options are single tokens.

    Raises:
        UsageError: If two label words are the same tokens, as ``good`` and ``Good`` are to an uncased model.
    """
    _refuse_equal_words(examples, task)
    single = all(len(option) == 1 for example in examples for option in example.option_ids)
    if not single and task.fixed_options:
        for choice, word in enumerate(task.label_words):
            longest = max(len(example.option_ids[choice]) for example in examples)
            if longest > 1:
                logger.info("Label word %r is up to %d tokens: scored by the mean over its tokens.", word, longest)
    return single


def _refuse_equal_words(examples: Sequence[Encoded], task: Any) -> None:
    first = next((example for example in examples if task.fixed_options and len(example.option_ids) > 1), None)
    words: dict[tuple[int, ...], str] = {}
    for word, ids in zip(task.label_words, first.option_ids) if first else ():
        same = words.setdefault(tuple(ids), word)
        if same != word:
            raise UsageError(
                f"The label words {same!r} and {word!r} are one word to this model (its tokenizer gives both the same "
                "tokens): choose words that differ in more than their spelling, or another model."
            )


def report_cut(examples: Sequence[Encoded], max_length: int) -> None:
    """Log how many prompts lost tokens because they are longer than the model or ``--max_length`` allows."""
    lost = [example.lost for example in examples if example.lost]
    if lost:
        logger.warning(
            "%d of %d prompts are longer than %d tokens and lost up to %d of them (--max_length sets the limit).",
            len(lost),
            len(examples),
            max_length,
            max(lost),
        )


__all__ = ["Encoded", "demonstrations", "encode", "report_cut", "report_label_words"]
