"""A pytest hook: with CI=true, a skipped test fails the run unless the machine lacks what no setup can install."""

from __future__ import annotations

import os

import pytest

ALLOWED_SKIPS = ("there is no GPU", "the data folder beside the checkout is not there")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run on CI that skipped tests which should run there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI", "").lower() != "true" or reporter is None:
        return
    skipped = [r for r in reporter.stats.get("skipped", []) if not any(why in str(r.longrepr) for why in ALLOWED_SKIPS)]
    for report in skipped:
        reporter.write_line(f"CI runs every test, but skipped {report.nodeid}: {report.longrepr[-1]}", red=True)
    if skipped and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
