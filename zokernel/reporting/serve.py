"""A live view of a training run: three fixed addresses on 127.0.0.1, nothing else is served."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from zokernel.errors import RunError, UsageError
from zokernel.reporting.html import read_asset, render, render_template, script_of
from zokernel.reporting.page import Page
from zokernel.reporting.progress import progress_of
from zokernel.reporting.rewards import is_rewarded
from zokernel.reporting.run_page import read_run
from zokernel.reporting.training import TrainingRun, is_training, read_training
from zokernel.reporting.training_text import facts_so_far, score_name

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
MOST_POINTS = 1500
SCORES = ("accuracy", "f1", "em", "perplexity", "reward", "pass_rate")  # columns of the table of evaluations


def live_data(folder: Path, since: int = 0) -> dict[str, Any]:
    """Return what the live page shows of a run.

    Args:
        folder: The run's ``output_dir``.
        since: Leave out steps up to this one.

    Returns:
        Plain JSON: how far the run is, in words, then steps after ``since``, evaluations and predictions.
    """
    run = read_training(folder) if is_training(folder) else None
    progress = progress_of(run)
    state = {
        "state": progress.state,
        "title": progress.title(run_name(folder)),
        "status": progress.description,
        "percent": progress.percent,
    }
    if run is None:
        return state | {"facts": [], "rows": [], "evaluations": []}
    rows = [row for row in run.rows if row["step"] > since]
    keep = max(1, math.ceil(len(rows) / MOST_POINTS))
    return state | {
        "facts": facts_so_far(run, progress),
        "steps": progress.steps,
        "scores": [(name, score_name(name)) for name in SCORES if any(name in row for row in run.evaluations)],
        "rewarded": is_rewarded(run.metrics, run.run),
        "rows": [_finite(row) | _rewards(run, row) for row in rows[::-keep][::-1]],
        "evaluations": [_finite(row) for row in run.evaluations],
        "prediction": run.prediction,
        "slope": run.slope,
    }


def _rewards(run: TrainingRun, row: dict[str, Any]) -> dict[str, Any]:
    """Return the quantiles of the members' rewards of a step, if they are known."""
    quantiles = run.rewards.get(int(row["step"]))
    return {} if quantiles is None else {"rewards": quantiles}


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Replace what JSON cannot hold by None."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def run_name(folder: Path) -> str:
    """Return what a run is called: the last two parts of its path.

    Example:
        >>> run_name(Path("/home/me/runs/reviews"))
        'runs/reviews'
    """
    return "/".join(folder.resolve().parts[-2:]).replace("//", "/")


def live_page(folder: Path) -> str:
    """Return the HTML of the live page; its title says how far which run is before any script runs."""
    run = read_training(folder) if is_training(folder) else None
    progress = progress_of(run)
    return render_template(
        "live.html.j2",
        run_name=run_name(folder),
        title=progress.title(run_name(folder)),
        status=progress.description,
        style=read_asset("style.css"),
        **script_of(read_asset("live.js")),
    )


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer
    server_version = "zokernel"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one of the three addresses."""
        address = urlsplit(self.path)
        # A page elsewhere may name this server by a host name of its own (DNS rebinding): answer to ours only.
        if self.headers.get("Host") not in self.server.names:
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "This server answers to 127.0.0.1 only.")
        elif address.path == "/":
            self._send(HTTPStatus.OK, "text/html", live_page(self.server.folder))
        elif address.path == "/data.json":
            since = parse_qs(address.query).get("since", ["0"])[0]
            data = live_data(self.server.folder, int(since) if since.isdecimal() else 0)
            self._send(HTTPStatus.OK, "application/json", json.dumps(data))
        elif address.path == "/report":
            self._report()
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "Not found.")

    def _report(self) -> None:
        try:
            text = render(self.server.read(self.server.folder))
        except (UsageError, RunError) as error:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", str(error))
            return
        self._send(HTTPStatus.OK, "text/html", text)

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log requests at debug level only."""
        logger.debug(format, *args)


class LiveServer(ThreadingHTTPServer):
    """The server of one run's live page.

    Args:
        folder: The run's ``output_dir``; it may still be empty.
        port: Port on 127.0.0.1; 0 takes a free one.
        read: Reads the folder for the page at ``/report``.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int, read: Callable[[Path], Page]):
        super().__init__((HOST, port), _Handler)
        self.folder, self.read = folder.resolve(), read
        self.names = {f"{name}:{self.server_address[1]}" for name in (HOST, "localhost")}


def make_server(folder: Path, *, port: int = 8321, read: Callable[[Path], Page] = read_run) -> LiveServer:
    """Return a server that is ready to run.

    Args:
        folder: The run's ``output_dir``; it must exist, and may still be empty.
        port: Port on 127.0.0.1; 0 takes a free one.
        read: Reads the folder for the page at ``/report``.

    Returns:
        The server; call ``serve_forever``.

    Raises:
        UsageError: If there is no such folder, or the port is taken.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}: give the output_dir of a run.")
    try:
        return LiveServer(folder, port, read)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"Port {port} cannot be used ({error}): choose another --port, or 0 for a free one."
        ) from error
