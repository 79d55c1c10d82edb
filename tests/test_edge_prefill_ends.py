"""sglfast.edge.prefill_leg, when a pair is ended by others: its client leaves, a worker is removed or drained, a connection was stale."""

import time
from collections.abc import Iterator

import pytest
from edge_harness import Edge, settled, wait_until
from pair_scripts import AT_ONCE_S, SENT, D, Ends, Half, Hang, P, after, stream, unloaded, was_aborted
from raw_client import chunk, post
from scripted_worker import SSE_HEAD, Call, Worker, answer, echoes, late, says

from sglfast import _counters as c
from sglfast import _workers

ROLES = ["prefill", "decode"]
DONE = says(answer(b"{}"))


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    workers = [Worker("prefill"), Worker("decode")]
    yield workers
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def shard_of_a_pair(workers: list[Worker]) -> Iterator[Edge]:
    with Edge(workers, takes_rid=True, roles=ROLES) as edge:  # type: ignore[arg-type]
        yield edge


@pytest.fixture
def edge(shard_of_a_pair: Edge) -> Iterator[Edge]:
    with settled(shard_of_a_pair):
        yield shard_of_a_pair
        wait_until(lambda: not shard_of_a_pair.inflight(), "each half has ended")


@pytest.fixture
def prefill(workers: list[Worker]) -> Half:
    half = Half(workers[P])
    half.does(DONE)
    return half


@pytest.fixture
def decode(workers: list[Worker]) -> Half:
    half = Half(workers[D])
    half.does(echoes)
    return half


# ---- the client leaves ----


@pytest.mark.parametrize("shown", ["nothing", "a head that is kept", "an event"])
@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
def test_a_client_that_leaves_ends_both_halves(shown: str, how: str, edge: Edge, prefill: Half, decode: Half) -> None:
    hangs, ends, gone = (Hang(), Hang()), Ends(edge), edge.word(c.S_CLIENT_GONE)
    if shown != "nothing":
        hangs[D].pieces = (SSE_HEAD,) if shown == "a head that is kept" else (SSE_HEAD, chunk(b"data: 1\n\n"))
    prefill.does(hangs[P])
    decode.does(hangs[D])
    with edge.client() as client:
        client.send(post(SENT))
        prefill.wait_calls(1)
        decode.wait_calls(1)
        if shown == "an event":
            client.read_until(b"data: 1\n\n")
        left_s = time.monotonic()
        client.sock.close() if how == "close" else getattr(client, how)()
        for hang, half in zip(hangs, (prefill, decode), strict=True):
            hang.wait()
            assert hang.ended_s[0] - left_s < AT_ONCE_S
            was_aborted(half)
    unloaded(edge)
    assert ends.found == (["cancelled"], ["cancelled"])
    assert edge.word(c.S_CLIENT_GONE) == gone + 1


def test_a_client_that_leaves_when_its_answer_is_whole_ends_nothing(edge: Edge, prefill: Half, decode: Half) -> None:
    ends = Ends(edge)
    prefill.does(late(0.5, answer(b"{}")))
    edge.ask(post(SENT))
    wait_until(lambda: ends.found == (["ok"], ["ok"]), "the prefill half ends by itself")
    assert prefill.aborted == []


# ---- a worker is removed, or drained ----


@pytest.mark.parametrize("row", [P, D])
def test_a_worker_that_is_removed_ends_the_pair(row: int, edge: Edge, prefill: Half, decode: Half) -> None:
    hangs = Hang(), Hang()
    prefill.does(hangs[P])
    decode.does(hangs[D])
    with edge.client() as client:
        client.send(post(SENT))
        prefill.wait_calls(1)
        decode.wait_calls(1)
        edge.put(row, is_new=True)  # the slot is another worker's now
        found = client.read_answer()
        assert (found.status, found.code) == (502, "prefill_failed" if row == P else "upstream_closed")
        for hang in hangs:
            hang.wait()
    was_aborted((decode, prefill)[row])
    unloaded(edge)


def test_a_lingering_half_of_a_worker_that_is_removed(edge: Edge, prefill: Half, decode: Half) -> None:
    hang = Hang()
    prefill.does(hang)
    edge.ask(post(SENT))
    edge.put(P, is_new=True)
    hang.wait()
    assert hang.ended_s
    unloaded(edge)


def test_a_worker_that_drains_ends_what_it_has(edge: Edge, prefill: Half, decode: Half) -> None:
    sends: list[int] = []
    prefill.does(after(lambda: sends, DONE))
    decode.does(after(lambda: sends, stream(b"data: 1\n\n")))
    with edge.client() as client:
        client.send(post(SENT))
        prefill.wait_calls(1)
        edge.table.set_state(P, _workers.DRAINING)
        edge.table.set_state(D, _workers.DRAINING)
        wait_until(lambda: edge.ask(post(SENT)).code == "no_prefill_workers_available", "no new ones")
        sends.append(1)
        assert client.read_answer().body == b"data: 1\n\n"
    edge.table.set_state(P, _workers.READY)
    edge.table.set_state(D, _workers.READY)


# ---- a connection that had been idle ----


@pytest.mark.parametrize("row", [P, D])
def test_a_pooled_connection_that_is_closed_is_no_failure(row: int, edge: Edge, prefill: Half, decode: Half) -> None:
    ends, resends = Ends(edge), edge.word(c.S_RESENDS)
    half = (prefill, decode)[row]
    fine = DONE if row == P else echoes
    half.does(fine, Call.close, fine)
    with edge.client() as client:
        for _ in range(2):
            assert client.ask(post(SENT)).status == 200
            unloaded(edge)
    assert edge.word(c.S_RESENDS) == resends + 1
    assert ends.found == (["ok"] * 2, ["ok"] * 2)
    assert len({bytes(call.body) for call in half.calls}) == 3, "sent again with another rid"
