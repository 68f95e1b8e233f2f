"""Search by meaning, as JSON."""

from flask import Flask, jsonify, request
from gunicorn.dirty import DirtyError, DirtyTimeoutError, get_dirty_client

from gunicorn_dirty_gevent import DirtyOverloadedError

app = Flask(__name__)


@app.get("/search")
def search():
    """/search?q=how do I get my money back&count=3"""
    question = request.args.get("q", "").strip()
    count = request.args.get("count", 3, type=int)
    if not 1 <= len(question) <= 1000:
        return jsonify(error="q must be from 1 to 1000 characters"), 400
    if not 1 <= count <= 20:
        return jsonify(error="count must be from 1 to 20"), 400
    return jsonify(get_dirty_client().execute("tasks:Search", "search", question, count))


@app.post("/embed")
def embed():
    """{"texts": [...]} -> {"vectors": [[...], ...]}"""
    body = request.get_json()
    texts = body.get("texts") if isinstance(body, dict) else None
    if (
        not isinstance(texts, list)
        or not 1 <= len(texts) <= 100
        or not all(isinstance(t, str) for t in texts)
    ):
        return jsonify(error="texts must be a list of 1 to 100 strings"), 400
    vectors = get_dirty_client().options(timeout=5).execute("tasks:Search", "embed", texts)
    return jsonify(vectors=vectors)


@app.errorhandler(DirtyOverloadedError)
def overloaded(error: DirtyOverloadedError):
    return jsonify(error="too many searches are waiting"), 503, {"Retry-After": "1"}


@app.errorhandler(DirtyTimeoutError)
def too_slow(error: DirtyTimeoutError):
    return jsonify(error=error.message), 504


@app.errorhandler(DirtyError)
def failed(error: DirtyError):
    app.logger.error("the dirty app failed: %s", error.message)
    return jsonify(error="the search failed"), 502
