"""What the documentation says that a machine can check."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"

ROW = re.compile(r"^   \* - (.*?)(?=^   \* - |^\S|\Z)", re.M | re.S)
TEST_NAME = re.compile(r"``(test_\w+)``")


def rows_of_differences() -> list[str]:
    text = (DOCS / "differences.rst").read_text()
    return [row for row in ROW.findall(text) if not row.startswith("What\n")]


@functools.cache
def names_of_tests() -> set[str]:
    trees = (ast.parse(path.read_text()) for path in TESTS.rglob("test_*.py"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, functions)}


def test_the_table_of_differences_has_rows() -> None:
    assert len(rows_of_differences()) > 40


@pytest.mark.parametrize("row", rows_of_differences(), ids=lambda row: row.splitlines()[0][:40])
def test_each_difference_is_held_by_a_test(row: str) -> None:
    cells = re.split(r"^     - ", row, flags=re.M)
    assert len(cells) == 4, row
    named = TEST_NAME.findall(cells[3])
    assert named, f"no test is named: {row}"
    assert set(named) <= names_of_tests(), f"no such test: {set(named) - names_of_tests()}"
