"""examples/eventlet_legacy: Pyramid under gunicorn 25's eventlet worker."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

from serving import ANSWER, needs, served, stops_clean
from support.gunicorn import Gunicorn
from support.worker_classes import needs_eventlet

pytestmark = [needs_eventlet, needs("pyramid")]


def post(gunicorn: Gunicorn, path: str, user: str, password: str) -> int:
    body = urlencode({"user": user, "password": password}).encode()
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    return gunicorn.request(path, ANSWER, "POST", body, headers).status


def test_users_register_and_log_in() -> None:
    with served("eventlet_legacy") as gunicorn:
        gunicorn.wait_log("Using worker: eventlet")
        users = [f"user{number}" for number in range(8)]
        with ThreadPoolExecutor(len(users)) as pool:

            def all_at_once(path: str, suffix: str) -> list[int]:
                return list(pool.map(lambda user: post(gunicorn, path, user, f"{user}-{suffix}"), users))

            assert all_at_once("/register", "secret") == [201] * 8
            assert all_at_once("/register", "secret") == [409] * 8
            assert all_at_once("/login", "secret") == [200] * 8
            assert all_at_once("/login", "secrets") == [403] * 8
        assert post(gunicorn, "/login", "nobody", "some password") == 403
        assert post(gunicorn, "/login", "user1", "short") == 400

        answer = gunicorn.get("/costs", timeout=ANSWER)
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        costs = [json.loads(line)["cost"] for line in answer.text.splitlines()]
        assert costs == [2**power for power in range(10, 17)]
        stops_clean(gunicorn)
