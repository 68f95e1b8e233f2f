"""The reference of settings, taken from the code, so that it cannot say anything else.

``.. install-arguments::``
    All arguments of `install()` that are bounds: names, defaults and docstrings of
    ``gunicorn_dirty_gevent/settings.py``.

``.. gunicorn-setting:: dirty_threads``
    A setting of gunicorn's: option and default from gunicorn, the text from the page.

Docstrings have names in single backquotes. Those that the API reference has become links, others stay
literals.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from docutils import nodes
from gunicorn.config import KNOWN_SETTINGS
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import gunicorn_dirty_gevent
from gunicorn_dirty_gevent import client, errors, settings, stash

NAME = re.compile(r"(?<![`:\w])`([^`<>\n]+)`(?!`)")
MIB = 1024 * 1024

HOMES = {
    **dict.fromkeys(client.__all__, "gunicorn_dirty_gevent.client"),
    **dict.fromkeys(gunicorn_dirty_gevent.__all__, "gunicorn_dirty_gevent"),
    **dict.fromkeys((name for name in errors.__all__ if name.startswith("Dirty")), errors.__name__),
    **dict.fromkeys(("StashClient", "StashTable"), stash.__name__),
    **dict.fromkeys((name for name in stash.__all__ if name.endswith("Error")), "gunicorn.dirty.stash"),
}
"""Where the API reference has a name."""


def linked(text: str) -> str:
    """The text, with names in single backquotes as links or as literals."""

    def replace(found: re.Match[str]) -> str:
        name, _, member = found[1].partition(".")
        if name in {field.name for field in fields(settings.Settings)}:
            return f":confval:`{name}`"
        if name not in HOMES:
            return f"``{found[1]}``"
        target = f"{HOMES[name]}.{found[1]}"
        return f":py:obj:`{found[1]} <{target}>`" if member else f":py:obj:`{name} <{target}>`"

    return NAME.sub(replace, text)


def documented_settings() -> Iterator[tuple[str, str, Any, str]]:
    """Name, type, default and docstring of each of `install()`'s bounds, as they stand in the code."""
    (cls,) = ast.parse(textwrap.dedent(inspect.getsource(settings.Settings))).body
    assert isinstance(cls, ast.ClassDef)
    for field, doc in zip(cls.body, cls.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(field.target, ast.Name)
            name = field.target.id
            assert isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant), f"{name} says nothing"
            default = getattr(settings.Settings, name)
            yield name, ast.unparse(field.annotation), default, inspect.cleandoc(doc.value.value)


def readable(value: Any) -> str:
    if isinstance(value, int) and value and value % MIB == 0:
        return f"{value:,} ({value // MIB} MiB)"
    return f"{value:,}" if isinstance(value, int) else repr(value)


class InstallArguments(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(inspect.getfile(settings))
        lines = []
        for name, kind, default, text in documented_settings():
            lines += [f".. confval:: {name}", f"   :type: ``{kind}``"]
            lines += [f"   :default: {readable(default)}", ""]
            lines += [*textwrap.indent(linked(text), "   ").splitlines(), ""]
        return self.parse_text_to_nodes("\n".join(lines))


class GunicornSetting(SphinxDirective):
    has_content = True
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        (name,) = self.arguments
        (setting,) = (known for known in KNOWN_SETTINGS if known.name == name)
        lines = [f".. confval:: {name}"]
        if callable(setting.default):
            lines.append(f"   :type: ``{name}{inspect.signature(setting.default)}``")
        else:
            option = f"; ``{setting.cli[-1]}``" if setting.cli else ""
            lines += [f"   :type: ``{(setting.type or list).__name__}``{option}"]
            lines += [f"   :default: ``{setting.default!r}``"]
        lines += ["", *(f"   {line}" for line in self.content)]
        return self.parse_text_to_nodes("\n".join(lines))


def link_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = linked("\n".join(lines)).split("\n")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("install-arguments", InstallArguments)
    app.add_directive("gunicorn-setting", GunicornSetting)
    app.connect("autodoc-process-docstring", link_docstring)
    return {"parallel_read_safe": True}
