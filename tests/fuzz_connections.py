"""Whole connections against llhttp: the bytes of a client or of a worker through the shard's own classes, in the test's process.

The law is that of tests/fuzz_httphead.py. Here the router is a stub that answers now or later, so that also the order of pipelined
requests, the hand-over to llhttp and the bytes that wait while an answer is made are part of what is compared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

from edge_harness import StubTransport
from fuzz_grammar import cuts
from llhttp_reference import Fields, Message, answers, end_to_end, fields_of, requests

from sglfast import errors, shm
from sglfast._counters import Column
from sglfast._httphead import RequestHead, scan_request
from sglfast._relay import BUSY, CLOSED, IDLE, RouterBase, ShardBase, UpstreamBase
from sglfast.config import ServeConfig
from sglfast.edge.cors import Cors
from sglfast.edge.exchange import Exchange
from sglfast.edge.guard import Guard
from sglfast.edge.request import ENDPOINTS
from sglfast.edge.retry import RetryPolicy
from sglfast.edge.server import ClientConnection
from sglfast.edge.upstream import UpstreamConnection

KNOWN = (b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS")
OURS = (b"host", b"content-length", b"transfer-encoding", b"expect", b"x-sglfast-kv")


_FD, _SEGMENT = shm.create(max_workers=1, max_ranks=64, max_shards=1, capacity_blocks=1)


def _no_mishap(what: str, extra: dict[str, object]) -> None:
    """Whatever comes in, our own code does not fail."""
    raise AssertionError(f"{what}: {extra}")


class StubShard(ShardBase):
    """What connections ask of a shard. `later`: calls that the loop would make; `choices`: requests that wait for a route."""

    def __init__(self, config: ServeConfig, rng: Random) -> None:
        self.configure(config)
        self.column = Column(_SEGMENT, 0)
        self.clients: set[Any] = set()
        self.endpoints = ENDPOINTS
        self.guard = Guard(config)
        self.cors = Cors(config)
        self.has_own_ids = False
        self.max_clients = 1000
        self.is_gated = True  # every request passes `dispatch`
        self.loop = cast(Any, SimpleNamespace(call_soon=lambda call, *args: self.later.append((call, args))))
        self.router = StubRouter(self)
        self.retry = RetryPolicy(ServeConfig(disable_retries=True))
        self.started_s = 0
        self.segment = SimpleNamespace(state=1)
        self.later: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self.choices: deque[Callable[[errors.Reason], None]] = deque()
        self.reasons: list[str] = []
        self.rng = rng
        self.kinds_elsewhere: frozenset[str] = frozenset()
        self.log = cast(Any, SimpleNamespace(error=_no_mishap))

    def count_error(self, reason: errors.Reason) -> None:
        self.reasons.append(reason.code)

    def turn(self) -> bool:
        """Do one thing that waits; whether there was one."""
        if self.later:
            call, args = self.later.popleft()
            call(*args)
        elif self.choices:
            self.choices.popleft()(errors.NO_HEALTHY_WORKERS)
        else:
            return False
        return True


class StubRouter(RouterBase):
    """Refuses every request, now or later."""

    def __init__(self, shard: StubShard) -> None:
        super().__init__(_SEGMENT)
        self._shard = shard
        self.pools: dict[str, Any] = {}
        self.models: list[str] = []
        self.adapters: dict[str, str] = {}

    def refresh(self) -> None:
        pass

    def choose(self, endpoint: object, body: bytes, then: Callable[[errors.Reason], None], is_wanted: object) -> None:
        if self._shard.rng.random() < 0.5:
            then(errors.NO_HEALTHY_WORKERS)
        else:
            self._shard.choices.append(then)


class RecordingConnection(ClientConnection):
    """Notes every request that the connection understood."""

    __slots__ = ("seen",)

    def __init__(self, shard: Any) -> None:
        super().__init__(shard)
        self.seen: list[tuple[RequestHead, bytes]] = []

    def dispatch(self, head: RequestHead, body: bytes) -> None:
        self.seen.append((head, body))
        super().dispatch(head, body)


_CONFIG = ServeConfig(max_payload_size=1 << 20)
_SMALL = ServeConfig(max_payload_size=8, max_header_bytes=1024)


def plain_target(target: bytes) -> bytes:
    """The origin form of a target."""
    if not target.startswith((b"/", b"*")):
        parts = urlsplit(target)
        target = (parts.path or b"/") + (b"?" + parts.query if parts.query else b"")
    return target.partition(b"#")[0]


def facts(message: Message) -> tuple[bytes, bytes, Fields, bytes]:
    """What must reach a worker of a request that llhttp read."""
    kept = [(name, value) for name, value in end_to_end(message.headers, *OURS) if name.lower() != b"x-request-id" or value]
    method = message.method if message.method in KNOWN else b"DELETE"  # any method that no path takes
    return method, plain_target(message.target), kept, message.body


def check_connection(data: bytes, rng: Random) -> str:
    """What the shard understands of a client's bytes must be the beginning of what llhttp reads, and nothing may be left lying."""
    if b"proxy-connection" in data.lower():
        return "left out"  # llhttp reads it like Connection and stops; it is nobody's standard and we drop it
    shard = StubShard(_SMALL if rng.random() < 0.1 else _CONFIG, rng)
    connection = RecordingConnection(shard)
    transport = StubTransport()
    connection.connection_made(transport)
    for piece in cuts(rng, data):
        connection.data_received(piece)
        while rng.random() < 0.5 and shard.turn():
            pass
    while shard.turn():
        pass
    expected = requests(data)
    if any(name.lower() == b"connection" for message in expected.messages for name, _ in message.trailers):
        return "left out"  # llhttp obeys it; a trailer is no header (RFC 9110 6.5.1)
    ours = [(head.method, head.target, fields_of(head.kept), body) for head, body in connection.seen]
    theirs = [facts(message) for message in expected.complete[: len(ours)]]
    assert ours == theirs, f"requests differ:\n  ours   {ours}\n  llhttp {theirs} {expected.error}"
    codings = [message.values(b"transfer-encoding") for message in expected.complete[: len(ours)]]
    assert all(not coding or (len(coding) == 1 and coding[0].lower() == b"chunked") for coding in codings), f"not understood: {codings}"
    assert connection.state != BUSY
    if not any(head.method == b"HEAD" for head, _ in connection.seen):  # llhttp would look for the bodies of their answers
        written = answers(transport.written)
        assert not written.error, f"our own answers are malformed: {written.error}: {transport.written!r}"
    if connection.state == CLOSED:
        assert transport.is_closed or transport.has_eof
        return "closed after " + (shard.reasons[-1] if shard.reasons else "an answer")
    waiting = len(expected.complete) - len(ours)
    assert not waiting, f"{waiting} complete requests are not answered: state {connection.state}, pending {connection.pending!r}"
    connection.connection_lost(None)
    return f"open after {min(len(ours), 3)}"


class RecordingExchange(Exchange):
    """Notes how its answer ended."""

    __slots__ = ("failure",)
    failure: str

    def on_malformed(self, connection: UpstreamConnection) -> None:
        self.failure = "malformed"

    def on_lost(self, connection: UpstreamConnection) -> None:
        self.failure = "lost"

    @property
    def end(self) -> str:
        assert not (self.failure and self.is_over)
        return "complete" if self.is_over else self.failure


class StubUpstream(UpstreamBase):
    """The connections to one worker, without a pool."""

    def __init__(self, shard: StubShard) -> None:
        self.shard = shard
        self.idle = []
        self.open_count = 0

    def forget(self, connection: object) -> None:
        pass


def check_upstream(data: bytes, rng: Random) -> str:
    """What is relayed of a worker's bytes must be its answer as llhttp reads it: the same bytes, the same end."""
    shard = StubShard(_CONFIG, rng)
    connection, client = UpstreamConnection(cast(Any, StubUpstream(shard))), ClientConnection(cast(Any, shard))
    transport, sent = StubTransport(), StubTransport()
    connection.connection_made(transport)
    client.connection_made(sent)
    head = scan_request(b"POST / HTTP/1.0\r\n\r\n" if rng.random() < 0.3 else b"POST / HTTP/1.1\r\nhost: a\r\n\r\n", 1024)
    exchange = client.exchange = RecordingExchange(client, ENDPOINTS[b"/generate"], cast(RequestHead, head), b"")
    exchange.failure = ""
    exchange.on_connected(connection)
    for piece in cuts(rng, data):
        if transport.is_closed:
            break
        connection.data_received(piece)
    reference = answers(data)
    final = next((message for message in reference.messages if message.status >= 200 and message.has_head), None)
    body = b""
    if any(0 < message.status < 200 and not (message.is_complete and message.keeps_alive) for message in reference.messages):
        return "odd 1xx"  # llhttp reads nothing behind one that closes, and a body where one claims chunks; there is none
    if exchange.has_answer:
        assert final is not None, f"we hand on a head that llhttp does not take: {reference.error}"
        assert exchange.status == final.status
        opening, _, relayed = sent.written.partition(b"\r\n\r\n")
        if exchange.decodes_chunks or b"\r\ntransfer-encoding:" not in opening.lower():
            body = relayed
        else:
            assert relayed in data, "relayed bytes are not the worker's"
            body = answers(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + relayed).messages[0].body
        assert final.body.startswith(body), f"body differs: {body!r} {final.body!r}"
    if exchange.end == "complete":
        assert final is not None
        assert final.is_complete, f"we end an answer that llhttp does not: {reference.error}"
        assert body == final.body
        assert connection.state == IDLE
    elif exchange.end == "":
        is_complete = final is not None and final.is_complete
        assert not is_complete, "we wait for an answer that is complete"
        connection.connection_lost(None)
        return f"waits, then {exchange.end}"
    return exchange.end
