"""The table of certification: what the tests marked `certify` counted, printed at the end of a session
(docs/reliability.md).

A test calls the fixture `certified(what, cases, note)`; equal `what` are added up. One that does not has a
line of its own with one case. `CERTIFY_SHARE=0.1` makes those that ask `share` do a tenth of their cases, and
the table says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest

SHARE = float(os.environ.get("CERTIFY_SHARE", 1))
LINES: dict[str, list[float]] = {}  # what -> cases held, failed, seconds
NOTES: dict[str, list[str]] = {}


def share(cases: int) -> int:
    """How many of so many cases this session does."""
    return max(math.ceil(cases * SHARE), 1)


@pytest.fixture
def certified(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`certified(what, cases, note="")`: a line of the table that this test is, or a part of."""

    def line(what: str, cases: int, note: str = "") -> None:
        request.node.user_properties.append(("certified", (what, cases, note)))

    return line


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "certify" not in report.keywords or not (report.when == "call" or report.failed):
        return
    name = report.nodeid.split("::")[-1].removeprefix("test_").replace("_", " ")
    told = [value for key, value in report.user_properties if key == "certified"] or [(name, 1, "")]
    for what, cases, note in told:
        held = LINES.setdefault(what, [0, 0, 0.0])
        held[report.failed] += 0 if report.skipped else cases
        held[2] += report.duration / len(told)
        note = (
            f"skipped: {report.longrepr[2]}"
            if report.skipped and isinstance(report.longrepr, tuple)
            else note
        )
        NOTES.setdefault(what, []).extend([note] if note else [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LINES:
        width = max(len(what) for what in [*LINES, "certification"])
        terminalreporter.section(f"certification{f', a share of {SHARE:g}' if SHARE != 1 else ''}")
        terminalreporter.write_line(f"{'':{width}} {'cases':>9} {'held':>9} {'failed':>7} {'seconds':>9}")
        for what, (held, failed, seconds) in LINES.items():
            notes = "; ".join(dict.fromkeys(NOTES[what]))
            line = f"{what:{width}} {held + failed:9,.0f} {held:9,.0f} {failed:7,.0f} {seconds:9.1f}  {notes}"
            terminalreporter.write_line(line.rstrip())
