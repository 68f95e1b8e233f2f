"""Calls of a real gunicorn through HTTP: the view, and how the tests ask it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from support.gunicorn import Gunicorn, LogMark, Response, app_with
from support.waiting import wait_until

VIEWS = '''
import gevent
from gunicorn.dirty import get_dirty_client


def caught(error):
    """An error as JSON: what `described` says, and all its classes."""
    bases = [cls.__name__ for cls in type(error).__mro__]
    return described(error) | {"bases": bases, "attrs": vars(error)}


def asked_client(query):
    names = ("timeout", "idle_timeout")
    options = {name: json.loads(query[name]) for name in names if name in query}
    return get_dirty_client().options(**options) if options else get_dirty_client()


@route("/call")
def call(environ, query):
    """execute() of what the query says."""
    args, kwargs = json.loads(query["args"]), json.loads(query["kwargs"])
    try:
        return {"result": asked_client(query).execute(query["app"], query["action"], *args, **kwargs)}
    except Exception as error:
        return caught(error)


@route("/collect")
def collect(environ, query):
    """All chunks of a stream, and the error that ended it."""
    args, kwargs = json.loads(query["args"]), json.loads(query["kwargs"])
    chunks = []
    try:
        for chunk in asked_client(query).stream(query["app"], query["action"], *args, **kwargs):
            chunks.append(chunk)
    except Exception as error:
        return caught(error) | {"chunks": chunks}
    return {"chunks": chunks}


@route("/pid")
def pid(environ, query):
    import os
    return {"pid": os.getpid()}
'''


def app_source(views: str = "") -> str:
    """The WSGI module with the views above and these."""
    return app_with(VIEWS + views)


def path(
    app: str, action: str, *args: object, route: str = "/call", options: Any = None, **kwargs: object
) -> str:
    """The URL of a call; `options` are those of `client.options`."""
    query = {"app": app, "action": action, "args": json.dumps(args), "kwargs": json.dumps(kwargs)}
    return f"{route}?{urlencode(query | (options or {}))}"


@dataclass(frozen=True)
class Failure:
    """The error that a call ended with."""

    error: str
    message: str
    bases: list[str]
    attrs: dict[str, Any]
    elapsed: float
    chunks: list[Any] = field(default_factory=list)

    @property
    def may_have_run(self) -> bool:
        return self.attrs["may_have_run"]


def answer(response: Response) -> Any:
    """What a call returned, or its `Failure`."""
    assert response.status == 200, f"{response.status}: {response.text}"
    said = response.json()
    if "error" not in said:
        return said["result"] if "result" in said else said["chunks"]
    chunks = said.get("chunks", [])
    return Failure(said["error"], said["message"], said["bases"], said["attrs"], response.elapsed, chunks)


def ask(gunicorn: Gunicorn, app: str, action: str, *args: object, **more: Any) -> Any:
    """`execute` in a view: the result, or the `Failure`."""
    return answer(gunicorn.get(path(app, action, *args, **more), timeout=20))


def ask_many(gunicorn: Gunicorn, paths: list[str], concurrency: int | None = None) -> list[Any]:
    return [answer(response) for response in gunicorn.get_many(paths, concurrency, timeout=30)]


def collect(gunicorn: Gunicorn, app: str, action: str, *args: object, **more: Any) -> Any:
    """All chunks of `stream` in a view, or the `Failure` with those before it."""
    return ask(gunicorn, app, action, *args, route="/collect", **more)


def failure(said: Any, error: str) -> Failure:
    """`said`, which must be a `Failure` of this class (or a subclass)."""
    assert isinstance(said, Failure), f"no error, but {said!r}"
    assert error in said.bases, f"{said.bases}: {said.message}"
    return said


@contextmanager
def asking(gunicorn: Gunicorn, paths: list[str]) -> Iterator[list[Future[Any]]]:
    """Calls that run beside the block; all have been answered when it is left."""
    with ThreadPoolExecutor(len(paths)) as pool:
        yield [pool.submit(lambda p=p: answer(gunicorn.get(p, timeout=30))) for p in paths]


def ready_pids(gunicorn: Gunicorn, since: LogMark | None = None) -> list[int]:
    """The living dirty workers that take calls, oldest first."""
    said = re.findall(r"Dirty worker ready \(pid: (\d+)\)", gunicorn.log_since(since))
    return [pid for pid in gunicorn.dirty_worker_pids() if str(pid) in said]


def wait_ready(gunicorn: Gunicorn, count: int, deadline: float = 15.0) -> list[int]:
    """`count` living dirty workers, when all of them take calls and there are no others."""

    def ready() -> list[int]:
        pids = ready_pids(gunicorn)
        return pids if len(pids) == count == len(gunicorn.dirty_worker_pids()) else []

    return wait_until(ready, deadline, f"{count} ready dirty workers", gunicorn.evidence)
