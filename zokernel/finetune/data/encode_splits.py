"""The splits of a run, tokenized for its model."""

from __future__ import annotations

import logging
from typing import Any

from zokernel.errors import UsageError
from zokernel.finetune.data.collate import EncodedDataset
from zokernel.finetune.data.datasets import Splits
from zokernel.finetune.tasks import Encoded, Task, demonstrations, encode
from zokernel.finetune.tasks.control_tokens import ControlTokens
from zokernel.finetune.tasks.encoding import report_cut, report_label_words
from zokernel.finetune.tasks.seq2seq import Decoder
from zokernel.readable import plural

logger = logging.getLogger(__name__)


def encode_splits(
    task: Task,
    splits: Splits,
    tokenizer: Any,
    *,
    max_length: int,
    masked: bool,
    decoder: Decoder | None = None,
    num_demonstrations: int = 0,
    only_answer: bool = False,
) -> tuple[dict[str, EncodedDataset], str]:
    """Tokenize the three splits for a model, and log how many examples there are and how they are scored.

    Demonstrations, if asked for, are the first training examples; the others remain to train on.

    Args:
        task: Templates and options.
        splits: The rows.
        tokenizer: The model's tokenizer.
        max_length: Longest sequence.
        masked: Whether the model fills masks.
        decoder: How a sequence-to-sequence model frames the texts that it writes.
        num_demonstrations: Solved examples before every prompt.
        only_answer: Whether training needs the right option alone.

    Returns:
        ``train``, ``validation`` and ``test``, and the text of the demonstrations, which stands before every prompt.

    Raises:
        UsageError: If there are too few examples to demonstrate with, or the task does not fit the model.
    """
    if num_demonstrations >= len(splits.train):
        raise UsageError(
            f"{plural(num_demonstrations, 'demonstration')} would leave none of "
            f"{plural(len(splits.train), 'training example')} to train on: lower --num_demonstrations."
        )
    solved, train = splits.train[:num_demonstrations], splits.train[num_demonstrations:]
    hidden, seq2seq = ControlTokens(tokenizer).shadows(solved), decoder is not None
    context = demonstrations(task, solved, masked=masked, seq2seq=seq2seq)
    context_shadow = demonstrations(task, solved, shadows=hidden, masked=masked, seq2seq=seq2seq)
    encoded = {}
    for split, rows in (("train", train), ("validation", splits.validation), ("test", splits.test)):
        encoded[split] = encode(
            task,
            rows,
            tokenizer,
            max_length=max_length,
            masked=masked,
            decoder=decoder,
            context=context,
            context_shadow=context_shadow,
            only_answer=only_answer and split == "train",
        )
    _report(task, encoded, max_length)
    return {split: EncodedDataset(examples) for split, examples in encoded.items()}, context


def _report(task: Task, encoded: dict[str, list[Encoded]], max_length: int) -> None:
    """Log how many examples there are, how they are scored, and which prompts were cut."""
    everything = [example for examples in encoded.values() for example in examples]
    report_cut(everything, max_length)
    if task.kind == "generation":
        how = "answers are generated"
    else:
        single = report_label_words(everything, task)
        how = "one forward scores every option" if single else "options have several tokens"
    *others, (last, count) = ((split, len(examples)) for split, examples in encoded.items() if examples)
    counts = [*(f"{number:,} {split}" for split, number in others), plural(count, f"{last} example")]
    logger.info("Data: %s; %s.", ", ".join(counts), how)
