"""Requests to the Hugging Face hub that give up soon: its clients repeat each of them for a minute and a half."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
LONGEST_WAIT_SECONDS = 10
REFUSALS = 2
_TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)


class _Outage:
    """Whether the hub was out of reach a moment ago, so that the next request need not find out again."""

    SECONDS = 60.0

    def __init__(self) -> None:
        self.reason, self.since = "", 0.0

    def now(self) -> str:
        """Return why the hub is out of reach; nothing if that is not known."""
        return self.reason if time.monotonic() < self.since + self.SECONDS else ""

    def start(self, reason: str) -> None:
        """Remember it."""
        self.reason, self.since = reason, time.monotonic()


_outage = _Outage()


def outage() -> str:
    """Return why the hub was out of reach within the last minute; nothing if it was not."""
    return _outage.now()


@contextmanager
def bounded_requests() -> Iterator[None]:
    """Let requests to the hub within the block fail soon.

    A hub that cannot be connected to is asked twice, and then not for a minute: the clients use what is cached, as with
    ``HF_HUB_OFFLINE=1``.  A hub that answers 429 or 5xx is asked three times in a row, unless it wants a longer pause.
    A connection lost in the middle of a file is taken up again by the clients, as ever.

    Yields:
        Nothing.
    """
    try:
        import huggingface_hub
    except ImportError:
        yield
        return
    client: Any = huggingface_hub.get_session()
    send, refusals = client.send, 0

    def bounded_send(request: Any, **options: Any) -> Any:
        nonlocal refusals
        response = _send(send, request, options)
        if response.status_code not in _TRANSIENT_STATUSES:
            refusals = 0
            return response
        refusals += 1
        if refusals > REFUSALS or seconds_to_wait(response) > LONGEST_WAIT_SECONDS:
            response.read()
            huggingface_hub.utils.hf_raise_for_status(response)
        return response

    client.send = bounded_send
    try:
        yield
    finally:
        client.send = send


def request_errors() -> tuple[type[Exception], ...]:
    """Return what clients of the hub raise if it is out of reach, refuses, or a proxy answers in its place.

    These are errors of connections and answers, of files of the cache, and of ids and JSON that cannot be read.
    """
    return transport_error(), OSError, ValueError


def transport_error() -> Any:
    """Return ``HTTPError`` of the HTTP library that this version of the hub's client uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def _send(send: Callable[..., Any], request: Any, options: dict[str, Any]) -> Any:
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    is_hub = request.url.host == urlsplit(constants.ENDPOINT).hostname
    if is_hub and _outage.now():
        raise OfflineModeIsEnabled(_outage.now())
    timeout = request.extensions.get("timeout")
    if timeout is not None:
        timeout["connect"] = min(timeout.get("connect") or CONNECT_SECONDS, CONNECT_SECONDS)
    for attempt in (1, 2):
        try:
            return send(request, **options)
        except transport_error() as error:
            if not (is_hub and type(error).__name__ in ("ConnectError", "ConnectTimeout")):
                raise
            if attempt == 2 or type(error).__name__ == "ConnectTimeout":
                reason = str(error) or "it does not answer"
                _outage.start(reason)
                logger.warning(
                    "The hub %s cannot be reached (%s): what is cached is used; HF_HUB_OFFLINE=1 does so at once.",
                    constants.ENDPOINT,
                    reason,
                )
                raise OfflineModeIsEnabled(reason) from error
            time.sleep(1)
    raise AssertionError("unreachable")


def seconds_to_wait(response: Any) -> int:
    """Return how long the hub asks to wait before the next request, in seconds; 0 if it does not say.

    Args:
        response: Its answer.
    """
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    header = str(response.headers.get("Retry-After") or "").strip()
    return int(header) if header.isdigit() else 0
