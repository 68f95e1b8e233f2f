"""The WSGI application: it answers with what the dirty app makes of picture.jpg.

Nothing in this file knows of gunicorn_dirty_gevent; it is written for gunicorn's own dirty arbiter.
"""

import json
import pathlib
from urllib.parse import parse_qs

from gunicorn.dirty import DirtyError, DirtyTimeoutError, get_dirty_client
from gunicorn.dirty.errors import DirtyNoWorkersAvailableError

PICTURE = pathlib.Path(__file__).with_name("picture.jpg").read_bytes()
HELP = b"""\
/thumbnail?width=160   the picture as a JPEG of that width
/histogram?bins=4      how many pixels of each channel fall in each bin, as JSON
/progress?width=200    a contact sheet as it is made, as server-sent events
"""


def app(environ, start_response):
    view = VIEWS.get(environ["PATH_INFO"])
    if view is None:
        return answer(start_response, "404 Not Found", "text/plain", HELP)
    try:
        return view(parse_qs(environ["QUERY_STRING"]), start_response)
    except BadRequest as error:
        return answer(start_response, "400 Bad Request", "text/plain", f"{error}\n".encode())
    # error.message is for the user; str(error) has the traceback too.
    except DirtyNoWorkersAvailableError as error:
        busy = [("Retry-After", "1")]
        return answer(
            start_response, "503 Service Unavailable", "text/plain", f"{error.message}\n".encode(), busy
        )
    except DirtyTimeoutError as error:
        return answer(start_response, "504 Gateway Timeout", "text/plain", f"{error.message}\n".encode())
    except DirtyError as error:
        return answer(start_response, "502 Bad Gateway", "text/plain", f"{error.message}\n".encode())


def thumbnail(query, start_response):
    width = number(query, "width", 160, 16, 2000)
    jpeg = get_dirty_client().execute("tasks:ImageApp", "thumbnail", PICTURE, width)
    return answer(start_response, "200 OK", "image/jpeg", jpeg)


def histogram(query, start_response):
    bins = number(query, "bins", 4, 1, 256)
    counts = get_dirty_client().execute("tasks:ImageApp", "histogram", PICTURE, bins)
    return answer(start_response, "200 OK", "application/json", json.dumps(counts).encode() + b"\n")


def progress(query, start_response):
    width = number(query, "width", 200, 16, 600)
    chunks = get_dirty_client().stream("tasks:ImageApp", "contact_sheet", PICTURE, width)
    start_response("200 OK", [("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache")])
    return events(chunks)


def events(chunks):
    """Each chunk as a server-sent event; an error is one too, for the status line has gone out."""
    try:
        for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n".encode()
    except DirtyError as error:
        yield f"event: error\ndata: {json.dumps(error.message)}\n\n".encode()


VIEWS = {
    "/": lambda query, start_response: answer(start_response, "200 OK", "text/plain", HELP),
    "/thumbnail": thumbnail,
    "/histogram": histogram,
    "/progress": progress,
}


class BadRequest(Exception):
    pass


def number(query, name, default, least, most):
    try:
        value = int(query.get(name, [default])[0])
    except ValueError:
        raise BadRequest(f"{name} must be a whole number") from None
    if not least <= value <= most:
        raise BadRequest(f"{name} must be from {least} to {most}")
    return value


def answer(start_response, status, kind, body, headers=()):
    start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *headers])
    return [body]
