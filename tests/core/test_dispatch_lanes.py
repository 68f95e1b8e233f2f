"""`core.dispatch`, for clients whose answers go past the arbiter: of those it learns what it is told."""

import math

import pytest
from test_dispatch import CREDIT, CREDIT_1, LIMITS, answer, do, is_empty, play, ready, request, submit

from gunicorn_dirty_gevent.core import wire
from gunicorn_dirty_gevent.core.calls import KILL_GRACE, Forward
from gunicorn_dirty_gevent.core.deadlines import SLICE
from gunicorn_dirty_gevent.core.dispatch import LANE_WORD, REPLY_GRACE

STUCK = 30.0 + KILL_GRACE
LANES = (0.0, ("takes_lanes", "c"), [])
STREAM = {"flags": wire.FLAG_STREAM, "budget": math.inf}
LATE = LANE_WORD + SLICE


def runs(slots=1, **call):
    """A call that a worker runs, and answers by a lane."""
    budget = call.get("budget", 10.0)
    action = call.get("action", "go")
    return [
        LANES,
        (0.0, ("worker_ready", 1, *ready(slots=slots)), []),
        (0.0, submit(1, **call), [f"assign w1#1 {action} {budget:g} by c#1"]),
    ]


def done(number, worker=1):
    return answer(worker, number, wire.DONE, b"")


def paced(number, waits):
    return ("worker_paced", 1, number, waits)


def test_only_calls_of_clients_that_take_lanes_may_go_by_one():
    play(
        [
            *runs(slots=9),
            (0.0, ("submit", "d", 1, request()), ["assign w1#2 go 10"]),
            (0.0, ("client_lost", "c"), ["forward w1#1 CANCEL"]),
            (0.0, submit(1), ["assign w1#3 go 10"]),  # another, which has not said so
        ]
    )


def test_a_stream_that_may_be_run_again_goes_by_the_arbiter():
    """So that it is known here whether a chunk has been seen."""
    play(
        [
            *runs(slots=9),
            (0.0, submit(2, action="safe"), ["assign w1#2 safe 10 by c#2"]),
            (0.0, submit(3, action="safe", **STREAM), ["assign w1#3 safe inf"]),
        ]
    )


def test_done_ends_a_call_without_a_word_to_its_client():
    dispatcher, _ = play([*runs(), (0.0, submit(2), []), (1.0, done(1), ["assign w1#2 go 9 by c#2"])])
    assert do(dispatcher, 2.0, done(2)) == []
    assert is_empty(dispatcher) and dispatcher.late_frames == 0


def test_what_a_lane_did_not_take_is_passed_on():
    dispatcher, _ = play([*runs(**STREAM), (1.0, answer(1, 1, wire.CHUNK), ["reply c#1 CHUNK"])])
    assert do(dispatcher, 1.0, answer(1, 1, wire.END))[0].kind == wire.END
    assert is_empty(dispatcher)


def test_done_of_a_call_that_was_cancelled_frees_its_slot():
    dispatcher, _ = play([*runs(), (1.0, ("cancel", "c", 1), ["forward w1#1 CANCEL"]), (1.0, done(1), [])])
    assert is_empty(dispatcher)


def test_the_deadline_holds():
    play(
        [
            *runs(),
            (10.0 + REPLY_GRACE - 0.01, ("tick",), []),
            (
                10.0 + REPLY_GRACE + SLICE,
                ("tick",),
                ["refuse c#1 DirtyTimeoutError ran?", "forward w1#1 CANCEL"],
            ),
            (11.0, done(1), []),
        ]
    )


def test_a_worker_that_dies_before_it_says_done():
    """It may have answered; then the client has that already, and drops this."""
    play([*runs(), (1.0, ("worker_lost", 1, "died"), ["refuse c#1 DirtyWorkerDiedError ran?"])])


def test_an_idempotent_call_is_run_again_by_the_next_lane():
    play(
        [
            *runs(action="safe"),
            (1.0, ("worker_lost", 1, "died"), []),
            (2.0, ("worker_ready", 2, *ready()), ["assign w2#1 safe 8 by c#1"]),
            (3.0, done(1, worker=2), []),
        ]
    )


# Streams.


def test_credit_goes_to_the_worker_as_it_is():
    """It knows what it has sent; here it would be cut to what is known to be used."""
    dispatcher, _ = play(runs(**STREAM))
    beyond = wire.pack_credit(0, 10 * wire.STREAM_WINDOW)[wire.HEADER_SIZE :]
    for amount in (CREDIT_1, CREDIT, beyond):
        assert do(dispatcher, 1.0, ("credit", "c", 1, amount)) == [Forward(1, wire.CREDIT, 1, amount)]


def test_without_a_lane_after_all_credit_is_counted_here():
    dispatcher, _ = play([*runs(**STREAM), (0.0, ("not_by_lane", 1, 1), [])])
    assert do(dispatcher, 1.0, ("credit", "c", 1, CREDIT)) == []


def test_a_streams_limit_counts_from_the_last_word_of_it():
    play(
        [
            *runs(**STREAM),
            (20.0, paced(1, False), []),
            (STUCK + SLICE, ("tick",), []),
            (20.0 + STUCK - 0.01, ("tick",), []),
            (20.0 + STUCK + SLICE, ("tick",), ["refuse c#1 DirtyTimeoutError ran?", "kill w1"]),
        ]
    )


def test_a_stream_that_waits_for_its_reader_is_not_stuck():
    dispatcher, _ = play([*runs(**STREAM), (1.0, paced(1, True), []), (1e6, ("tick",), [])])
    assert dispatcher.next_deadline() is None
    do(dispatcher, 1e6, paced(1, False))
    assert do(dispatcher, 1e6 + STUCK - 0.01, ("tick",)) == []
    assert len(do(dispatcher, 1e6 + STUCK + SLICE, ("tick",))) == 2


@pytest.mark.parametrize("amount", [0, 1, wire.STREAM_WINDOW])
def test_whether_credit_is_enough_to_go_on_is_the_workers_to_say(amount):
    credit = wire.pack_credit(0, amount)[wire.HEADER_SIZE :]
    dispatcher, _ = play([*runs(**STREAM), (1.0, paced(1, True), [])])
    do(dispatcher, 2.0, ("credit", "c", 1, credit))
    assert do(dispatcher, 2.0 + STUCK + SLICE, ("tick",)) == []


def test_words_of_an_abandoned_stream_give_it_no_more_time():
    play(
        [
            *runs(**STREAM),
            (1.0, ("cancel", "c", 1), ["forward w1#1 CANCEL"]),
            (20.0, paced(1, False), []),
            (21.0, paced(1, True), []),
            (STUCK + SLICE, ("tick",), ["kill w1"]),
        ]
    )


def test_words_of_unknown_calls_and_workers_are_nothing():
    play([*runs(**STREAM), (1.0, paced(7, False), []), (1.0, ("worker_paced", 7, 1, False), [])])


# A slot may be free before its worker's word is here.

ONE_PLACE = LIMITS._replace(queue_calls=1)
FULL = [*runs(), (0.0, submit(2), [])]


def test_what_finds_all_full_waits_a_moment_to_be_told():
    dispatcher, (refuse,) = play(
        [
            *FULL,
            (0.0, submit(3), []),
            (LANE_WORD - 0.001, ("tick",), []),
            (LATE, ("tick",), ["refuse c#3 DirtyOverloadedError not run"]),
        ],
        limits=ONE_PLACE,
    )
    assert "full with 1 calls (queue_size)" in refuse.fault["message"]
    assert dispatcher.queued == 1


def test_a_word_in_that_moment_gives_it_a_place():
    dispatcher, _ = play(
        [
            *FULL,
            (0.0, submit(3), []),
            (0.001, done(1), ["assign w1#2 go 9.999 by c#2"]),
            (LATE, ("tick",), []),
            (1.0, done(2), ["assign w1#3 go 9 by c#3"]),
            (1.0, done(3), []),
        ],
        limits=ONE_PLACE,
    )
    assert is_empty(dispatcher)


def test_a_place_that_gets_free_is_the_oldests():
    play(
        [
            *FULL,
            (0.0, submit(3), []),
            (0.001, done(1), ["assign w1#2 go 9.999 by c#2"]),
            (0.002, submit(4), []),  # 3 has the place, and there may be a slot for this
            (0.002 + LATE, ("tick",), ["refuse c#4 DirtyOverloadedError not run"]),
        ],
        limits=ONE_PLACE,
    )


def test_no_more_wait_so_than_slots_may_be_free():
    play([*FULL, (0.0, submit(3), []), (0.0, submit(4), ["refuse c#4 DirtyOverloadedError not run"])],
         limits=ONE_PLACE)  # fmt: skip


def test_where_no_answer_goes_by_a_lane_it_is_told_at_once():
    play(
        [
            (0.0, ("worker_ready", 1, *ready()), []),
            (0.0, submit(1), ["assign w1#1 go 10"]),
            (0.0, submit(2), []),
            (0.0, submit(3), ["refuse c#3 DirtyOverloadedError not run"]),
        ],
        limits=ONE_PLACE,
    )


def test_the_bound_of_bytes_waits_for_the_word_too():
    size = len(request(body=b"x" * 500).payload)
    limits, big = LIMITS._replace(queue_bytes=size), {"body": b"x" * 500}
    start = [*runs(slots=2), (0.0, submit(2), ["assign w1#2 go 10 by c#2"])]
    start += [(0.0, submit(3, **big), []), (0.0, submit(4, **big), [])]
    _, (refuse,) = play(
        [*start, (LATE, ("tick",), ["refuse c#4 DirtyOverloadedError not run"])], limits=limits
    )
    assert "(queue_bytes)" in refuse.fault["message"]
    dispatcher, _ = play(
        [
            *start,
            (0.0, submit(5, **big), ["refuse c#5 DirtyOverloadedError not run"]),  # nor in the overflow
            (0.001, done(1), ["assign w1#3 go 9.999 by c#3"]),
            (LATE, ("tick",), []),
            (1.0, done(2), ["assign w1#4 go 9 by c#4"]),
            (1.0, done(3), []),
            (1.0, done(4), []),
        ],
        limits=limits,
    )
    assert is_empty(dispatcher)


def test_the_bound_of_a_client_is_of_calls_that_have_not_been_answered_for_certain():
    """Which those are that run cannot be known here; their number is bounded by the slots."""
    play(
        [
            *runs(slots=2),
            (0.0, submit(2), ["assign w1#2 go 10 by c#2"]),
            (0.0, submit(3), []),
            (0.0, submit(4), ["refuse c#4 DirtyOverloadedError not run"]),
            (0.0, ("submit", "d", 1, request()), []),
            (0.0, ("submit", "d", 2, request()), ["refuse d#2 DirtyOverloadedError not run"]),
        ],
        limits=LIMITS._replace(calls_per_client=1),
    )


def test_the_callers_deadline_holds_there_too():
    _, (refuse,) = play(
        [
            *FULL,
            (0.0, submit(3, budget=0.001), []),
            (0.002 + SLICE, ("tick",), ["refuse c#3 DirtyTimeoutError not run"]),
        ],
        limits=ONE_PLACE,
    )
    assert "busy" in refuse.fault["message"]


def test_whoever_waits_so_can_be_cancelled_and_stopped():
    dispatcher, _ = play(
        [
            *FULL,
            (0.0, submit(3), []),
            (0.0, ("cancel", "c", 3), []),
            (0.0, submit(4), []),
            (
                0.0,
                ("stop", "told to quit"),
                [
                    "refuse c#1 DirtyWorkerError ran?",
                    "refuse c#2 DirtyWorkerError not run",
                    "refuse c#4 DirtyWorkerError not run",
                ],
            ),
            (0.0, done(1), []),
        ],
        limits=ONE_PLACE,
    )
    assert is_empty(dispatcher)
