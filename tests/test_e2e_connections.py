"""One shard with thousands of idle connections and hundreds of slow clients: what each costs, how each ends, others notice nothing.

How the latency of normal requests bears it is measured by bench/connections.py. Where few descriptors are allowed, fewer take part.
"""

import contextlib
import resource
import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from edge_harness import Edge, settled, wait_until
from raw_client import Client, post, request
from scripted_worker import SSE_HEAD, Call, Worker, answer

from sglfast import _counters as c
from sglfast.errors import REASON_INDEX, REQUEST_TIMEOUT

pytestmark = pytest.mark.alone

HEALTH = request("GET", "/health")
IDLE_BYTES = 10_000  # of an idle connection at most, in the shard's own memory
SLOW_OF_A_KIND = 100
LARGE = b"x" * (8 << 20)


@pytest.fixture(scope="module")
def many_files() -> Iterator[int]:
    """Descriptors that this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def worker(many_files: int) -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def shard(worker: Worker) -> Iterator[Edge]:
    with Edge([worker], header_timeout_secs=3.0, body_timeout_secs=3.0, send_timeout_secs=4.0) as edge:
        yield edge


def connect(port: int, rcvbuf_bytes: int = 0) -> socket.socket:
    sock = socket.socket()
    if rcvbuf_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf_bytes)
    sock.settimeout(8.0)
    sock.connect(("127.0.0.1", port))
    return sock


@contextlib.contextmanager
def idle_connections(edge: Edge, count: int) -> Iterator[None]:
    """So many; every second one has been used."""
    with contextlib.ExitStack() as held:
        opened = [held.enter_context(connect(edge.port)) for _ in range(count)]
        for sock in opened[::2]:
            sock.sendall(HEALTH)
        for sock in opened[::2]:
            assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: edge.word(c.S_CONNECTIONS) == count, "all are in")
        yield
        assert edge.word(c.S_CONNECTIONS) >= count, "nobody was sent away"


def test_memory_of_idle_connections(shard: Edge, worker: Worker, many_files: int) -> None:
    count = min(10_000, many_files // 2)
    with settled(shard):
        with idle_connections(shard, 100):
            pass
        wait_until(lambda: shard.word(c.S_CONNECTIONS) == 0, "all have left")
        before_bytes = shard.rss_bytes()
        with idle_connections(shard, count):
            first_bytes = shard.rss_bytes()
            assert first_bytes - before_bytes < IDLE_BYTES * count
            with shard.client() as normal:
                assert [normal.ask(post(b"%d" % n)).body for n in range(100)] == [b"%d" % n for n in range(100)]
            before_s = shard.cpu_s()
            time.sleep(1.0)
            assert shard.cpu_s() - before_s < 0.3, "looking at idle connections is next to nothing"
        wait_until(lambda: shard.word(c.S_CONNECTIONS) == 0, "all have left")
        with idle_connections(shard, count):
            assert shard.rss_bytes() - first_bytes < IDLE_BYTES / 5 * count, "memory of those who left is used again"


class Slow:
    """A slow client. It sends `rest` byte by byte, or reads nothing; `answer` is what it got, None while it is in."""

    def __init__(self, port: int, kind: str) -> None:
        self.kind = kind
        self.is_reader = kind in ("large", "stream")
        self.sock = connect(port, 4096 if self.is_reader else 0)
        self.sock.setblocking(False)
        body = post(b"y" * 10_000)
        opening = {"head": b"", "body": body[:-9_999], "large": post(b"large"), "stream": post(b"stream")}[kind]
        self.sock.send(opening)
        self.rest = iter(body[len(opening) :])
        self.answer: bytes | None = None

    def step(self) -> None:
        """Send a byte, and look whether the router has said anything."""
        if not self.is_reader:
            with contextlib.suppress(ConnectionError):
                self.sock.send(bytes([next(self.rest)]))

    def look(self) -> None:
        """What there is to read is the end."""
        try:
            self.answer = self.sock.recv(4096)
        except ConnectionError:
            self.answer = b""


def answers(call: Call) -> None:
    """Large answers and streams without end for those who ask for them, else an echo."""
    if call.body == b"stream":
        call.send(SSE_HEAD)
        while True:
            call.send(b"4000\r\n" + LARGE[:0x4000] + b"\r\n")
    call.send(answer(LARGE if call.body == b"large" else call.body))


def test_slow_clients_are_cut_and_others_are_served(shard: Edge, worker: Worker) -> None:
    worker.plan(answers)
    timeouts = c.S_REASONS + REASON_INDEX[REQUEST_TIMEOUT.code]
    with settled(shard), contextlib.ExitStack() as held, selectors.DefaultSelector() as selector:
        timeouts_before, gone_before = shard.word(timeouts), shard.word(c.S_CLIENT_GONE)
        held.enter_context(idle_connections(shard, 500))
        slow = [Slow(shard.port, kind) for kind in ("head", "body", "large", "stream") for _ in range(SLOW_OF_A_KIND)]
        for each in slow:
            held.callback(each.sock.close)
        senders = [each for each in slow if not each.is_reader]
        for each in senders:
            selector.register(each.sock, selectors.EVENT_READ, each)
        normal: Counter[bytes] = Counter()
        client = held.enter_context(shard.client())
        end_s = time.monotonic() + 30
        while selector.get_map() and time.monotonic() < end_s:
            for each in senders:
                if each.answer is None:
                    each.step()
            for _ in range(20):
                normal[client.ask(post(b"1")).body] += 1
            for key, _ in selector.select(0.1):
                key.data.look()
                selector.unregister(key.fileobj)
        outcomes = Counter((each.kind, (each.answer or b"")[:12]) for each in senders)
        assert outcomes == {(kind, b"HTTP/1.1 408"): SLOW_OF_A_KIND for kind in ("head", "body")}
        assert shard.word(timeouts) - timeouts_before == 2 * SLOW_OF_A_KIND
        wait_until(lambda: shard.word(c.S_CLIENT_GONE) - gone_before == 2 * SLOW_OF_A_KIND, "readers are cut", 20.0)
        assert set(normal) == {b"1"}
        assert client.ask(post(b"last")).body == b"last"


def test_a_reader_that_goes_on_is_not_cut(shard: Edge, worker: Worker) -> None:
    """Slower than the time for sending allows in all, but it moves."""
    worker.plan(answers)
    with settled(shard), Client(shard.port, 4096) as client:
        client.send(post(b"large"))
        begun_s, got = time.monotonic(), 0
        while time.monotonic() - begun_s < 8.0:
            got += len(client.sock.recv(2048))
            time.sleep(0.05)
        assert got > 100_000
        found = len(client.read_exactly(len(LARGE) - got))
        assert found == len(LARGE) - got
