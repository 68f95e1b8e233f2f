"""A chat page: tokens go to the browser as server-sent events while they are made."""

import itertools
import json
from collections.abc import Iterator

from flask import Flask, Response, jsonify, render_template, request
from gunicorn.dirty import DirtyError, DirtyTimeoutError, get_dirty_client

from gunicorn_dirty_gevent import DirtyOverloadedError, stash

app = Flask(__name__)


@app.get("/")
def page() -> str:
    return render_template("chat.html", user=request.args.get("user", "guest")[:40])


@app.get("/chat")
def chat():
    prompt = request.args.get("prompt", "").strip()[:500]
    if not prompt:
        return "say something: ?prompt=...\n", 400
    user = request.args.get("user", "guest")[:40]
    # 120 seconds for the whole answer; gunicorn's default of 30 would cut a long one off.
    chunks = get_dirty_client().options(timeout=120).stream("tasks:Writer", "write", user, prompt)
    # The call is sent by the first next(): what goes wrong by then still gets a status of its own.
    first = next(chunks)
    return Response(
        events(first, chunks), mimetype="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


def events(first: dict, chunks) -> Iterator[str]:
    with chunks:  # closed when the browser leaves, and the dirty app's generator with it
        try:
            for chunk in itertools.chain([first], chunks):
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "event: done\ndata: {}\n\n"
        except DirtyError as error:  # the status line has gone out
            # Not str(error): that has the traceback too, which is not for users.
            app.logger.warning("a generation failed: %s", error.message)
            yield f"event: failed\ndata: {json.dumps(error.message)}\n\n"


@app.get("/running")
def running():
    """Whose generations are running now, in all dirty workers."""
    users = (stash.get("running", key) for key in stash.keys("running"))
    return jsonify(sorted(user for user in users if user is not None))


@app.errorhandler(DirtyOverloadedError)
def overloaded(error: DirtyOverloadedError):
    return "Too many people are writing just now. Try again in a few seconds.\n", 503, {"Retry-After": "5"}


@app.errorhandler(DirtyTimeoutError)
def too_slow(error: DirtyTimeoutError):
    return f"{error.message}\n", 504


@app.errorhandler(DirtyError)
def failed(error: DirtyError):
    app.logger.error("the dirty app failed: %s", error.message)
    return "The text generator failed.\n", 502
