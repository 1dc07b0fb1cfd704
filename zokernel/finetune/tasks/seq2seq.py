"""Examples for sequence-to-sequence models: the prompt goes to the encoder, options and answers to the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zokernel.data.tables import Row
from zokernel.errors import UsageError, first_line
from zokernel.finetune.tasks.base import Task
from zokernel.finetune.tasks.control_tokens import ControlTokens
from zokernel.finetune.tasks.encoded import Context, Encoded, choices_and_answers, keep_end, refuse_empty_option
from zokernel.finetune.tasks.template import fill, literals

SENTINEL = "<extra_id_0>"  # what T5 was pretrained to fill in


@dataclass(frozen=True)
class Decoder:
    """How a model frames the texts that its decoder writes.

    Attributes:
        start: The decoder's first input, from which it predicts the first token of a text.
        before: Tokens that the tokenizer puts before a text: BART's ``<s>``, the language of M2M100 and NLLB.
        after: Tokens that it puts after a text: the end of the sequence, and the language of mBART.

    Example:
        >>> Decoder(start=2, before=(0,), after=(2,)).prompt
        (2, 0)
    """

    start: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The decoder's inputs before the first token that is written freely."""
        return (self.start, *self.before)


def decoder_of(model: Any, tokenizer: Any) -> Decoder:
    """Return how a sequence-to-sequence model frames texts, as its own training would.

    The first input is the one that the model itself puts before labels: a start token for most families, the language
    for mBART.

    Args:
        model: A sequence-to-sequence model of transformers, or a peft wrapper of one.
        tokenizer: Its tokenizer.

    Raises:
        UsageError: If the model's decoder does not read its labels shifted by one.
    """
    whole, bare = (_target_ids(tokenizer, ["a"], add_special_tokens=special)[0] for special in (True, False))
    begin = next((n for n in range(len(whole)) if bare and whole[n : n + len(bare)] == bare), 0)
    before, after = tuple(whole[:begin]), tuple(whole[begin + len(bare) :])
    start = _first_input(model, whole)
    if before == (start,):  # a tokenizer that writes the start token itself, as T5Gemma's does
        before = ()
    if not after and tokenizer.eos_token_id is not None:
        after = (tokenizer.eos_token_id,)  # without an end, decoding would not stop
    return Decoder(start, before, after)


def _first_input(model: Any, labels: list[int]) -> int:
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    name = type(model).__name__
    if shift is None:
        start = getattr(model.config, "decoder_start_token_id", None)
        if start is None:
            raise UsageError(f"{name} has no decoder_start_token_id in its config.json: add the one of its family.")
        return int(start)
    try:
        inputs = shift(torch.tensor([labels]))[0].tolist()
    except (ValueError, TypeError, AssertionError) as error:
        raise UsageError(f"{name} cannot begin to decode: {first_line(error)}") from error
    if inputs[1:] != labels[:-1]:
        raise UsageError(
            f"The decoder of {name} does not read its labels shifted by one, so options cannot be scored there: train "
            "it with zokernel.finetune.zeroth_order(Seq2SeqTrainer)."
        )
    return inputs[0]


def encode_seq2seq(
    task: Task,
    rows: Sequence[Row],
    tokenizer: Any,
    decoder: Decoder,
    *,
    max_length: int,
    context: Context,
    only_answer: bool,
) -> list[Encoded]:
    """Tokenize the prompt for the encoder and every option for the decoder.

    Options of classification and multiple choice are scored by their own tokens, after everything that the tokenizer
    puts before a text.  An answer that will be generated is scored with all tokens of its labels, as the model's own
    training does, so the end of the sequence takes the place of the line break.

    With ``<extra_id_0>`` in the template, the decoder begins with that token, as in T5's pretraining.

    Args:
        task: Template and options.
        rows: The table.
        tokenizer: A fast tokenizer.
        decoder: How the model frames texts.
        max_length: Longest sequence of either side; a longer prompt loses tokens at the front.
        context: Text put before every prompt.
        only_answer: Encode the right option alone.

    Returns:
        One :class:`Encoded` per row, with a ``decoder_start``.

    Raises:
        UsageError: If an option has no token, or is longer than ``max_length``.
    """
    controls = ControlTokens(tokenizer)
    all_ids, _ = controls(
        [context.text + task.prompt(row) for row in rows],
        [context.shadow + task.prompt(row) for row in controls.shadows(rows)],
    )
    options, correct = choices_and_answers(
        [task.options(row) for row in rows], [task.correct(row) for row in rows], only_answer
    )
    ids_of_option = _option_ids(task, tokenizer, options)
    frame = _answer_frame(task, tokenizer, decoder)
    _check_targets(ids_of_option, max_length - len(frame.start) - len(frame.forced) - len(frame.ending))
    examples = []
    for row, ids, choices, right in zip(rows, all_ids, options, correct):
        prompt_ids = keep_end(ids, max_length, tokenizer)
        examples.append(
            Encoded(
                prompt_ids,
                [[*frame.forced, *ids_of_option[option.strip()], *frame.ending] for option in choices],
                right[0],
                correct=right,
                references=task.references(row),
                lost=len(ids) - len(prompt_ids),
                decoder_start=frame.start,
                forced=frame.forced,
            )
        )
    return examples


@dataclass(frozen=True)
class _AnswerFrame:
    """The tokens around an option or answer of a task.

    Attributes:
        start: What the decoder reads before it.
        forced: Tokens that every answer begins with.
        ending: Tokens that every answer ends with.
    """

    start: tuple[int, ...]
    forced: tuple[int, ...]
    ending: tuple[int, ...]


def _answer_frame(task: Task, tokenizer: Any, decoder: Decoder) -> _AnswerFrame:
    is_generated = task.kind == "generation"
    ending = decoder.after if is_generated else ()
    if has_sentinel(task, tokenizer):
        return _AnswerFrame((decoder.start, tokenizer.convert_tokens_to_ids(SENTINEL)), (), ending)
    if is_generated:
        return _AnswerFrame((decoder.start,), decoder.before, ending)
    return _AnswerFrame(decoder.prompt, (), ending)


def _option_ids(task: Task, tokenizer: Any, options: Sequence[tuple[str, ...]]) -> dict[str, list[int]]:
    """Return the tokens of every text that is an option of some row, by the text without surrounding spaces."""
    texts = list(dict.fromkeys(option.strip() for choices in options for option in choices))
    # Label words are the user's own; an option from a column stays text.
    ids = _target_ids(tokenizer, texts, add_special_tokens=False, split_special_tokens=not task.fixed_options)
    return dict(zip(texts, ids))


def has_sentinel(task: Task, tokenizer: Any) -> bool:
    """Whether the template itself has T5's ``<extra_id_0>``, and the tokenizer knows it as a control token."""
    return SENTINEL in literals(task.template) and SENTINEL in tokenizer.get_added_vocab()


def fill_in_answer(task: Task, row: Row, answer: str) -> str:
    """Return the prompt with its answer: in place of the template's sentinel, or after the prompt."""
    if SENTINEL not in literals(task.template):
        return task.prompt(row) + answer
    before, after = task.template.split(SENTINEL, 1)
    return fill(before, row) + answer.strip() + fill(after, row)


def _target_ids(tokenizer: Any, texts: list[str], **settings: Any) -> list[list[int]]:
    return tokenizer(text_target=texts, **settings)["input_ids"]


def _check_targets(ids_of_option: dict[str, list[int]], room: int) -> None:
    for text, ids in ids_of_option.items():
        refuse_empty_option(text, ids)
        if len(ids) > room:
            raise UsageError(
                f"An option or answer has {len(ids)} tokens, more than the {room} that the decoder takes: raise "
                f"--max_length, or shorten it ({text[:40]!r}...)."
            )
