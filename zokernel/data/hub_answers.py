"""What the Hugging Face hub answered instead of a file, in one sentence that says what to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zokernel.data.hub_repository import Repository, listing
from zokernel.data.hub_requests import seconds_to_wait
from zokernel.errors import RunError, UsageError, ZokernelError, first_line


@dataclass(frozen=True)
class _Answer:
    """The first answer of the hub that is an error.

    Attributes:
        error: The ``HfHubHTTPError`` that a client made of it.
        repository: What was requested.
    """

    error: Any
    repository: Repository

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.error.response.status_code

    @property
    def authorized(self) -> bool:
        """Whether an access token was sent with the request."""
        return "authorization" in self.error.response.request.headers

    @property
    def message(self) -> str:
        """The hub's own words in parentheses, after a space; empty if there are none."""
        text = self.error.server_message
        return f" ({first_line(Exception(text)).rstrip('.')})" if text else ""


def explain_answer(chain: Sequence[BaseException], repository: Repository) -> ZokernelError | None:
    """Explain what the hub answered.

    Args:
        chain: The error of a client, and those that caused it.
        repository: What was requested.

    Returns:
        The error to raise; None if the hub did not answer, or only that a file is missing.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RemoteEntryNotFoundError

    if any(isinstance(error, HFValidationError) for error in chain):
        return UsageError(f"{repository.name!r} is not a hub id: those are of the form 'organization/name'.")
    for error in chain:
        # Clients also ask in passing whether a file exists: zokernel.data.hub has a rule for that.
        if isinstance(error, HfHubHTTPError) and not isinstance(error, RemoteEntryNotFoundError):
            answer = _Answer(error, repository)
            return next(filter(None, (rule(answer) for rule in _RULES)))
    return None


def _gated(answer: _Answer) -> ZokernelError | None:
    from huggingface_hub.errors import GatedRepoError

    if not isinstance(answer.error, GatedRepoError):
        return None
    title, page = answer.repository.title, answer.repository.page
    if not answer.authorized:
        return RunError(
            f"{title} is gated, and no access token was sent: ask for access at {page}, then log in with "
            "'hf auth login' (or set HF_TOKEN)."
        )
    return RunError(f"{title} is gated, and your account may not read it{answer.message}: ask for access at {page}.")


def _token_refused(answer: _Answer) -> ZokernelError | None:
    from huggingface_hub import constants

    if not (answer.status == 401 and answer.authorized):
        return None
    environment = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the one saved by 'hf auth login'"
    return RunError(
        f"The hub does not accept your access token ({answer.repository.token_from or environment}): log in again with "
        f"'hf auth login', or make a new one at {constants.ENDPOINT}/settings/tokens."
    )


def _no_revision(answer: _Answer) -> ZokernelError | None:
    from huggingface_hub.errors import RevisionNotFoundError

    if not isinstance(answer.error, RevisionNotFoundError):
        return None
    repository = answer.repository
    revisions = repository.revisions()
    hint = f"there are {listing(revisions)}" if revisions else f"{repository.page}/tree/main lists them"
    return UsageError(f"{repository.title} has no revision {repository.revision or 'main'!r}: {hint}.")


def _no_repository(answer: _Answer) -> ZokernelError | None:
    from huggingface_hub.errors import RepositoryNotFoundError

    if not isinstance(answer.error, RepositoryNotFoundError) and answer.status != 401:
        return None
    repository = answer.repository
    close = repository.close_names()
    hint = f" (close: {', '.join(close)})" if close else ""
    private = "your token may not read it" if answer.authorized else "it is private (log in with 'hf auth login')"
    return UsageError(f"The hub has no {repository.subject}{hint}, or {private}{repository.no_folder_hint}.")


def _forbidden(answer: _Answer) -> ZokernelError | None:
    if answer.status != 403:
        return None
    subject, page = answer.repository.subject, answer.repository.page
    return RunError(f"Your access token does not allow this with {subject}{answer.message}: see {page}.")


def _too_many_requests(answer: _Answer) -> ZokernelError | None:
    if answer.status != 429:
        return None
    seconds = seconds_to_wait(answer.error.response)
    pause = f"{seconds} s" if seconds else "a few minutes"
    login = "" if answer.authorized else " (a logged-in account may ask more often: 'hf auth login')"
    return RunError(f"The hub gets too many requests from here{answer.message}: repeat the command in {pause}{login}.")


def _server_error(answer: _Answer) -> ZokernelError | None:
    if answer.status < 500:
        return None
    return RunError(
        f"The hub fails at the moment, with {answer.status} {answer.error.response.reason_phrase}{answer.message}: "
        "repeat the command later, or with HF_HUB_OFFLINE=1 if everything is cached."
    )


def _any_other(answer: _Answer) -> ZokernelError:
    subject, page = answer.repository.subject, answer.repository.page
    return RunError(f"The hub answers {answer.status}{answer.message} for {subject}: see {page}.")


# The first one that applies counts.
_RULES: tuple[Callable[[_Answer], ZokernelError | None], ...] = (
    _gated,
    _token_refused,
    _no_revision,
    _no_repository,
    _forbidden,
    _too_many_requests,
    _server_error,
    _any_other,
)
