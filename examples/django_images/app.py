"""Upload a picture and see its thumbnails appear: Django in one file."""

import base64
import itertools
import json
import logging
import pathlib
from collections.abc import Iterator

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path
from django.views.decorators.http import require_GET, require_POST
from gunicorn.dirty import DirtyError, DirtyTimeoutError, get_dirty_client

from gunicorn_dirty_gevent import DirtyOverloadedError

PAGE = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
MOST = 10 * 1024 * 1024  # bytes of a picture
log = logging.getLogger(__name__)


@require_GET
def page(request: HttpRequest) -> HttpResponse:
    return HttpResponse(PAGE)


@require_POST
def thumbnails(request: HttpRequest) -> HttpResponse | StreamingHttpResponse:
    """Lines of JSON: the size of the picture, then each thumbnail when it is done."""
    picture = request.FILES.get("picture")
    if picture is None:
        return plain(400, "send a file named picture")
    if picture.size > MOST:
        return plain(413, f"a picture may have {MOST // 1024 // 1024} MiB")
    chunks = get_dirty_client().stream("tasks:Thumbnails", "make", picture.read())
    first = next(chunks)  # sends the call: from here on it runs, or the middleware answers
    if "refused" in first:
        return plain(400, first["refused"])
    return StreamingHttpResponse(lines(first, chunks), content_type="application/x-ndjson")


def lines(first: dict, chunks) -> Iterator[bytes]:
    with chunks:  # closed when the browser leaves, and the work with it
        try:
            for chunk in itertools.chain([first], chunks):
                if "jpeg" in chunk:
                    chunk["jpeg"] = base64.b64encode(chunk["jpeg"]).decode()
                yield json.dumps(chunk).encode() + b"\n"
        except DirtyError as error:  # the status line has gone out
            log.warning("thumbnails ended early: %s", error.message)
            yield json.dumps({"error": error.message}).encode() + b"\n"


class DirtyErrors:
    """Middleware: what the dirty side says, as an HTTP status."""

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request: HttpRequest):
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        if isinstance(error, DirtyOverloadedError):
            return plain(503, "too many pictures are waiting; try again in 5 seconds", {"Retry-After": "5"})
        if isinstance(error, DirtyTimeoutError):
            return plain(504, error.message)
        if isinstance(error, DirtyError):
            log.error("the dirty app failed: %s", error.message)
            return plain(502, "the thumbnails could not be made")
        return None


def plain(status: int, text: str, headers: dict[str, str] | None = None) -> HttpResponse:
    return HttpResponse(f"{text}\n", status=status, content_type="text/plain", headers=headers)


urlpatterns = [path("", page), path("thumbnails", thumbnails)]

# There is no log-in, no cookie and nothing that is stored: so no sessions, no CSRF token, no database.
settings.configure(
    SECRET_KEY="nothing is signed here",
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    MIDDLEWARE=["django.middleware.security.SecurityMiddleware", f"{__name__}.DirtyErrors"],
)
app = get_wsgi_application()
