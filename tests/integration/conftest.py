"""Where a gunicorn stood when a test that shares it failed."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from support.gunicorn import Gunicorn


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.when == "call" and report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Gunicorn):
                report.sections.append((f"gunicorn {name}", value.evidence()))
    return report
