"""examples/fastapi_asgi: FastAPI under gunicorn's asgi worker."""

from __future__ import annotations

import json

from serving import ANSWER, needs, served, stops_clean
from support.gunicorn import Gunicorn, Response

pytestmark = needs("fastapi", "gunicorn.workers.gasgi")

HARD = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."
EASY = HARD[:27] + "." * 54


def solve(gunicorn: Gunicorn, puzzle: str) -> Response:
    body = json.dumps({"puzzle": puzzle}).encode()
    return gunicorn.request("/solve", ANSWER, "POST", body, {"Content-Type": "application/json"})


def assert_solves(solution: str, puzzle: str) -> None:
    rows = [solution[start : start + 9] for start in range(0, 81, 9)]
    columns = ["".join(column) for column in zip(*rows, strict=True)]
    boxes = [
        "".join(row[left : left + 3] for row in rows[top : top + 3])
        for top in (0, 3, 6)
        for left in (0, 3, 6)
    ]
    assert all(set(group) == set("123456789") for group in (*rows, *columns, *boxes))
    assert all(given in (".", cell) for given, cell in zip(puzzle, solution, strict=True))


def test_it_solves_streams_and_refuses() -> None:
    with served("fastapi_asgi") as gunicorn:
        answer = solve(gunicorn, HARD)
        assert answer.status == 200, answer.text
        assert_solves(answer.json()["solution"], HARD)

        easy, hard = gunicorn.get_many([f"/steps?puzzle={EASY}", f"/steps?puzzle={HARD}"], timeout=ANSWER)
        for puzzle, streamed in ((EASY, easy), (HARD, hard)):
            assert streamed.headers["content-type"].startswith("text/event-stream")
            steps = [json.loads(event.removeprefix("data: ")) for event in streamed.text.split("\n\n")[:-1]]
            assert steps[0] == {"guesses": 0, "board": puzzle}
            assert_solves(steps[-1]["solution"], puzzle)
            assert [step["guesses"] for step in steps[:-1]] == [200 * n for n in range(len(steps) - 1)]
        assert len(hard.text.split("\n\n")) > 5

        answer = solve(gunicorn, "11" + "." * 79)
        assert (answer.status, answer.json()) == (422, {"detail": "this puzzle has no solution"})
        assert solve(gunicorn, "1").status == 422
        assert gunicorn.get("/steps?puzzle=1", timeout=ANSWER).status == 422
        stops_clean(gunicorn)


def test_hanging_up_ends_the_search_and_a_long_one_is_told_with_504() -> None:
    # No solution, and no quick way to see it: the search goes on for longer than anyone waits.
    impossible = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."
    with served("fastapi_asgi") as gunicorn:
        for _ in range(3):  # more than there are dirty workers: each must be free again
            with gunicorn.open(f"/steps?puzzle={impossible}", timeout=ANSWER) as stream:
                assert json.loads(next(iter(stream)).removeprefix("data: "))["guesses"] == 0
        answer = solve(gunicorn, impossible)
        assert answer.status == 504
        assert "dirty_timeout" in answer.json()["detail"]
        assert solve(gunicorn, HARD).status == 200
        gunicorn.stop()
