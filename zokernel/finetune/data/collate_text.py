"""Batches of rows of text: right padding, explicit scored positions, and rows packed from several documents.

Shapes: R rows, T tokens, K scored tokens of the row with the most.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zokernel.finetune.tasks.batching import Examples, right_padded
from zokernel.finetune.tasks.encode_text import EncodedText


class TextDataset(Examples[EncodedText]):
    """A list of rows as the dictionaries that :class:`TextCollator` takes."""

    def _size(self, example: EncodedText) -> int:
        return example.size


@dataclass(frozen=True)
class TextCollator:
    """Batches rows.

    Args:
        pad_token_id: Any valid token; padded positions are masked and never scored.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch.

        ``input_ids`` and ``attention_mask`` (R, T); ``targets`` (R, K), the tokens that count, and ``positions``
        (R, K), where each is predicted, one token earlier; padded with -100 and 0.  ``labels`` (R,) are the numbers of
        tokens that count.  If a row holds several documents, ``position_ids`` (R, T) begin anew in each, and
        ``segments`` (R, T) number them from 1 (-1: padding).

        For sequence-to-sequence models, ``input_ids`` and ``attention_mask`` (R, S) are the encoder's, and
        ``decoder_input_ids`` (R, T) what the decoder reads.
        """
        length = max(len(feature["input_ids"]) for feature in features)
        width = max(len(feature["scored"]) for feature in features)
        batch = {
            "labels": torch.tensor([len(feature["scored"]) for feature in features]),
            "input_ids": right_padded([feature["input_ids"] for feature in features], length, self.pad_token_id),
            "attention_mask": right_padded([[1] * len(feature["input_ids"]) for feature in features], length, 0),
            "positions": right_padded([[place - 1 for place in feature["scored"]] for feature in features], width, 0),
            "targets": right_padded([[f["input_ids"][place] for place in f["scored"]] for f in features], width, -100),
        }
        if any(len(feature["lengths"]) > 1 for feature in features):
            within = [[place for size in f["lengths"] for place in range(size)] for f in features]
            number = [[n for n, size in enumerate(f["lengths"], 1) for _ in range(size)] for f in features]
            batch["position_ids"] = right_padded(within, length, 0)
            batch["segments"] = right_padded(number, length, -1)
        if any(feature["source_ids"] for feature in features):
            sources = [feature["source_ids"] for feature in features]
            longest = max(map(len, sources))
            # The last token is only predicted.
            batch["decoder_input_ids"] = batch["input_ids"][:, :-1]
            batch["input_ids"] = right_padded(sources, longest, self.pad_token_id)
            batch["attention_mask"] = right_padded([[1] * len(source) for source in sources], longest, 0)
        return batch


def pack(examples: Sequence[EncodedText], max_length: int) -> list[EncodedText]:
    """Put several documents into each row, best fit first, as trl's ``bfd`` does; none is cut.

    Args:
        examples: One document each, at most ``max_length`` tokens long.
        max_length: Longest row.

    Returns:
        Rows in the order in which they were opened.

    Example:
        >>> documents = [EncodedText([1] * n, [n - 1], [n]) for n in (5, 3, 4, 2)]
        >>> [row.lengths for row in pack(documents, 7)]
        [[5, 2], [4, 3]]
    """
    rows: list[list[EncodedText]] = []
    open_rows: list[tuple[int, int]] = []  # (room, number of the row), in order of room
    for example in sorted(examples, key=lambda e: -len(e.input_ids)):
        size = len(example.input_ids)
        fitting = bisect_left(open_rows, (size, -1))
        if fitting == len(open_rows):
            rows.append([])
            room, number = max_length, len(rows) - 1
        else:
            room, number = open_rows.pop(fitting)
        rows[number].append(example)
        insort(open_rows, (room - size, number))
    return [_join_documents(row) for row in rows]


def _join_documents(documents: Sequence[EncodedText]) -> EncodedText:
    ids: list[int] = []
    scored: list[int] = []
    for document in documents:
        scored += [len(ids) + place for place in document.scored]
        ids += document.input_ids
    return EncodedText(ids, scored, [len(document.input_ids) for document in documents])
