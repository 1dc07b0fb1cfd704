"""What went wrong with the Hugging Face hub, in one sentence that says what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from zokernel.data.hub_answers import explain_answer
from zokernel.data.hub_repository import DATA_SET, MODEL, Repository, listing
from zokernel.data.hub_requests import outage, transport_error
from zokernel.errors import RunError, UsageError, ZokernelError, first_line

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM)
_LOST_CONNECTIONS = ("RemoteProtocolError", "ReadError", "ReadTimeout", "IncompleteRead", "ChunkedEncodingError")


def explain(
    error: BaseException, name: str, *, kind: str = MODEL, revision: str | None = None, token_from: str = ""
) -> ZokernelError | None:
    """Return the error that says in one sentence why a repository of the hub could not be used.

    Args:
        error: What a client of the hub raised; the errors that caused it are looked at, too.
        name: The repository's id.
        kind: ``model`` or ``dataset``.
        revision: The branch, tag or commit that was requested.
        token_from: Where the access token came from, if it was passed for this request alone.

    Returns:
        A ``UsageError`` or ``RunError``; None if the hub has nothing to do with it.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        return None
    if isinstance(error, ZokernelError):
        return error
    repository = Repository(name, kind, revision, token_from)
    chain = list(_chain(error))
    if type(error).__name__ == "DatasetNotFoundError":
        chain += list(_chain(repository.access_error()))  # the datasets library drops what the hub answered
    return next(filter(None, (rule(chain, repository) for rule in _RULES)), None)


def explain_or(error: BaseException, name: str, fallback: ZokernelError) -> ZokernelError:
    """Return what went wrong with a model of the hub; ``fallback`` for a local one, or if the hub is not to blame."""
    return (None if Path(name).expanduser().exists() else explain(error, name)) or fallback


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what caused it, and what they were raised from."""
    visited: list[BaseException] = []
    queue = [error]
    while queue:
        current = queue.pop(0)
        if current is not None and current not in visited:
            visited.append(current)
            yield current
            queue += [current.__cause__, current.__context__]


def _explain_full_disk(chain: Sequence[BaseException], _: Repository) -> ZokernelError | None:
    from huggingface_hub import constants

    for error in chain:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            place = error.filename or constants.HF_HUB_CACHE
            cure = "free some space" if error.errno in _FULL else "make it writable"
            return RunError(
                f"The hub's cache cannot be written ({place}: {error.strerror}): {cure}, or set HF_HOME to a folder "
                "elsewhere, and repeat the command."
            )
    return None


def _explain_contents(chain: Sequence[BaseException], repository: Repository) -> ZokernelError | None:
    """Explain what the repository holds, or does not."""
    for error in chain:
        explanation = _explain_data_set(error, repository) or _explain_model(error, repository)
        if explanation is not None:
            return explanation
    return None


def _explain_data_set(error: BaseException, repository: Repository) -> ZokernelError | None:
    """Explain what the datasets library does not find in a repository, or cannot read."""
    title, text = repository.title, _one_line(error)
    if match := re.search(r"Dataset scripts are no longer supported, but found (\S+)", text):
        return UsageError(
            f"{title} is made by a script ({match[1]}), which the datasets library no longer runs: add "
            "--dataset_revision refs/convert/parquet for the hub's conversion, or name another data set."
        )
    if match := re.search(r"BuilderConfig '?(.*?)'? not found\. Available: \[(.*?)\]", text):
        return UsageError(f"{title} has no configuration {match[1]!r}: there are {_unquoted(match[2])}.")
    if match := re.search(r"Config name is missing.*?available configs: \[(.*?)\]", text):
        return UsageError(
            f"{title} has several configurations: name one with --dataset_config ({_unquoted(match[1])})."
        )
    if match := re.search(r"Unknown split \"?(.*?)\"?\. Should be one of \[(.*?)\]", text):
        return UsageError(f"{title} has no split {match[1]!r}: there are {_unquoted(match[2])}.")
    if re.search(r"DataFilesNotFound|EmptyDataset", type(error).__name__):
        return UsageError(f"{title} holds no files that the datasets library can read: see its page.")
    if repository.kind == DATA_SET and type(error).__module__.startswith("pyarrow") and "arquet" in text:
        return RunError(f"{title} has a damaged Parquet file ({first_line(error)}): delete it from the cache.")
    return None


def _explain_model(error: BaseException, repository: Repository) -> ZokernelError | None:
    """Explain which files of a model transformers does not find in a repository."""
    text = _one_line(error)
    match = re.search(r"appear to have (?:a file|files) named \(?'?([^\s,']+?)'?\)?[.,] ", text)
    if not (match or "Can't load the model for" in text) or Path(repository.name).exists():
        return None
    weights = repository.other_weights_hint()
    if match:
        return UsageError(f"{repository.title} holds no {match[1]} on the hub{weights}.")
    return UsageError(f"{repository.title} holds no safetensors on the hub{weights}.") if weights else None


def _explain_lost_connection(chain: Sequence[BaseException], repository: Repository) -> ZokernelError | None:
    """Explain a connection that was lost in the middle of a file."""
    for error in chain:
        if type(error).__name__ in _LOST_CONNECTIONS or "Consistency check failed" in str(error):
            return RunError(
                f"The connection broke in the middle of a file of {repository.subject}: repeat the command, "
                "which continues where it stopped."
            )
    return None


def _explain_outage(chain: Sequence[BaseException], repository: Repository) -> ZokernelError | None:
    """Explain that the hub cannot be reached, or may not be asked."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    failures = [e for e in chain if isinstance(e, (OfflineModeIsEnabled, ConnectionError, transport_error()))]
    if not failures and not any(isinstance(error, LocalEntryNotFoundError) for error in chain):
        return None
    if constants.is_offline_mode():
        return UsageError(
            f"{repository.title} is not in the cache, or not wholly ({constants.HF_HOME}), and HF_HUB_OFFLINE=1 keeps "
            f"from asking the hub: unset it until everything is there{repository.no_folder_hint}."
        )
    cause = outage() or (first_line(failures[-1]) if failures else "")
    reason = f" ({cause})" if cause else ""
    return RunError(
        f"The hub {constants.ENDPOINT} cannot be reached{reason}, and {repository.subject} is not wholly in the "
        f"cache: check the network and any proxy, or give files of your own{repository.no_folder_hint}."
    )


def _explain_missing_file(chain: Sequence[BaseException], repository: Repository) -> ZokernelError | None:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    for error in chain:
        if isinstance(error, RemoteEntryNotFoundError):
            file = str(error.response.request.url).rsplit("/", 1)[-1]
            folder = f"{repository.page}/tree/{repository.revision or 'main'}"
            return UsageError(f"{repository.title} has no file {file}: see {folder}.")
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _unquoted(names: str) -> str:
    """Return the names in a list that Python printed, without its quotes."""
    return listing([name.strip(" '\"") for name in names.split(",") if name.strip(" '\"")])


# The first one that applies counts.
_RULES: tuple[Callable[[Sequence[BaseException], Repository], ZokernelError | None], ...] = (
    _explain_full_disk,
    explain_answer,
    _explain_contents,
    _explain_lost_connection,
    _explain_outage,
    _explain_missing_file,
)
