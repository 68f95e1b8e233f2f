"""The WSGI module that tests extend with views."""

from __future__ import annotations

import textwrap

BASE_APP = '''\
import json
import sys
from urllib.parse import parse_qsl

ROUTES = {}
TEXT = "text/plain; charset=utf-8"
JSON = "application/json"


def route(path):
    """A view takes (environ, query: dict) and returns str, bytes, an iterator of those
    (sent chunk by chunk), or anything that can be JSON."""

    def add(view):
        ROUTES[path] = view
        return view

    return add


@route("/ready")
def ready(environ, query):
    return "ready"


def app(environ, start_response):
    view = ROUTES.get(environ["PATH_INFO"])
    if view is None:
        return reply(start_response, "404 Not Found", TEXT, "no such route")
    try:
        result = view(environ, dict(parse_qsl(environ.get("QUERY_STRING", ""))))
        if hasattr(result, "__next__"):
            return chunks(result, start_response)
        if isinstance(result, (str, bytes)):
            return reply(start_response, "200 OK", TEXT, result)
        return reply(start_response, "200 OK", JSON, json.dumps(result, default=repr))
    except BaseException as error:
        return failure(error, start_response)


def reply(start_response, status, content_type, body, exc_info=None):
    body = encoded(body)
    headers = [("Content-Type", content_type), ("Content-Length", str(len(body)))]
    start_response(status, headers, exc_info)
    return [body]


def chunks(iterator, start_response):
    start_response("200 OK", [("Content-Type", TEXT)])
    try:
        for chunk in iterator:
            yield encoded(chunk)
    except BaseException as error:
        # Still a 500 if nothing was sent; otherwise start_response raises the error again.
        yield from failure(error, start_response)
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def failure(error, start_response):
    # gevent.Timeout is no Exception, but an answer here; these end the greenlet or process.
    if isinstance(error, (GeneratorExit, SystemExit, KeyboardInterrupt)):
        raise error
    if type(error).__name__ == "GreenletExit":
        raise error
    return reply(
        start_response,
        "500 Internal Server Error",
        JSON,
        json.dumps(described(error)),
        sys.exc_info(),
    )


def described(error):
    return {
        "error": type(error).__name__,
        "module": type(error).__module__,
        "message": str(error),
        "attrs": {name: repr(value) for name, value in getattr(error, "__dict__", {}).items()},
    }


def encoded(text):
    return text.encode() if isinstance(text, str) else bytes(text)
'''


def app_with(views: str) -> str:
    """`BASE_APP` with (indented) view functions added."""
    return f"{BASE_APP}\n\n{textwrap.dedent(views).strip()}\n"
