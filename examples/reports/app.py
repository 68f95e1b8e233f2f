"""Reports that take long: with progress, with a time limit, and with an answer when there is no room."""

import itertools
import json
from collections.abc import Iterator

from flask import Flask, Response, jsonify, request
from gunicorn.dirty import DirtyError, DirtyTimeoutError, get_dirty_client
from werkzeug.exceptions import BadRequest

from gunicorn_dirty_gevent import DirtyOverloadedError

app = Flask(__name__)


@app.get("/regions")
def regions():
    return jsonify(get_dirty_client().execute("tasks:Reports", "regions"))


@app.get("/report")
def report():
    """Progress and result as lines of JSON: /report?region=north&samples=20000"""
    # The whole time for one report, in the queue and running, is ours to say; 30 s is the default.
    chunks = get_dirty_client().options(timeout=120).stream("tasks:Reports", "report", *asked())
    first = next(chunks)  # sends the call: from here on the report runs, or an error handler answers
    return Response(lines(first, chunks), mimetype="application/x-ndjson")


def lines(first: dict, chunks) -> Iterator[str]:
    with chunks:  # closed when the reader leaves, and the computation with it
        try:
            for chunk in itertools.chain([first], chunks):
                yield json.dumps(chunk) + "\n"
        except DirtyError as error:  # the status line has gone out
            app.logger.warning("a report ended early: %s", error.message)
            yield json.dumps({"error": error.message}) + "\n"


@app.get("/quick")
def quick():
    """Only the result, within 2 seconds or not at all."""
    return jsonify(get_dirty_client().execute("tasks:Reports", "quick", *asked()))


def asked() -> tuple[str, int]:
    region, samples = request.args.get("region", "north"), request.args.get("samples", 2000, type=int)
    if region not in ("north", "south", "west"):
        raise BadRequest("region must be north, south or west")
    if not 100 <= samples <= 1_000_000:
        raise BadRequest("samples must be from 100 to 1000000")
    return region, samples


@app.errorhandler(BadRequest)
def bad_request(error: BadRequest):
    return f"{error.description}\n", 400, {"Content-Type": "text/plain"}


@app.errorhandler(DirtyOverloadedError)
def overloaded(error: DirtyOverloadedError):
    text = "All reporters are busy and the queue is full. Try again in 10 seconds.\n"
    return text, 503, {"Retry-After": "10", "Content-Type": "text/plain"}


@app.errorhandler(DirtyTimeoutError)
def too_slow(error: DirtyTimeoutError):
    app.logger.warning("%s", error.message)
    text = "The report took too long and was stopped. Ask for fewer samples, or for /report.\n"
    return text, 504, {"Content-Type": "text/plain"}


@app.errorhandler(DirtyError)
def failed(error: DirtyError):
    app.logger.error("the dirty app failed: %s", error.message)
    return "The report failed.\n", 502, {"Content-Type": "text/plain"}
