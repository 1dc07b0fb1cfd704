"""YAML files of settings, in which every key stands once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zokernel.errors import UsageError


def read_mapping(path: Path, *, as_written: bool = False) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file.
        as_written: Whether ``0``, ``No`` and ``1.0`` stay the texts that they are on the command line.

    Returns:
        The mapping.

    Raises:
        UsageError: If it is not UTF-8, not YAML, no mapping, or has a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    if as_written:
        Loader.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # merge keys, as in YAML

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        repeated = next((key for n, key in enumerate(keys) if key in keys[:n]), None)
        if repeated is not None:
            line = [key.start_mark.line + 1 for key, _ in node.value if key.value == repeated]
            raise UsageError(f"{path} sets {repeated!r} twice, on lines {line[0]} and {line[1]}: remove one of them.")
        loader.flatten_mapping(node)
        return {loader.construct_object(key, deep=True): loader.construct_object(v, deep=True) for key, v in node.value}

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=Loader)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    except (yaml.YAMLError, TypeError) as error:  # a mapping as a key
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must be a mapping of names to values, such as 'learning_rate: 1e-5'.")
    return values
