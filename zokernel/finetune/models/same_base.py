"""Whether a saved adapter is put on the base that it was trained on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from zokernel.finetune.models.quantized_model import describe_quantization
from zokernel.finetune.models.saved_adapter import adapter_config, base_name
from zokernel.finetune.run_files import RUN_FILE, read_run_file, run_folders
from zokernel.journal import Journal
from zokernel.journal.hashes import frozen_sha256
from zokernel.journal.reader import FILE_NAME

logger = logging.getLogger(__name__)


def base_facts(adapted: Any) -> dict[str, str]:
    """Return what tells the base of an adapter from others, for the record of a run.

    Args:
        adapted: The model.

    Returns:
        Class of the base, type of its weights, how it is quantized, and a hash over samples of each weight; empty
        without an adapter.
    """
    if not hasattr(adapted, "peft_config"):
        return {}
    base = adapted.get_base_model()
    parameters = dict(adapted.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    facts = {"class": type(base).__name__, "dtype": dtype, "frozen_sha256": frozen_sha256(parameters, trained)}
    return facts | ({"quantization": describe_quantization(adapted)} if describe_quantization(adapted) else {})


def other_base(adapted: Any, name: str, base: str) -> str:
    """Return how a base differs from the one that a saved adapter was trained on.

    A run recorded class and weights of its base.  Of an adapter from elsewhere only the name of its base is known.

    Args:
        adapted: The peft model, made of both.
        name: The adapter's folder or hub id.
        base: What the user named as the base.

    Returns:
        What differs; empty if nothing is known to.
    """
    current, recorded = base_facts(adapted), _recorded_facts(Path(name).expanduser())
    if recorded:
        if recorded["class"] != current["class"]:
            return f"that was a {recorded['class']}, and this is a {current['class']}"
        before, now = (facts.get("quantization", "") for facts in (recorded, current))
        if before != now:
            words = [f"quantized ({how})" if how else "in full precision" for how in (before, now)]
            logger.info("%s was trained on its base %s, and here the base is %s.", name, *words)
            return ""
        if recorded["dtype"] == current["dtype"] and recorded["frozen_sha256"] != current["frozen_sha256"]:
            return "its weights were different"
        return ""
    recorded_name, name_here = str(adapter_config(name).base_model_name_or_path or ""), base_name(base)
    if (
        recorded_name
        and recorded_name != name_here
        and not any(Path(place).is_absolute() for place in (recorded_name, name_here))
    ):
        return f"that was {recorded_name}"
    return ""


def _recorded_facts(folder: Path) -> dict[str, str]:
    """Return the :func:`base_facts` of the run that an adapter is from; those of its journal if it is an older one."""
    for place in run_folders(folder):
        if (place / RUN_FILE).is_file() and (facts := read_run_file(place / RUN_FILE).get("base")):
            return dict(facts)
        if (place / FILE_NAME).is_file():
            header = Journal.read(place / FILE_NAME).header
            description = header["model"]
            return {name: description[name] for name in ("class", "dtype")} | {"frozen_sha256": header["frozen_sha256"]}
    return {}
