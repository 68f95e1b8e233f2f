"""The walls between the parts: who may import what, who may fork and kill, and what an import does."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import gunicorn_dirty_gevent

PACKAGE = "gunicorn_dirty_gevent"
ROOT = Path(gunicorn_dirty_gevent.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

PURE = {
    *("__future__", "collections", "dataclasses", "datetime", "decimal", "enum", "fnmatch", "functools"),
    *("hashlib", "heapq", "itertools", "json", "math", "operator", "re", "reprlib", "struct", "sys"),
    *("types", "typing", "uuid", "zoneinfo"),
}
"""What the core may import of the standard library: nothing that waits, reads a clock or talks to the
system. (No gevent, socket, os, signal, time, threading, random; no gunicorn.)"""

FROM_GUNICORN = {
    "app.py": {"gunicorn.dirty.app", "gunicorn.dirty.errors"},
    "arbiter.py": {"gunicorn.dirty.app", "gunicorn.util"},
    "client/__init__.py": {"gunicorn.dirty"},
    "client/client.py": {"gunicorn.dirty.client"},
    "client/stock.py": {"gunicorn.dirty.protocol", "gunicorn.dirty.tlv"},
    "client/stash.py": {"gunicorn.dirty.errors", "gunicorn.dirty.protocol", "gunicorn.dirty.stash"},
    "codecs.py": {"gunicorn.dirty.tlv"},
    "desk.py": {"gunicorn.dirty.protocol"},
    "errors.py": {"gunicorn.dirty.errors"},
    "overview.py": {"gunicorn.dirty.protocol"},
    "stash.py": {"gunicorn.dirty", "gunicorn.dirty.stash"},
    "stash_desk.py": {"gunicorn.dirty.protocol"},
    "testing.py": {"gunicorn.dirty"},
    "worker.py": {"gunicorn.util"},
}
"""Each file that uses gunicorn, and what of it. plugin.py, which reaches into its internals, imports
nothing of it: it waits until gunicorn itself does."""

PROCESS_CALLS = {
    *("fork", "forkpty", "_exit", "abort", "kill", "killpg", "posix_spawn", "posix_spawnp", "popen"),
    *("system", "wait", "wait3", "wait4", "waitid", "waitpid", "execv", "execve", "execvp", "execvpe"),
}


def package_of(name: str) -> list[str]:
    """The package that a file's relative imports start from."""
    return [PACKAGE, *name.split("/")[:-1]]


def imports(name: str) -> set[str]:
    """Every module that a file imports, at any depth of its code, by full name."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package_of(name)[: len(package_of(name)) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import module` names a module; `from module import thing` does not.
            for alias in node.names:
                full = f"{module}.{alias.name}"
                found.add(full if is_module(full) else module)
    return found


def is_module(full: str) -> bool:
    if full.startswith("gunicorn."):
        return full in {"gunicorn.util", "gunicorn.arbiter", "gunicorn.dirty.protocol"}
    return file_of(full) is not None


def file_of(module: str) -> str | None:
    """The file of a module of ours."""
    if module.split(".")[0] != PACKAGE:
        return None
    inner = "/".join(module.split(".")[1:])
    names = [f"{inner}.py", f"{inner}/__init__.py" if inner else "__init__.py"]
    return next((name for name in names if name in FILES), None)


def ours(name: str) -> set[str]:
    """The files of ours that a file imports."""
    return {found for module in imports(name) if (found := file_of(module))}


def in_core(name: str) -> bool:
    return name.startswith("core/")


CORE = [name for name in FILES if in_core(name)]


# By reading the code.


def test_the_walls_see_the_code():
    assert {"core/dispatch.py", "core/roster.py", "core/wire.py", "core/mux.py"} <= set(CORE)
    assert "core/wire.py" in ours("core/dispatch.py")
    assert "client/channels.py" in ours("client/client.py")
    assert "gunicorn.util" in imports("worker.py")
    assert "gevent" in imports("link.py")


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_nothing_but_itself_and_pure_modules(name):
    foreign = {module for module in imports(name) if module.split(".")[0] not in PURE}
    foreign -= {module for module in foreign if (found := file_of(module)) and in_core(found)}
    assert foreign <= ({"ormsgpack"} if name == "core/values.py" else set())


@pytest.mark.parametrize("name", CORE)
def test_the_core_does_nothing_on_its_own(name):
    called = {
        node.func.id
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"open", "print", "input", "exec", "eval", "compile", "__import__"}


def test_the_core_imports_at_run_time_what_it_imports_in_its_text():
    """What stands behind its imports loads nothing impure either (of gevent, gunicorn, or sockets)."""
    modules = [f"{PACKAGE}.core.{name.removesuffix('.py')[5:]}" for name in CORE if "__init__" not in name]
    loaded = run(f"import {', '.join(modules)}").modules
    assert not {m for m in loaded if m.split(".")[0] in ("gevent", "gunicorn", "greenlet", "asyncio")}
    assert not {"socket", "_socket", "select", "subprocess"} & loaded


def process_calls(name: str) -> set[str]:
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ("os", "posix") and node.attr in PROCESS_CALLS:
                found.add(node.attr)
            if node.value.id == "signal" and node.attr in ("pthread_kill", "raise_signal"):
                found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "posix"):
            found |= {alias.name for alias in node.names} & PROCESS_CALLS
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get_original":
            texts = {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
            found |= texts & PROCESS_CALLS
    return found


def test_one_file_forks_kills_and_reaps():
    """Others call its functions: `process.fork`, `process.kill`, `process.reap`, `process.leave`."""
    assert process_calls("process.py") == {"fork", "_exit", "kill", "waitpid"}
    assert {name for name in FILES if process_calls(name)} == {"process.py"}
    spawners = {"subprocess", "multiprocessing", "concurrent", "pty"}
    assert not [name for name in FILES if {m.split(".")[0] for m in imports(name)} & spawners]


def test_who_knows_what_of_gunicorn():
    found = {name: {m for m in imports(name) if m.split(".")[0] == "gunicorn"} for name in FILES}
    assert {name: modules for name, modules in found.items() if modules} == FROM_GUNICORN


def test_one_file_knows_gunicorns_own_modules_by_name():
    """Only plugin.py looks gunicorn's modules up to change them."""
    touching = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in ("gunicorn.arbiter", "gunicorn.dirty"):
                touching.add(name)
    assert touching == {"plugin.py"}


def test_the_client_knows_nothing_of_the_arbiter_and_its_workers_nor_they_of_it():
    for name in FILES:
        used = ours(name)
        if name.startswith("client/"):
            beyond = {n for n in used if not n.startswith(("client/", "core/"))}
            assert beyond <= {"blob.py", "errors.py", "lane.py", "link.py", "settings.py", "__init__.py"}, (
                name
            )
        elif name not in ("plugin.py", "__init__.py", "stash.py", "testing.py"):
            assert not {n for n in used if n.startswith("client/")}, name


def test_only_the_entry_points_reach_the_arbiter():
    assert {name for name in FILES if "arbiter.py" in ours(name)} == {"__init__.py", "plugin.py"}
    assert "pool.py" not in ours("worker.py") | ours("task.py") | ours("router.py")


def test_imports_go_one_way():
    """No file imports, by whatever way round, one that imports it. (The package's own `__init__`
    loads its public names when they are asked for, so it stands apart.)"""
    graph = {name: ours(name) - {name, "__init__.py"} for name in FILES if name != "__init__.py"}
    while leaves := {name for name, used in graph.items() if not used & graph.keys()}:
        graph = {name: used for name, used in graph.items() if name not in leaves}
    assert not graph, "these import each other"


# By running it.


def run(code: str) -> SimpleNamespace:
    """Run code in a fresh interpreter: `modules`, what it has loaded; `told`, its variable `told`."""
    ending = "\nimport sys, json\nprint(json.dumps([sorted(sys.modules), globals().get('told')]))"
    command = [sys.executable, "-c", code + ending]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    modules, told = json.loads(done.stdout.splitlines()[-1])
    return SimpleNamespace(modules=set(modules), told=told)


MASTER = "import __future__, gunicorn.app.wsgiapp, gunicorn.arbiter\n"
"""What gunicorn's master has loaded when it reads its configuration file; and what is in every interpreter
with an editable install, and does nothing."""

INSTALL = f"import {PACKAGE}\n{PACKAGE}.install()\n"
IMPORTED_ALONE = {PACKAGE, f"{PACKAGE}.plugin"}


def foreign(modules: set[str]) -> set[str]:
    return {name for name in modules if name.split(".")[0] != PACKAGE}


def test_importing_the_package_loads_nothing_else():
    assert run(MASTER + f"import {PACKAGE}").modules - run(MASTER).modules == IMPORTED_ALONE


def test_importing_the_package_alone_loads_the_standard_library_at_most():
    new = run(f"import {PACKAGE}").modules - run("").modules
    assert {name for name in foreign(new) if name.split(".")[0] not in sys.stdlib_module_names} == set()
    assert new - foreign(new) == IMPORTED_ALONE
    assert not {"asyncio", "socket", "ssl", "threading", "subprocess"} & new


def test_install_loads_nothing_until_dirty_support_is_used():
    assert run(MASTER + INSTALL).modules - run(MASTER).modules == IMPORTED_ALONE


def test_install_with_options_loads_the_settings_only():
    new = run(MASTER + INSTALL.replace("()", "(queue_size=5)")).modules - run(MASTER).modules
    assert foreign(new) <= {"dataclasses"}
    assert new - foreign(new) <= IMPORTED_ALONE | {
        f"{PACKAGE}.settings",
        f"{PACKAGE}.core",
        f"{PACKAGE}.core.wire",
    }


def test_the_master_loads_nothing_but_what_gunicorn_gevent_and_we_are():
    """With dirty settings. Modules that are loaded before a worker patches keep what they were given."""
    stock = run(MASTER + "import gunicorn.dirty").modules
    gevent = run(MASTER + "import gunicorn.workers.ggevent").modules  # the master does that itself
    codec = run("import ormsgpack").modules
    mine = run(MASTER + INSTALL + "import gunicorn.dirty").modules
    assert sorted(foreign(mine - stock - gevent - codec)) == []
    assert f"{PACKAGE}.arbiter" in mine


NOTHING_DONE = """
import sys
told = {"gevent": "gevent" in sys.modules, "greenlet": "greenlet" in sys.modules}
from gevent import monkey
from gevent._hub_local import get_hub_if_exists
told["patched"] = sorted(monkey.saved)
told["hub"] = get_hub_if_exists() is not None
import threading
told["threads"] = threading.active_count()
"""


@pytest.mark.parametrize("code", [f"import {PACKAGE}\n", INSTALL, f"import {PACKAGE}.auto\n"])
def test_neither_import_nor_install_touches_gevent(code):
    told = run(code + NOTHING_DONE).told
    assert told == {"gevent": False, "greenlet": False, "patched": [], "hub": False, "threads": 1}


@pytest.mark.parametrize("code", ["", "import gunicorn_dirty_gevent.arbiter, gunicorn_dirty_gevent.worker\n"])
def test_what_is_loaded_in_the_master_patches_nothing_and_creates_no_hub(code):
    told = run(MASTER + INSTALL + "import gunicorn.dirty\n" + code + NOTHING_DONE).told
    assert told == {"gevent": True, "greenlet": True, "patched": [], "hub": False, "threads": 1}


FINDERS = """
import sys
told = [type(finder).__name__ for finder in sys.meta_path if type(finder).__module__.startswith("%s")]
"""


def test_installing_twice_leaves_one_finder():
    code = f"import {PACKAGE} as us\nus.install()\nus.install(queue_size=9)\nus.install()\n"
    assert run(code + FINDERS % PACKAGE).told == ["_Finder"]


def test_auto_installs():
    assert run(f"import {PACKAGE}.auto\n" + FINDERS % PACKAGE).told == ["_Finder"]


@pytest.mark.parametrize("call", ["nonsense=1", "queue_size=0", "queue_size='5'", "max_message_size=2**32"])
def test_an_option_that_is_no_good_installs_nothing(call):
    code = f"""
import {PACKAGE} as us
try:
    us.install({call})
except (TypeError, ValueError) as error:
    pass
else:
    raise SystemExit("no error")
"""
    assert run(code + FINDERS % PACKAGE).told == []


REPLACED = """
import gunicorn.dirty, gunicorn.dirty.client
told = {
    "gunicorn.dirty.DirtyArbiter": gunicorn.dirty.DirtyArbiter.__module__,
    "gunicorn.dirty.DirtyClient": gunicorn.dirty.DirtyClient.__module__,
    "gunicorn.dirty.client.DirtyClient": gunicorn.dirty.client.DirtyClient.__module__,
    "same": gunicorn.dirty.DirtyClient is gunicorn.dirty.client.DirtyClient,
}
gunicorn.dirty.set_dirty_socket_path("/nowhere/dirty.sock")
client = gunicorn.dirty.get_dirty_client()
told["get_dirty_client"] = type(client).__module__
told["is stock"] = isinstance(client, gunicorn.dirty.client.DirtyClient.__mro__[1])
"""
OURS = {
    "gunicorn.dirty.DirtyArbiter": f"{PACKAGE}.arbiter",
    "gunicorn.dirty.DirtyClient": f"{PACKAGE}.client.client",
    "gunicorn.dirty.client.DirtyClient": f"{PACKAGE}.client.client",
    "same": True,
    "get_dirty_client": f"{PACKAGE}.client.client",
    "is stock": True,
}


@pytest.mark.parametrize(
    "code",
    [
        INSTALL,
        INSTALL + "import gunicorn.dirty.client\n",  # the package is imported on the way
        INSTALL + "import gunicorn.dirty.errors\n",
        "import gunicorn.dirty\n" + INSTALL,
        "import gunicorn.dirty.client\n" + INSTALL + INSTALL,
        MASTER + INSTALL,
    ],
)
def test_ours_stand_in_gunicorns_places(code):
    assert run(code + REPLACED).told == OURS


def test_without_install_gunicorn_is_untouched():
    code = f"import {PACKAGE}, {PACKAGE}.arbiter, {PACKAGE}.client\n"
    told = run(code + REPLACED.replace("[1]", "[0]")).told
    assert told["gunicorn.dirty.DirtyArbiter"] == "gunicorn.dirty.arbiter"
    assert told["get_dirty_client"] == told["gunicorn.dirty.DirtyClient"] == "gunicorn.dirty.client"


def test_a_name_imported_before_install_yields_our_client():
    code = f"""
from gunicorn.dirty import get_dirty_client, set_dirty_socket_path
{INSTALL}
set_dirty_socket_path("/nowhere/dirty.sock")
told = type(get_dirty_client()).__module__
"""
    assert run(code).told == f"{PACKAGE}.client.client"


def test_gunicorns_package_is_still_a_package_to_everybody():
    code = (
        INSTALL
        + """
import importlib.util, inspect, pkgutil
import gunicorn.dirty
told = {
    "source": inspect.getsource(gunicorn.dirty) == open(gunicorn.dirty.__file__).read(),
    "spec": importlib.util.find_spec("gunicorn.dirty.tlv").name,
    "data": bool(pkgutil.get_data("gunicorn.dirty", "__init__.py")),
    "missing": importlib.util.find_spec("gunicorn.dirty.nothing_of_the_kind"),
}
"""
    )
    assert run(code).told == {"source": True, "spec": "gunicorn.dirty.tlv", "data": True, "missing": None}


def test_public_names():
    code = f"""
import {PACKAGE} as us
told = {{name: getattr(us, name).__module__ for name in us.__all__}}
try:
    us.nothing_of_the_kind
except AttributeError as error:
    told["unknown"] = str(error)
"""
    told = run(code).told
    assert "nothing_of_the_kind" in told.pop("unknown")
    assert told["install"] == f"{PACKAGE}.plugin"
    assert told["DirtyClient"] == f"{PACKAGE}.client.client"
    assert set(told) == set(gunicorn_dirty_gevent.__all__)
    assert all(module.startswith(PACKAGE) for module in told.values())
