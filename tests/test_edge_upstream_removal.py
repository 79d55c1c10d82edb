"""sglfast.edge.upstream when its worker is removed: what is idle, busy, connecting, and what comes to the slot afterwards."""

import asyncio
from collections.abc import Iterator

import pytest
from edge_harness import Edge, Memory, run, settled, shard_in_loop, stub_client, wait_until
from raw_client import chunk, many, post
from scripted_worker import SSE_HEAD, Call, Worker, answer_head, echoes

from sglfast import _counters as c
from sglfast import _workers


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    workers = [Worker("first"), Worker("second")]
    yield workers
    for worker in workers:
        worker.close()


def test_a_removed_worker_loses_its_connections(workers: list[Worker]) -> None:
    """Control removes a worker that is idle, or to cut what it has: either way nothing is left open."""

    def script(call: Call) -> None:
        call.send(SSE_HEAD + chunk(b"data: 1\n\n"))
        assert call.wait_for_end(5)

    with Edge(workers, policy="least_load") as edge, settled(edge), many(2, edge.port) as clients:
        for worker in workers:
            worker.plan(echoes, script)
        for client in clients:  # one idle connection to each
            client.send(post())
        for client in clients:
            client.read_answer()
        wait_until(lambda: edge.word(c.S_INFLIGHT) == 0, "both are idle")
        clients[0].send(post())
        wait_until(lambda: sum(len(worker.calls) for worker in workers) == 3, "one is busy")
        busy = workers[0] if len(workers[0].calls) == 2 else workers[1]
        position = workers.index(busy)
        edge.table.set_state(position, _workers.FREE)
        edge.table.set_state(1 - position, _workers.FREE)
        wait_until(lambda: workers[1 - position].open_connections == 0, "the idle connection is closed")
        assert clients[1].ask(post()).code == "no_healthy_workers"
        body = clients[0].read_answer().body
        assert body.startswith(b"data: 1\n\n")
        assert b'"code":"upstream_body_incomplete"' in body, "a stream that is cut says so"
        wait_until(lambda: busy.open_connections == 0, "the busy one is closed too")
        assert edge.word(c.S_STREAMS_CUT) == 1


def test_what_waits_for_a_removed_worker_is_not_sent_to_it_again(workers: list[Worker]) -> None:
    """Over a pooled connection, so that its end would be reason to send once more."""

    def script(call: Call) -> None:
        assert call.wait_for_end(5)

    with Edge(workers[:1]) as edge, settled(edge), edge.client() as client:
        assert client.ask(post(b"1")).body == b"1"
        workers[0].plan(script)
        client.send(post(b"2"))
        wait_until(lambda: len(workers[0].calls) == 2, "the request is there")
        edge.table.remove(0)
        found = client.read_answer()
        assert (found.status, found.code) == (502, "upstream_closed")
        assert len(workers[0].calls) == 2
        assert edge.word(c.S_RESENDS) == 0


def test_an_answer_that_only_the_connection_ends_is_not_complete_when_its_worker_is_removed(workers: list[Worker]) -> None:
    def script(call: Call) -> None:
        call.send(answer_head() + b"half of the answer")
        assert call.wait_for_end(5)

    with Edge(workers[:1]) as edge, settled(edge), edge.client() as client:
        workers[0].plan(script)
        client.send(post())
        client.read_until(b"half of the answer")
        edge.table.remove(0)
        wait_until(lambda: edge.word(c.S_STREAMS_CUT) == 1, "it counts as cut")
        assert edge.worker_word(0, c.W_ERRORS) == 1
        assert edge.worker_word(0, c.W_OK) == 0


def test_a_request_that_was_connecting_when_its_worker_was_removed_goes_to_another(workers: list[Worker]) -> None:
    memory = Memory([worker.url for worker in workers[:2]])

    async def inside() -> None:
        shard = shard_in_loop(memory, disable_retries=False)
        client, client_side = stub_client(shard)
        client.data_received(post(b"{}"))
        exchange = client.exchange
        assert exchange is not None
        assert exchange.route is not None
        first = exchange.route.upstream.worker_idx
        memory.table.remove(first)
        shard.router.refresh()
        while not client_side.written:  # noqa: ASYNC110 - real sockets, bounded by `run`
            await asyncio.sleep(0.01)
        assert client_side.written.startswith(b"HTTP/1.1 200 ")
        assert [len(worker.calls) for worker in workers[:2]] == [int(first == 1), int(first == 0)]
        assert memory.worker_word(first, c.W_CONNECTIONS) == 0
        client.connection_lost(None)
        shard.router.sweep(float("inf"))
        await asyncio.sleep(0.05)

    run(inside())
    for worker in workers:
        worker.reset()


def test_another_worker_in_the_same_slot_gets_its_own_connections(workers: list[Worker]) -> None:
    with Edge(workers[:1]) as edge, settled(edge), edge.client() as client:
        assert client.ask(post(b"1")).body == b"1"
        edge.put(0, url=workers[1].url)
        assert client.ask(post(b"2")).body == b"2"
        assert ([call.body for call in workers[0].calls], [call.body for call in workers[1].calls]) == ([b"1"], [b"2"])
        assert workers[1].calls[0].header("host") == [workers[1].url.removeprefix("http://").encode()]
        wait_until(lambda: workers[0].open_connections == 0, "the old connection is closed")
        workers[1].reset()
