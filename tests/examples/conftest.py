"""`--nothing-skipped`: where everything should be installed, a skipped example is a failure."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from support.worker_classes import EVENTLET


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nothing-skipped",
        action="store_true",
        help="fail when a test is skipped, except for want of an eventlet worker",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    excused = not EVENTLET and item.path.name == "test_eventlet_legacy.py"
    if report.skipped and item.config.getoption("--nothing-skipped") and not excused:
        report.outcome = "failed"
        report.longrepr = f"skipped, which --nothing-skipped forbids: {report.longrepr[2]}"
    return report
