"""The code of docs/quickstart.rst, writing_apps.rst and calling.rst: in a real gunicorn, and as it stands."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.gunicorn import Gunicorn, app_with
from support.waiting import wait_until

from gunicorn_dirty_gevent.errors import DirtyConnectionError, DirtyOverloadedError

DOCS = Path(__file__).parents[2] / "docs"

BLOCK = re.compile(r"^\.\. code-block:: python\n((?:   :\w+: .*\n)*)\n((?:   .*\n|\n)+)", re.M)

SLOW = 20.0  # seconds for what takes a fraction of one on an idle machine


def blocks(page: str) -> dict[str, str]:
    """The page's blocks of Python, by name."""
    found = {}
    for options, body in BLOCK.findall((DOCS / f"{page}.rst").read_text()):
        name = re.search(r":name: (\S+)", options)
        assert name is not None, f"a block of {page}.rst has no name, so no test runs it:\n{body}"
        found[name[1]] = textwrap.dedent(body).strip() + "\n"
    return found


BLOCKS = {**blocks("quickstart"), **blocks("writing_apps"), **blocks("calling")}


def code(*names: str) -> str:
    return "\n".join(BLOCKS[name] for name in names)


def sse(text: str) -> list[Any]:
    """The data of each server-sent event."""
    *events, rest = text.split("\n\n")
    assert rest == ""
    return [json.loads(event.removeprefix("data: ")) for event in events]


# -- quickstart ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickstart() -> Iterator[Gunicorn]:
    # What is served is the page's three files; the harness adds only its port and its log.
    with Gunicorn(
        code("quickstart-app"), code("quickstart-tasks"), install=code("quickstart-conf"), ready="/"
    ) as running:
        yield running


def test_the_quickstarts_page_and_plain_call(quickstart: Gunicorn) -> None:
    assert 'new EventSource("/words")' in quickstart.get("/").text
    assert quickstart.get("/choices/the").json() == ["arbiter", "call", "worker"]
    quickstart.wait_log(r"\[INFO\] Initialized dirty app: tasks:Writer \(pid: \d+\)")
    quickstart.wait_log(r"\[INFO\] Dirty worker ready \(pid: \d+\)")


def test_the_quickstarts_windows_each_have_their_own_words(quickstart: Gunicorn) -> None:
    namespace: dict[str, Any] = {}
    exec(code("quickstart-tasks"), namespace)
    writer = namespace["Writer"]()
    writer.init()
    following = writer.following
    answers = quickstart.get_many(["/words"] * 4, timeout=2 * SLOW)
    for answer in answers:
        assert answer.headers["content-type"].startswith("text/event-stream")
        words = sse(answer.text)
        assert len(words) == 50 and words[0] == "the"
        # One window's words follow each other; mixed with another's they would not.
        assert all(then in following[word] for word, then in itertools.pairwise(words))
    assert max(answer.elapsed for answer in answers) < 15  # 20 s one by one


def test_outside_gunicorn_the_message_is_the_one_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(code("quickstart-app"))
    program = "import app; app.app.testing = True; app.app.test_client().get('/choices/the')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False
    )
    (message,) = re.findall(r"^``(Dirty socket .*)``$", (DOCS / "quickstart.rst").read_text(), re.M)
    assert message in done.stderr


# -- writing_apps ----------------------------------------------------------------------------------

APPS = [
    *("apps-state", "apps-lock", "apps-threadpool", "apps-timeouts", "apps-streams", "apps-errors"),
    "apps-async",
]

CALLS = """
    import json
    from gunicorn.dirty import get_dirty_client
    from writing import order as order_view

    @route("/call")
    def call(environ, query):
        return get_dirty_client().execute(query["app"], query["do"], *json.loads(query.get("args", "[]")))

    @route("/stream")
    def stream(environ, query):
        chunks = get_dirty_client().stream(query["app"], query["do"], *json.loads(query.get("args", "[]")))
        return (json.dumps(chunk) + "\\n" for chunk in chunks)

    @route("/order")
    def order(environ, query):
        return order_view("tea")

    @route("/hash")
    def hash(environ, query):
        return get_dirty_client().execute("tasks:Passwords", "hash", b"secret", b"salt").hex()
"""


@pytest.fixture(scope="module")
def apps() -> Iterator[Gunicorn]:
    names = ["Rates", "Account", "Passwords", "Pictures", "Export", "Shop", "Fetcher"]
    settings = {
        "dirty_apps": [f"tasks:{name}" for name in names], "dirty_workers": 1, "dirty_threads": 16,
    }  # fmt: skip
    gunicorn = Gunicorn(app_with(CALLS), code(*APPS), settings)
    gunicorn.write("writing.py", code("apps-errors-view"))
    with gunicorn as running:
        running.wait_log("Dirty worker ready", SLOW)
        yield running


def url(app: str, action: str, *args: Any, kind: str = "call") -> str:
    return f"/{kind}?app=tasks:{app}&do={action}&args={json.dumps(args).replace(' ', '').replace('+', '%2B')}"


def test_state_stays_from_call_to_call(apps: Gunicorn) -> None:
    first = apps.get(url("Rates", "where")).json()
    assert apps.get(url("Rates", "convert", 10, "USD")).json() == pytest.approx(11)
    assert apps.get(url("Rates", "where")).json() == {"pid": first["pid"], "asked": first["asked"] + 1}


def test_the_lock_holds_over_a_wait(apps: Gunicorn) -> None:
    answers = apps.get_many([url("Account", "add", 1)] * 10)
    assert sorted(answer.json() for answer in answers) == list(range(1, 11))


def test_the_threadpool_hashes(apps: Gunicorn) -> None:
    import hashlib

    assert apps.get("/hash", SLOW).text == hashlib.pbkdf2_hmac("sha256", b"secret", b"salt", 600_000).hex()


def test_the_actions_own_limit_holds_and_its_cleanup_runs(apps: Gunicorn) -> None:
    assert apps.get(url("Pictures", "resize", 0.01)).text == "resized"
    before = apps.get(url("Pictures", "count")).json()
    late = apps.get(url("Pictures", "resize", 600), SLOW)
    assert late.json()["error"] == "DirtyTimeoutError" and "stopped after 1 s" in late.json()["message"]
    assert apps.get(url("Pictures", "count")).json() == before + 1
    assert apps.get(url("Pictures", "measure", "abc")).json() == 3


def test_the_stream_and_its_end(apps: Gunicorn) -> None:
    rows = apps.get(url("Export", "rows", 20, kind="stream")).text.splitlines()
    assert [json.loads(row) for row in rows] == [{"row": number} for number in range(20)]
    with apps.open(url("Export", "rows", 1_000_000, kind="stream")) as stream:
        assert next(iter(stream)) == '{"row": 0}'
        assert apps.get(url("Export", "count_open")).json() == 1
    wait_until(lambda: apps.get(url("Export", "count_open")).json() == 0, SLOW, "the generator to be closed")
    assert "call it with client.stream()" in apps.get(url("Export", "rows", 3)).text


def test_the_apps_error_is_told_apart(apps: Gunicorn) -> None:
    assert apps.get("/order").text == "sorry: no tea left"
    assert "OutOfStock: no tea left" in apps.get(url("Shop", "order", "tea")).text
    apps.wait_log(r"\[ERROR\] Error executing tasks:Shop\.order: no tea left")


def test_coroutines_and_async_generators(apps: Gunicorn) -> None:
    assert apps.get(url("Fetcher", "fetch", ["a", "b"])).json() == ["A", "B"]
    lines = apps.get(url("Fetcher", "lines", 3, kind="stream")).text.splitlines()
    assert lines == ['"line 0"', '"line 1"', '"line 2"']


def run_pytest(directory: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (directory / name).write_text(text)
    # -B: a file that is changed within its second, and not in size, counts as the same for what was compiled.
    done = subprocess.run(
        [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(directory)],
        cwd=directory, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_the_tests_of_apps_pass_without_gunicorn(tmp_path: Path) -> None:
    files = {"tasks.py": code(*APPS), "test_tasks.py": code("apps-test")}
    assert "5 passed" in run_pytest(tmp_path, files)
    # And they see what is wrong.
    files["tasks.py"] = files["tasks.py"].replace('"USD": 1.1', '"USD": 1.2')
    assert "1 failed, 4 passed" in run_pytest(tmp_path, files)


def test_the_test_of_an_app_with_a_stash_passes_without_gunicorn(tmp_path: Path) -> None:
    files = {"tasks.py": blocks("stash")["stash-tasks"], "test_reports.py": code("apps-test-stash")}
    assert "1 passed" in run_pytest(tmp_path, files)
    files["tasks.py"] = files["tasks.py"].replace('stash.incr("counters", "built")', "pass")
    assert "1 failed" in run_pytest(tmp_path, files)


# -- calling ---------------------------------------------------------------------------------------

HOLD = """
import time
_summary = Texts.summary

def _or_hold(self, text):
    while text == "hold":
        time.sleep(0.01)
    return _summary(self, text)

Texts.summary = _or_hold

def _words_or_more(self, text):
    try:
        number = 0
        while text == "more":
            number += 1
            yield str(number)
            time.sleep(0.002)
        yield from text.split()
        if text == "oh no":
            raise ValueError("no words")
    finally:
        print("closed", text, flush=True)

Texts.words = _words_or_more
"""
"""The page's app, with texts that make trouble."""

DJANGO = """
from django.conf import settings
from django.core.wsgi import get_wsgi_application

settings.configure(
    SECRET_KEY="x", ROOT_URLCONF="views", ALLOWED_HOSTS=["*"], MIDDLEWARE=["middleware.DirtyErrors"]
)
app = get_wsgi_application()
"""

BOUNDED = "import gunicorn_dirty_gevent\ngunicorn_dirty_gevent.install(queue_size=2)\n"


@pytest.fixture(scope="module", params=["flask", "django", "pyramid", "fastapi"])
def framework(request: pytest.FixtureRequest) -> Iterator[Gunicorn]:
    kind = request.param
    pytest.importorskip(kind)
    worker_class = "gevent"
    if kind == "fastapi":
        pytest.importorskip("gunicorn.workers.gasgi")
        worker_class = "asgi"
    source = DJANGO if kind == "django" else code(f"calling-{kind}")
    settings = {"dirty_apps": ["tasks:Texts"], "dirty_workers": 1, "dirty_threads": 2}
    tasks = code("calling-tasks") + HOLD
    gunicorn = Gunicorn(source, tasks, settings, worker_class, install=BOUNDED, ready="/summary?text=x")
    if kind == "django":
        gunicorn.write("views.py", code("calling-django-views"))
        gunicorn.write("middleware.py", code("calling-django-middleware"))
    with gunicorn as running:
        yield running


def test_a_call_of_each_framework(framework: Gunicorn) -> None:
    assert framework.get("/summary?text=to+be+or+not").json() == {"words": 4, "longest": "not"}


def test_a_stream_of_each_framework(framework: Gunicorn) -> None:
    answer = framework.get("/words?text=to+be+or")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert sse(answer.text) == ["to", "be", "or"]
    text = framework.get("/words?text=oh+no").text
    assert text == 'data: "oh"\n\ndata: "no"\n\nevent: error\ndata: "no words"\n\n'


def test_a_browser_that_leaves_closes_the_generator(framework: Gunicorn) -> None:
    mark = framework.mark()
    with framework.open("/words?text=more") as stream:
        assert next(iter(stream)) == 'data: "1"'
    framework.wait_log("^closed more$", SLOW, since=mark)


def test_the_apps_error_is_502_and_in_the_log(framework: Gunicorn) -> None:
    mark = framework.mark()
    answer = framework.get("/summary?text=")  # max() of nothing
    assert (answer.status, answer.text) == (502, "failed")
    framework.wait_log(r"^ValueError: max\(\)", SLOW, since=mark)


def test_overload_is_503_and_a_late_call_504(framework: Gunicorn) -> None:
    seen: dict[int, Any] = {}

    def both() -> bool:
        # 2 run and 2 wait, all until their 2 s are over; the others are refused at once.
        answers = framework.get_many(["/summary?text=hold"] * 8, timeout=SLOW)
        assert {answer.status for answer in answers} <= {503, 504}
        seen.update({answer.status: answer for answer in answers})
        return len(seen) == 2

    wait_until(both, SLOW, "eight calls to arrive within 2 s of each other", framework.evidence)
    assert seen[503].headers["retry-after"] == "1"
    assert seen[504].text == "took too long"


FUNCTIONS = (
    *("calling-functions", "calling-options", "calling-futures", "calling-again"),
    "calling-first-chunk",
)

FUNCTION_VIEWS = """
    import json
    import functions

    @route("/do")
    def do(environ, query):
        value = getattr(functions, query["name"])(json.loads(query["arg"]))
        return value if isinstance(value, (dict, list)) else list(value)
"""


def test_the_functions_that_call() -> None:
    settings = {"dirty_apps": ["tasks:Texts"], "dirty_workers": 1, "dirty_threads": 8}
    gunicorn = Gunicorn(app_with(FUNCTION_VIEWS), code("calling-tasks") + HOLD, settings)
    gunicorn.write("functions.py", code(*FUNCTIONS))
    with gunicorn as server:
        two = {"words": 2, "longest": "bb"}
        for name in ("summary", "quick_summary", "summary_tried_twice"):
            assert server.get(f'/do?name={name}&arg="a+bb"').json() == two
        for name in ("words", "patient_words"):
            assert server.get(f'/do?name={name}&arg="a+bb"').json() == ["a", "bb"]
        assert server.get('/do?name=summaries&arg=["a+bb","c"]').json() == [two, {"words": 1, "longest": "c"}]
        assert server.get('/do?name=started_words&arg="a+bb"').json() == ["a", "bb"]
        assert server.get('/do?name=started_words&arg=""').json() == []
        assert server.get("/do?name=started_words&arg=5").json()["error"] == "DirtyAppError"
        late = server.get('/do?name=quick_summary&arg="hold"', SLOW).json()
        assert late["error"] == "DirtyTimeoutError"


def test_a_stream_that_is_taken_on_first_raises_before_the_answer() -> None:
    namespace: dict[str, Any] = {}
    exec(code(*FUNCTIONS), namespace)

    class Full:
        def stream(self, *args: Any) -> Iterator[str]:
            raise DirtyOverloadedError("full")
            yield

    namespace["get_dirty_client"] = Full
    with pytest.raises(DirtyOverloadedError):
        namespace["started_words"]("x")  # not at the first next() of what it returns


class Failing:
    """A client whose calls fail with these, one after the other, and then succeed."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def options(self, **options: Any) -> Failing:
        return self

    def execute(self, *args: Any) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def error(cls: type[Exception], may_have_run: bool) -> Exception:
    made = cls("failed")
    made.may_have_run = may_have_run  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("failure", "calls"),
    [
        (error(DirtyConnectionError, False), 2),
        (error(DirtyConnectionError, True), 1),
        (error(DirtyOverloadedError, False), 1),
    ],
)
def test_calling_again_only_where_it_is_safe(failure: Exception, calls: int) -> None:
    namespace: dict[str, Any] = {}
    exec(code(*FUNCTIONS), namespace)
    client = Failing(failure)
    namespace["get_dirty_client"] = lambda: client
    if calls == 2:
        assert namespace["summary_tried_twice"]("x") == "done"
    else:
        with pytest.raises(type(failure)):
            namespace["summary_tried_twice"]("x")
    assert client.calls == calls


def test_the_tests_of_views_pass_without_gunicorn(tmp_path: Path) -> None:
    files = {
        "app.py": code("calling-flask"),
        "tasks.py": code("calling-tasks"),
        "test_app.py": code("calling-test"),
    }
    assert "3 passed" in run_pytest(tmp_path, files)
    files["app.py"] = files["app.py"].replace("503", "500")
    assert "1 failed, 2 passed" in run_pytest(tmp_path, files)


# -- all of it -------------------------------------------------------------------------------------


def test_every_block_is_run_by_a_test() -> None:
    """From this file's text, so that it holds whichever of these tests are run."""
    text = Path(__file__).read_text()
    patterned = {f"calling-{kind}" for kind in ("flask", "pyramid", "fastapi")}
    unused = {name for name in BLOCKS if f'"{name}"' not in text} - patterned
    assert len(BLOCKS) > 20
    assert not unused, f"blocks of the documentation that no test runs: {sorted(unused)}"
