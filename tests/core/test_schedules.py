"""Random schedules: whatever happens in whatever order, every call ends once, with its own result.

The first half drives a `Dispatcher` and keeps a plain model of its clients and workers beside it. The
second puts `Mux`, `Dispatcher` and a trivial worker back to back, joined by byte pipes that are cut
anywhere and break at any moment.
"""

import itertools
import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from gunicorn_dirty_gevent.core import dispatch, faults, mux, wire
from gunicorn_dirty_gevent.core.calls import (
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
from gunicorn_dirty_gevent.core.deadlines import SLICE
from gunicorn_dirty_gevent.core.dispatch import Dispatcher

APPS = ("a", "b", "c")
TRAITS = AppTraits(
    ActionTraits(5.0),
    {"safe": ActionTraits(5.0, idempotent=True), "endless": ActionTraits(math.inf)},
)
ACTIONS = ("plain", "plain", "safe", "endless")
LAST = (wire.RESPONSE, wire.ERROR, wire.END)


def assert_empty(dispatcher):
    """Nothing of any call is left."""
    assert not any(dispatcher._clients.values())
    assert not any(len(queue) or queue.bytes for queue in dispatcher._queues.values())
    assert not any(worker.running for worker in dispatcher._crew)
    assert len(dispatcher._deadlines) == 0
    assert dispatcher.idle and dispatcher.queued == dispatcher.running == 0


class Submitted:
    """What the model knows of a call."""

    def __init__(self, number, app, action, deadline):
        self.number = number
        self.app = app
        self.action = action
        self.deadline = deadline
        self.runs = 0
        self.chunks = 0
        self.laned = False
        self.answered = False  # by a lane; the dispatcher may not know yet
        self.pauses = False  # its worker has said that it waits for its reader
        self.overflowed = False  # there was no place for it when it came


class ModelWorker:
    def __init__(self, apps, slots):
        self.apps = apps
        self.slots = slots
        self.draining = False
        self.stuck = False
        self.pings = 0  # that it has not answered yet
        self.running = {}  # id on its link -> Submitted
        self.ids = set()
        self.worn = 0
        self.words = []  # about calls by lanes, on their way to the dispatcher


class DispatcherMachine(RuleBasedStateMachine):
    @initialize(
        queue_calls=st.sampled_from([100, 3, 100]),
        queue_bytes=st.sampled_from([10**6, 200, 10**6]),
        per_client=st.sampled_from([100, 6, 100, 2]),
        slots=st.lists(st.integers(1, 4), max_size=3),
        lanes=st.sampled_from(["", "xy", "xyz"]),
        ends_by_stop=st.booleans(),
    )
    def start(self, queue_calls, queue_bytes, per_client, slots, lanes, ends_by_stop):
        self.limits = Limits(queue_calls, queue_bytes, per_client)
        self.dispatcher = Dispatcher(APPS, self.limits)
        self.now = 100.0
        self.numbers = itertools.count()
        self.keys = itertools.count(1)
        self.calls = {}  # number -> Submitted
        self.waiting = {}  # (client, id) -> Submitted
        self.workers = {}
        self.slots = 0  # that all workers have had together
        self.started = dict.fromkeys(APPS, -1)  # number of the last call started
        self.late = 0
        self.stopped = False
        self.ends_by_stop = ends_by_stop
        self.lanes = lanes
        for client in lanes:
            self.dispatcher.takes_lanes(client)
        for number in slots:
            self.worker_ready(set(APPS), number, 0)

    # What the dispatcher does.

    def carry_out(self, actions):
        for action in actions:
            if isinstance(action, Assign):
                self.assigned(action)
            elif isinstance(action, Reply):
                self.replied(action)
            elif isinstance(action, Refuse):
                self.refused(action)
            elif isinstance(action, Forward) and action.kind == wire.PING:
                worker = self.workers[action.worker]
                assert worker.running and not worker.draining and not worker.pings
                worker.pings += 1
            elif isinstance(action, Forward):
                assert action.call_id in self.workers[action.worker].running
                if action.kind == wire.CANCEL:
                    call = self.workers[action.worker].running[action.call_id]
                    assert call not in self.waiting.values(), "its caller still waits"
            elif isinstance(action, Kill):
                running = self.workers[action.worker].running.values()
                awaited = list(self.waiting.values())
                assert any(not call.pauses or call not in awaited for call in running), "all wait for readers"
                self.workers[action.worker].stuck = self.workers[action.worker].draining = True
            else:
                assert isinstance(action, Worn)
                self.workers[action.worker].worn += 1
                assert self.workers[action.worker].worn == 1

    def assigned(self, action):
        worker = self.workers[action.worker]
        call = self.calls[int(bytes(action.request.body))]
        assert not worker.draining and len(worker.running) < worker.slots
        assert call.app == action.request.app and call.app in worker.apps
        assert action.call_id not in worker.ids
        assert call in self.waiting.values(), "nobody waits for it"
        assert action.budget == call.deadline - self.now > 0
        assert call.runs == 0 or (call.action == "safe" and call.runs == 1 and not call.chunks)
        if call.runs == 0:
            assert call.overflowed or call.number > self.started[call.app], "not first in, first out"
            self.started[call.app] = max(call.number, self.started[call.app])
        call.runs += 1
        call.laned = action.client is not None
        repeatable = action.request.stream and call.action == "safe"
        if call.laned:
            assert self.waiting[action.client, action.client_id] is call and action.client in self.lanes
            assert not repeatable
        else:
            client = next(client for (client, _), waits in self.waiting.items() if waits is call)
            assert client not in self.lanes or repeatable
        worker.running[action.call_id] = call
        worker.ids.add(action.call_id)

    def replied(self, action):
        call = self.waiting[action.client, action.call_id]
        assert action.payload == b"%d" % call.number, "the answer to another call"
        assert action.kind in (wire.CHUNK, *LAST)
        if action.kind == wire.CHUNK:
            call.chunks += 1
        else:
            del self.waiting[action.client, action.call_id]

    def refused(self, action):
        """The caller of one that was answered by a lane has seen that first, and drops this."""
        call = self.waiting.pop((action.client, action.call_id))
        assert action.fault["details"]["may_have_run"] == (call.runs > 0), action.fault

    # Clients.

    @rule(
        calls=st.lists(
            st.tuples(
                st.sampled_from("xyz"),
                st.integers(1, 12),
                st.sampled_from([*APPS, *APPS, *APPS, "unknown"]),
                st.sampled_from(ACTIONS),
                st.sampled_from([3.0, 0.5, 20.0, math.inf, 3.0, 20.0, 0.0]),
                st.booleans(),
            ),
            min_size=1,
            max_size=10,
        )
    )
    def submit(self, calls):
        for call in calls:
            self.submit_one(*call)

    def submit_one(self, client, call_id, app, action, budget, stream):
        number = next(self.numbers)
        names = wire.pack_names(app, action)
        envelope = wire.pack_envelope(names, budget, wire.FLAG_STREAM if stream else 0)
        request = wire.unpack_request(envelope + b"%d" % number)
        if (client, call_id) in self.waiting:
            try:
                self.dispatcher.submit(client, call_id, request, self.now)
            except wire.WireError:
                return
            raise AssertionError("an id in use was taken")
        call = self.calls[number] = Submitted(number, app, action, self.now + budget)
        before = len([key for key in self.waiting if key[0] == client])
        self.waiting[client, call_id] = call
        self.carry_out(self.dispatcher.submit(client, call_id, request, self.now))
        known = self.dispatcher._clients[client].get(call_id)
        queue = self.dispatcher._queues.get(app)
        call.overflowed = known is not None and known in queue.overflow
        no_place = before >= self.limits.calls_per_client + (self.untold() if client in self.lanes else 0)
        if app == "unknown" or budget <= 0 or self.stopped or no_place:
            assert (client, call_id) not in self.waiting

    def untold(self):
        """The most slots that may be free without the dispatcher's knowing."""
        return sum(len(worker.running) for worker in self.workers.values())

    def cancel(self, client, call_id):
        """Perhaps its answer is on its way by a lane."""
        self.waiting.pop((client, call_id), None)
        self.carry_out(self.dispatcher.cancel(client, call_id, self.now))

    def client_lost(self, client):
        for key in [key for key in self.waiting if key[0] == client]:
            del self.waiting[key]
        self.carry_out(self.dispatcher.client_lost(client, self.now))
        assert client not in self.dispatcher._clients
        if client in self.lanes:  # the next of that name
            self.dispatcher.takes_lanes(client)

    @rule(client=st.sampled_from("xyz"), call_id=st.integers(1, 12), amount=st.integers(0, 2**32 - 1))
    def credit(self, client, call_id, amount):
        payload = wire.pack_credit(0, amount)[wire.HEADER_SIZE :]
        self.carry_out(self.dispatcher.credit(client, call_id, payload, self.now))

    # Workers.

    @precondition(lambda self: len(self.workers) < 4)
    @rule(
        apps=st.sets(st.sampled_from(APPS), min_size=1),
        slots=st.integers(1, 3),
        most=st.sampled_from([0, 0, 5]),
    )
    def worker_ready(self, apps, slots, most):
        key = next(self.keys)
        self.workers[key] = ModelWorker(apps, slots)
        self.slots += slots
        traits = dict.fromkeys(sorted(apps), TRAITS)
        self.carry_out(self.dispatcher.worker_ready(key, key, traits, slots, self.now, most))

    def app_failed(self, app):
        fault = faults.fault("DirtyAppError", "no model", may_have_run=False)
        self.carry_out(self.dispatcher.app_failed(app, fault))

    @rule(
        picks=st.lists(
            st.tuples(st.integers(0, 11), st.sampled_from([*LAST, wire.CHUNK])), min_size=1, max_size=5
        )
    )
    def frames(self, picks):
        for which, kind in picks:
            running = [
                (key, call_id)
                for key, worker in self.workers.items()
                for call_id, call in worker.running.items()
                if not call.answered
            ]
            if running:
                self.frame(*running[which % len(running)], kind)

    def frame(self, key, call_id, kind):
        worker = self.workers[key]
        call = worker.running[call_id]
        if call.laned and call in self.waiting.values() and kind != wire.ERROR:
            call.answered = kind != wire.CHUNK
            worker.words.append((wire.DONE if call.answered else wire.PACE, call_id))
            return
        self.told(key)  # what was sent before
        if worker.pings and kind == wire.CHUNK:
            self.pong(key)
        call = worker.running[call_id]
        if call not in self.waiting.values():
            self.late += kind == wire.CHUNK
        if kind != wire.CHUNK:
            del worker.running[call_id]
        payload = b"%d" % call.number
        self.carry_out(self.dispatcher.frame_from_worker(key, kind, call_id, payload, self.now))

    @rule(which=st.integers(0, 3))
    def answers_ping(self, which):
        asked = [key for key, worker in self.workers.items() if worker.pings]
        if asked:
            self.pong(asked[which % len(asked)])

    @rule(which=st.integers(0, 3))
    def says_a_word(self, which):
        """Without being asked."""
        if self.workers:
            self.dispatcher.worker_heard(list(self.workers)[which % len(self.workers)], self.now)

    def pong(self, key):
        self.workers[key].pings -= 1
        self.carry_out(self.dispatcher.worker_answered(key, self.now))

    @rule(which=st.integers(0, 3), count=st.integers(1, 5), waits=st.booleans())
    def words(self, which, count, waits):
        """The dispatcher hears some of what went by lanes."""
        if self.workers:
            self.told(list(self.workers)[which % len(self.workers)], count, waits)

    def told(self, key, count=1000, waits=False):
        worker = self.workers[key]
        words, worker.words = worker.words[:count], worker.words[count:]
        for kind, call_id in words:
            if kind == wire.PACE:
                self.dispatcher.worker_paced(key, call_id, waits, self.now)
                if call_id in worker.running:
                    worker.running[call_id].pauses = waits
                continue
            call = worker.running.pop(call_id)
            for caller in [caller for caller, waiting in self.waiting.items() if waiting is call]:
                del self.waiting[caller]
            actions = self.dispatcher.frame_from_worker(key, wire.DONE, call_id, b"", self.now)
            assert not any(isinstance(action, Reply) for action in actions)
            self.carry_out(actions)

    def stray_frame(self, key, call_id):
        if call_id not in self.workers[key].running:
            self.late += 1
            actions = self.dispatcher.frame_from_worker(key, wire.RESPONSE, call_id, b"stray", self.now)
            assert actions == []

    def worker_lost(self, key, heard):
        """It had sent some of its words."""
        self.told(key, heard)
        del self.workers[key]
        self.carry_out(self.dispatcher.worker_lost(key, "died", self.now))

    def worker_draining(self, key):
        self.workers[key].draining = True
        self.dispatcher.worker_draining(key)

    # Less often: one rule for what would otherwise leave nothing standing.

    @rule(
        what=st.sampled_from(
            ["cancel"] * 4 + ["worker_lost"] * 2 + ["client_lost", "draining", "app_failed", "stray_frame"]
        ),
        client=st.sampled_from("xyz"),
        which=st.integers(0, 50),
    )
    def mishap(self, what, client, which):
        if what == "cancel":
            self.cancel(client, which % 12 + 1)
        elif what == "client_lost":
            self.client_lost(client)
        elif what == "app_failed":
            self.app_failed(APPS[which % 3])
        elif self.workers:
            key = list(self.workers)[which % len(self.workers)]
            if what == "worker_lost":
                self.worker_lost(key, which % 3)
            elif what == "draining":
                self.worker_draining(key)
            else:
                self.stray_frame(key, which)

    # Time, and the end.

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.5, 1.0, 2.9, 7.0, 30.0]))
    def tick(self, seconds):
        self.now += seconds
        self.carry_out(self.dispatcher.tick(self.now))
        running = [call for worker in self.workers.values() for call in worker.running.values()]
        for call in self.waiting.values():
            grace = dispatch.REPLY_GRACE if call in running else 0.0
            assert self.now < call.deadline + grace + SLICE, "its time was over"
        if seconds > dispatch.LANE_WORD + SLICE:
            assert not any(queue.overflow for queue in self.dispatcher._queues.values())
            self.check_queues(settled=True)
        due = self.dispatcher.next_deadline()
        assert due is None or due > self.now

    @invariant()
    def agrees_with_the_model(self):
        dispatcher = self.dispatcher
        assert dispatcher.idle == (not self.waiting)
        assert dispatcher.running == sum(len(worker.running) for worker in self.workers.values())
        assert dispatcher.late_frames == self.late
        running = [call for worker in self.workers.values() for call in worker.running.values()]
        queued = [call for call in self.waiting.values() if call not in running]
        assert dispatcher.queued == len(queued)
        self.check_queues(settled=not self.lanes)

    def check_queues(self, settled):
        running = [call for worker in self.workers.values() for call in worker.running.values()]
        queued = [call for call in self.waiting.values() if call not in running]
        overflowing = [call for queue in self.dispatcher._queues.values() for call in queue.overflow]
        overflowing = {int(bytes(call.request.body)) for call in overflowing}
        assert not (settled and overflowing)
        queued = [call for call in queued if call.number not in overflowing]
        free = [w for w in self.workers.values() if not w.draining and len(w.running) < w.slots]
        for call in queued:
            places = [worker for worker in free if call.app in worker.apps]
            assert all(worker.pings for worker in places), "it waits beside a free slot"
            assert not places or len(self.workers) > 1, "it waits for the word of the only worker"
        first_time = Counter(call.app for call in queued if call.runs == 0)
        # Beside the bound, as many as there were free slots for when they came.
        most = self.limits.queue_calls + self.slots
        assert all(count <= most for count in first_time.values())

    def teardown(self):
        if not hasattr(self, "dispatcher"):
            return
        if self.ends_by_stop:
            self.stopped = True
            self.carry_out(self.dispatcher.stop("told to quit"))
            assert not self.waiting
            self.submit_one("x", 1, "a", "plain", 3.0, False)
        for key in list(self.workers):
            self.told(key)
        while any(worker.running for worker in self.workers.values()):
            for key, worker in list(self.workers.items()):
                for call_id, call in list(worker.running.items()):
                    del worker.running[call_id]
                    payload = b"%d" % call.number
                    actions = self.dispatcher.frame_from_worker(key, wire.END, call_id, payload, self.now)
                    self.carry_out(actions)
        for client, call_id in list(self.waiting):
            self.cancel(client, call_id)
        assert_empty(self.dispatcher)
        assert self.dispatcher.next_deadline() is None


TestDispatcher = DispatcherMachine.TestCase
TestDispatcher.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


# Back to back.


class Pipe:
    """One direction of a socket: what its writer keeps, what the kernel has, what its reader made
    of it."""

    def __init__(self):
        self.outbox = b""
        self.kernel = b""
        self.flushed = 0
        self.decoder = wire.FrameDecoder()

    def write(self, parts):
        self.outbox += b"".join(parts)

    def flush(self, size):
        taken, self.outbox = self.outbox[:size], self.outbox[size:]
        self.flushed += len(taken)
        self.kernel += taken

    def read(self, size):
        data, self.kernel = self.kernel[:size], self.kernel[size:]
        self.decoder.receive_data(data)
        return self.decoder.frames()

    def everything(self):
        self.flush(len(self.outbox))
        return self.read(len(self.kernel))

    @property
    def empty(self):
        return not self.outbox and not self.kernel


class Lane:
    """Whole packets or nothing. Its reader has its end from when it has read of it."""

    ROOM = 20_000  # bytes

    def __init__(self):
        self.packets = []
        self.closed = False  # by its reader
        self.decoder = wire.FrameDecoder(kinds=wire.BY_LANE)

    def take(self, packet):
        if self.closed or len(packet) + sum(map(len, self.packets)) > self.ROOM:
            return False
        self.packets.append(packet)
        return True

    def read(self):
        packets, self.packets = self.packets, []
        self.decoder.receive_data(b"".join(packets))
        return self.decoder.frames()


class Caller:
    """A call and what its caller has seen of it."""

    def __init__(self, number, call):
        self.number = number
        self.call = call
        self.cancelled = False
        self.chunks = []


class Client:
    """`Mux` with its link, as the client's shells drive it."""

    def __init__(self, lanes):
        self.mux = mux.Mux("/tmp/dirty.sock", lanes=lanes)
        self.up = self.down = None
        self.lanes = {}  # worker -> `Lane`, of this link
        self.known = []  # those that it has been told of
        self.callers = []

    def start(self, caller, now):
        self.callers.append(caller)
        self.send(self.mux.submit(caller.call, now))

    def send(self, parts):
        if parts is not None:
            self.up.write(parts)

    def cancel(self, caller):
        caller.cancelled = True
        self.send(self.mux.cancel(caller.call))

    def take(self, caller):
        payload, credit = self.mux.take_chunk(caller.call)
        caller.chunks.append(payload)
        self.send(credit)


class FakeWorker:
    """Answers each request with its body; a stream sends it `length` times, while it has credit."""

    def __init__(self, key, runs, answered):
        self.key = key
        self.runs = runs  # of each body, over all workers
        self.answered = answered  # the bodies of calls that were, by a lane
        self.lanes = {}  # by number
        self.inbox, self.outlet = Pipe(), Pipe()
        self.tasks = {}  # id -> [body, chunks to go, credit, lane, client's id, waits]

    def frames(self, frames):
        for kind, call_id, payload in frames:
            if kind in (wire.REQUEST, wire.ROUTED):
                lane, client_id = None, None
                if kind == wire.ROUTED:
                    number, client_id, request = wire.unpack_routed(payload)
                    lane = self.lanes[number]
                else:
                    request = wire.unpack_request(payload)
                body = bytes(request.body)
                self.runs[body] += 1
                assert call_id not in self.tasks
                to_go = 80 if request.stream else 0
                self.tasks[call_id] = [body, to_go, wire.STREAM_WINDOW, lane, client_id, False]
            elif kind == wire.CREDIT and call_id in self.tasks:
                task = self.tasks[call_id]
                task[2] = min(task[2] + wire.unpack_credit(payload), wire.STREAM_WINDOW)
                self.tell_pace(call_id)
            elif kind == wire.CANCEL and self.tasks.pop(call_id, None) is not None:
                self.say(wire.END, call_id, b"")
            elif kind == wire.PING:
                self.say(wire.PONG, 0, b"")

    def work(self, which):
        """One task goes one step on."""
        if not self.tasks:
            return
        call_id = list(self.tasks)[which % len(self.tasks)]
        task = self.tasks[call_id]
        body, to_go, credit = task[:3]
        if to_go == 0:
            self.say(wire.PING, 0, b"")
            if self.reply(task, wire.RESPONSE, call_id, body):
                self.answered.add(body)
                self.say(wire.DONE, call_id, b"")
            del self.tasks[call_id]
        elif credit > 0:
            # Of different sizes: tiny ones, some that fill a lane, and ones beyond the whole window.
            size = 300_000 if to_go % 20 == 8 else (0, 5000)[to_go % 2]
            payload = body + b":%d:" % to_go + b"x" * size
            task[1] -= 1
            task[2] -= wire.chunk_cost(payload)
            self.reply(task, wire.CHUNK, call_id, payload)
            self.tell_pace(call_id)

    def tell_pace(self, call_id):
        """When that changes."""
        task = self.tasks[call_id]
        waits = task[2] <= 0
        if task[4] is not None and waits != task[5]:
            task[5] = waits
            self.say(wire.PACE, call_id, wire.pack_pace(waits))

    def reply(self, task, kind, call_id, payload):
        """By the lane, if it has one with room; whether that was so."""
        lane, client_id = task[3:5]
        if lane is not None and lane.take(wire.pack_frame(kind, client_id, payload)):
            return True
        task[3] = None
        self.say(kind, call_id, payload)
        return False

    def say(self, kind, call_id, payload):
        self.outlet.write((wire.pack_frame(kind, call_id, payload),))


class System:
    """Clients, an arbiter around `Dispatcher`, workers, and pipes between them."""

    def __init__(self, clients):
        self.now = 0.0
        self.runs = Counter()
        self.answered = set()
        self.numbers = itertools.count(1)
        self.keys = itertools.count(1)
        self.clients = [Client(lanes=number != 1) for number in range(clients)]
        self.boot()
        for which in range(clients):
            self.greet(which)

    def boot(self):
        """A new arbiter with one worker."""
        limits = Limits(100, 10**9, 100)
        self.dispatcher = Dispatcher(["a"], limits)
        self.workers = {}
        self.add_worker()

    def add_worker(self):
        key = next(self.keys)
        self.workers[key] = FakeWorker(key, self.runs, self.answered)
        traits = {"a": AppTraits(ActionTraits(math.inf), {})}
        self.act(self.dispatcher.worker_ready(key, key, traits, 3, self.now))

    # The arbiter's shell.

    def act(self, actions):
        for action in actions:
            if isinstance(action, Assign):
                self.assign(*action)
            elif isinstance(action, Forward):
                frame = wire.pack_frame(action.kind, action.call_id, action.payload)
                self.workers[action.worker].inbox.write((frame,))
            elif isinstance(action, Reply):
                frame = wire.pack_frame(action.kind, action.call_id, action.payload)
                action.client.down.write((frame,))
            else:
                assert isinstance(action, Refuse)
                frame = wire.pack_frame(wire.ERROR, action.call_id, repr(action.fault).encode())
                action.client.down.write((frame,))

    def assign(self, key, call_id, request, budget, client, client_id):
        worker, route = self.workers[key], b""
        if client is not None:
            if key not in client.lanes:
                number = next(self.numbers)
                client.lanes[key] = worker.lanes[number] = Lane()
                client.down.write((wire.pack_frame(wire.LANE, 0, b"%d" % key),))
            number = next(n for n, lane in worker.lanes.items() if lane is client.lanes[key])
            route = wire.pack_route(number, client_id)
        worker.inbox.write(wire.repack_request(call_id, request, budget, route))

    def from_client(self, client, frames):
        for kind, call_id, payload in frames:
            if kind == wire.REQUEST:
                request = wire.unpack_request(payload)
                self.act(self.dispatcher.submit(client, call_id, request, self.now))
            elif kind == wire.CREDIT:
                self.act(self.dispatcher.credit(client, call_id, payload, self.now))
            elif kind == wire.CANCEL:
                self.act(self.dispatcher.cancel(client, call_id, self.now))
            elif kind == wire.HELLO:
                if wire.unpack_hello(payload).flags & wire.HELLO_LANES:
                    self.dispatcher.takes_lanes(client)
                client.down.write((wire.pack_hello(10**7),))

    def from_worker(self, worker, frames):
        for frame in frames:
            if frame.kind == wire.PING:
                self.dispatcher.worker_heard(worker.key, self.now)
            elif frame.kind == wire.PONG:
                self.act(self.dispatcher.worker_answered(worker.key, self.now))
            elif frame.kind == wire.PACE:
                waits = wire.unpack_pace(frame.payload)
                self.dispatcher.worker_paced(worker.key, frame.call_id, waits, self.now)
            else:
                self.act(self.dispatcher.frame_from_worker(worker.key, *frame, self.now))

    def to_client(self, client, frames):
        for frame in frames:
            if frame.kind == wire.LANE:
                client.known.append(client.lanes[int(frame.payload)])
                continue
            if frame.kind in mux.BEHIND_LANES:
                self.read_lanes(client)
            for parts in client.mux.receive(frame, self.now):
                client.up.write(parts)

    def read_lanes(self, client):
        for frame in [frame for lane in client.known for frame in lane.read()]:
            assert list(client.mux.receive(frame, self.now)) == []

    def lose(self, client, why):
        """Its link has ended."""
        self.read_lanes(client)
        flushed = client.up.flushed
        client.up = client.down = None
        for lane in client.lanes.values():
            lane.closed = True
        client.lanes, client.known = {}, []
        client.mux.lost(why, flushed)

    # What happens.

    def start(self, which, stream):
        client = self.clients[which % len(self.clients)]
        number = next(self.numbers)
        call = mux.Call("a", "go", b"<%d>" % number, math.inf, stream)
        client.start(Caller(number, call), self.now)

    def caller(self, which):
        callers = [(client, caller) for client in self.clients for caller in client.callers]
        return callers[which % len(callers)] if callers else (None, None)

    def cancel(self, which, _):
        client, caller = self.caller(which)
        if caller and not caller.call.done and not caller.cancelled:
            client.cancel(caller)

    def take(self, which, _):
        client, caller = self.caller(which)
        if caller and caller.call.chunks and not caller.cancelled:
            client.take(caller)

    def connect(self, which, _):
        client = self.clients[which % len(self.clients)]
        if client.up is None:
            client.up, client.down = Pipe(), Pipe()
            client.up.write(client.mux.connected())

    def greet(self, which, _=0):
        """Connect, and both have said hello."""
        self.connect(which, 0)
        client = self.link(which)
        self.from_client(client, client.up.everything())
        self.to_client(client, client.down.everything())

    def link(self, which):
        client = self.clients[which % len(self.clients)]
        return client if client.up is not None else None

    def flush_up(self, which, size):
        if client := self.link(which):
            client.up.flush(size)

    def read_up(self, which, size):
        if client := self.link(which):
            self.from_client(client, client.up.read(size))

    def read_down(self, which, size):
        if client := self.link(which):
            client.down.flush(10 * size)
            self.to_client(client, client.down.read(10 * size))

    def lose_link(self, which, size):
        """The arbiter may still have read some of what the kernel took."""
        if client := self.link(which):
            self.from_client(client, client.up.read(size))
            self.to_client(client, client.down.everything())
            self.act(self.dispatcher.client_lost(client, self.now))
            self.lose(client, "reset")

    def read_lane(self, which, _):
        if client := self.link(which):
            self.read_lanes(client)

    def go_away(self, which, _):
        if (client := self.link(which)) and client.mux.phase is mux.Phase.OPEN:
            client.down.write((wire.pack_frame(wire.GOAWAY, 0),))

    def worker(self, which):
        return list(self.workers.values())[which % len(self.workers)]

    def to_worker(self, which, size):
        worker = self.worker(which)
        worker.inbox.flush(size)
        worker.frames(worker.inbox.read(size))

    def work(self, which, task):
        self.worker(which).work(task)

    def read_worker(self, which, size):
        worker = self.worker(which)
        worker.outlet.flush(100 * size)
        self.from_worker(worker, worker.outlet.read(100 * size))

    def lose_worker(self, which, _):
        worker = self.worker(which)
        worker.outlet.outbox = b""
        self.from_worker(worker, worker.outlet.everything())
        del self.workers[worker.key]
        self.act(self.dispatcher.worker_lost(worker.key, "died", self.now))
        if not self.workers:
            self.add_worker()

    def kill_arbiter(self, *_):
        for client in self.clients:
            if client.up is not None:
                self.to_client(client, client.down.everything())
                self.lose(client, "the arbiter died")
        self.boot()

    # The end.

    def settle(self):
        """Everything that is under way arrives; all ends."""
        for _ in range(1000):
            quiet = True
            for client in self.clients:
                if client.mux.phase is mux.Phase.LEAVING:
                    self.lose_link(self.clients.index(client), 10**9)
                self.connect(self.clients.index(client), 0)
                for pipe, deliver in ((client.up, self.from_client), (client.down, self.to_client)):
                    quiet = quiet and pipe.empty
                    deliver(client, pipe.everything())
                self.read_lanes(client)
                for caller in client.callers:
                    while caller.call.chunks and not caller.cancelled:
                        client.take(caller)
                        quiet = False
            for worker in self.workers.values():
                quiet = quiet and worker.inbox.empty and worker.outlet.empty and not worker.tasks
                worker.frames(worker.inbox.everything())
                for _ in range(5):
                    for task in range(len(worker.tasks)):
                        worker.work(task)
                self.from_worker(worker, worker.outlet.everything())
            if quiet:
                return
        raise AssertionError("calls are left that never end")

    def check(self):
        assert_empty(self.dispatcher)
        for client in self.clients:
            assert client.mux.pending == 0
            for caller in client.callers:
                self.check_caller(caller)

    def check_caller(self, caller):
        call, body = caller.call, b"<%d>" % caller.number
        runs = self.runs[body]
        assert runs <= 1, "it ran twice"
        whole = [body + b":%d:" % to_go for to_go in range(80, 0, -1)]
        seen = [chunk.rstrip(b"x") for chunk in caller.chunks]
        assert seen == whole[: len(seen)], "chunks of another, lost or out of order"
        if caller.cancelled:
            assert call.last is None and call.fault["error_type"] == "DirtyCancelledError"
            assert call.fault["details"]["may_have_run"] or not runs
        elif call.fault is not None:
            assert call.last is None
            assert call.fault["details"]["may_have_run"] or not runs
            assert body not in self.answered, "it was answered by a lane"
        elif call.last.kind == wire.RESPONSE:
            assert call.last.payload == body and runs == 1
            assert len(seen) == (80 if call.stream else 0)
        else:
            assert call.last.kind == wire.ERROR
            assert body not in self.answered, "it was answered by a lane"
            fault = eval(call.last.payload)
            assert fault["error_type"] == "DirtyWorkerDiedError" and fault["details"]["may_have_run"]


HAPPENINGS = {
    "start": 6,
    "stream": 3,
    "cancel": 2,
    "take": 4,
    "connect": 1,
    "greet": 3,
    "flush_up": 8,
    "read_up": 8,
    "read_down": 8,
    "read_lane": 4,
    "to_worker": 8,
    "work": 8,
    "read_worker": 8,
    "lose_link": 2,
    "lose_worker": 1,
    "add_worker": 1,
    "go_away": 1,
    "kill_arbiter": 1,
}
WEIGHTED = [name for name, weight in HAPPENINGS.items() for _ in range(weight)]
steps = st.tuples(
    st.sampled_from(WEIGHTED),
    st.integers(0, 20),
    st.sampled_from([100_000, 37, 1, 16, 17, 36, 38, 74, 200, 1000, 0]),
)


def happen(system, name, which, size):
    if name in ("start", "stream"):
        system.start(which, name == "stream")
    elif name == "add_worker":
        if len(system.workers) < 3:
            system.add_worker()
    else:
        getattr(system, name)(which, size)


@settings(max_examples=200, deadline=None)
@given(st.lists(steps, min_size=20, max_size=200))
def test_back_to_back(schedule):
    system = System(clients=2)
    for step in schedule:
        happen(system, *step)
    system.settle()
    system.check()


def at_work(stream=False):
    """One call of a client with lanes, which its worker has just begun."""
    system = System(clients=1)
    system.start(0, stream)
    system.flush_up(0, 10**6)
    system.read_up(0, 10**6)
    system.to_worker(0, 10**6)
    (caller,) = system.clients[0].callers
    return system, caller


def test_an_answer_by_a_lane_counts_though_its_worker_has_died_since():
    system, caller = at_work()
    system.work(0, 0)
    system.lose_worker(0, 0)  # which has not told the arbiter
    system.settle()
    system.check()
    assert caller.call.last.kind == wire.RESPONSE


def test_what_a_lane_does_not_take_comes_behind_what_it_took():
    system, caller = at_work(stream=True)
    worker = system.worker(0)
    (lane,) = worker.lanes.values()
    while b"x" * 5000 not in worker.outlet.outbox:
        worker.work(0)
    assert lane.packets
    system.read_worker(0, 10**6)
    system.read_down(0, 10**6)
    system.settle()
    system.check()
    assert len(caller.chunks) == 80


def test_back_to_back_with_nothing_lost():
    """The model itself: without losses every call has its result, streams beyond their window too."""
    system = System(clients=2)
    for which in range(20):
        system.start(which, which % 3 == 0)
    system.settle()
    system.check()
    callers = [caller for client in system.clients for caller in client.callers]
    assert len(callers) == 20
    assert all(caller.call.last.kind == wire.RESPONSE for caller in callers)
    assert sum(len(caller.chunks) for caller in callers) == 7 * 80
