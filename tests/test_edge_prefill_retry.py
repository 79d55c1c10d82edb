"""sglfast.edge.prefill_leg and retry: a pair that fails is followed by another, at other workers, as long as the client has had no byte."""

import time
from collections.abc import Iterator

import pytest
from edge_harness import Edge, Memory, run, settled, shard_in_loop, stub_client, wait_until
from pair_scripts import SENT, Half, Hang, after, after_other, fields, once_computed, rid_of, room_of, stream, unloaded, was_aborted
from raw_client import post
from scripted_worker import SSE_HEAD, Call, RefusingPort, Script, Worker, answer, echoes, says

from sglfast import _counters as c
from sglfast import _workers
from sglfast._breaker import CLAIMED, HALF_OPEN, Breakers
from sglfast.edge.exchange import Exchange
from sglfast.edge.pools import Route
from sglfast.edge.upstream import Upstream

QUICK = {"disable_retries": False, "retry_initial_backoff_ms": 5, "retry_max_backoff_ms": 20, "takes_rid": True}
TWO_PAIRS = ["prefill", "prefill", "decode", "decode"]
DONE = says(answer(b"{}"))


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    workers = [Worker(name) for name in ("prefill 1", "prefill 2", "decode 1", "decode 2")]
    yield workers
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def shard_of_two_pairs(workers: list[Worker]) -> Iterator[Edge]:
    with Edge(workers, roles=TWO_PAIRS, **QUICK) as edge:  # type: ignore[arg-type]
        yield edge


@pytest.fixture
def halves(workers: list[Worker]) -> list[Half]:
    halves = [Half(worker) for worker in workers]
    for half in halves[:2]:
        half.does(DONE)
    for half in halves[2:]:
        half.does(echoes)
    return halves


@pytest.fixture
def edge(shard_of_two_pairs: Edge, halves: list[Half]) -> Iterator[Edge]:
    with settled(shard_of_two_pairs):
        yield shard_of_two_pairs
        wait_until(lambda: not shard_of_two_pairs.inflight(), "each half has ended")


def first_fails(halves: list[Half], script: Script, then: Script) -> None:
    """Whichever of these two is asked first fails so; from then on both do the other thing."""
    taken: list[Half] = []

    def once(call: Call) -> None:
        taken.append(halves[0])
        script(call) if len(taken) == 1 else then(call)

    for half in halves:
        half.does(once)


PREFILL_FAILS: dict[str, Script] = {
    "resets": Call.reset,
    "closes": Call.close,
    "500": says(answer(b"no", status="500 No")),
    "503": says(answer(b"no", status="503 Busy")),
    "429": says(answer(b"no", status="429 Too Many Requests")),
}


@pytest.mark.parametrize("head", [b"", SSE_HEAD], ids=["silent", "head"])
@pytest.mark.parametrize("name", PREFILL_FAILS)
def test_another_prefill_worker_is_tried(name: str, head: bytes, edge: Edge, halves: list[Half]) -> None:
    """Also when the decode worker has begun a stream: the client has not seen its head."""
    hang = Hang(head)
    decodes = halves[2:]
    first_fails(halves[:2], after(lambda: decodes[0].calls or decodes[1].calls, PREFILL_FAILS[name]), DONE)
    first_fails(decodes, hang, echoes)
    retries = edge.word(c.S_RETRIES)
    found = edge.ask(post(SENT))
    assert (found.status, found.code) == (200, None)
    hang.wait()
    firsts = [half.wait_calls(1) for half in halves[:2]]
    assert [len(calls) for calls in firsts] == [1, 1], "the one that failed is not asked again"
    ((first,), (second,)) = firsts
    seconds = [*decodes[0].calls, *decodes[1].calls]
    assert len(seconds) == 2
    assert {room_of(call) for call in seconds} == {room_of(first), room_of(second)}
    assert room_of(first) != room_of(second)
    assert {fields(call)["bootstrap_port"] for call in (first, second)} == {8900, 8901}
    assert len({rid_of(call) for call in seconds}) == 2
    assert edge.word(c.S_RETRIES) == retries + 1
    wait_until(lambda: any(half.aborted for half in decodes), "it is told to end its request")
    (told,) = (half for half in decodes if half.aborted)
    assert told.aborted == [next(rid_of(call) for call in seconds if room_of(call) != fields_of_answer(found.body))]


def fields_of_answer(body: bytes) -> object:
    import orjson

    return orjson.loads(body)["bootstrap_room"]


@pytest.mark.parametrize("name", PREFILL_FAILS)
def test_another_decode_worker_is_tried_with_the_same_prefill_worker(name: str, edge: Edge, halves: list[Half]) -> None:
    """It has the prompt in its cache by then."""
    firsts = halves[:2]
    hang = Hang()
    first_fails(firsts, hang, DONE)
    first_fails(halves[2:], after(lambda: firsts[0].calls or firsts[1].calls, PREFILL_FAILS[name]), echoes)
    found = edge.ask(post(SENT))
    assert (found.status, found.code) == (200, None)
    hang.wait()
    assert [len(half.wait_calls(1)) for half in halves[2:]] == [1, 1]
    (asked,) = (half for half in firsts if half.calls)
    asked.wait_calls(2)
    assert len({rid_of(call) for call in asked.calls}) == 2
    assert len({room_of(call) for call in asked.calls}) == 2
    was_aborted(asked)
    assert found.header("x-sgl-decode-url") == [
        next(half for half in halves[2:] if room_of(half.calls[0]) == fields_of_answer(found.body)).url.encode()
    ]


def test_when_all_attempts_fail_the_last_cause_is_told(edge: Edge, halves: list[Half]) -> None:
    for half in halves[:2]:
        half.does(after_other(halves[:2], halves[2:], says(answer(b"no", status="500 No"))))
    hang = Hang()
    for half in halves[2:]:
        half.does(hang)
    found = edge.ask(post(SENT))
    assert (found.status, found.code) == (502, "prefill_failed")
    assert sum(len(half.calls) for half in halves[:2]) == 5
    wait_until(lambda: sum(len(half.aborted) for half in halves[2:]) == sum(len(half.calls) for half in halves[2:]), "each is told")


def test_a_busy_pair_is_the_client_s_to_wait_for(edge: Edge, halves: list[Half]) -> None:
    hang = Hang()
    for half in halves[:2]:
        half.does(after_other(halves[:2], halves[2:], says(answer(b"wait", "retry-after: 7", status="429 Busy"))))
    for half in halves[2:]:
        half.does(hang)
    errors = [edge.worker_word(row, c.W_ERRORS) for row in range(4)]
    found = edge.ask(post(SENT))
    assert (found.status, found.body, found.header("retry-after")) == (429, b"wait", [b"7"])
    assert [edge.worker_word(row, c.W_ERRORS) for row in range(4)] == errors
    wait_until(lambda: sum(len(half.aborted) for half in halves[2:]) == sum(len(half.calls) for half in halves[2:]), "each is told")


def test_no_second_pair_behind_the_first_byte(edge: Edge, halves: list[Half]) -> None:
    sends: list[int] = []
    for half in halves[:2]:
        half.does(after(lambda: sends, Call.close))
    for half in halves[2:]:
        half.does(stream(b"data: 1\n\n", end=False))
    with edge.client() as client:
        client.send(post(SENT))
        client.read_until(b"data: 1\n\n")
        sends.append(1)
        assert b"prefill_failed" in client.read_to_end()
    assert sum(len(half.calls) for half in halves) == 2
    wait_until(lambda: halves[2].aborted or halves[3].aborted, "it is told")


@pytest.mark.parametrize("roles", [["prefill", "prefill", "decode"], ["prefill", "decode", "decode"]])
def test_a_worker_that_refuses_connections_costs_no_request(roles: list[str], workers: list[Worker], halves: list[Half]) -> None:
    port = RefusingPort()
    is_prefill = roles[1] == "prefill"
    live = [workers[0], workers[2]]
    halves[2].does(once_computed(halves[:1]))
    with Edge([live[0], port, live[1]] if is_prefill else [*live, port], roles=roles, **QUICK) as edge, settled(edge):  # type: ignore[arg-type]
        edge.allowed_log = ("cannot be reached",)
        for _ in range(20):
            assert edge.ask(post(SENT)).status == 200
        unloaded(edge)
        assert edge.word(c.S_RETRIES) > 0
        wait_until(
            lambda: all(len(half.aborted) <= len(half.calls) for half in (halves[0], halves[2])), "aborts are of requests that were sent"
        )
        time.sleep(0.2)  # the last of them
    port.close()


# ---- beside regular workers ----


def test_a_regular_worker_takes_what_a_pair_could_not(workers: list[Worker], halves: list[Half]) -> None:
    halves[0].does(after_other(halves[:1], halves[2:3], Call.close))
    halves[1].does(echoes)
    hang = Hang()
    halves[2].does(hang)
    with Edge(workers[:3], roles=["prefill", "regular", "decode"], **QUICK) as edge, settled(edge):  # type: ignore[arg-type]
        for _ in range(4):
            found = edge.ask(post(SENT))
            assert (found.status, found.header("x-sgl-decode-url")) == (200, [])
            assert b"bootstrap" not in found.body, "the body is as it was"
        assert [len(half.calls) for half in halves[:3]] == [2, 4, 2]
        assert all(call.header("x-sgl-decode-url") == [] for call in halves[1].calls)
        wait_until(lambda: len(halves[2].aborted) == 2, "each is told")


def test_a_pair_takes_what_a_regular_worker_could_not(workers: list[Worker], halves: list[Half]) -> None:
    halves[1].does(Call.close)
    with Edge(workers[:3], roles=["prefill", "regular", "decode"], **QUICK) as edge, settled(edge):  # type: ignore[arg-type]
        for _ in range(4):
            found = edge.ask(post(SENT))
            assert (found.status, found.header("x-sgl-decode-url")) == (200, [halves[2].url.encode()])
        unloaded(edge)


# ---- health checks ----


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_pair_that_waits_for_an_unhealthy_worker_goes_to_another(side: str, edge: Edge, halves: list[Half]) -> None:
    hangs = Hang(), Hang()
    first_fails(halves[:2], hangs[0], DONE)
    first_fails(halves[2:], hangs[1], echoes)
    with edge.client() as client:
        client.send(post(SENT))
        wait_until(lambda: any(half.calls for half in halves[:2]) and any(half.calls for half in halves[2:]), "both are asked")
        rows = range(2) if side == "prefill" else range(2, 4)
        (row,) = (row for row in rows if halves[row].calls)
        errors = edge.worker_word(row, c.W_ERRORS)
        edge.table.set_state(row, _workers.UNHEALTHY)
        assert client.read_answer().status == 200
        for hang in hangs:
            hang.wait()
        assert edge.worker_word(row, c.W_ERRORS) == errors + 1
    edge.table.set_state(row, _workers.READY)
    wait_until(lambda: sum(len(half.aborted) for half in halves) == 2, "both are told")


# ---- in this process: claims, and connections that come too late ----


@pytest.mark.parametrize(
    ("busy", "sent_then"), [(1, [("Exchange", 2), ("PrefillLeg", 0)]), (0, [("Exchange", 3)])], ids=["decode", "prefill"]
)
def test_a_probe_is_claimed_for_both_or_for_none(busy: int, sent_then: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker's probe is another request's: nothing is sent to the other one of the pair, whose probe is free again."""
    memory = Memory([f"http://10.0.0.{n}:1" for n in range(4)], roles=["prefill", "decode", "decode", "regular"])

    async def inside() -> None:
        settings = {"disable_circuit_breaker": False, "cb_failure_threshold": 1, "cb_timeout_duration_secs": 0.1}
        shard = shard_in_loop(memory, policy="round_robin", **settings)
        now_s = shard.loop.time()
        table = Breakers(memory.segment, 0, failure_threshold=1, success_threshold=1, open_secs=0.1, window_secs=60.0)
        for row in (0, 1):
            table.failed(row, 1, False, now_s - 1.0)
            table.wake(row, now_s)
        shard.router.refresh()
        pool = shard.router.pools["demo"]
        assert pool.decodes is not None
        prefill, decode = pool.upstreams[0], pool.decodes.upstreams[0]
        assert prefill.needs_probe
        assert decode.needs_probe
        sent: list[tuple[str, int]] = []
        monkeypatch.setattr(Upstream, "open", lambda upstream, leg: sent.append((type(leg).__name__, upstream.worker_idx)))
        assert table.claim(busy, 1) == CLAIMED, "by somebody else"
        client, _ = stub_client(shard)
        exchange = client.exchange = Exchange(client, next(iter(shard.endpoints.values())), head_of(), b"{}")
        first = Route(pool, prefill, 0)
        exchange.send(Route(pool, decode, 16, prefill=first))
        assert table.state(0) == HALF_OPEN
        assert sent == sent_then
        if busy == 1:
            assert table.claim(0, 1) != CLAIMED, "it is the probe, with another decode worker"
        exchange.cancel()
        assert table.claim(1 - busy, 1) == CLAIMED, "its probe was given back"
        assert not memory.inflight()

    run(inside())


def head_of() -> object:
    from sglfast._httphead import RequestHead, scan_request

    head = scan_request(post(b"{}"), 65536)
    assert isinstance(head, RequestHead)
    return head


def test_a_connection_that_comes_too_late_is_not_written_to(workers: list[Worker], halves: list[Half]) -> None:
    """The prefill half fails while the decode half's connection is being opened: by then the exchange is elsewhere."""
    memory = Memory([worker.url for worker in workers], roles=TWO_PAIRS)  # type: ignore[arg-type]

    async def inside() -> None:
        shard = shard_in_loop(memory)
        shard.router.refresh()
        pool = shard.router.pools["demo"]
        assert pool.decodes is not None
        client, transport = stub_client(shard)
        exchange = client.exchange = Exchange(client, next(iter(shard.endpoints.values())), head_of(), b"{}")
        decode = pool.decodes.upstreams[0]
        exchange.send(Route(pool, decode, 16, prefill=Route(pool, pool.upstreams[0], 0)))
        leg = exchange.pair
        assert leg is not None
        assert len(decode._tasks) == 1
        leg.on_unreachable(ConnectionRefusedError())  # before the loop has opened anything
        assert b"prefill_failed" in transport.take()
        for upstream in (decode, pool.upstreams[0]):
            for task in list(upstream._tasks):
                await task
            assert len(upstream.idle) == 1, "it is kept for the next request"
            upstream.close()
        assert not memory.inflight()
        assert shard.prefill_legs == set()

    run(inside())
    assert not any(half.calls for half in halves)
    for worker in workers:
        worker.reset()
