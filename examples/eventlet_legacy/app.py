"""Log-in for a Pyramid application that still runs under gunicorn's eventlet worker."""

import itertools
import json
import logging
from collections.abc import Iterator

from gunicorn.dirty import DirtyError, DirtyTimeoutError, get_dirty_client
from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPBadRequest
from pyramid.request import Request
from pyramid.response import Response

from gunicorn_dirty_gevent import DirtyOverloadedError

log = logging.getLogger(__name__)


def register(request: Request) -> Response:
    if get_dirty_client().execute("tasks:Passwords", "register", *credentials(request)):
        return plain(201, "welcome")
    return plain(409, "this name is taken")


def login(request: Request) -> Response:
    if get_dirty_client().execute("tasks:Passwords", "check", *credentials(request)):
        return plain(200, "hello again")
    return plain(403, "wrong name or password")


def credentials(request: Request) -> tuple[str, str]:
    user, password = request.POST.get("user", ""), request.POST.get("password", "")
    if not (1 <= len(user) <= 100 and 8 <= len(password) <= 1000):
        raise HTTPBadRequest("user may have 100 characters, password must have from 8 to 1000")
    return user, password


class Lines:
    """Chunks as lines of JSON. Pyramid closes it when the browser leaves."""

    def __init__(self, chunks) -> None:
        self.chunks = chunks
        self.first = next(chunks)  # sends the call: until here an exception view answers

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in itertools.chain([self.first], self.chunks):
                yield json.dumps(chunk).encode() + b"\n"
        except DirtyError as error:  # the status line has gone out
            yield json.dumps({"error": error.message}).encode() + b"\n"

    def close(self) -> None:
        self.chunks.close()


def costs(request: Request) -> Response:
    lines = Lines(get_dirty_client().stream("tasks:Passwords", "costs"))
    return Response(app_iter=lines, content_type="application/x-ndjson")


def overloaded(error: DirtyOverloadedError, request: Request) -> Response:
    return plain(503, "too many log-ins at once; try again in a second", {"Retry-After": "1"})


def too_slow(error: DirtyTimeoutError, request: Request) -> Response:
    return plain(504, error.message)


def failed(error: DirtyError, request: Request) -> Response:
    log.error("the dirty app failed: %s", error.message)
    return plain(502, "the log-in service failed")


def plain(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    response = Response(text=f"{text}\n", status=status, content_type="text/plain")
    response.headers.update(headers or {})
    return response


with Configurator() as config:
    for view, method in ((register, "POST"), (login, "POST"), (costs, "GET")):
        config.add_route(view.__name__, f"/{view.__name__}", request_method=method)
        config.add_view(view, route_name=view.__name__)
    config.add_exception_view(overloaded, context=DirtyOverloadedError)
    config.add_exception_view(too_slow, context=DirtyTimeoutError)
    config.add_exception_view(failed, context=DirtyError)
    app = config.make_wsgi_app()
