"""Prompts as tokens, batched for generation, and a check that rewards, rows and model fit together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.models.greedy import end_tokens
from zokernel.finetune.rewards.functions import Rewards, load_rewards
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks.batching import Examples, left_padded
from zokernel.finetune.tasks.chat_template import choose_chat_template, render
from zokernel.finetune.tasks.encoded import keep_end
from zokernel.readable import plural

logger = logging.getLogger(__name__)

_ANSWER = {"role": "assistant", "content": "."}
MANY = 0.5  # share of empty answers from which a run warns


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt, tokenized.

    Attributes:
        input_ids: Its tokens.
        number: Number of its row in the split, on which the noise of its samples depends.
        row: The row, with the prompt as a text or messages.
    """

    input_ids: list[int]
    number: int
    row: Row = field(repr=False)


class PromptDataset(Examples[EncodedPrompt]):
    """A list of prompts as the dictionaries that :class:`PromptCollator` takes."""

    def _size(self, example: EncodedPrompt) -> int:
        return len(example.input_ids)


@dataclass(frozen=True)
class PromptCollator:
    """Batches prompts, padded on the left: ``prompts`` and ``prompts_mask`` (B, T), ``labels`` (B,) their numbers.

    ``rows`` are the rows themselves, for the reward functions.

    Args:
        pad_token_id: Any token that has an embedding (None: the first).

    Example:
        >>> batch = PromptCollator(0)([vars(EncodedPrompt(ids, n, {})) for n, ids in enumerate([[5], [6, 7]])])
        >>> batch["prompts"].tolist(), batch["prompts_mask"].tolist(), batch["labels"].tolist()
        ([[0, 5], [6, 7]], [[0, 1], [1, 1]], [0, 1])
    """

    pad_token_id: int | None

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch."""
        prompts = [feature["input_ids"] for feature in features]
        length = max(map(len, prompts))
        return {
            "labels": torch.tensor([feature["number"] for feature in features]),
            "prompts": left_padded(prompts, length, self.pad_token_id or 0),
            "prompts_mask": left_padded([[1] * len(prompt) for prompt in prompts], length, 0),
            "rows": [feature["row"] for feature in features],
        }


def encode_prompts(rows: Sequence[Row], tokenizer: Any, *, max_length: int, where: str) -> PromptDataset:
    """Tokenize prompts; one that is too long loses its beginning."""
    prompts, cut = [], 0
    for number, row in enumerate(rows):
        ids = prompt_ids(row, tokenizer)
        cut += len(ids) > max_length
        prompts.append(EncodedPrompt(keep_end(ids, max_length, tokenizer), number, row))
    if cut:
        count = plural(len(rows), "prompt")
        logger.info("%s: %d of %s are cut at the front to %d tokens.", where, cut, count, max_length)
    return PromptDataset(prompts)


def prompt_ids(row: Row, tokenizer: Any) -> list[int]:
    """Return the tokens after which the model answers a row's prompt.

    Raises:
        UsageError: If the prompt is a chat that the chat template does not take, or there is no template.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    # A chat that ends with the assistant's words is continued there.
    open_turn = (
        {"continue_final_message": True} if prompt[-1]["role"] == "assistant" else {"add_generation_prompt": True}
    )
    return list(render(tokenizer, prompt, tokenize=True, **open_turn))


def turn_ends(rows: Sequence[Row], tokenizer: Any) -> list[int]:
    """Return the control tokens with which the chat template ends the assistant's turn; none without chats."""
    chat = next((row["prompt"] for row in rows if not isinstance(row["prompt"], str)), None)
    if chat is None:
        return []
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    messages = chat[:-1] if chat[-1]["role"] == "assistant" else chat  # many templates take no two answers in a row
    ids = render(tokenizer, [*messages, _ANSWER], tokenize=True)
    return [next((token for token in reversed(ids) if token in special), tokenizer.eos_token_id)]


def ends_of(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[int]:
    """Return the tokens that end an answer: those of the tokenizer and the model, and the end of a turn in chats."""
    return sorted(end_tokens(model, tokenizer).union(turn_ends(rows, tokenizer)) - {None})


def describe_empty_answers(share: float, rows: Sequence[Row], tokenizer: Any) -> str:
    """Return a warning that a model wrote nothing after many prompts; an empty text if there were few.

    Args:
        share: The share of empty answers.
        rows: The rows of the prompts.
        tokenizer: The model's tokenizer.
    """
    if share < MANY:
        return ""
    finding = f"{round(share * len(rows)):,} of the answers to {plural(len(rows), 'held-out prompt')} were empty"
    if getattr(tokenizer, "chat_template", None) and all(isinstance(row["prompt"], str) for row in rows):
        return (
            f"{finding} before training: the model writes nothing after these prompts, so give rows of messages, such "
            'as prompt: [{"role": "user", "content": "..."}], for which its chat template is used.'
        )
    return (
        f"{finding} before training: the model writes nothing after these prompts, so word them such that an answer "
        "follows, or choose another model."
    )


def rewards_of(arguments: DataArguments) -> Rewards:
    """Return the rewards that the flags name; see :func:`zokernel.finetune.rewards.functions.load_rewards`."""
    return load_rewards(arguments.reward_function or [], arguments.reward_weights)


def check_prompts(rows: Sequence[Row], tokenizer: Any, arguments: DataArguments, *, kind: str) -> None:
    """Check rewards and prompts before the weights are loaded, and set the tokenizer's chat template.

    Args:
        rows: Rows to train on, of which the first is tokenized.
        tokenizer: The tokenizer, whose template is set.
        arguments: What the user said about the data.
        kind: ``causal``, ``masked`` or ``seq2seq``.

    Raises:
        UsageError: If something does not fit, naming the flag.
    """
    if kind != "causal":
        raise UsageError(f"--objective reward needs a causal language model, and this model is {kind}: choose another.")
    if arguments.num_generations > 1 and arguments.temperature == 0:
        raise UsageError(
            f"--num_generations {arguments.num_generations} answers to a prompt are all the same at --temperature 0: "
            "raise the temperature, or leave out --num_generations."
        )
    rewards_of(arguments).check_columns(rows)
    choose_chat_template(tokenizer, arguments.chat_template)
    if arguments.chat_template is not None and all(isinstance(row["prompt"], str) for row in rows):
        raise UsageError("--chat_template does not apply to prompts that are plain texts: leave it out.")
    prompt_ids(rows[0], tokenizer)
    turn_ends(rows, tokenizer)
