"""How Sphinx builds these pages: ``tox -e docs``. Warnings are errors there."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "gunicorn-dirty-gevent"
author = copyright = "the authors of gunicorn-dirty-gevent"
release = version = version_of(project)

extensions = ["sphinx.ext.autodoc", "sphinx.ext.graphviz", "reference"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = False
highlight_language = "none"

graphviz_output_format = "svg"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"

nitpicky = True
# Python's and gunicorn's own names: their references are elsewhere.
nitpick_ignore_regex = [("py:.*", r"gunicorn\.dirty\..*|collections\.abc\..*|gunicorn_dirty_gevent\.app\.F")]
