"""Tiny ImageNet through the datasets library; no package registry carries it."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Sequence

import numpy as np

from zokernel.errors import MissingDependencyError, RunError

HUB_ID = "zh-plus/tiny-imagenet"
TIMEOUT_SECONDS = 5.0


def load_tiny_imagenet(classes: Sequence[int] = (2, 9), per_class: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Return training images of some classes of Tiny ImageNet.

    Args:
        classes: Class numbers in the data set's own order, 0 to 199.
        per_class: At most so many images of each class.

    Returns:
        Images (n, 64, 64, 3) uint8 and their class numbers.

    Raises:
        MissingDependencyError: If datasets is not installed.
        RunError: If the hub cannot be reached (found out within seconds) or does not serve the data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", "finetune", "Loading Tiny ImageNet") from error
    _check_hub()
    try:
        split = datasets.load_dataset(HUB_ID, split="train")
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        raise RunError(f"Tiny ImageNet ({HUB_ID}) could not be loaded: {error}") from error
    all_labels = np.asarray(split["label"])
    chosen = np.concatenate([np.flatnonzero(all_labels == number)[:per_class] for number in classes])
    images = [np.asarray(split[int(index)]["image"].convert("RGB"), dtype=np.uint8) for index in chosen]
    return np.stack(images), all_labels[chosen]


def _check_hub() -> None:
    """Fail at once where there is no hub: the client itself retries for minutes."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(f"{endpoint}/api/datasets/{HUB_ID}", timeout=TIMEOUT_SECONDS):
            pass
    except urllib.error.URLError as error:
        raise RunError(
            f"Tiny ImageNet is not on any package registry and the hub {endpoint} cannot be reached "
            f"({error.reason}): run this where the hub can be reached."
        ) from error
    except TimeoutError as error:
        raise RunError(f"The hub {endpoint} did not answer within {TIMEOUT_SECONDS:g} s: try again later.") from error
