"""Views of Flask, Django, Pyramid and FastAPI that call dirty apps, in a real gunicorn."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.gunicorn import Gunicorn
from support.waiting import wait_until
from support.worker_classes import needs_eventlet

TASKS = """
import os, time
from gunicorn.dirty import DirtyApp

class Chat(DirtyApp):
    def answer(self, user, seconds=0.0):
        time.sleep(seconds)
        return f"hello {user}"

    def tokens(self, user, n, pause):
        try:
            for number in range(n):
                time.sleep(pause)
                yield f"{user}-{number}\\n"
        finally:
            print("closed", user, flush=True)

    def boom(self):
        raise ValueError("boo")

    def hold(self):
        while not os.path.exists("release"):
            time.sleep(0.01)
        return "held"
"""

APPS = {
    "flask": """
        from flask import Flask, Response, jsonify, request, stream_with_context
        from gunicorn.dirty import DirtyError, get_dirty_client
        from gunicorn_dirty_gevent import DirtyOverloadedError

        app = Flask(__name__)

        @app.get("/ready")
        def ready():
            return "ready"

        @app.get("/answer")
        def answer():
            seconds = float(request.args.get("seconds", 0))
            return get_dirty_client().execute("tasks:Chat", "answer", request.args["user"], seconds)

        @app.get("/tokens")
        def tokens():
            args = request.args["user"], int(request.args["n"]), float(request.args["pause"])
            chunks = get_dirty_client().stream("tasks:Chat", "tokens", *args)
            return Response(stream_with_context(chunks), mimetype="text/plain")

        @app.get("/boom")
        def boom():
            return get_dirty_client().execute("tasks:Chat", "boom")

        @app.get("/hold")
        def hold():
            return get_dirty_client().execute("tasks:Chat", "hold")

        @app.errorhandler(DirtyOverloadedError)
        def overloaded(error):
            return "overloaded", 503, {"Retry-After": "1"}

        @app.errorhandler(DirtyError)
        def failed(error):
            return error.message, 502
    """,
    "django": """
        import django
        from django.conf import settings
        from django.core.wsgi import get_wsgi_application
        from django.http import HttpResponse, StreamingHttpResponse
        from django.urls import path
        from gunicorn.dirty import DirtyError, get_dirty_client
        from gunicorn_dirty_gevent import DirtyOverloadedError

        def dirty_errors(get_response):
            def middleware(request):
                return get_response(request)

            def process_exception(request, error):
                if isinstance(error, DirtyOverloadedError):
                    return HttpResponse("overloaded", status=503, headers={"Retry-After": "1"})
                if isinstance(error, DirtyError):
                    return HttpResponse(error.message, status=502)

            middleware.process_exception = process_exception
            return middleware

        def answer(request):
            seconds = float(request.GET.get("seconds", 0))
            return HttpResponse(
                get_dirty_client().execute("tasks:Chat", "answer", request.GET["user"], seconds)
            )

        def tokens(request):
            args = request.GET["user"], int(request.GET["n"]), float(request.GET["pause"])
            return StreamingHttpResponse(get_dirty_client().stream("tasks:Chat", "tokens", *args))

        def call(action):
            return lambda request: HttpResponse(get_dirty_client().execute("tasks:Chat", action))

        urlpatterns = [
            path("ready", lambda request: HttpResponse("ready")),
            path("answer", answer),
            path("tokens", tokens),
            path("boom", call("boom")),
            path("hold", call("hold")),
        ]
        settings.configure(
            SECRET_KEY="x",
            ROOT_URLCONF=__name__,
            ALLOWED_HOSTS=["*"],
            MIDDLEWARE=[f"{__name__}.dirty_errors"],
        )
        app = get_wsgi_application()
    """,
    "pyramid": """
        from gunicorn.dirty import DirtyError, get_dirty_client
        from gunicorn_dirty_gevent import DirtyOverloadedError
        from pyramid.config import Configurator
        from pyramid.response import Response

        def answer(request):
            seconds = float(request.params.get("seconds", 0))
            return Response(
                text=get_dirty_client().execute("tasks:Chat", "answer", request.params["user"], seconds)
            )

        class Encoded:
            '''Pyramid closes an app_iter that has a close().'''
            def __init__(self, chunks):
                self._chunks = chunks
                self.close = chunks.close
            def __iter__(self):
                return (chunk.encode() for chunk in self._chunks)

        def tokens(request):
            args = request.params["user"], int(request.params["n"]), float(request.params["pause"])
            chunks = get_dirty_client().stream("tasks:Chat", "tokens", *args)
            return Response(app_iter=Encoded(chunks), content_type="text/plain")

        def call(action):
            return lambda request: Response(text=get_dirty_client().execute("tasks:Chat", action))

        def overloaded(error, request):
            return Response(text="overloaded", status=503, headers={"Retry-After": "1"})

        def failed(error, request):
            return Response(text=error.message, status=502)

        with Configurator() as config:
            views = {"ready": lambda request: Response(text="ready"), "answer": answer, "tokens": tokens}
            views |= {"boom": call("boom"), "hold": call("hold")}
            for name, view in views.items():
                config.add_route(name, "/" + name)
                config.add_view(view, route_name=name)
            config.add_exception_view(overloaded, context=DirtyOverloadedError)
            config.add_exception_view(failed, context=DirtyError)
            app = config.make_wsgi_app()
    """,
    "fastapi": """
        from fastapi import FastAPI
        from fastapi.responses import PlainTextResponse, StreamingResponse
        from gunicorn.dirty import DirtyError, get_dirty_client_async
        from gunicorn_dirty_gevent import DirtyOverloadedError

        app = FastAPI(default_response_class=PlainTextResponse)

        @app.get("/ready")
        async def ready():
            return "ready"

        @app.get("/answer")
        async def answer(user: str, seconds: float = 0.0):
            client = await get_dirty_client_async()
            return await client.execute_async("tasks:Chat", "answer", user, seconds)

        @app.get("/tokens")
        async def tokens(user: str, n: int, pause: float):
            client = await get_dirty_client_async()
            async def body():
                async with client.stream_async("tasks:Chat", "tokens", user, n, pause) as chunks:
                    async for chunk in chunks:
                        yield chunk
            return StreamingResponse(body(), media_type="text/plain")

        @app.get("/boom")
        async def boom():
            return await (await get_dirty_client_async()).execute_async("tasks:Chat", "boom")

        @app.get("/hold")
        async def hold():
            return await (await get_dirty_client_async()).execute_async("tasks:Chat", "hold")

        @app.exception_handler(DirtyOverloadedError)
        async def overloaded(request, error):
            return PlainTextResponse("overloaded", 503, {"Retry-After": "1"})

        @app.exception_handler(DirtyError)
        async def failed(request, error):
            return PlainTextResponse(error.message, 502)
    """,
}

CLASSES = {
    "flask": ["gevent", "eventlet", "gthread"],
    "django": ["gevent", "eventlet", "gthread"],
    "pyramid": ["gevent", "eventlet", "gthread"],
    "fastapi": ["asgi"],
}

CASES = [
    pytest.param(
        (framework, kind), marks=needs_eventlet if kind == "eventlet" else (), id=f"{framework}-{kind}"
    )
    for framework, kinds in CLASSES.items()
    for kind in kinds
]

BOUNDED = "import gunicorn_dirty_gevent\ngunicorn_dirty_gevent.install(queue_size=4)\n"


@pytest.fixture(scope="module", params=CASES)
def server(request: pytest.FixtureRequest) -> Iterator[Gunicorn]:
    framework, kind = request.param
    pytest.importorskip(framework)
    if kind == "asgi":
        pytest.importorskip("gunicorn.workers.gasgi")
    settings = {"dirty_apps": ["tasks:Chat"], "dirty_workers": 1, "dirty_threads": 32, "threads": 48}
    source = textwrap.dedent(APPS[framework])
    with Gunicorn(source, TASKS, settings, kind, install=BOUNDED) as running:
        running.wait_log("Dirty worker ready")
        yield running


def test_users_get_their_own_answers_at_once(server: Gunicorn) -> None:
    users = [f"user{number}" for number in range(16)]
    started = time.monotonic()
    answers = server.get_many([f"/answer?user={user}&seconds=0.5" for user in users])
    assert [answer.text for answer in answers] == [f"hello {user}" for user in users]
    assert time.monotonic() - started < 4  # 8 s one by one


def test_users_get_their_own_tokens(server: Gunicorn) -> None:
    users = [f"user{number}" for number in range(8)]
    answers = server.get_many([f"/tokens?user={user}&n=40&pause=0.002" for user in users])
    for user, answer in zip(users, answers, strict=True):
        assert answer.text.splitlines() == [f"{user}-{number}" for number in range(40)]


def test_a_browser_that_leaves_ends_its_generator(server: Gunicorn) -> None:
    with server.open("/tokens?user=leaver&n=100000&pause=0.005") as stream:
        assert next(iter(stream)) == "leaver-0"
    wait_until(
        lambda: "closed leaver" in server.log_text(), 15, "the generator to be closed", server.evidence
    )
    assert server.get("/answer?user=next").text == "hello next"


def test_errors_become_answers(server: Gunicorn) -> None:
    answer = server.get("/boom")
    assert (answer.status, answer.text) == (502, "boo")


def test_a_full_pool_is_told_with_503(server: Gunicorn) -> None:
    with ThreadPoolExecutor(48) as pool:
        held = [pool.submit(server.get, "/hold", 30) for _ in range(36)]  # 32 run, 4 wait
        try:

            def full() -> bool:
                answer = server.get("/answer?user=x", timeout=1)
                return answer.status == 503 and answer.headers["retry-after"] == "1"

            def refused() -> bool:
                try:
                    return full()
                except OSError:  # not full yet: the call waits
                    return False

            wait_until(refused, 20, "the queue to be full", server.evidence)
        finally:
            server.write("release", "")
        answers = [call.result(30) for call in held]
        assert [answer.text for answer in answers].count("held") >= 32
    (server.dir / "release").unlink()
