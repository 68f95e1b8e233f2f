"""examples/embeddings: a real model, loaded once in each dirty worker."""

from __future__ import annotations

import json
import re
from urllib.parse import quote

import pytest
from serving import ANSWER, needs, served, stops_clean

pytestmark = needs("flask", "wordllama")

ASKED = {
    "how do I get my money back": "Refunds are paid",
    "I cannot remember my password": "To choose a new password",
    "when are you open": "Our shop in the old town",
    "my screen is black": "If the screen stays black",
    "can I bring my dog": "Dogs are welcome",
}


def test_it_finds_by_meaning_and_loads_the_model_once_per_worker() -> None:
    with served("embeddings") as gunicorn:
        questions = list(ASKED) * 8
        answers = gunicorn.get_many([f"/search?q={quote(q)}" for q in questions], timeout=ANSWER)
        for question, answer in zip(questions, answers, strict=True):
            hits = answer.json()["hits"]
            assert len(hits) == 3
            assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
            assert hits[0]["sentence"].startswith(ASKED[question]), question

        gunicorn.wait_log(r"(?s)(Dirty worker ready.*){2}", ANSWER)
        loaded = re.findall(r"^worker (\d+): model loaded", gunicorn.log_text(), re.M)
        assert sorted(map(int, loaded)) == sorted(gunicorn.dirty_worker_pids())
        assert len(loaded) == 2
        assert {answer.json()["worker"] for answer in answers} <= set(map(int, loaded))

        body = json.dumps({"texts": ["a lamp", "a bright lamp", "taxes"]}).encode()
        headers = {"Content-Type": "application/json"}
        answer = gunicorn.request("/embed", ANSWER, "POST", body, headers)
        lamp, bright, taxes = answer.json()["vectors"]
        assert len(lamp) == 256 and sum(x * x for x in lamp) == pytest.approx(1, abs=0.01)
        assert dot(lamp, bright) > dot(lamp, taxes) + 0.2

        assert gunicorn.get("/search?q=", timeout=ANSWER).status == 400
        assert gunicorn.get("/search?q=x&count=0", timeout=ANSWER).status == 400
        assert gunicorn.request("/embed", ANSWER, "POST", b"[]", headers).status == 400
        stops_clean(gunicorn)


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))
