"""Batches of encoded examples: right padding, explicit scored positions, and shared prompts.

Shapes: B examples, C options of the example with the most, R rows of the batch, T tokens, K scored positions per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zokernel.finetune.tasks.batching import Examples, left_padded, right_padded
from zokernel.finetune.tasks.encoded import Encoded


class EncodedDataset(Examples[Encoded]):
    """A list of encoded examples as the dictionaries that a collator takes.

    ``input_ids`` is the prompt; samplers that group by length read its length.
    """

    def _size(self, example: Encoded) -> int:
        return len(example.prompt_ids) + len(example.suffix_ids)

    def __getitem__(self, position: int) -> dict[str, Any]:
        example = self.examples[position]
        item = {"input_ids": example.prompt_ids, "option_ids": example.option_ids, "label": example.label}
        if example.mask_id is not None:
            item |= {"suffix_ids": example.suffix_ids, "mask_id": example.mask_id}
        if example.decoder_start:
            item |= {"decoder_start": example.decoder_start, "forced": example.forced}
        if len(example.correct) > 1:
            item["correct"] = example.correct
        if example.references:
            item["references"] = example.references
        return item


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return a batch with its tensors on a device; other values stay as they are."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@dataclass(frozen=True)
class _Row:
    """One sequence of the batch and what is read off it."""

    tokens: list[int]
    positions: list[int]  # whose logits are wanted
    targets: list[int]  # the token that each of them should give
    cells: list[tuple[int, int]]  # (example, option) that each of them counts for
    position_ids: list[int] | None = None
    segments: list[int] | None = None  # 0 the prompt, c + 1 option c


@dataclass(frozen=True)
class Collator:
    """Batches examples.

    Options of one token each are read off a single forward pass over the prompt.  Longer options are scored by the mean
    over their tokens, in one of two layouts.  Either every option has a row of its own, after a copy of the prompt.
    Or, with ``shared_prompt``, all options of an example are in one row after one prompt: the attention mask keeps them
    apart, and each has the positions that it would have in a row of its own.

    For a sequence-to-sequence model, all this happens in the decoder; the encoder's batch has one row per example.

    Args:
        pad_token_id: Any token that has an embedding (None: the first); padded positions are masked and never scored.
        shared_prompt: Whether options share their prompt.  Needs a model that takes such masks: see
            :func:`zokernel.finetune.scoring.choose_collator.choose_collator`.
    """

    pad_token_id: int | None
    shared_prompt: bool = False

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch.

        It always has ``labels`` (B,), ``input_ids`` and ``attention_mask`` (R, T), ``positions`` and ``targets``.  When
        all options are single tokens and every example has the same number of them, R = B, ``positions`` is (B, 1) and
        ``targets`` (B, C) holds each option's token.  Otherwise both are (R, K), ``cells`` (R, K) says which option of
        which example a position counts for (-1: none), and ``option_mask`` (B, C) which options exist.  Shared prompts
        add ``position_ids`` and ``segments`` (R, T); masked language models add ``masked``; generation adds
        ``prompts``, left-padded, and ``references``.

        For sequence-to-sequence models, ``input_ids`` and ``attention_mask`` (B, S) are the encoder's, and
        ``decoder_input_ids`` (R, T) what the decoder reads; ``decoder_prompt`` (B, D) is what generated answers begin
        with.
        """
        if "decoder_start" not in features[0]:
            return self._batch(features)
        decoded = [{**feature, "input_ids": list(feature["decoder_start"])} for feature in features]
        batch = self._batch(decoded)
        prompts = [feature["input_ids"] for feature in features]
        length = max(map(len, prompts))
        batch |= {
            "decoder_input_ids": batch["input_ids"],
            "input_ids": right_padded(prompts, length, self._padding),
            "attention_mask": right_padded([[1] * len(prompt) for prompt in prompts], length, 0),
        }
        if "references" in batch:
            batch |= {"prompts": batch["input_ids"], "prompts_mask": batch["attention_mask"]}
            batch["decoder_prompt"] = torch.tensor([[*f["decoder_start"], *f["forced"]] for f in features])
        return batch

    @property
    def _padding(self) -> int:
        return self.pad_token_id or 0

    def _batch(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        counts = [len(feature["option_ids"]) for feature in features]
        batch: dict[str, Any] = {"labels": torch.tensor([feature["label"] for feature in features])}
        if "mask_id" in features[0]:
            batch["masked"] = True
        single = all(len(option) == 1 for feature in features for option in feature["option_ids"])
        if single and len(set(counts)) == 1 and counts[0] > 1:
            rows = [self._single(feature) for feature in features]
            batch |= self._pad([_Row(tokens, [position], [], []) for tokens, position in rows])
            batch["targets"] = torch.tensor([[option[0] for option in f["option_ids"]] for f in features])
        else:
            shared = self.shared_prompt and max(counts) > 1
            rows_of = _masked_rows if "mask_id" in features[0] else _packed_rows if shared else _plain_rows
            scored = [row for number, feature in enumerate(features) for row in rows_of(number, feature)]
            batch |= self._pad(scored)
            batch |= _targets(scored, max(counts))
            batch["option_mask"] = torch.arange(max(counts))[None] < torch.tensor(counts)[:, None]
        if any("correct" in feature for feature in features):
            correct = torch.zeros(len(features), max(counts), dtype=torch.bool)
            for number, feature in enumerate(features):
                correct[number, list(feature.get("correct", (feature["label"],)))] = True
            batch["correct"] = correct
        if "references" in features[0]:
            batch |= self._prompts(features)
        return batch

    def _single(self, feature: dict[str, Any]) -> tuple[list[int], int]:
        prompt = feature["input_ids"]
        if "mask_id" in feature:
            return [*prompt, feature["mask_id"], *feature["suffix_ids"]], len(prompt)
        return prompt, len(prompt) - 1

    def _pad(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        length = max(len(row.tokens) for row in rows)
        width = max(len(row.positions) for row in rows)
        padded = {
            "input_ids": right_padded([row.tokens for row in rows], length, self._padding),
            "attention_mask": right_padded([[1] * len(row.tokens) for row in rows], length, 0),
            "positions": right_padded([row.positions for row in rows], width, 0),
        }
        if rows[0].segments is not None:
            padded["position_ids"] = right_padded([row.position_ids or [] for row in rows], length, 0)
            padded["segments"] = right_padded([row.segments or [] for row in rows], length, -1)
        return padded

    def _prompts(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the prompts for decoding: padded on the left, where decoding expects it."""
        prompts = [feature["input_ids"] for feature in features]
        length = max(map(len, prompts))
        return {
            "prompts": left_padded(prompts, length, self._padding),
            "prompts_mask": left_padded([[1] * len(prompt) for prompt in prompts], length, 0),
            "references": [feature["references"] for feature in features],
        }


def _plain_rows(number: int, feature: dict[str, Any]) -> list[_Row]:
    """One row per option, after a copy of the prompt."""
    prompt = feature["input_ids"]
    return [
        _Row(
            prompt + option[:-1],
            list(range(len(prompt) - 1, len(prompt) + len(option) - 1)),
            option,
            [(number, choice)] * len(option),
        )
        for choice, option in enumerate(feature["option_ids"])
    ]


def _packed_rows(number: int, feature: dict[str, Any]) -> list[_Row]:
    """One row: the prompt once, then every option at the positions that follow the prompt."""
    prompt = feature["input_ids"]
    tokens, place, segments = list(prompt), list(range(len(prompt))), [0] * len(prompt)
    positions: list[int] = []
    targets: list[int] = []
    cells: list[tuple[int, int]] = []
    for choice, option in enumerate(feature["option_ids"]):
        start = len(tokens)
        tokens += option[:-1]
        place += range(len(prompt), len(prompt) + len(option) - 1)
        segments += [choice + 1] * (len(option) - 1)
        # The first token is predicted by the prompt's last, each other by the token before it.
        positions += [len(prompt) - 1, *range(start, start + len(option) - 1)]
        targets += option
        cells += [(number, choice)] * len(option)
    return [_Row(tokens, positions, targets, cells, place, segments)]


def _masked_rows(number: int, feature: dict[str, Any]) -> list[_Row]:
    """One row per length of options: that many masks, from which all options of the length are read."""
    prompt, rows = feature["input_ids"], []
    by_length: dict[int, list[int]] = {}
    for choice, option in enumerate(feature["option_ids"]):
        by_length.setdefault(len(option), []).append(choice)
    for length, choices in by_length.items():
        rows.append(
            _Row(
                [*prompt, *[feature["mask_id"]] * length, *feature["suffix_ids"]],
                list(range(len(prompt), len(prompt) + length)) * len(choices),
                [token for choice in choices for token in feature["option_ids"][choice]],
                [(number, choice) for choice in choices for _ in range(length)],
            )
        )
    return rows


def _targets(rows: Sequence[_Row], num_options: int) -> dict[str, Tensor]:
    width = max(len(row.positions) for row in rows)
    return {
        "targets": right_padded([row.targets for row in rows], width, -100),
        "cells": right_padded([[example * num_options + c for example, c in row.cells] for row in rows], width, -1),
    }
