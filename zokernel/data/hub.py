"""What went wrong with the Hugging Face hub, in one sentence that says what to do."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zokernel.data.hub_requests import outage, request_errors, seconds_to_wait, transport_error
from zokernel.errors import RunError, UsageError, ZokernelError, first_line

MODEL, DATA_SET = "model", "dataset"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM)
_LISTED = 12


def explain(
    error: BaseException, name: str, *, kind: str = MODEL, revision: str | None = None, token_from: str = ""
) -> ZokernelError | None:
    """Return the error that tells in one sentence why a repository of the hub could not be used.

    Args:
        error: What a client of the hub raised; the errors that caused it are looked at, too.
        name: The repository's id.
        kind: ``model`` or ``dataset``.
        revision: The branch, tag or commit that was asked for.
        token_from: Where the access token came from, if it was given for this request alone.

    Returns:
        A ``UsageError`` or ``RunError``; None if the hub has nothing to do with it.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        return None
    if isinstance(error, ZokernelError):
        return error
    chain = list(_chain(error))
    if type(error).__name__ == "DatasetNotFoundError":
        chain += list(_chain(_asked_again(name, kind)))  # the datasets library drops what the hub answered
    what = f"{'Model' if kind == MODEL else 'Data set'} {name!r}"
    for rule in (_disk, _answer, _contents, _broken, _unreachable, _missing_file):
        told = rule(chain, name, kind, revision, what, token_from)
        if told is not None:
            return told
    return None


def explained(error: BaseException, name: str, otherwise: ZokernelError) -> ZokernelError:
    """Return what went wrong with a model of the hub; ``otherwise`` for a local one, or if the hub is not to blame."""
    return (None if Path(name).expanduser().exists() else explain(error, name)) or otherwise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what caused it, and what they were raised from."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        found = waiting.pop(0)
        if found is not None and found not in seen:
            seen.append(found)
            yield found
            waiting += [found.__cause__, found.__context__]


def _disk(chain: list[BaseException], *rest: Any) -> ZokernelError | None:
    from huggingface_hub import constants

    for error in chain:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            where = error.filename or constants.HF_HUB_CACHE
            cure = "free some space" if error.errno in _FULL else "make it writable"
            return RunError(
                f"The hub's cache cannot be written ({where}: {error.strerror}): {cure}, or set HF_HOME to a folder "
                "elsewhere, and repeat the command."
            )
    return None


def _answer(
    chain: list[BaseException], name: str, kind: str, revision: str | None, what: str, token_from: str
) -> ZokernelError | None:
    """Explain what the hub answered."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if any(isinstance(error, HFValidationError) for error in chain):
        return UsageError(f"{name!r} is not a hub id: those are of the form 'organization/name'.")
    # Whether a file is there is asked in passing, too: see _missing_file.
    answers = [e for e in chain if isinstance(e, HfHubHTTPError) and not isinstance(e, RemoteEntryNotFoundError)]
    if not answers:
        return None
    answer = answers[0]
    status = answer.response.status_code
    authorized = "authorization" in answer.response.request.headers
    said = f" ({first_line(Exception(answer.server_message)).rstrip('.')})" if answer.server_message else ""
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == DATA_SET else ''}{name}"
    if isinstance(answer, GatedRepoError):
        if not authorized:
            return RunError(
                f"{what} is gated, and no access token was sent: ask for access at {page}, then log in with "
                "'hf auth login' (or set HF_TOKEN)."
            )
        return RunError(f"{what} is gated, and your account may not read it{said}: ask for access at {page}.")
    if status == 401 and authorized:
        token = token_from or ("HF_TOKEN" if os.environ.get("HF_TOKEN") else "the one saved by 'hf auth login'")
        return RunError(
            f"The hub does not accept your access token ({token}): log in again with 'hf auth login', or make a "
            f"new one at {constants.ENDPOINT}/settings/tokens."
        )
    if isinstance(answer, RevisionNotFoundError):
        there = _revisions(name, kind)
        listing = f": there are {_listed(there)}" if there else f": {page}/tree/main lists them"
        return UsageError(f"{what} has no revision {revision or 'main'!r}{listing}.")
    if isinstance(answer, RepositoryNotFoundError) or (status == 401 and not authorized):
        close = _close_names(name, kind)
        hint = f" (close: {', '.join(close)})" if close else ""
        private = "your token may not read it" if authorized else "it is private (log in with 'hf auth login')"
        return UsageError(f"The hub has no {what[0].lower()}{what[1:]}{hint}, or {private}{_nor_here(name)}.")
    if status == 403:
        return RunError(f"Your access token does not allow this with {what[0].lower()}{what[1:]}{said}: see {page}.")
    if status == 429:
        seconds = seconds_to_wait(answer.response)
        pause = f"{seconds} s" if seconds else "a few minutes"
        more = "" if authorized else " (a logged-in account may ask more often: 'hf auth login')"
        return RunError(f"The hub gets too many requests from here{said}: repeat the command in {pause}{more}.")
    if status >= 500:
        return RunError(
            f"The hub fails at the moment, with {status} {answer.response.reason_phrase}{said}: repeat the command "
            "later, or with HF_HUB_OFFLINE=1 if everything is cached."
        )
    return RunError(f"The hub answers {status}{said} for {what[0].lower()}{what[1:]}: see {page}.")


def _contents(
    chain: list[BaseException], name: str, kind: str, revision: str | None, what: str, token_from: str
) -> ZokernelError | None:
    """Explain what the repository holds, or does not."""
    for error in chain:
        text = " ".join(str(error).split())
        if found := re.search(r"Dataset scripts are no longer supported, but found (\S+)", text):
            return UsageError(
                f"{what} is made by a script ({found[1]}), which the datasets library no longer runs: add "
                "--dataset_revision refs/convert/parquet for the hub's conversion, or name another data set."
            )
        if found := re.search(r"BuilderConfig '?(.*?)'? not found\. Available: \[(.*?)\]", text):
            return UsageError(f"{what} has no configuration {found[1]!r}: there are {_listed(_names(found[2]))}.")
        if found := re.search(r"Config name is missing.*?available configs: \[(.*?)\]", text):
            there = _listed(_names(found[1]))
            return UsageError(f"{what} has several configurations: name one with --dataset_config ({there}).")
        if found := re.search(r"Unknown split \"?(.*?)\"?\. Should be one of \[(.*?)\]", text):
            return UsageError(f"{what} has no split {found[1]!r}: there are {_listed(_names(found[2]))}.")
        if re.search(r"DataFilesNotFound|EmptyDataset", type(error).__name__):
            return UsageError(f"{what} holds no files that the datasets library can read: see its page.")
        if kind == DATA_SET and type(error).__module__.startswith("pyarrow") and "arquet" in text:
            return RunError(f"{what} has a damaged Parquet file ({first_line(error)}): delete it from the cache.")
        found = re.search(r"appear to have (?:a file|files) named \(?'?([^\s,']+?)'?\)?[.,] ", text)
        if found and not Path(name).exists():
            return UsageError(f"{what} holds no {found[1]} on the hub{_weights_there(name, revision)}.")
        if "Can't load the model for" in text and not Path(name).exists():
            weights = _weights_there(name, revision)
            if weights:
                return UsageError(f"{what} holds no safetensors on the hub{weights}.")
    return None


def _broken(
    chain: list[BaseException], name: str, kind: str, revision: str | None, what: str, token_from: str
) -> ZokernelError | None:
    """Explain a connection that was lost in the middle of a file."""
    lost = ("RemoteProtocolError", "ReadError", "ReadTimeout", "IncompleteRead", "ChunkedEncodingError")
    for error in chain:
        if type(error).__name__ in lost or "Consistency check failed" in str(error):
            return RunError(
                f"The connection broke in the middle of a file of {what[0].lower()}{what[1:]}: repeat the command, "
                "which continues where it stopped."
            )
    return None


def _unreachable(
    chain: list[BaseException], name: str, kind: str, revision: str | None, what: str, token_from: str
) -> ZokernelError | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    away = [e for e in chain if isinstance(e, (OfflineModeIsEnabled, ConnectionError, transport_error()))]
    if not away and not any(isinstance(error, LocalEntryNotFoundError) for error in chain):
        return None
    if constants.is_offline_mode():
        return UsageError(
            f"{what} is not in the cache, or not wholly ({constants.HF_HOME}), and HF_HUB_OFFLINE=1 keeps from asking "
            f"the hub: unset it until everything is there{_nor_here(name)}."
        )
    known = outage() or (first_line(away[-1]) if away else "")
    reason = f" ({known})" if known else ""
    return RunError(
        f"The hub {constants.ENDPOINT} cannot be reached{reason}, and {what[0].lower()}{what[1:]} is not wholly in the "
        f"cache: check the network and any proxy, or give files of your own{_nor_here(name)}."
    )


def _nor_here(name: str) -> str:
    """Return that a name is no folder here either, in case one was meant; empty if there is something of that name."""
    return "" if Path(name).expanduser().exists() else f" (there is no folder {name} here)"


def _missing_file(
    chain: list[BaseException], name: str, kind: str, revision: str | None, what: str, token_from: str
) -> ZokernelError | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import RemoteEntryNotFoundError

    for error in chain:
        if isinstance(error, RemoteEntryNotFoundError):
            file = str(error.response.request.url).rsplit("/", 1)[-1]
            page = f"{constants.ENDPOINT}/{'datasets/' if kind == DATA_SET else ''}{name}"
            return UsageError(f"{what} has no file {file}: see {page}/tree/{revision or 'main'}.")
    return None


def _names(listing: str) -> list[str]:
    return [name.strip(" '\"") for name in listing.split(",") if name.strip(" '\"")]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _asked_again(name: str, kind: str) -> Exception | None:
    """Return the error that the hub answers with when asked for access to a repository."""
    from huggingface_hub import HfApi

    try:
        HfApi().auth_check(name, repo_type=kind)
    except request_errors() as error:
        return error
    return None


def _revisions(name: str, kind: str) -> list[str]:
    """Return the branches and tags of a repository; nothing if the hub does not say."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(name, repo_type=kind)
    except request_errors():  # the hint is not worth another error
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)] + [ref.ref for ref in refs.converts]


def _close_names(name: str, kind: str) -> list[str]:
    """Return ids that are nearly what was asked for; nothing if the hub does not say."""
    from huggingface_hub import HfApi

    listing: Any = HfApi().list_models if kind == MODEL else HfApi().list_datasets
    owner, _, own = name.rpartition("/")
    try:
        found = {repository.id for repository in listing(search=own, limit=20)}
        if owner:
            found |= {repository.id for repository in listing(author=owner, limit=200)}
    except request_errors():  # the hint is not worth another error
        return []
    return difflib.get_close_matches(name, sorted(found - {name}), n=3, cutoff=0.75)


def _weights_there(name: str, revision: str | None) -> str:
    """Return which files of weights a model has instead."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except request_errors():  # the hint is not worth another error
        return ""
    if any(file.endswith(".safetensors") for file in files):
        return ""
    weights = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt"))]
    if not weights:
        return ""
    return f", only {_listed(weights[:3])}: load it with transformers and write it again with save_pretrained"
