"""The zero-shot score, kept in a cache: the same weights on the same examples need not be scored twice."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import astuple

import torch
from torch import nn

from zokernel.data.cache import cache_home
from zokernel.files import read_json, write_json
from zokernel.finetune.scoring.options import EncodedDataset
from zokernel.journal.hashes import stored_bits

logger = logging.getLogger(__name__)


def fingerprint(model: nn.Module, dataset: EncodedDataset, settings: str) -> str:
    """Return a SHA-256 of all that decides a zero-shot score: weights, architecture, examples, settings, torch.

    Args:
        model: The model before training.
        dataset: The encoded examples.
        settings: Precision of the forwards, and how answers are scored.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{type(model).__name__} {settings} {torch.__version__}".encode())
    config = getattr(model, "config", None)
    digest.update(str(config.to_json_string() if config is not None else "").encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for bits in stored_bits(tensor):
            digest.update(bits)
    for example in dataset.examples:
        digest.update(json.dumps(astuple(example)).encode())
    return digest.hexdigest()


def cached_score(key: str, score: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return the score kept under ``key`` in the cache folder, or compute and keep it.

    Args:
        key: A :func:`fingerprint`.
        score: Computes the score.

    Returns:
        Loss and metrics.
    """
    path = cache_home() / "zero-shot" / f"{key}.json"
    if path.exists():
        logger.info("The score of these weights on these examples is known from %s.", path)
        return dict(read_json(path, keys=("loss",), advice="remove it, and the model is scored again"))
    metrics = score()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, metrics)
    return metrics
