"""What `core.dispatch` promises, as tables: at `now`, on this event, exactly these actions."""

import math
import sys

import pytest

from gunicorn_dirty_gevent.core import faults, wire
from gunicorn_dirty_gevent.core.calls import (
    KILL_GRACE,
    ActionTraits,
    AppTraits,
    Assign,
    Forward,
    Kill,
    Limits,
    Refuse,
    Reply,
    Worn,
)
from gunicorn_dirty_gevent.core.crew import PROMPT, SILENCE
from gunicorn_dirty_gevent.core.deadlines import SLICE
from gunicorn_dirty_gevent.core.dispatch import KEPT, LANE_WORD, REPLY_GRACE, Dispatcher

LIMITS = Limits(queue_calls=100, queue_bytes=10**6, calls_per_client=100)
PLAIN = AppTraits(ActionTraits(30.0), {"safe": ActionTraits(30.0, idempotent=True)})
TIMELESS = ("app_failed", "not_ready", "worker_draining", "stop", "takes_lanes", "not_by_lane")
CREDIT_1 = wire.pack_credit(0, 1)[wire.HEADER_SIZE :]


def request(app="a", action="go", budget=10.0, body=b"", flags=0):
    return wire.unpack_request(wire.pack_envelope(wire.pack_names(app, action), budget, flags) + body)


def ready(*apps, slots=1, traits=PLAIN):
    """The arguments of `worker_ready` after the worker's key."""
    return 1000, dict.fromkeys(apps or ("a",), traits), slots


def show(action):
    """One action as a short line."""
    if isinstance(action, Assign):
        lane = f" by {action.client}#{action.client_id}" if action.client is not None else ""
        return f"assign w{action.worker}#{action.call_id} {action.request.action} {action.budget:g}{lane}"
    if isinstance(action, Reply):
        return f"reply {action.client}#{action.call_id} {wire.Kind(action.kind).name}"
    if isinstance(action, Forward):
        return f"forward w{action.worker}#{action.call_id} {wire.Kind(action.kind).name}"
    if isinstance(action, Refuse):
        ran = "ran?" if action.fault["details"]["may_have_run"] else "not run"
        return f"refuse {action.client}#{action.call_id} {action.fault['error_type']} {ran}"
    assert isinstance(action, (Kill, Worn))
    return f"{type(action).__name__.lower()} w{action.worker}"


def do(dispatcher, now, event):
    method, *arguments = event
    if method not in TIMELESS:
        arguments.append(now)
    return getattr(dispatcher, method)(*arguments) or []


def play(table, apps=("a", "b"), limits=LIMITS):
    """Run a table of (now, event, expected lines); returns the dispatcher and the last actions."""
    dispatcher, actions = Dispatcher(apps, limits), []
    for number, (now, event, expected) in enumerate(table):
        actions = do(dispatcher, now, event)
        assert [show(action) for action in actions] == expected, f"row {number}: {event}"
    return dispatcher, actions


def is_empty(dispatcher):
    assert not any(dispatcher._clients.values())
    assert not any(len(queue) or queue.bytes for queue in dispatcher._queues.values())
    assert not any(worker.running for worker in dispatcher._crew)
    assert len(dispatcher._deadlines) == 0
    assert dispatcher.next_deadline() is None
    return dispatcher.idle and dispatcher.queued == dispatcher.running == 0


def submit(number, **what):
    return ("submit", "c", number, request(**what))


def answer(worker, number, kind=wire.RESPONSE, payload=b"ok"):
    return ("frame_from_worker", worker, kind, number, payload)


W1 = (0.0, ("worker_ready", 1, *ready("a")), [])
W1_IDEMPOTENT = [W1, (0.0, submit(1, action="safe"), ["assign w1#1 safe 10"])]
RUNS = [W1, (0.0, submit(1), ["assign w1#1 go 10"])]


# Where calls go.


def test_a_call_and_its_answer():
    dispatcher, (reply,) = play([*RUNS, (2.0, answer(1, 1, payload=b"value"), ["reply c#1 RESPONSE"])])
    assert reply.payload == b"value"
    assert is_empty(dispatcher)


@pytest.mark.parametrize("kind", [wire.RESPONSE, wire.ERROR, wire.END])
def test_each_last_frame_ends_a_call(kind):
    name = wire.Kind(kind).name
    dispatcher, _ = play([*RUNS, (1.0, answer(1, 1, kind), [f"reply c#1 {name}"])])
    assert is_empty(dispatcher)


def test_the_budget_that_is_left_travels_on():
    play(
        [
            (5.0, submit(1, budget=8.0), []),
            (5.0, submit(2, budget=math.inf), []),
            (7.5, ("worker_ready", 1, *ready(slots=2)), ["assign w1#1 go 5.5", "assign w1#2 go inf"]),
        ]
    )


def test_the_least_loaded_worker_gets_the_call():
    play(
        [
            (0.0, ("worker_ready", 1, *ready(slots=3)), []),
            (0.0, submit(1), ["assign w1#1 go 10"]),
            (0.0, submit(2), ["assign w1#2 go 10"]),
            (0.0, ("worker_ready", 2, *ready(slots=3)), []),
            (0.0, submit(3), ["assign w2#1 go 10"]),
            (0.0, submit(4), ["assign w2#2 go 10"]),
            (0.0, answer(1, 1), ["reply c#1 RESPONSE"]),
            (0.0, submit(5), ["assign w1#3 go 10"]),
        ]
    )


def one_at_a_time(dispatcher, answers):
    """Who gets each of some calls, one after the other, that end with these kinds."""
    order = []
    for number, kind in enumerate(answers):
        (assign,) = dispatcher.submit("c", number, request(), 0.0)
        order.append(assign.worker)
        dispatcher.frame_from_worker(assign.worker, kind, assign.call_id, b"", 0.0)
    return order


def three_workers():
    dispatcher = Dispatcher(["a"], LIMITS)
    for worker in (1, 2, 3):
        dispatcher.worker_ready(worker, *ready(slots=5), 0.0)
    return dispatcher


def test_an_idle_worker_that_was_used_last_is_used_again():
    dispatcher = three_workers()
    assert len(set(one_at_a_time(dispatcher, [wire.RESPONSE, wire.END] * 3))) == 1


def test_a_worker_that_fails_every_call_at_once_does_not_get_them_all():
    assert sorted(one_at_a_time(three_workers(), [wire.ERROR] * 6)) == [1, 1, 2, 2, 3, 3]
    dispatcher = three_workers()
    (bad, *others) = one_at_a_time(dispatcher, [wire.ERROR, *[wire.RESPONSE] * 8])
    assert len(set(others)) == 1 and bad not in others


def test_nor_does_one_that_fails_them_beside_others():
    dispatcher = three_workers()
    for number in (101, 102, 103):  # one long call in each
        dispatcher.submit("c", number, request(), 0.0)
    order = []
    for number in range(30):
        (assign,) = dispatcher.submit("c", number, request(), 0.0)
        order.append(assign.worker)
        kind = wire.ERROR if assign.worker == 1 else wire.RESPONSE
        dispatcher.frame_from_worker(assign.worker, kind, assign.call_id, b"", 0.0)
    assert order.count(1) <= 11


def test_nor_does_one_whose_calls_are_given_up():
    dispatcher = three_workers()
    order = []
    for number in range(6):
        (assign,) = dispatcher.submit("c", number, request(), 0.0)
        order.append(assign.worker)
        dispatcher.cancel("c", number, 0.0)
        dispatcher.frame_from_worker(assign.worker, wire.END, assign.call_id, b"", 0.0)
    assert sorted(order) == [1, 1, 2, 2, 3, 3]


def test_equally_busy_workers_take_turns():
    dispatcher = three_workers()
    order = [dispatcher.submit("c", number, request(), 0.0)[0].worker for number in range(9)]
    assert sorted(order[:3]) == sorted(order[3:6]) == sorted(order[6:]) == [1, 2, 3]
    assert order[3:6] == order[6:]


def test_only_workers_that_have_the_app():
    play(
        [
            (0.0, ("worker_ready", 1, *ready("a", slots=5)), []),
            (0.0, ("worker_ready", 2, *ready("b", slots=5)), []),
            (0.0, submit(1, app="b"), ["assign w2#1 go 10"]),
            (0.0, submit(2, app="b"), ["assign w2#2 go 10"]),
            (0.0, submit(3, app="a"), ["assign w1#1 go 10"]),
        ]
    )


def test_slots_are_never_exceeded_and_calls_wait_in_order():
    play(
        [
            (0.0, ("worker_ready", 1, *ready(slots=2)), []),
            (0.0, submit(1), ["assign w1#1 go 10"]),
            (0.0, submit(2), ["assign w1#2 go 10"]),
            (1.0, submit(3), []),
            (1.0, submit(4), []),
            (1.0, submit(5), []),
            (2.0, answer(1, 2), ["reply c#2 RESPONSE", "assign w1#3 go 9"]),
            (2.0, answer(1, 3), ["reply c#3 RESPONSE", "assign w1#4 go 9"]),
            (2.0, answer(1, 1), ["reply c#1 RESPONSE", "assign w1#5 go 9"]),
        ]
    )


def test_a_worker_takes_the_oldest_call_of_all_its_apps():
    play(
        [
            (0.0, submit(1, app="b"), []),
            (1.0, submit(2, app="a"), []),
            (2.0, submit(3, app="b"), []),
            (3.0, ("worker_ready", 1, *ready("a", "b")), ["assign w1#1 go 7"]),
            (3.0, answer(1, 1), ["reply c#1 RESPONSE", "assign w1#2 go 8"]),
            (3.0, answer(1, 2), ["reply c#2 RESPONSE", "assign w1#3 go 9"]),
        ]
    )


def test_a_slow_app_does_not_block_another():
    play(
        [
            (0.0, ("worker_ready", 1, *ready("a")), []),
            (0.0, ("worker_ready", 2, *ready("b")), []),
            (0.0, submit(1, app="a"), ["assign w1#1 go 10"]),
            (0.0, submit(2, app="a"), []),
            (0.0, submit(3, app="b"), ["assign w2#1 go 10"]),
        ]
    )


def test_a_draining_worker_gets_nothing_new():
    play(
        [
            *RUNS,
            (0.0, submit(2), []),
            (0.0, ("worker_draining", 1), []),
            (0.0, ("worker_draining", 99), []),
            (1.0, answer(1, 1), ["reply c#1 RESPONSE"]),
            (1.0, submit(3), []),
            (2.0, ("worker_ready", 2, *ready(slots=5)), ["assign w2#1 go 8", "assign w2#2 go 9"]),
        ]
    )


def test_a_draining_worker_with_free_slots_gets_nothing_either():
    play(
        [
            (0.0, ("worker_ready", 1, *ready(slots=5)), []),
            (0.0, ("worker_draining", 1), []),
            (0.0, submit(1), []),
            (0.0, ("worker_ready", 2, *ready()), ["assign w2#1 go 10"]),
        ]
    )


def test_a_worker_that_has_had_its_calls_is_worn_and_says_so_once():
    """It goes on until it is told to drain."""
    dispatcher = Dispatcher(["a"], LIMITS)
    dispatcher.worker_ready(1, *ready(slots=9), 0.0, max_calls=2)
    found = [show(a) for number in range(4) for a in dispatcher.submit("c", number, request(), 0.0)]
    assert found == [
        "assign w1#1 go 10",
        "assign w1#2 go 10",
        "worn w1",
        "assign w1#3 go 10",
        "assign w1#4 go 10",
    ]


# Refusals.


def test_an_app_that_nobody_configured():
    dispatcher, (refuse,) = play(
        [W1, (0.0, submit(1, app="x:Y"), ["refuse c#1 DirtyAppNotFoundError not run"])]
    )
    assert "x:Y" in refuse.fault["message"] and "a, b" in refuse.fault["message"]
    assert is_empty(dispatcher)


@pytest.mark.parametrize("app", ["a", "x:Y"])
def test_an_id_in_use_breaks_the_link_and_answers_nothing(app):
    dispatcher, _ = play(RUNS)
    with pytest.raises(wire.WireError, match="1 is already in use"):
        dispatcher.submit("c", 1, request(app), 0.0)
    assert dispatcher.submit("other client", 1, request(), 0.0) == []


def test_an_id_may_be_used_again_after_its_call():
    play([*RUNS, (0.0, answer(1, 1), ["reply c#1 RESPONSE"]), (0.0, submit(1), ["assign w1#2 go 10"])])


def test_a_full_queue():
    limits = LIMITS._replace(queue_calls=2)
    dispatcher, (refuse,) = play(
        [
            *RUNS,
            (0.0, submit(2), []),
            (0.0, submit(3), []),
            (0.0, submit(4), ["refuse c#4 DirtyOverloadedError not run"]),
            (0.0, submit(5, app="b"), []),  # another queue
            (0.0, ("cancel", "c", 3), []),
            (0.0, submit(6), []),
            (0.0, submit(7), ["refuse c#7 DirtyOverloadedError not run"]),
        ],
        limits=limits,
    )
    assert "full with 2 calls (queue_size)" in refuse.fault["message"]
    assert dispatcher.queued == 3


def test_bytes_of_a_queue():
    size = len(request(body=b"x" * 500).payload)
    limits = LIMITS._replace(queue_bytes=2 * size)
    big = {"body": b"x" * 500}
    _, (refuse,) = play(
        [
            *RUNS,
            (0.0, submit(2, body=b"x" * 5000), []),  # too large alone, but it must be able to wait
            (0.0, submit(3), ["refuse c#3 DirtyOverloadedError not run"]),
            (0.0, ("cancel", "c", 2), []),
            (0.0, submit(4, **big), []),
            (0.0, submit(5, **big), []),
            (0.0, submit(6), ["refuse c#6 DirtyOverloadedError not run"]),
            (1.0, answer(1, 1), ["reply c#1 RESPONSE", "assign w1#2 go 9"]),
            (1.0, submit(7, **big), []),
            (1.0, submit(8), ["refuse c#8 DirtyOverloadedError not run"]),
        ],
        limits=limits,
    )
    assert f"holds {2 * size} bytes of requests (queue_bytes)" in refuse.fault["message"]


def test_calls_per_client():
    limits = LIMITS._replace(calls_per_client=2)
    _, (refuse,) = play(
        [
            *RUNS,
            (0.0, submit(2), []),
            (0.0, submit(3), ["refuse c#3 DirtyOverloadedError not run"]),
            (0.0, ("submit", "d", 3, request()), []),
            (0.0, ("cancel", "c", 2), []),
            (0.0, submit(4), []),
            (0.0, submit(5), ["refuse c#5 DirtyOverloadedError not run"]),
        ],
        limits=limits,
    )
    assert "2 calls in flight (calls_per_connection)" in refuse.fault["message"]


# Apps that fail to load.

BROKEN = faults.fault("DirtyAppError", "no such model file", may_have_run=False)


def test_calls_get_the_apps_own_error_until_a_worker_has_it():
    dispatcher, _ = play(
        [
            (0.0, submit(1), []),
            (0.0, submit(2, app="b"), []),
            (0.0, submit(3), []),
            (
                1.0,
                ("app_failed", "a", BROKEN),
                ["refuse c#1 DirtyAppError not run", "refuse c#3 DirtyAppError not run"],
            ),
            (1.0, submit(4), ["refuse c#4 DirtyAppError not run"]),
            (2.0, ("worker_ready", 1, *ready("b")), ["assign w1#1 go 8"]),
            (2.0, submit(5), ["refuse c#5 DirtyAppError not run"]),
            (3.0, ("worker_ready", 2, *ready("a")), []),
            (3.0, submit(6), ["assign w2#1 go 10"]),
            (3.0, submit(7), []),  # busy is not broken
        ]
    )
    assert dispatcher.queued == 1


def test_the_error_is_the_apps_own():
    _, (refuse,) = play(
        [
            (0.0, ("app_failed", "a", BROKEN), []),
            (0.0, submit(1), ["refuse c#1 DirtyAppError not run"]),
        ]
    )
    assert refuse.fault is BROKEN


def test_one_workers_failure_is_no_error_while_another_has_the_app():
    """And it is forgotten: when that one ends, calls wait for its replacement."""
    play(
        [
            *RUNS,
            (0.0, submit(2), []),
            (0.0, ("app_failed", "a", BROKEN), []),
            (1.0, submit(3), []),
            (2.0, ("worker_lost", 1, "died"), ["refuse c#1 DirtyWorkerDiedError ran?"]),
            (2.0, submit(4), []),
            (
                3.0,
                ("worker_ready", 2, *ready(slots=3)),
                ["assign w2#1 go 7", "assign w2#2 go 8", "assign w2#3 go 9"],
            ),
        ]
    )


def test_a_worker_that_drains_does_not_count_as_having_the_app():
    play(
        [
            *RUNS,
            (0.0, submit(2), []),
            (0.0, ("worker_draining", 1), []),
            (1.0, ("app_failed", "a", BROKEN), ["refuse c#2 DirtyAppError not run"]),
            (1.0, submit(3), ["refuse c#3 DirtyAppError not run"]),
            (2.0, answer(1, 1), ["reply c#1 RESPONSE"]),
        ]
    )


# Deadlines.


@pytest.mark.parametrize(
    ("before", "why"),
    [
        ([], "no dirty worker was ready with this app (gunicorn's log says more)"),
        ([(0.0, ("not_ready", ["a"], "it crashed"), [])], "was ready with this app (it crashed)"),
        (
            [
                (0.0, ("not_ready", ["a"], "it crashed"), []),
                (0.0, ("worker_ready", 1, *ready()), []),
                (0.0, ("worker_lost", 1, "died"), []),
            ],
            "was ready with this app (gunicorn's log says more)",
        ),
        (
            [
                (0.0, ("worker_ready", 1, *ready()), []),
                (0.0, ("not_ready", ["a"], "another crashed"), []),
                (0.0, ("worker_lost", 1, "died"), []),
            ],
            "was ready with this app (gunicorn's log says more)",
        ),
        ([(0.0, ("worker_ready", 1, *ready("b")), [])], "no dirty worker was ready with this app"),
        (
            [
                (0.0, ("worker_ready", 1, *ready()), []),
                (0.0, ("worker_ready", 2, *ready()), []),
                (0.0, ("submit", "x", 1, request(budget=99.0)), ["assign w1#1 go 99"]),
                (0.0, ("submit", "x", 2, request(budget=99.0)), ["assign w2#1 go 99"]),
            ],
            "all 2 slots of 2 workers were busy",
        ),
    ],
)
def test_a_deadline_in_the_queue_says_why(before, why):
    dispatcher, _ = play([*before, (0.0, submit(1, budget=3.0), []), (2.99, ("tick",), [])])
    when = dispatcher.next_deadline()
    assert 3.0 <= when < 3.0 + SLICE
    (refuse,) = dispatcher.tick(when)
    assert show(refuse) == "refuse c#1 DirtyTimeoutError not run"
    assert why in refuse.fault["message"]
    assert dispatcher.queued == 0 and not dispatcher._clients["c"]


def test_a_call_whose_time_is_over_is_not_started():
    """Not on arrival, and not when a slot falls free before the clock has been looked at."""
    dispatcher, _ = play(
        [
            W1,
            (0.0, submit(1, budget=0.0), ["refuse c#1 DirtyTimeoutError not run"]),
            (0.0, submit(2, budget=-1e308), ["refuse c#2 DirtyTimeoutError not run"]),
            (0.0, submit(3), ["assign w1#1 go 10"]),
            (0.0, submit(4, budget=2.0), []),
            (0.0, submit(5, budget=3.0), []),
            (0.0, submit(6, budget=9.0), []),
            (
                3.0,
                answer(1, 1),
                [
                    "reply c#3 RESPONSE",
                    "refuse c#4 DirtyTimeoutError not run",
                    "refuse c#5 DirtyTimeoutError not run",
                    "assign w1#2 go 6",
                ],
            ),
            (4.0, answer(1, 2), ["reply c#6 RESPONSE"]),
        ]
    )
    assert is_empty(dispatcher)


@pytest.mark.parametrize("budget", [math.inf, 1e308])
def test_no_deadline(budget):
    dispatcher, _ = play([(0.0, submit(1, budget=budget), []), (1e9, ("tick",), [])])
    assert dispatcher.next_deadline() is None and dispatcher.queued == 1


def test_a_running_call_past_its_deadline_is_answered_after_a_grace_and_cancelled():
    late = 10.0 + REPLY_GRACE
    dispatcher, _ = play(
        [
            *RUNS,
            (0.0, submit(2, budget=99.0), []),
            (10.0, ("tick",), []),
            (late - 0.01, ("tick",), []),
            (late + SLICE, ("tick",), ["refuse c#1 DirtyTimeoutError ran?", "forward w1#1 CANCEL"]),
            # The slot is still taken: the action may be in its `finally`.
            (late + 1, submit(3), []),
            (late + 2, answer(1, 1, wire.CHUNK), []),
            (late + 2, answer(1, 1), ["assign w1#2 go 86.75"]),
        ],
    )
    assert dispatcher.late_frames == 1  # the chunk; the last frame was waited for


def test_the_workers_own_word_in_the_grace_counts():
    dispatcher, _ = play(
        [
            *RUNS,
            (10.0 + REPLY_GRACE / 2, answer(1, 1, wire.ERROR), ["reply c#1 ERROR"]),
            (99.0, ("tick",), []),
        ]
    )
    assert is_empty(dispatcher)


STUCK = 30.0 + KILL_GRACE


def test_a_stuck_worker_is_killed_after_a_grace_and_gets_nothing_new():
    dispatcher, (refuse, kill) = play(
        [
            (0.0, ("worker_ready", 1, *ready(slots=5)), []),
            (0.0, submit(1, budget=math.inf), ["assign w1#1 go inf"]),
            (STUCK - 0.01, ("tick",), []),
            (STUCK + SLICE, ("tick",), ["refuse c#1 DirtyTimeoutError ran?", "kill w1"]),
        ]
    )
    assert "a.go ran past its limit of 30 s" in kill.why
    assert refuse.fault["details"]["worker_id"] == 1000
    assert do(dispatcher, STUCK + 1, submit(2)) == []
    assert do(dispatcher, STUCK + 2, ("worker_lost", 1, "was killed")) == []
    assert dispatcher.late_frames == 0
    do(dispatcher, STUCK + 2, ("cancel", "c", 2))
    assert is_empty(dispatcher)


def test_a_cancelled_call_that_does_not_end_is_stuck_too():
    play(
        [
            *RUNS,
            (1.0, ("cancel", "c", 1), ["forward w1#1 CANCEL"]),
            (STUCK - 0.01, ("tick",), []),
            (STUCK + SLICE, ("tick",), ["kill w1"]),
        ]
    )


def test_each_actions_own_limit_counts():
    traits = AppTraits(ActionTraits(30.0), {"quick": ActionTraits(2.0), "slow": ActionTraits(math.inf)})
    dispatcher, _ = play(
        [
            (0.0, ("worker_ready", 1, *ready(slots=9, traits=traits)), []),
            (0.0, submit(1, action="slow", budget=math.inf), ["assign w1#1 slow inf"]),
            (1e6, ("tick",), []),
            (1e6, submit(2, action="quick", budget=math.inf), ["assign w1#2 quick inf"]),
            (1e6 + 2 + KILL_GRACE - 0.01, ("tick",), []),
            (1e6 + 2 + KILL_GRACE, ("tick",), ["refuse c#2 DirtyTimeoutError ran?", "kill w1"]),
        ]
    )
    assert "c" in dispatcher._clients


def test_a_call_that_may_not_have_begun_does_not_cost_its_neighbour_the_worker():
    """#1 computes for 5 s, well within its 30 s, and the worker says so."""
    traits = AppTraits(ActionTraits(2.0), {"compute": ActionTraits(30.0)})
    late = 0.1 + 2 + KILL_GRACE + SLICE
    table = [
        (0.0, ("worker_ready", 1, *ready(slots=9, traits=traits)), []),
        (0.0, submit(1, action="compute", budget=60.0), ["assign w1#1 compute 60"]),
        (0.1, submit(2, budget=60.0), ["assign w1#2 go 60"]),
        (late - 0.2, ("worker_blocked", 1, 1), []),
        (late, ("tick",), ["refuse c#2 DirtyTimeoutError ran?", "forward w1#2 CANCEL"]),
    ]
    dispatcher, actions = play(table)
    assert "a.compute keeps the hub" in actions[0].fault["message"]
    do(dispatcher, late + 1.0, ("worker_blocked", 1, 1))
    assert do(dispatcher, late + 1.5, ("tick",)) == []
    assert [show(action) for action in do(dispatcher, 5.0, answer(1, 1))] == ["reply c#1 RESPONSE"]
    assert do(dispatcher, 5.0, answer(1, 2, wire.END)) == []
    assert is_empty(dispatcher)


@pytest.mark.parametrize(
    "said", [(1, 2.9 - 2.0), (2, 2.9), (1, 2.9)], ids=["old word", "itself", "late blocker"]
)
def test_a_stuck_call_is_spared_only_for_a_fresh_word_of_another_within_its_limit(said):
    blocker, when = said
    traits = AppTraits(ActionTraits(2.0), {"compute": ActionTraits(1.5 if when == 2.9 else 30.0)})
    table = [
        (0.0, ("worker_ready", 1, *ready(slots=9, traits=traits)), []),
        (0.0, submit(1, action="compute", budget=60.0), ["assign w1#1 compute 60"]),
        (0.0, submit(2, budget=60.0), ["assign w1#2 go 60"]),
        (when, ("worker_blocked", 1, blocker), []),
    ]
    dispatcher, _ = play(table)
    killed = [show(action) for action in do(dispatcher, 2 + KILL_GRACE, ("tick",))]
    assert "refuse c#2 DirtyTimeoutError ran?" in killed
    assert "kill w1" in killed


# Streams.

STREAM = {"flags": wire.FLAG_STREAM, "budget": math.inf}
STREAMS = [W1, (0.0, submit(1, **STREAM), ["assign w1#1 go inf"])]
CHUNK = answer(1, 1, wire.CHUNK, b"x" * wire.STREAM_WINDOW)  # takes the whole window
CREDIT = wire.pack_credit(0, wire.STREAM_WINDOW)[wire.HEADER_SIZE :]


def test_chunks_and_credits_are_passed_on_untouched():
    dispatcher, _ = play(STREAMS)
    chunk = do(dispatcher, 1.0, answer(1, 1, wire.CHUNK, b"one"))
    assert chunk == [Reply("c", wire.CHUNK, 1, b"one")]
    credit = do(dispatcher, 1.0, ("credit", "c", 1, CREDIT_1))
    assert credit == [Forward(1, wire.CREDIT, 1, CREDIT_1)]
    assert do(dispatcher, 2.0, answer(1, 1, wire.END, b"")) == [Reply("c", wire.END, 1, b"")]
    assert do(dispatcher, 2.0, ("credit", "c", 1, CREDIT_1)) == []  # crossed the end
    assert is_empty(dispatcher)


def test_credit_for_a_call_that_waits_goes_nowhere():
    play([(0.0, submit(1, **STREAM), []), (0.0, ("credit", "c", 1, CREDIT_1), [])])


def test_broken_credit():
    dispatcher, _ = play(STREAMS)
    with pytest.raises(wire.WireError):
        dispatcher.credit("c", 1, b"\0", 0.0)


def test_a_streams_limit_counts_from_its_last_chunk():
    small = answer(1, 1, wire.CHUNK, b"x")
    play(
        [
            *STREAMS,
            (20.0, small, ["reply c#1 CHUNK"]),
            (STUCK + SLICE, ("tick",), []),
            (45.0, small, ["reply c#1 CHUNK"]),
            (20.0 + STUCK + SLICE, ("tick",), []),
            (45.0 + STUCK - 0.01, ("tick",), []),
            (45.0 + STUCK + SLICE, ("tick",), ["refuse c#1 DirtyTimeoutError ran?", "kill w1"]),
        ]
    )


def test_a_stream_whose_reader_pauses_is_not_stuck():
    dispatcher, _ = play([*STREAMS, (1.0, CHUNK, ["reply c#1 CHUNK"]), (1e6, ("tick",), [])])
    assert dispatcher.next_deadline() is None
    # The reader goes on: from here the action has its time again.
    assert len(do(dispatcher, 1e6, ("credit", "c", 1, CREDIT))) == 1
    assert do(dispatcher, 1e6 + STUCK - 0.01, ("tick",)) == []
    actions = do(dispatcher, 1e6 + STUCK + SLICE, ("tick",))
    assert [show(a) for a in actions] == ["refuse c#1 DirtyTimeoutError ran?", "kill w1"]


def test_too_little_credit_leaves_it_paused():
    dispatcher, _ = play([*STREAMS, (1.0, CHUNK, ["reply c#1 CHUNK"]), (1.0, CHUNK, ["reply c#1 CHUNK"])])
    assert len(do(dispatcher, 2.0, ("credit", "c", 1, CREDIT))) == 1
    assert do(dispatcher, 1e6, ("tick",)) == []


def test_the_callers_deadline_holds_for_a_paused_stream():
    play(
        [
            W1,
            (0.0, submit(1, flags=wire.FLAG_STREAM, budget=50.0), ["assign w1#1 go 50"]),
            (1.0, CHUNK, ["reply c#1 CHUNK"]),
            (50.0 + REPLY_GRACE - 0.01, ("tick",), []),
            (
                50.0 + REPLY_GRACE + SLICE,
                ("tick",),
                ["refuse c#1 DirtyTimeoutError ran?", "forward w1#1 CANCEL"],
            ),
        ]
    )


def test_a_paused_stream_that_is_cancelled_has_its_whole_time_to_end():
    play(
        [
            *STREAMS,
            (1.0, CHUNK, ["reply c#1 CHUNK"]),
            (500.0, ("cancel", "c", 1), ["forward w1#1 CANCEL"]),
            (500.0 + STUCK - 0.01, ("tick",), []),
            (500.0 + STUCK + SLICE, ("tick",), ["kill w1"]),
        ]
    )


def test_chunks_of_an_abandoned_stream_give_it_no_more_time():
    small = answer(1, 1, wire.CHUNK, b"x")
    play(
        [
            *STREAMS,
            (1.0, ("cancel", "c", 1), ["forward w1#1 CANCEL"]),
            *[(second, small, []) for second in range(2, 30)],
            (STUCK + SLICE, ("tick",), ["kill w1"]),
        ]
    )


# Callers that go away.


def test_cancel_in_the_queue_forgets_the_call():
    dispatcher, _ = play(
        [
            *RUNS,
            (0.0, submit(2), []),
            (0.0, submit(3), []),
            (0.0, ("cancel", "c", 2), []),
            (0.0, ("cancel", "c", 2), []),
            (1.0, answer(1, 1), ["reply c#1 RESPONSE", "assign w1#2 go 9"]),
            (1.0, answer(1, 2), ["reply c#3 RESPONSE"]),
        ]
    )
    assert is_empty(dispatcher)


def test_cancel_of_a_running_call_keeps_its_slot_until_it_has_ended():
    dispatcher, _ = play(
        [
            *RUNS,
            (0.0, submit(2), []),
            (1.0, ("cancel", "c", 1), ["forward w1#1 CANCEL"]),
            (1.0, ("cancel", "c", 1), []),
            (1.0, answer(1, 1, wire.CHUNK), []),
            (2.0, answer(1, 1, wire.END), ["assign w1#2 go 8"]),
            (2.0, answer(1, 1, wire.END), []),
            (2.0, answer(1, 7), []),
            (2.0, answer(55, 1), []),
        ]
    )
    assert dispatcher.late_frames == 4


def test_cancel_of_nothing():
    play([(0.0, ("cancel", "c", 1), []), (0.0, ("client_lost", "c"), [])])


def test_a_lost_client_loses_its_calls_and_no_other():
    dispatcher, _ = play(
        [
            (0.0, ("worker_ready", 1, *ready(slots=2)), []),
            (0.0, submit(1), ["assign w1#1 go 10"]),
            (0.0, ("submit", "d", 1, request()), ["assign w1#2 go 10"]),
            (0.0, submit(2), []),
            (0.0, ("submit", "d", 2, request()), []),
            (1.0, ("client_lost", "c"), ["forward w1#1 CANCEL"]),
            (1.0, answer(1, 1), ["assign w1#3 go 9"]),
            (1.0, answer(1, 2), ["reply d#1 RESPONSE"]),
            (1.0, answer(1, 3), ["reply d#2 RESPONSE"]),
        ]
    )
    assert is_empty(dispatcher)
    assert "c" not in dispatcher._clients


# Workers that die.


def test_the_loss_of_a_worker_says_that_the_call_may_have_run():
    dispatcher, (refuse,) = play(
        [*RUNS, (1.0, ("worker_lost", 1, "was killed by SIGKILL"), ["refuse c#1 DirtyWorkerDiedError ran?"])]
    )
    assert "dirty worker 1000 was killed by SIGKILL while it ran a.go" in refuse.fault["message"]
    assert is_empty(dispatcher)
    assert do(dispatcher, 2.0, ("worker_lost", 1, "again")) == []


def test_queued_calls_outlive_the_worker():
    play(
        [
            *RUNS,
            (0.0, submit(2), []),
            (1.0, ("worker_lost", 1, "died"), ["refuse c#1 DirtyWorkerDiedError ran?"]),
            (2.0, ("worker_ready", 2, *ready()), ["assign w2#1 go 8"]),
        ]
    )


def test_idempotent_calls_run_again_once_before_all_that_wait():
    traits = AppTraits(ActionTraits(30.0, idempotent=True), {"once": ActionTraits(30.0)})
    dispatcher, _ = play(
        [
            (0.0, ("worker_ready", 1, *ready(slots=3, traits=traits)), []),
            (0.0, submit(1), ["assign w1#1 go 10"]),
            (0.5, submit(2, action="once"), ["assign w1#2 once 10"]),
            (1.0, submit(3), ["assign w1#3 go 10"]),
            (2.0, submit(4), []),
            (3.0, ("worker_lost", 1, "died"), ["refuse c#2 DirtyWorkerDiedError ran?"]),
            (
                4.0,
                ("worker_ready", 2, *ready(slots=3, traits=traits)),
                ["assign w2#1 go 6", "assign w2#2 go 7", "assign w2#3 go 8"],
            ),
            (
                5.0,
                ("worker_lost", 2, "died"),
                ["refuse c#3 DirtyWorkerDiedError ran?", "refuse c#1 DirtyWorkerDiedError ran?"],
            ),
            (6.0, ("worker_ready", 3, *ready(traits=traits)), ["assign w3#1 go 6"]),
            (6.0, answer(3, 1), ["reply c#4 RESPONSE"]),
        ]
    )
    assert is_empty(dispatcher)


def test_an_idempotent_call_goes_to_another_worker_at_once():
    play(
        [
            (0.0, ("worker_ready", 1, *ready()), []),
            (0.0, ("worker_ready", 2, *ready()), []),
            (0.0, submit(1, action="safe"), ["assign w1#1 safe 10"]),
            (1.0, ("worker_lost", 1, "died"), ["assign w2#1 safe 9"]),
            (2.0, answer(2, 1), ["reply c#1 RESPONSE"]),
        ]
    )


@pytest.mark.parametrize(
    ("meanwhile", "lost_at", "expected"),
    [
        ([], 10.0, ["refuse c#1 DirtyWorkerDiedError ran?"]),  # no time is left
        ([(1.0, ("cancel", "c", 1), ["forward w1#1 CANCEL"])], 2.0, []),
        (
            [(1.0, answer(1, 1, wire.CHUNK), ["reply c#1 CHUNK"])],
            2.0,
            ["refuse c#1 DirtyWorkerDiedError ran?"],
        ),
    ],
    ids=["past its deadline", "cancelled", "chunks have gone out"],
)
def test_idempotent_calls_that_do_not_run_again(meanwhile, lost_at, expected):
    dispatcher, _ = play([*W1_IDEMPOTENT, *meanwhile, (lost_at, ("worker_lost", 1, "died"), expected)])
    assert is_empty(dispatcher)


def test_a_call_that_waits_again_has_its_deadline_and_can_be_cancelled():
    dispatcher, _ = play(
        [
            *W1_IDEMPOTENT,
            (1.0, ("worker_lost", 1, "died"), []),
            (10.0 + SLICE, ("tick",), ["refuse c#1 DirtyTimeoutError ran?"]),
        ]
    )
    assert is_empty(dispatcher)
    dispatcher, _ = play(
        [*W1_IDEMPOTENT, (1.0, ("worker_lost", 1, "died"), []), (2.0, ("cancel", "c", 1), [])]
    )
    assert is_empty(dispatcher)


@pytest.mark.parametrize(
    ("event", "error"),
    [(("app_failed", "a", BROKEN), "DirtyAppError"), (("stop", "told to quit"), "DirtyWorkerError")],
)
def test_whoever_ends_a_call_that_waits_again_says_that_it_may_have_run(event, error):
    dispatcher, _ = play(
        [
            *W1_IDEMPOTENT,
            (1.0, ("worker_lost", 1, "died"), []),
            (2.0, event, [f"refuse c#1 {error} ran?"]),
        ]
    )
    assert is_empty(dispatcher)
    assert BROKEN["details"]["may_have_run"] is False


# The end.


def test_stop_ends_every_call_and_those_that_still_come():
    dispatcher, _ = play(
        [
            *W1_IDEMPOTENT,
            (0.0, submit(2), []),
            (0.0, ("submit", "d", 1, request("b")), []),
            (
                1.0,
                ("stop", "told to quit"),
                [
                    "refuse c#1 DirtyWorkerError ran?",
                    "refuse c#2 DirtyWorkerError not run",
                    "refuse d#1 DirtyWorkerError not run",
                ],
            ),
            (1.0, ("stop", "told to quit"), []),
            (1.0, submit(3), ["refuse c#3 DirtyWorkerError not run"]),
            (2.0, answer(1, 1), []),
            (2.0, submit(4), ["refuse c#4 DirtyWorkerError not run"]),
            (2.0, ("worker_lost", 1, "was stopped"), []),
        ]
    )
    assert is_empty(dispatcher)


def test_what_the_shell_may_look_at():
    dispatcher, _ = play(
        [
            (0.0, ("worker_ready", 1, *ready(slots=2)), []),
            (0.0, submit(1), ["assign w1#1 go 10"]),
            (0.0, submit(2, action="safe"), ["assign w1#2 safe 10"]),
            (0.0, submit(3), []),
        ]
    )
    assert (dispatcher.running, dispatcher.queued, dispatcher.idle) == (2, 1, False)
    assert dispatcher.running_on(1) == [("a", "go"), ("a", "safe")]
    assert dispatcher.running_on(2) == []


def test_a_cancelled_request_is_let_go_at_once():
    """However many calls wait around it, its bytes are not kept until its turn."""
    dispatcher, _ = play([*RUNS, *[(0.0, submit(number), []) for number in range(2, 40)]])
    mine, alone = dispatcher._clients["c"][20], object()
    assert sys.getrefcount(mine) > sys.getrefcount(alone)
    do(dispatcher, 0.0, ("cancel", "c", 20))
    assert sys.getrefcount(mine) == sys.getrefcount(alone)


LARGE = b"x" * (KEPT + 1)


def test_a_large_request_is_not_held_while_its_call_runs():
    dispatcher, (assign,) = play([W1, (0, submit(1, body=LARGE), ["assign w1#1 go 10"])])
    assert bytes(assign.request.body) == LARGE
    held = dispatcher._clients["c"][1].request
    assert (held.app, held.action, held.payload) == ("a", "go", b"")


@pytest.mark.parametrize("body", [b"x", LARGE], ids=["small", "large"])
@pytest.mark.parametrize("lost", ["undelivered", "worker"])
def test_a_call_that_goes_elsewhere_takes_its_request_along(body, lost):
    action = "go" if lost == "undelivered" else "safe"
    dispatcher, (assign,) = play([W1, (0, submit(1, action=action, body=body), [f"assign w1#1 {action} 10"])])
    if lost == "undelivered":
        assert do(dispatcher, 1, ("undelivered", 1, 1, assign.request)) == []
    assert do(dispatcher, 1, ("worker_lost", 1, "was killed")) == []
    (again,) = do(dispatcher, 2, ("worker_ready", 2, *ready("a")))
    assert bytes(again.request.body) == body
    (reply,) = do(dispatcher, 3, answer(2, 1))
    assert show(reply) == "reply c#1 RESPONSE" and is_empty(dispatcher)


def test_an_undelivered_call_that_its_caller_has_given_up_just_ends():
    dispatcher, (assign,) = play(RUNS)
    do(dispatcher, 1, ("cancel", "c", 1))
    assert do(dispatcher, 1, ("undelivered", 1, 1, assign.request)) == []
    assert do(dispatcher, 1, ("undelivered", 1, 1, assign.request)) == []
    assert do(dispatcher, 1, ("worker_lost", 1, "was killed")) == []
    assert is_empty(dispatcher)


# Workers whose hub may not be running.

LATER = SILENCE * 1.5


def two(*more):
    """A table in which worker 1 runs a call that says nothing, and worker 2 waits."""
    return [
        (0, ("worker_ready", 1, *ready(slots=9)), []),
        (0, ("worker_ready", 2, *ready(slots=9)), []),
        (0, ("submit", "c", 1, request(action="burn")), ["assign w1#1 burn 10"]),
        *more,
    ]


def test_a_silent_worker_is_asked_once_and_gets_calls_last():
    play(
        two(
            # Soon after its first call a worker counts as free for more.
            (SILENCE / 2, ("submit", "c", 2, request()), ["assign w2#1 go 10"]),
            (SILENCE / 2, ("submit", "c", 3, request()), ["assign w1#2 go 10"]),
            (SILENCE / 2, ("frame_from_worker", 2, wire.RESPONSE, 1, b""), ["reply c#2 RESPONSE"]),
            # Later not, though the other has more to do. An idle one is taken without asking others.
            (LATER, ("submit", "c", 4, request()), ["assign w2#2 go 10"]),
            (LATER, ("submit", "c", 5, request()), ["forward w1#0 PING", "assign w2#3 go 10"]),
            (LATER, ("submit", "c", 6, request()), ["assign w2#4 go 10"]),
            (LATER, ("submit", "c", 7, request()), ["assign w2#5 go 10"]),
        )
    )


@pytest.mark.parametrize(
    "word",
    [("worker_answered", 1), ("worker_heard", 1), ("frame_from_worker", 1, wire.CHUNK, 1, b"")],
    ids=["pong", "unasked", "chunk"],
)
def test_a_worker_that_has_said_a_word_takes_its_share_again(word):
    said = ["reply c#1 CHUNK"] if word[0] == "frame_from_worker" else []
    asked = ["forward w1#0 PING"] if word[0] == "worker_answered" else []
    play(
        two(
            (LATER, ("submit", "c", 2, request()), ["assign w2#1 go 10"]),
            (LATER, ("submit", "c", 3, request()), ["forward w1#0 PING", "assign w2#2 go 10"]),
            (LATER, word, said),
            (LATER, ("submit", "c", 4, request()), ["assign w1#2 go 10"]),
            # Until it has been silent again for as long. (It is not asked twice before it has answered.)
            (3 * LATER, ("frame_from_worker", 2, wire.RESPONSE, 1, b""), ["reply c#2 RESPONSE"]),
            (3 * LATER, ("submit", "c", 5, request()), [*asked, "assign w2#3 go 10"]),
        )
    )


def test_with_a_slot_only_in_a_silent_worker_a_call_waits_for_its_word_or_another_slot():
    rows = [
        (0, ("worker_ready", 1, *ready(slots=2)), []),
        (0, ("worker_ready", 2, *ready(slots=1)), []),
        (0, ("submit", "c", 1, request()), ["assign w1#1 go 10"]),
        (LATER, ("submit", "c", 2, request()), ["assign w2#1 go 10"]),
        (LATER, ("submit", "c", 3, request(budget=1)), ["forward w1#0 PING"]),
        (LATER, ("submit", "c", 4, request()), []),
    ]
    play([*rows, (LATER, ("worker_answered", 1), ["assign w1#2 go 1"])])
    play([*rows, (LATER, answer(2, 1), ["reply c#2 RESPONSE", "assign w2#2 go 1"])])


def test_all_silent_workers_are_asked_and_the_first_to_answer_gets_the_call():
    play(
        two(
            (0, ("submit", "c", 2, request()), ["assign w2#1 go 10"]),
            (0, ("submit", "c", 3, request()), ["assign w1#2 go 10"]),
            (LATER, ("submit", "c", 4, request()), ["forward w1#0 PING", "forward w2#0 PING"]),
            (LATER, ("worker_answered", 1), ["assign w1#3 go 10"]),
            (LATER, ("worker_answered", 2), []),
        )
    )


def test_what_waits_for_a_word_is_shared():
    """The first that answers gets one call, and more only while it has less to do than others, which may
    answer in a moment; and again when it has answered again."""
    play(
        two(
            (0, ("submit", "c", 2, request()), ["assign w2#1 go 10"]),
            (9, ("submit", "c", 3, request()), ["forward w2#0 PING", "forward w1#0 PING"]),
            *((9, ("submit", "c", number, request()), []) for number in range(4, 9)),
            (9, ("worker_answered", 1), ["assign w1#2 go 10", "forward w1#0 PING"]),
            (9, ("worker_answered", 2), ["assign w2#2 go 10", "assign w2#3 go 10", "forward w2#0 PING"]),
            (9, ("worker_answered", 1), ["assign w1#3 go 10", "assign w1#4 go 10", "forward w1#0 PING"]),
            # What it says without being asked gives it nothing, for it says so before each answer ...
            (9, ("worker_heard", 2), []),
            # ... but the slot that its answer frees.
            (9, answer(2, 1), ["reply c#2 RESPONSE", "assign w2#4 go 10"]),
            (9, ("worker_answered", 1), []),
        )
    )


def test_the_last_worker_is_not_asked():
    play(
        two(
            (0, ("submit", "c", 2, request()), ["assign w2#1 go 10"]),
            (9, ("submit", "c", 3, request()), ["forward w2#0 PING", "forward w1#0 PING"]),
            (9, ("submit", "c", 4, request()), []),
            (
                9,
                ("worker_lost", 2, "was killed"),
                ["refuse c#2 DirtyWorkerDiedError ran?", "assign w1#2 go 10", "assign w1#3 go 10"],
            ),
            (99, ("submit", "c", 5, request()), ["assign w1#4 go 10"]),
        )
    )


def test_a_lost_workers_calls_wait_for_the_word_of_others():
    play(
        two(
            (0, ("worker_ready", 3, *ready(slots=9)), []),
            (0, ("submit", "c", 2, request()), ["assign w2#1 go 10"]),
            (0, ("submit", "c", 3, request(action="safe")), ["assign w3#1 safe 10"]),
            (9, ("worker_lost", 3, "was killed"), ["forward w1#0 PING", "forward w2#0 PING"]),
            (9, ("worker_answered", 2), ["assign w2#2 safe 1"]),
        )
    )


def test_a_prompt_answer_doubles_what_a_worker_gets():
    def given(first, last):
        return [f"assign w1#{number} go 10" for number in range(first, last + 1)]

    play(
        two(
            (0, ("submit", "c", 2, request()), ["assign w2#1 go 10"]),
            (9, ("submit", "c", 3, request(budget=10)), ["forward w2#0 PING", "forward w1#0 PING"]),
            *((9, ("submit", "c", number, request()), []) for number in range(4, 40)),
            (9, ("worker_answered", 1), [*given(2, 2), "forward w1#0 PING"]),
            (9, ("worker_answered", 1), [*given(3, 4), "forward w1#0 PING"]),
            (9, ("worker_answered", 1), [*given(5, 8), "forward w1#0 PING"]),
        )
    )


def test_a_late_answer_does_not():
    late = 9 + 1.01 * PROMPT
    play(
        two(
            (0, ("submit", "c", 2, request()), ["assign w2#1 go 10"]),
            (9, ("submit", "c", 3, request(budget=99)), ["forward w2#0 PING", "forward w1#0 PING"]),
            *((9, ("submit", "c", number, request(budget=99)), []) for number in range(4, 7)),
            (9, ("worker_answered", 1), ["assign w1#2 go 99", "forward w1#0 PING"]),
            (late, ("worker_answered", 1), ["assign w1#3 go 98.899", "forward w1#0 PING"]),
            (late, ("worker_answered", 1), ["assign w1#4 go 98.899", "assign w1#5 go 98.899"]),
        )
    )


def test_calls_for_which_there_are_slots_are_none_too_many():
    _, (refusal,) = play(
        two(
            (0, ("submit", "c", 2, request()), ["assign w2#1 go 10"]),
            (9, ("submit", "c", 3, request()), ["forward w2#0 PING", "forward w1#0 PING"]),
            *((9, ("submit", "c", number, request()), []) for number in range(4, 21)),
            (9, ("submit", "c", 21, request()), ["refuse c#21 DirtyOverloadedError not run"]),
        ),
        limits=LIMITS._replace(queue_calls=2),
    )
    assert "its queue is full with 18 calls" in refusal.fault["message"]


def test_the_only_worker_with_an_app_is_not_asked():
    play(
        [
            (0, ("worker_ready", 1, *ready("a", slots=9)), []),
            (0, ("worker_ready", 2, *ready("a", "b", slots=9)), []),
            (0, ("submit", "c", 1, request("b")), ["assign w2#1 go 10"]),
            (9, ("submit", "c", 2, request("b")), ["assign w2#2 go 10"]),
            (9, ("worker_draining", 1), []),
            (99, ("submit", "c", 3, request("a")), ["assign w2#3 go 10"]),
        ]
    )


@pytest.mark.parametrize(
    "heard", [answer(1, 1), ("worker_ready", 2, *ready())], ids=["an answer", "a new worker"]
)
def test_a_late_call_is_not_told_of_hubs_when_its_worker_has_just_been_heard(heard):
    dispatcher, _ = play([*RUNS, (0, submit(2, budget=1), [])])
    actions = do(dispatcher, 1.01, heard)
    (refusal,) = [action for action in actions if isinstance(action, Refuse)]
    assert "slots of" in refusal.fault["message"]


def test_one_that_was_left_with_the_only_worker_is_told_of_its_hub():
    _, (refusal,) = play(
        two(
            (0, ("submit", "c", 2, request()), ["assign w2#1 go 10"]),
            (9, ("submit", "c", 3, request(budget=1)), ["forward w2#0 PING", "forward w1#0 PING"]),
            (9, ("worker_draining", 2), []),
            (10 + SLICE, ("tick",), ["refuse c#3 DirtyTimeoutError not run"]),
        )
    )
    assert "of 1 workers 1 had a free slot" in refusal.fault["message"]


def test_a_worker_is_not_asked_twice_at_once():
    play(
        two(
            (0, ("submit", "c", 2, request()), ["assign w2#1 go 10"]),
            (9, ("submit", "c", 3, request()), ["forward w2#0 PING", "forward w1#0 PING"]),
            *((9, ("submit", "c", number, request()), []) for number in range(4, 9)),
            (9, answer(2, 1), ["reply c#2 RESPONSE", "assign w2#2 go 10", "assign w2#3 go 10"]),
            (9, answer(2, 2), ["reply c#3 RESPONSE", "assign w2#4 go 10"]),
        )
    )


def test_a_worker_without_room_is_none_to_leave_calls_to():
    play(
        [
            (0, ("worker_ready", 1, *ready(slots=1)), []),
            (0, ("worker_ready", 2, *ready(slots=9)), []),
            (0, ("submit", "c", 1, request()), ["assign w1#1 go 10"]),
            (0, ("submit", "c", 2, request()), ["assign w2#1 go 10"]),
            (9, ("submit", "c", 3, request()), ["forward w2#0 PING"]),
            (9, ("submit", "c", 4, request()), []),
            (9, ("submit", "c", 5, request()), []),
            (9, ("worker_answered", 2), ["assign w2#2 go 10", "assign w2#3 go 10", "assign w2#4 go 10"]),
        ]
    )


def test_what_was_late_for_a_place_is_not_overtaken():
    def lane(worker, number, call):
        return f"assign w{worker}#{number} go 10 by c#{call}"

    dispatcher, _ = play(
        two(
            (0, ("takes_lanes", "c"), []),
            (0, ("submit", "c", 2, request()), [lane(2, 1, 2)]),
            (9, ("submit", "c", 3, request()), ["forward w2#0 PING", "forward w1#0 PING"]),
            # 1 that may wait anyway, 16 for whom there are slots, 1 whose place may have got free unheard.
            *((9, ("submit", "c", number, request()), []) for number in range(4, 21)),
            (9, ("submit", "c", 21, request()), ["refuse c#21 DirtyOverloadedError not run"]),
            (9, ("worker_answered", 1), [lane(1, 2, 3), "forward w1#0 PING"]),
            *((9, ("submit", "c", number, request()), []) for number in (22, 23, 24)),
            (9, ("submit", "c", 25, request()), ["refuse c#25 DirtyOverloadedError not run"]),
            (9, answer(2, 1, wire.DONE), [lane(2, 2, 4), lane(2, 3, 5), lane(2, 4, 6)]),
            (9, ("submit", "c", 26, request()), []),
        ),
        limits=LIMITS._replace(queue_calls=1),
    )
    # 22 has a place now; behind 23 and 24, 26 has none either.
    refused = do(dispatcher, 9 + LANE_WORD + SLICE, ("tick",))
    assert sorted(action.call_id for action in refused) == [23, 24, 26]


@pytest.mark.parametrize("app", ["a", "zoo"])
@pytest.mark.parametrize("said", [False, True])
def test_a_call_that_no_hub_ran_for_is_told_so(said, app):
    """Of many silent workers, those are named of which is known why."""
    said = [(9.9, ("worker_blocked", 3, 1), [])] if said else []
    workers = [(0, ("worker_ready", number, *ready(app, slots=9)), []) for number in (1, 2, 3)]
    calls = [
        (0, ("submit", "c", n, request(app, "burn")), [f"assign w{w}#1 burn 10"])
        for n, w in ((1, 1), (2, 2), (3, 3))
    ]
    _, (refusal,) = play(
        [
            *workers,
            *calls,
            (9, ("submit", "c", 4, request(app, budget=1)), [f"forward w{n}#0 PING" for n in (3, 2, 1)]),
            *said,
            (10 + SLICE, ("tick",), ["refuse c#4 DirtyTimeoutError not run"]),
        ],
        apps=[app],
    )
    message = refusal.fault["message"]
    assert message.endswith("it has not run")
    assert "of 3 workers 3 had a free slot" in message
    assert (f"{app}.burn keeps the hub of dirty worker 1000" in message) == bool(said)


def test_an_idle_worker_is_not_silent():
    play(
        two(
            (1, ("frame_from_worker", 1, wire.RESPONSE, 1, b""), ["reply c#1 RESPONSE"]),
            (9, ("submit", "c", 2, request()), ["assign w1#2 go 10"]),
            (9, ("submit", "c", 3, request()), ["assign w2#1 go 10"]),
        )
    )
