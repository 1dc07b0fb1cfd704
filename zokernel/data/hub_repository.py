"""A repository of the Hugging Face hub as it was requested, and what the hub says about it when asked again."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zokernel.data.hub_requests import request_errors

MODEL, DATA_SET = "model", "dataset"
_LISTED = 12
_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt")


@dataclass(frozen=True)
class Repository:
    """What was requested.

    Attributes:
        name: The repository's id.
        kind: ``model`` or ``dataset``.
        revision: The branch, tag or commit that was requested.
        token_from: Where the access token came from, if it was passed for this request alone.

    Example:
        >>> Repository("org/rows", DATA_SET).title, Repository("org/lm").subject
        ("Data set 'org/rows'", "model 'org/lm'")
    """

    name: str
    kind: str = MODEL
    revision: str | None = None
    token_from: str = ""

    @property
    def title(self) -> str:
        """What it is called where a sentence begins."""
        return f"{'Model' if self.kind == MODEL else 'Data set'} {self.name!r}"

    @property
    def subject(self) -> str:
        """What it is called within a sentence."""
        return self.title[0].lower() + self.title[1:]

    @property
    def page(self) -> str:
        """The address of its page."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == DATA_SET else ''}{self.name}"

    @property
    def no_folder_hint(self) -> str:
        """That its name is no folder here either, in case one was meant; empty if something has that name."""
        return "" if Path(self.name).expanduser().exists() else f" (there is no folder {self.name} here)"

    def access_error(self) -> Exception | None:
        """Return the error that the hub answers with when asked for access; None if it grants it."""
        from huggingface_hub import HfApi

        try:
            HfApi().auth_check(self.name, repo_type=self.kind)
        except request_errors() as error:
            return error
        return None

    def revisions(self) -> list[str]:
        """Return the branches and tags; nothing if the hub does not say."""
        from huggingface_hub import HfApi

        try:
            refs = HfApi().list_repo_refs(self.name, repo_type=self.kind)
        except request_errors():  # the hint is not worth another error
            return []
        return [ref.name for ref in (*refs.branches, *refs.tags)] + [ref.ref for ref in refs.converts]

    def close_names(self) -> list[str]:
        """Return ids of other repositories that are nearly this one; nothing if the hub does not say."""
        from huggingface_hub import HfApi

        search: Any = HfApi().list_models if self.kind == MODEL else HfApi().list_datasets
        owner, _, name = self.name.rpartition("/")
        try:
            ids = {repository.id for repository in search(search=name, limit=20)}
            if owner:
                ids |= {repository.id for repository in search(author=owner, limit=200)}
        except request_errors():  # the hint is not worth another error
            return []
        return difflib.get_close_matches(self.name, sorted(ids - {self.name}), n=3, cutoff=0.75)

    def other_weights_hint(self) -> str:
        """Return which files of weights a model has instead of safetensors; empty if none, or if it has those."""
        from huggingface_hub import HfApi

        try:
            files = HfApi().list_repo_files(self.name, revision=self.revision)
        except request_errors():  # the hint is not worth another error
            return ""
        weights = [file for file in files if file.endswith(_WEIGHTS)]
        if not weights or any(file.endswith(".safetensors") for file in files):
            return ""
        return f", only {listing(weights[:3])}: load it with transformers and write it again with save_pretrained"


def listing(names: list[str]) -> str:
    """Return names as a list within a sentence, shortened if it is long.

    Example:
        >>> listing(["main", "v1"])
        'main, v1'
    """
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
