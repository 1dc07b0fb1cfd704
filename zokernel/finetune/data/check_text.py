"""Whether a task of text fits the model, the tokenizer and the flags: before the weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.rewards.prompts import check_prompts
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks import Task
from zokernel.finetune.tasks.chat_template import choose_chat_template, has_chat_template
from zokernel.finetune.tasks.encode_pairs import PairEncoder
from zokernel.finetune.tasks.encode_text import TextEncoder
from zokernel.finetune.tasks.generation import GenerationTask
from zokernel.finetune.tasks.reward import RewardTask
from zokernel.finetune.tasks.seq2seq import Decoder
from zokernel.finetune.tasks.text import TextTask

logger = logging.getLogger(__name__)


def check_text(
    task: Task, rows: Sequence[Row], tokenizer: Any, arguments: DataArguments, *, kind: str, objective: str
) -> None:
    """Check the flags of a task of text, and let the tokenizer use the chat template that was asked for.

    Args:
        task: The task; of another kind, only what it asks of the model, and where its answers end.
        rows: Rows to train on; of texts, the first is tokenized.
        tokenizer: The tokenizer, whose template is set.
        arguments: What the user said about the data.
        kind: ``causal``, ``masked`` or ``seq2seq``.
        objective: What a step minimises.

    Raises:
        UsageError: If something does not fit, naming the flag.
    """
    if isinstance(task, RewardTask):
        check_prompts(rows, tokenizer, arguments, kind=kind)
        return
    if not isinstance(task, TextTask):
        if kind == "causal" and "{mask}" in task.template:
            raise UsageError(f"The template {task.template!r} has a {{mask}}: it needs a masked language model.")
        if isinstance(task, GenerationTask):
            _check_answers(task, rows, tokenizer, kind=kind)
        return
    if kind == "masked":
        raise UsageError(
            f"Chats, instructions and texts train causal and sequence-to-sequence language models, and this model is "
            f"{kind}: choose another, or name a task with --task."
        )
    if kind == "seq2seq" and task.form == "text":
        raise UsageError(
            "Plain text trains causal language models, and this model is seq2seq, which learns to answer: give rows "
            "with prompt and completion, messages, or instruction and output, or choose another model."
        )
    if objective != "cross_entropy":
        raise UsageError(f"--objective {objective} needs answers to compare, which texts do not have: leave it out.")
    choose_chat_template(tokenizer, arguments.chat_template)
    chats = _are_chats(task, rows[0], tokenizer)
    unfit = {
        "chat_template": not chats,
        "assistant_only_loss": not chats,
        "completion_only_loss": task.form not in ("prompt-completion", "instruction"),
    }
    for flag, wrong in unfit.items():
        if wrong and getattr(arguments, flag) is not None:
            raise UsageError(f"--{flag} does not apply to rows of the form {task.form!r}: leave it out.")
    if kind == "seq2seq":
        _check_pairs(arguments)
    text_encoder(task, tokenizer, arguments, max_length=arguments.max_length or 2048, kind=kind).check(rows)


def text_encoder(
    task: TextTask,
    tokenizer: Any,
    arguments: DataArguments,
    *,
    max_length: int,
    kind: str = "causal",
    decoder: Decoder | None = None,
) -> TextEncoder:
    """Return what tokenizes the rows of a task, with trl's defaults where the user said nothing.

    Args:
        task: What the rows are.
        tokenizer: The tokenizer.
        arguments: What the user said about the data.
        max_length: Longest row; of a sequence-to-sequence model, longest source and longest answer.
        kind: ``causal`` or ``seq2seq``.
        decoder: How a sequence-to-sequence model frames texts, once it is loaded.
    """
    assistant, completion = arguments.assistant_only_loss, arguments.completion_only_loss
    if kind == "seq2seq":
        return PairEncoder(tokenizer, task.form, True, True, max_length, decoder)
    return TextEncoder(
        tokenizer,
        task.form,
        assistant_only_loss=task.form == "messages" if assistant is None else assistant,
        completion_only_loss=completion is None or completion,
        max_length=max_length,
    )


def _check_answers(task: GenerationTask, rows: Sequence[Row], tokenizer: Any, *, kind: str) -> None:
    """Refuse an ending at which decoding does not stop, and name answers that it cannot write."""
    ending, is_seq2seq = task.ending, kind == "seq2seq"  # by the token that ends a sequence
    if not is_seq2seq and not ending.strip(" "):
        raise UsageError(
            f"The answers end with {ending!r}, at which decoding cannot stop: leave out the task's ending (a line "
            "break), or let it hold more than spaces."
        )
    decoded = tokenizer.decode(tokenizer(f"a{ending}", add_special_tokens=False)["input_ids"])
    if ending not in decoded and (ending.strip() or not is_seq2seq):
        raise UsageError(
            f"The answers end with {ending!r}, which this tokenizer writes as {decoded[1:]!r}: choose another ending."
        )
    num_cut = sum(all(ending in reference for reference in task.references(row)) for row in rows) if ending else 0
    if num_cut:
        logger.warning(
            "%d of %d training examples have answers that hold their ending, %r; decoding stops there, so such an "
            "answer is never scored as an exact match.",
            num_cut,
            len(rows),
            ending,
        )


def _check_pairs(arguments: DataArguments) -> None:
    """Refuse what a sequence-to-sequence model cannot do with chats, instructions and completions."""
    if arguments.packing:
        raise UsageError(
            "--packing puts several texts into one row, and each answer of a seq2seq model has a source of its own: "
            "leave it out."
        )
    for flag in ("assistant_only_loss", "completion_only_loss"):
        if getattr(arguments, flag) is False:
            raise UsageError(
                f"--{flag} false would learn what the encoder of this seq2seq model reads, which is never predicted: "
                "leave it out."
            )


def _are_chats(task: TextTask, row: Row, tokenizer: Any) -> bool:
    if task.form == "instruction":
        return has_chat_template(tokenizer)
    return task.form == "messages" or (task.form == "prompt-completion" and not isinstance(row["prompt"], str))
