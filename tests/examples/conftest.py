"""`--nothing-skipped`: where everything should be installed, a skipped example is a failure."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest
from support.worker_classes import EVENTLET


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nothing-skipped",
        action="store_true",
        help="fail when a test is skipped, except for want of what cannot be had here",
    )


def cannot_be_had(name: str) -> bool:
    """Needs an eventlet worker, which gunicorn 26 has not; or a wheel that Python 3.14 has not."""
    return (name == "test_eventlet_legacy.py" and not EVENTLET) or (
        name == "test_embeddings.py" and sys.version_info >= (3, 14)
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    strict = item.config.getoption("--nothing-skipped") and not cannot_be_had(item.path.name)
    if report.skipped and strict:
        report.outcome = "failed"
        report.longrepr = f"skipped, which --nothing-skipped forbids: {report.longrepr[2]}"
    return report
