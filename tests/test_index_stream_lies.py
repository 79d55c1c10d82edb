"""Replay sockets that lie: of another run, far ahead, without an end. The live stream is believed, and the index goes on."""

import itertools

import pytest
from test_index_stream import Bench, payload

from sglfast._counters import RANK_DEGRADED, RANK_EXACT
from sglfast.index.held import HeldBatches
from sglfast.index.stream_state import FORGOTTEN, UNKNOWN_HISTORY


def test_replay_of_a_former_run_is_found_out_at_the_first_batch_that_both_have() -> None:
    bench = Bench(has_replay=True)
    assert bench.live(3, 4) == [("ask", 0)]
    assert bench.replay(0, 1, 2, 3, 4, 5, run=1, end=True) == [(1, 0), (1, 1), (1, 2), 3, 4, "clear"]
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)
    assert bench.live(5, 6) == [5, 6]
    assert bench.stream.counters.give_ups == 1
    # nobody asks such a socket again, until the connection is another
    assert bench.live(9) == ["clear", 9]
    assert bench.reconnect() == [("ask", 9)]


def test_replay_that_contradicts_itself_or_the_front() -> None:
    bench = Bench(has_replay=True)
    bench.live(0, 1)
    assert bench.live(5) == [("ask", 1)]
    assert bench.replay(1, 2) == [2]
    assert bench.replay(5, run=1) == ["clear", 5]
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)
    assert bench.live(6) == [6]


@pytest.mark.parametrize("wrong", [10**6, 2**63 - 1])
def test_replay_far_ahead_of_the_stream_is_not_asked_for_ever(wrong: int) -> None:
    bench = Bench(has_replay=True)
    assert bench.live(5) == [("ask", 0)]
    assert bench.replay(wrong, run=1, end=True) == [(1, wrong)]
    for seq in (6, 7):
        assert bench.live(seq) == ["clear", ("ask", 0)]
        assert bench.replay(wrong, run=1, end=True) == [(1, wrong)]
    assert bench.live(8, 9, 10) == ["clear", 8, 9, 10]
    assert bench.status == (RANK_DEGRADED, UNKNOWN_HISTORY)
    assert bench.stream.counters.replays == 3


def test_an_engine_that_restarts_again_and_again_keeps_its_replay() -> None:
    bench = Bench(has_replay=True)
    for run in range(10):
        bench.live(0, 1, run=run)
        bench.live(5, run=run)
        bench.replay(*range(1, 6), run=run, end=True)
        assert bench.status == (RANK_EXACT, 0)
    assert bench.stream.counters.replays == 10


def test_an_answer_that_repeats_itself_is_as_good_as_silence() -> None:
    bench = Bench(has_replay=True)
    assert bench.live(5) == [("ask", 0)]
    for _ in range(100):  # a batch every 0.3 s
        bench.now_s += 0.3
        bench.replay(2)
        bench.stream.on_time(bench.now_s)
        if "clear" in bench.sink.done:
            break
    else:
        pytest.fail("an answer without an end holds the live stream back for ever")
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)
    bench.sink.take()
    assert bench.live(6) == [6]


def test_an_answer_that_never_ends_but_goes_ahead_is_refuted_by_the_live_stream() -> None:
    bench = Bench(has_replay=True)
    asked = 0
    far = itertools.count()
    for seq in range(20):
        asked += bench.live(seq + 5).count(("ask", 0))
        for _ in range(30):
            if bench.stream.deadline_s is not None:
                bench.stream.on_replay(at := next(far), payload(at, 1), bench.now_s)
        bench.sink.take()
    assert asked <= 3
    assert bench.live(25) == [25]


def test_what_is_missing_is_told() -> None:
    bench = Bench(has_replay=True)
    assert bench.stream.missing_batches == 0
    bench.live(9)
    assert bench.stream.missing_batches == 10
    bench.replay(*range(4))
    assert bench.stream.missing_batches == 6
    bench.replay(*range(4, 10), end=True)
    assert (bench.stream.missing_batches, bench.status) == (0, (RANK_EXACT, 0))


def test_what_is_held_by_number_and_bytes() -> None:
    held = HeldBatches(3, 10)
    for seq, data in ((7, b"aaaa"), (3, b"bb"), (8, b"ccccc"), (4, b"dd"), (9, b"")):
        held.put(seq, data)
    assert [held.get(seq) for seq in (3, 4, 7, 8, 9)] == [b"bb", b"dd", b"aaaa", None, None]
    held.pop(3)
    held.pop(3)
    held.put(8, b"cccc")
    assert held.take_last_run() == [(7, b"aaaa"), (8, b"cccc")]
    assert len(held) == 0
    held.put(1, b"x" * 10)
    held.drop(below=1)
    assert len(held) == 1
    held.drop()
    held.put(1, b"x" * 10)
    assert held.take_last_run() == [(1, b"x" * 10)]
