"""examples/reports: progress, a time limit and a full queue, over HTTP."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from serving import ANSWER, needs, served, stops_clean
from support.gunicorn import Gunicorn
from support.waiting import wait_until

pytestmark = needs("flask")

ENDLESS = "/report?region=west&samples=1000000"  # minutes, unless it is hung up on


def test_a_report_shows_its_progress_and_then_its_result() -> None:
    with served("reports") as gunicorn:
        assert gunicorn.get("/regions", timeout=ANSWER).json() == ["north", "south", "west"]
        answer = gunicorn.get("/report?region=west&samples=2000", timeout=ANSWER)
        assert answer.headers["content-type"] == "application/x-ndjson"
        *progress, last = [json.loads(line) for line in answer.text.splitlines()]
        assert [chunk["done"] for chunk in progress] == [0, 0.25, 0.5, 0.75, 1]
        assert 40 < last["from"] < last["mean"] < last["to"] < 70
        assert gunicorn.get("/quick?region=west&samples=2000", timeout=ANSWER).json() == last
        assert gunicorn.get("/quick?region=east", timeout=ANSWER).status == 400
        assert gunicorn.get("/quick?samples=many", timeout=ANSWER).status == 200  # Flask takes the default
        stops_clean(gunicorn)


def test_a_report_past_its_time_is_stopped_and_told_with_504() -> None:
    with served("reports") as gunicorn:
        workers = ready_workers(gunicorn)
        answer = gunicorn.get("/quick?samples=1000000", timeout=ANSWER)
        assert answer.status == 504
        assert answer.text.startswith("The report took too long and was stopped.")
        assert answer.elapsed >= 2
        gunicorn.wait_log(r"Execution timeout for tasks:Reports\.quick after 2", ANSWER)
        # Its worker serves on, with what it has loaded.
        answers = gunicorn.get_many(["/quick?samples=200"] * 4, timeout=ANSWER)
        assert [answer.status for answer in answers] == [200] * 4
        assert gunicorn.dirty_worker_pids() == workers
        gunicorn.stop()


def test_a_full_queue_is_told_with_503() -> None:
    with served("reports") as gunicorn, ThreadPoolExecutor(3) as pool:
        ready_workers(gunicorn)
        with gunicorn.open(ENDLESS, timeout=ANSWER) as one, gunicorn.open(ENDLESS, timeout=ANSWER) as two:
            for running in (one, two):
                assert json.loads(next(iter(running))) == {"region": "west", "done": 0}
            # Both workers are busy. Two of three find room in the queue.
            asked = [pool.submit(gunicorn.get, "/quick?samples=100", ANSWER) for _ in range(3)]
            done = wait_until(
                lambda: [call for call in asked if call.done()], ANSWER, "a 503", gunicorn.evidence
            )
            assert [call.result().status for call in done] == [503]
            assert done[0].result().headers["retry-after"] == "10"
            assert "Try again in 10 seconds" in done[0].result().text
        # Their readers have left, so those that waited get their turn.
        assert sorted(call.result().status for call in asked) == [200, 200, 503]
        stops_clean(gunicorn)


def ready_workers(gunicorn: Gunicorn) -> list[int]:
    gunicorn.wait_log(r"(?s)(Dirty worker ready.*){2}", ANSWER)
    return gunicorn.dirty_worker_pids()
