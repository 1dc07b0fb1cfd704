"""Files of flags: YAML mappings for ``--config``, which may extend each other, and the recipes of the package."""

from __future__ import annotations

import difflib
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from zokernel.data.yaml_mapping import read_mapping
from zokernel.errors import UsageError
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.settings.config import ZOConfig

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package.

    Example:
        >>> "mezo-opt-sst2" in recipe_names()
        True
    """
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


_keys: dict[Path, set[str]] = {}  # which flags each file sets that was read


def keys_of(path: Path) -> set[str]:
    """Return what a file of flags sets: as it was when it was read for its values, if it was."""
    if path not in _keys:
        read_yaml(path)
    return _keys[path]


def read_yaml(path: Path, *, _below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML mapping of flags; ``extends: name`` takes over what another file sets.

    Args:
        path: A file, or the name of a recipe that comes with the package: ``mezo-opt-sst2``.

    Raises:
        UsageError: If the file is missing or is not a mapping, or files extend each other in a circle.
    """
    requested = path
    packaged = RECIPES / f"{path.stem if path.suffix.lower() in ('.yaml', '.yml') else path.name}.yaml"
    if not path.is_file() and packaged.is_file() and str(path.parent) in (".", "recipes"):
        path = packaged
    if not path.is_file():
        close = difflib.get_close_matches(path.stem, recipe_names(), n=1)
        hint = f"the recipe of the nearest name is {close[0]}" if close else "check the path"
        raise UsageError(f"There is no config file {path}: {hint}.")
    if path in _below:
        raise UsageError(f"{path} extends itself: remove one of the extends lines.")
    if path == packaged and not _below:
        logger.info(
            "Recipe %s holds published settings; the tests take two steps with it, and it has not been run in full.",
            path.stem,
        )
    values, texts = read_mapping(path), read_mapping(path, as_written=True)
    for name, kind in {**get_type_hints(ModelArguments), **get_type_hints(DataArguments)}.items():
        kinds = {*get_args(kind), kind}
        if values.get(name) is not None and kinds & {str, list[str]}:
            values[name] = _words(texts[name], f"{path} sets {name!r}", kinds)
    base, below = values.pop("extends", None), {}
    if base is not None:
        beside = path.parent / f"{str(base).removesuffix('.yaml')}.yaml"
        below = read_yaml(beside if beside.is_file() else Path(str(base)), _below=(*_below, path))
    for name, value in values.items():
        is_reset = value is None and (name in below or name in nullable_settings())
        if value in ("", [], {}):
            raise UsageError(f"{path} leaves {name!r} empty: give it a value, or take the line out.")
        if value is None and not is_reset:
            logger.info("%s sets %s to null, so its default is used.", path, name)
    _keys[requested] = {*below, *values}
    return {**below, **values}


def nullable_settings() -> set[str]:
    """Return the settings that may be None and by default are not, such as ``max_train_samples``."""
    groups: tuple[Any, ...] = (ModelArguments, DataArguments, ZOConfig)
    defaults = {f.name: f.default for group in groups for f in fields(group)}
    kinds = {name: kind for group in groups for name, kind in get_type_hints(group).items()}
    return {name for name, default in defaults.items() if default is not None and type(None) in get_args(kinds[name])}


def _words(value: Any, where: str, kinds: set[Any]) -> str | list[str]:
    """Return the value of a flag that takes text, as the command line would give it."""
    words = value if isinstance(value, list) else [value]
    if not all(isinstance(word, str) for word in words) or (isinstance(value, list) and list[str] not in kinds):
        raise UsageError(f"{where} to {value!r:.80}: write {'a list of texts' if list[str] in kinds else 'one text'}.")
    return value if str in kinds else words
