"""sglfast.edge.prefill_leg, when a pair is ended by others: its client leaves, a worker is removed or drained, a connection was stale."""

import time

import pytest
from edge_harness import Edge, wait_until
from pair_scripts import AT_ONCE_S, DONE, SENT, D, Ends, Half, Hang, P, after, stream, unloaded, was_aborted
from raw_client import chunk, post
from scripted_worker import SSE_HEAD, Call, answer, echoes, late

from sglfast import _counters as c
from sglfast import _workers

# ---- the client leaves ----


@pytest.mark.parametrize("shown", ["nothing", "a head that is kept", "an event"])
@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
def test_a_client_that_leaves_ends_both_halves(shown: str, how: str, pair: Edge, prefill: Half, decode: Half) -> None:
    hangs, ends, gone = (Hang(), Hang()), Ends(pair), pair.word(c.S_CLIENT_GONE)
    if shown != "nothing":
        hangs[D].pieces = (SSE_HEAD,) if shown == "a head that is kept" else (SSE_HEAD, chunk(b"data: 1\n\n"))
    prefill.does(hangs[P])
    decode.does(hangs[D])
    with pair.client() as client:
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
    unloaded(pair)
    assert ends.found == (["cancelled"], ["cancelled"])
    assert pair.word(c.S_CLIENT_GONE) == gone + 1


def test_a_client_that_leaves_when_its_answer_is_whole_ends_nothing(pair: Edge, prefill: Half, decode: Half) -> None:
    ends = Ends(pair)
    prefill.does(late(0.5, answer(b"{}")))
    pair.ask(post(SENT))
    wait_until(lambda: ends.found == (["ok"], ["ok"]), "the prefill half ends by itself")
    assert prefill.aborted == []


# ---- a worker is removed, or drained ----


@pytest.mark.parametrize("row", [P, D])
def test_a_worker_that_is_removed_ends_the_pair(row: int, pair: Edge, prefill: Half, decode: Half) -> None:
    hangs = Hang(), Hang()
    prefill.does(hangs[P])
    decode.does(hangs[D])
    with pair.client() as client:
        client.send(post(SENT))
        prefill.wait_calls(1)
        decode.wait_calls(1)
        pair.put(row, is_new=True)  # the slot is another worker's now
        found = client.read_answer()
        assert (found.status, found.code) == (502, "prefill_failed" if row == P else "upstream_closed")
        for hang in hangs:
            hang.wait()
    was_aborted((decode, prefill)[row])
    unloaded(pair)


def test_a_lingering_half_of_a_worker_that_is_removed(pair: Edge, prefill: Half, decode: Half) -> None:
    hang = Hang()
    prefill.does(hang)
    pair.ask(post(SENT))
    pair.put(P, is_new=True)
    hang.wait()
    assert hang.ended_s
    unloaded(pair)


def test_a_worker_that_drains_ends_what_it_has(pair: Edge, prefill: Half, decode: Half) -> None:
    sends: list[int] = []
    prefill.does(after(lambda: sends, DONE))
    decode.does(after(lambda: sends, stream(b"data: 1\n\n")))
    with pair.client() as client:
        client.send(post(SENT))
        prefill.wait_calls(1)
        pair.table.set_state(P, _workers.DRAINING)
        pair.table.set_state(D, _workers.DRAINING)
        wait_until(lambda: pair.ask(post(SENT)).code == "no_prefill_workers_available", "no new ones")
        sends.append(1)
        assert client.read_answer().body == b"data: 1\n\n"
    pair.table.set_state(P, _workers.READY)
    pair.table.set_state(D, _workers.READY)


# ---- a connection that had been idle ----


@pytest.mark.parametrize("row", [P, D])
def test_a_pooled_connection_that_is_closed_is_no_failure(row: int, pair: Edge, prefill: Half, decode: Half) -> None:
    ends, resends = Ends(pair), pair.word(c.S_RESENDS)
    half = (prefill, decode)[row]
    fine = DONE if row == P else echoes
    half.does(fine, Call.close, fine)
    with pair.client() as client:
        for _ in range(2):
            assert client.ask(post(SENT)).status == 200
            unloaded(pair)
    assert pair.word(c.S_RESENDS) == resends + 1
    assert ends.found == (["ok"] * 2, ["ok"] * 2)
    assert len({bytes(call.body) for call in half.calls}) == 3, "sent again with another rid"
