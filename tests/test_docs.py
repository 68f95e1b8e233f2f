"""What the documentation says that a machine can check."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from gunicorn.config import KNOWN_SETTINGS

import gunicorn_dirty_gevent
from gunicorn_dirty_gevent import errors
from gunicorn_dirty_gevent.settings import Settings

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


README = (TESTS.parent / "README.rst").read_text()


def readme_table(first_header: str) -> dict[str, str]:
    """The first two columns of the README's table that begins with this header. A cell with several
    names gives each of them its own of the defaults."""
    start = README.index(f"   * - {first_header}\n")
    found = {}
    for row in ROW.findall(README[start:].split("\n\n", 1)[0]):
        names, default, *_ = re.split(r"^     -", row, flags=re.M)
        names = re.findall(r"``(\w+)``", names)
        defaults = default.split(", ") if len(names) > 1 else [default]
        defaults = defaults if len(defaults) == len(names) else [default] * len(names)
        found.update({name: text.strip(" \n`") for name, text in zip(names, defaults, strict=True)})
    return found


def value_of(text: str) -> Any:
    """What "16,384", "256 MiB", "1.0" and "[]" mean."""
    number = text.removesuffix(" MiB").replace(",", "")
    return ast.literal_eval(number) * (1024 * 1024 if text.endswith(" MiB") else 1)


def test_the_readmes_table_of_arguments_agrees_with_the_code() -> None:
    told = {name: value_of(text) for name, text in readme_table("Argument").items()}
    assert told == {field.name: field.default for field in fields(Settings)}


def test_the_readmes_table_of_settings_agrees_with_gunicorn() -> None:
    known = {setting.name: setting.default for setting in KNOWN_SETTINGS if "dirty_" in setting.name}
    told = readme_table("Setting")
    assert told.keys() == known.keys()
    for name, text in told.items():
        is_hook = callable(known[name])
        assert text == "" if is_hook else value_of(text) == known[name]


def test_the_page_of_settings_has_every_setting_and_class_attribute() -> None:
    page = (DOCS / "settings.rst").read_text()
    shown = re.findall(r"^\.\. gunicorn-setting:: (\w+)$", page, re.M)
    assert sorted(shown) == sorted(readme_table("Setting"))
    package = Path(gunicorn_dirty_gevent.__file__).parent
    read = set(re.findall(r'getattr\(cls, "(\w+)"', (package / "app.py").read_text()))
    assert set(re.findall(r"^\.\. py:attribute:: DirtyApp\.(\w+)$", page, re.M)) == read


def test_the_api_reference_has_every_public_name() -> None:
    page = (DOCS / "api.rst").read_text()
    shown = set(re.findall(r"^\.\. (?:auto|py:)(?:class|exception|function|decorator):: (\w+)", page, re.M))
    # Called by the library itself only.
    public = {*gunicorn_dirty_gevent.__all__, *errors.__all__} - {"error_from_fault"}
    assert public <= shown, public - shown


def test_every_page_is_in_the_index() -> None:
    listed = set(re.findall(r"^   (\w+)$", (DOCS / "index.rst").read_text(), re.M))
    assert listed == {path.stem for path in DOCS.glob("*.rst")} - {"index"}
