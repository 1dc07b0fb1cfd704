"""Which kind of language model a configuration or a model is: causal, masked, or sequence to sequence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import nn

from zokernel.errors import UsageError, first_line
from zokernel.without_adapter import without_adapter

Kind = Literal["causal", "masked", "seq2seq"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_AUTO_CLASSES: dict[Kind, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def language_model_kind(architecture: Any, lm_type: str = "auto") -> Kind:
    """Return which kind of language model a configuration is loaded as.

    The class that the model was saved as decides.  Where that class is of several kinds (``XLMWithLMHeadModel``), or is
    no language model, the configuration says whether it encodes and decodes, decodes, or fills masks.

    Args:
        architecture: The model's configuration.
        lm_type: ``causal``, ``masked``, ``seq2seq`` or ``auto``.

    Returns:
        ``causal``, ``masked`` or ``seq2seq``.

    Raises:
        UsageError: If the model is none of these, or not what was asked for.

    Example:
        >>> from transformers import BartConfig, XLMConfig
        >>> [language_model_kind(config) for config in (BartConfig(), XLMConfig(), XLMConfig(causal=True))]
        ['seq2seq', 'masked', 'causal']
    """
    if lm_type not in ("auto", *KINDS):
        raise UsageError(f"lm_type must be auto, causal, masked or seq2seq, not {lm_type!r}.")
    classes = _classes(architecture)
    if not classes and getattr(type(architecture), "is_encoder_decoder", False):
        saved = " ".join(getattr(architecture, "architectures", None) or ["an encoder"])
        raise UsageError(
            f"This {architecture.model_type!r} model has no decoder, since it was saved as {saved}: choose the "
            "language model that it was made from, or train it with zokernel.finetune.zeroth_order(Trainer)."
        )
    if lm_type != "auto":
        if lm_type not in classes:
            raise UsageError(f"transformers has no {lm_type} language model of type {architecture.model_type!r}.")
        return lm_type
    kind = _kind(architecture, classes, getattr(architecture, "architectures", None) or ())
    if kind is None:
        raise UsageError(
            f"Models of type {architecture.model_type!r} are not language models that transformers can load as causal, "
            "masked or seq2seq: train them with zokernel.finetune.zeroth_order(Trainer), or zokernel.optim in a loop."
        )
    return kind


def kind_of_model(model: Any) -> Kind:
    """Return which kind of language model a model is, or the model inside an adapter; ``causal`` if nothing says so."""
    inner = without_adapter(model)
    architecture = getattr(inner, "config", None)
    names = [base.__name__ for base in type(inner).__mro__]
    return _kind(architecture, _classes(architecture), names) or "causal"


def fills_masks(model: nn.Module) -> bool:
    """Return whether a model, or the model inside an adapter, is a masked language model."""
    return kind_of_model(model) == "masked"


def auto_class(kind: Kind) -> Any:
    """Return the ``AutoModel`` class of transformers that loads models of a kind."""
    import transformers

    return getattr(transformers, _AUTO_CLASSES[kind])


def is_trusted(architecture: Any) -> bool:
    """Return whether a configuration is of a class that came with its model, which the user has let run."""
    return type(architecture).__module__.startswith("transformers_modules.")


def empty_model(architecture: Any, kind: Kind = "causal") -> Any:
    """Build a model on the device ``meta``, where weights have shapes and no memory, from its configuration.

    Code that comes with the model runs if the configuration is of that code, too.

    Raises:
        UsageError: If the configuration describes no model that can be built.
    """
    try:
        with torch.device("meta"):
            model = auto_class(kind).from_config(architecture, trust_remote_code=is_trusted(architecture))
        model.tie_weights()
    except Exception as error:  # sizes that do not fit fail in any way
        raise UsageError(
            f"The configuration of this {architecture.model_type} describes no model that can be built "
            f"({first_line(error)}): compare its config.json with that of the model it was made from."
        ) from error
    return model


def _classes(architecture: Any) -> dict[Kind, set[str]]:
    """Return the names of the classes that load a configuration, by the kinds it may be: its own code's, too."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    auto_map = getattr(architecture, "auto_map", None) or {}
    classes: dict[Kind, set[str]] = {
        kind: {str(auto_map[name]).rpartition(".")[2]} for kind, name in _AUTO_CLASSES.items() if name in auto_map
    }
    for kind, mapping in zip(KINDS, mappings):
        if type(architecture) in mapping:
            mapped: Any = mapping[type(architecture)]
            names = {c.__name__ for c in (mapped if isinstance(mapped, tuple) else (mapped,))}
            classes[kind] = classes.get(kind, set()) | names
    # Models of speech are listed as seq2seq, too; some of them continue text after an encoded sound.  BART is listed as
    # masked, but writes the text anew in its decoder.
    classes.pop("masked" if getattr(architecture, "is_encoder_decoder", False) else "seq2seq", None)
    return classes


def _kind(architecture: Any, classes: dict[Kind, set[str]], names: Iterable[str]) -> Kind | None:
    matching = {kind for kind, class_names in classes.items() if class_names & set(names)}
    possible = matching or set(classes)
    decodes = getattr(architecture, "is_decoder", False) or getattr(architecture, "causal", False)
    order: tuple[Kind, ...] = ("seq2seq", "causal", "masked") if decodes is True else ("seq2seq", "masked", "causal")
    return next((kind for kind in order if kind in possible), None)
