"""How answers are scored: exact match and token F1 of the SQuAD evaluation, and macro F1 of classes."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(answer: str) -> str:
    """Return the answer as SQuAD compares it: lower case, no punctuation, no articles, single spaces.

    Example:
        >>> normalize("The  Eiffel-Tower!")
        'eiffeltower'
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer equals one of the references after normalisation, else 0."""
    return float(any(normalize(answer) == normalize(reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Return the largest F1 of the answer's words against a reference's.

    An answer that shares no word with the reference scores 0, also when nothing is left of both after normalisation.

    Example:
        >>> token_f1("in the blue house", ["a blue house", "home"])
        0.8
        >>> token_f1("the", ["the"])
        0.0
    """
    return max((_one_f1(normalize(answer).split(), normalize(r).split()) for r in references), default=0.0)


def _one_f1(answer: list[str], reference: list[str]) -> float:
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference)) if shared else 0.0


def macro_f1(predicted_N: Tensor, labels_N: Tensor) -> float:
    r"""Return the mean over classes of :math:`2 TP_c / (2 TP_c + FP_c + FN_c)`, over the classes that occur.

    Args:
        predicted_N: Predicted classes.
        labels_N: True classes.

    Returns:
        A number in [0, 1].

    Example:
        >>> macro_f1(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
        0.666...
    """
    scores = []
    for label in torch.cat([predicted_N, labels_N]).unique():
        predicted, actual = predicted_N == label, labels_N == label
        both = (predicted & actual).sum()
        scores.append((2 * both / (predicted.sum() + actual.sum())).item())
    return sum(scores) / len(scores)
