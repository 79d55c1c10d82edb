"""sglfast.edge.explain: what a request would get, without sending or counting it."""

from array import array
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from edge_harness import Memory, StubTransport, run, shard_in_loop, stub_client
from raw_client import post, request

from sglfast import _counters as c
from sglfast import _workers
from sglfast._counters import Column
from sglfast._hashtree import DEVICE, HOST, TreeWriter
from sglfast.edge.breaker import NO_PROBE
from sglfast.edge.overlap import look_up
from sglfast.edge.request import Facts
from sglfast.edge.server import ClientConnection
from sglfast.edge.shard import Shard
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH
from sglfast.shm import Variant

ENGINES = [f"http://10.0.0.{number}:30000" for number in range(1, 5)]
KEYS = array("Q", range(1000, 1020)).tobytes()
HEALTH = request("GET", "/health")


class FixedKeyer:
    """Finds 20 blocks of 64 tokens in every body; with `is_late` when the test says so."""

    def __init__(self, *, is_late: bool = False) -> None:
        self.is_late = is_late
        self.waiting: list[Callable[[], None]] = []

    def key(self, kind: int, body: bytes, variants: object, then: Callable[[Facts], None], is_whole: bool = False, **_: object) -> None:
        facts = Facts(1300, {Variant(64): KEYS})
        if self.is_late:
            self.waiting.append(lambda: then(facts))
        else:
            then(facts)


def connected(memory: Memory, test: Callable[[Shard, ClientConnection, StubTransport], None], keyer: Any = None, **settings: Any) -> None:
    async def inside() -> None:
        shard = shard_in_loop(memory, keyer, **settings)
        test(shard, *stub_client(shard))

    run(inside())


def explained(connection: ClientConnection, transport: StubTransport, body: bytes = b"{}") -> tuple[int, Any]:
    """(status, body) of the answer to an explain request."""
    connection.data_received(post(body, target="/explain/v1/chat/completions"))
    head, _, found = transport.take().partition(b"\r\n\r\n")
    assert b"content-length: %d\r\n" % len(found) in head
    return int(head[9:12]), orjson.loads(found)


def test_candidates_and_choice_under_cache_aware() -> None:
    memory = Memory(ENGINES, block_size=64)
    writer = TreeWriter(memory.segment)
    writer.store(0, DEVICE.bit_length() - 1, KEYS[:80])
    writer.store(1, DEVICE.bit_length() - 1, KEYS[:40])
    writer.store(1, HOST.bit_length() - 1, KEYS[:120])
    writer.store(3, DEVICE.bit_length() - 1, KEYS[:96])
    memory.table.set_state(3, _workers.UNHEALTHY)
    Column(memory.segment, 0).begin(2, 100, 0, 0)

    def test(shard: Shard, connection: ClientConnection, transport: StubTransport) -> None:
        before = [memory.totals.shard(), *(memory.totals.worker(worker_idx) for worker_idx in range(4))]
        status, found = explained(connection, transport)
        assert status == 200
        assert (found["model"], found["policy"], found["block_size"], found["prompt_tokens"]) == ("demo", "cache_aware", 64, 1300)
        assert found["choice"] == {"worker": ENGINES[1], "rank": 0, "decision": "cache_hit"}
        rows = {row["worker"]: row for row in found["candidates"]}
        assert [rows[url]["overlap_blocks"] for url in ENGINES] == [10, 15, 0, 12], "of those that cannot be chosen, too"
        assert rows[ENGINES[3]]["overlap_blocks_by_tier"] == {"device": 12, "host": 0, "disk": 0, "predicted": 0}
        assert rows[ENGINES[1]]["overlap_blocks_by_tier"] == {"device": 5, "host": 15, "disk": 0, "predicted": 0}
        assert [rows[url]["score"] for url in ENGINES] == [1300 - 640, 1300 - 960, 1400, None]
        assert [rows[url]["eligible"] for url in ENGINES] == [True, True, True, False]
        assert rows[ENGINES[2]]["load"] == {"requests": 1, "tokens": 100}
        after = [memory.totals.shard(), *(memory.totals.worker(worker_idx) for worker_idx in range(4))]
        before[0][c.S_RESPONSES_2XX] += 1
        assert before == after, "nothing but the answer is counted"

    connected(memory, test, FixedKeyer(), policy="cache_aware", tokenizer_path=DEMO_TOKENIZER_PATH)


def test_a_turn_of_round_robin_is_not_used_up() -> None:
    def test(shard: Shard, connection: ClientConnection, transport: StubTransport) -> None:
        shard.router.refresh()
        choices = {explained(connection, transport)[1]["choice"]["worker"] for _ in range(5)}
        assert len(choices) == 1
        policy = shard.router.pools["demo"].policy
        position, _ = policy.choose(
            shard.router.pools["demo"].view, shard.loads, look_up(shard.tree, shard.router.pools["demo"], Facts(0, {}))
        )
        assert choices == {ENGINES[position]}

    connected(Memory(ENGINES), test)


def test_refusals() -> None:
    memory = Memory(ENGINES[:2], models=["a", "b"])

    def test(shard: Shard, connection: ClientConnection, transport: StubTransport) -> None:
        for body, code in ((b'{"model":"c"}', (404, "model_not_found")), (b"{}", (400, "missing_model"))):
            status, found = explained(connection, transport, body)
            assert (status, found["error"]["code"]) == code
        for path, expected in (("/explain/v1/models", 404), ("/explain", 404), ("/explain/", 404)):
            connection.data_received(post(target=path))
            assert int(transport.take()[9:12]) == expected
        connection.data_received(request("GET", "/explain/generate"))
        assert b"405 Method Not Allowed" in transport.take()
        connection.data_received(HEALTH)
        assert transport.take().endswith(b"OK"), "the connection goes on"

    connected(memory, test)


def whys(found: Any) -> dict[str, str]:
    """Last part of a candidate's address -> why it cannot be chosen; checks that none can."""
    assert found["choice"] is None
    assert not any(row["eligible"] for row in found["candidates"])
    return {row["worker"][14:15]: row["why"] for row in found["candidates"]}


def test_without_a_healthy_worker_all_are_shown_with_what_they_hold() -> None:
    memory = Memory(ENGINES, block_size=64, models=["demo", "demo", "demo", "other"])
    TreeWriter(memory.segment).store(1, DEVICE.bit_length() - 1, KEYS[:80])
    for worker_idx, state in enumerate((_workers.UNHEALTHY, _workers.DRAINING, _workers.JOINING)):
        memory.table.set_state(worker_idx, state)

    def test(shard: Shard, connection: ClientConnection, transport: StubTransport) -> None:
        status, found = explained(connection, transport, b'{"model":"demo"}')
        assert status == 200
        assert whys(found) == {
            "1": "fails its health checks",
            "2": "is draining: it finishes its requests and takes no new ones",
            "3": "has not passed a health check yet",
        }
        assert [row["overlap_blocks"] for row in found["candidates"]] == [0, 10, 0]
        assert (found["model"], found["policy"], found["prompt_tokens"], found["prompt_blocks"]) == ("demo", "cache_aware", 1300, 20)
        real = refused(connection, transport, b'{"model":"demo"}')
        assert found["would_answer"] == real | {"after_secs": 0.0}
        assert (real["status"], real["code"]) == (503, "no_healthy_workers")
        assert explained(connection, transport, b'{"model":"c"}')[0] == 404, "a model that nobody knows is still unknown"

    connected(memory, test, FixedKeyer(), policy="cache_aware", tokenizer_path=DEMO_TOKENIZER_PATH)


def refused(connection: ClientConnection, transport: StubTransport, body: bytes = b"{}") -> dict[str, Any]:
    """What a real request gets."""
    connection.data_received(post(body))
    head, _, found = transport.take().partition(b"\r\n\r\n")
    error = orjson.loads(found)["error"]
    return {"status": int(head[9:12]), "code": error["code"], "message": error["message"]}


def test_without_any_worker() -> None:
    memory = Memory(ENGINES[:1])
    memory.table.remove(0)

    def test(shard: Shard, connection: ClientConnection, transport: StubTransport) -> None:
        status, found = explained(connection, transport)
        assert (status, found["candidates"], found["choice"], found["model"]) == (200, [], None, None)
        assert found["would_answer"] == refused(connection, transport) | {"after_secs": 0.0}

    connected(memory, test)


def test_all_circuits_open() -> None:
    memory = Memory(ENGINES[:3])
    memory.table.set_state(2, _workers.UNHEALTHY)

    def test(shard: Shard, connection: ClientConnection, transport: StubTransport) -> None:
        shard.router.refresh()
        for upstream in shard.router.pools["demo"].upstreams:
            shard.breakers.left(upstream, c.W_ERRORS, NO_PROBE)
        status, found = explained(connection, transport)
        assert status == 200
        assert whys(found) == {"1": _CIRCUIT, "2": _CIRCUIT, "3": "fails its health checks"}
        assert found["would_answer"] == refused(connection, transport) | {"after_secs": 0.0}
        assert found["would_answer"]["code"] == "breaker_open"

    connected(memory, test, disable_circuit_breaker=False, cb_failure_threshold=1)


_CIRCUIT = "its circuit is open: its requests have failed"
_IS_FULL = "has as many requests as --worker-max-in-flight lets it"


@pytest.mark.parametrize(
    ("queue_size", "would_answer"),
    [(0, {"status": 429, "code": "queue_full", "after_secs": 0.0}), (9, {"status": 408, "code": "queue_timeout", "after_secs": 7.0})],
)
def test_all_workers_full(queue_size: int, would_answer: dict[str, Any]) -> None:
    memory = Memory(ENGINES[:3])
    memory.table.set_state(2, _workers.DRAINING)
    for worker_idx in range(2):
        Column(memory.segment, 0).begin(worker_idx, 0, 0, 0)

    def test(shard: Shard, connection: ClientConnection, transport: StubTransport) -> None:
        shard.router.refresh()
        status, found = explained(connection, transport)
        assert status == 200
        draining = "is draining: it finishes its requests and takes no new ones"
        assert whys(found) == {"1": _IS_FULL, "2": _IS_FULL, "3": draining}
        assert {key: found["would_answer"][key] for key in would_answer} == would_answer

    connected(memory, test, worker_max_in_flight=1, queue_size=queue_size, queue_timeout_secs=7)


def test_a_full_worker_is_not_the_choice_while_others_have_room() -> None:
    memory = Memory(ENGINES[:3], block_size=64)
    TreeWriter(memory.segment).store(1, DEVICE.bit_length() - 1, KEYS)
    TreeWriter(memory.segment).store(2, DEVICE.bit_length() - 1, KEYS[:120])
    Column(memory.segment, 0).begin(1, 0, 0, 0)

    def test(shard: Shard, connection: ClientConnection, transport: StubTransport) -> None:
        found = explained(connection, transport)[1]
        assert found["choice"] == {"worker": ENGINES[2], "rank": 0, "decision": "failover"}
        assert [(row["eligible"], row["why"]) for row in found["candidates"]] == [
            (True, "was not better than the choice"),
            (False, _IS_FULL),
            (True, "is the best of those that have fewer requests than --worker-max-in-flight"),
        ]
        assert found["would_answer"] is None

    settings = {"policy": "cache_aware", "tokenizer_path": DEMO_TOKENIZER_PATH}
    connected(memory, test, FixedKeyer(), worker_max_in_flight=1, **settings)


def test_workers_whose_model_is_not_known_yet_are_shown_too() -> None:
    memory = Memory(ENGINES[:3], models=["demo", None, "other"])
    memory.table.set_state(1, _workers.JOINING)

    def test(shard: Shard, connection: ClientConnection, transport: StubTransport) -> None:
        for is_ready in (True, False):
            found = explained(connection, transport, b'{"model":"demo"}')[1]
            assert [row["worker"] for row in found["candidates"]] == ENGINES[:2]
            assert (found["choice"] is not None) == is_ready
            memory.table.set_state(0, _workers.UNHEALTHY)

    connected(memory, test)


def test_a_late_explanation() -> None:
    """It comes in its turn; to a client that left it comes nowhere."""
    keyer = FixedKeyer(is_late=True)

    def test(shard: Shard, connection: ClientConnection, transport: StubTransport) -> None:
        sent = post(target="/explain/generate")
        connection.data_received(sent + HEALTH)
        assert transport.take() == b""
        keyer.waiting.pop()()
        assert transport.take().startswith(b"HTTP/1.1 200 OK\r\ncontent-type: application/json")
        connection.go_on()
        assert transport.take().endswith(b"OK")
        connection.data_received(sent)
        connection.connection_lost(None)
        keyer.waiting.pop()()
        assert transport.take() == b""

    connected(Memory(ENGINES, block_size=64), test, keyer, policy="cache_aware", tokenizer_path=DEMO_TOKENIZER_PATH)
