"""The sequence rules of one rank, case by case, with a sink that writes down (at random: test_index_stream_random.py).

Each case runs twice: with every live batch handed in, and with those that are next in line applied by the one who reads them.
"""

from collections.abc import Iterator

import pytest
from stream_bench import Bench, payload

from sglfast._counters import RANK_DEGRADED, RANK_EXACT, RANK_SYNCING
from sglfast.index.held import Limits
from sglfast.index.stream_state import DISCONNECTED, FORGOTTEN, LOST, NO_EVENT_YET, REPLAYING, UNKNOWN_HISTORY
from sglfast.shm import RANK_REASONS


@pytest.fixture(autouse=True, params=["one by one", "in runs"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    Bench.has_runs = request.param == "in runs"
    yield
    Bench.has_runs = False


def test_reasons_are_the_ones_of_shared_memory() -> None:
    assert RANK_REASONS[NO_EVENT_YET] == "no event has arrived yet"
    assert RANK_REASONS[REPLAYING] == "replaying missed events"
    assert RANK_REASONS[UNKNOWN_HISTORY] == "history before the subscription is unknown"
    assert RANK_REASONS[LOST] == "events were lost and could not be replayed"
    assert RANK_REASONS[DISCONNECTED] == "the event stream is disconnected"


# ---- without replay ----


def test_from_the_first_batch_on() -> None:
    bench = Bench(has_replay=False)
    assert bench.status == (RANK_SYNCING, NO_EVENT_YET)
    assert bench.connect() == []
    assert bench.status == (RANK_SYNCING, NO_EVENT_YET)
    assert bench.live(0, 1, 2) == [0, 1, 2]
    assert bench.status == (RANK_EXACT, 0)
    assert bench.stream.next_seq == 3
    assert bench.stream.deadline_s is None


def test_late_without_replay_is_partial_until_the_engine_clears() -> None:
    bench = Bench(has_replay=False)
    assert bench.live(7, 8) == [7, 8]
    assert bench.status == (RANK_DEGRADED, UNKNOWN_HISTORY)
    bench.sink.clearing.add(9)
    assert bench.live(9, 10) == [9, 10]
    assert bench.status == (RANK_EXACT, 0)


def test_gap_without_replay_clears() -> None:
    bench = Bench(has_replay=False)
    bench.live(0, 1)
    assert bench.live(4, 5) == ["clear", 4, 5]
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)
    assert bench.stream.counters.gaps == 1


def test_copy_of_the_last_batch_is_dropped() -> None:
    bench = Bench(has_replay=False)
    bench.live(0, 1, 2)
    assert bench.live(2) == []
    assert bench.live(3) == [3]
    assert (bench.stream.counters.duplicates, bench.stream.counters.restarts) == (1, 0)


@pytest.mark.parametrize("first", [0, 1, 2, 4])
def test_sequence_going_back_is_a_restart(first: int) -> None:
    bench = Bench(has_replay=False)
    bench.live(0, 1, 2, 3, 4)
    assert bench.live(first, first + 1, run=1) == ["clear", (1, first), (1, first + 1)]
    assert bench.stream.counters.restarts == 1
    assert bench.status == ((RANK_EXACT, 0) if first == 0 else (RANK_DEGRADED, UNKNOWN_HISTORY))


def test_new_connection_without_replay() -> None:
    """A low number that just fits is not believed; a high one is."""
    bench = Bench(has_replay=False)
    bench.connect()
    bench.live(0, 1)
    bench.stream.on_disconnected()
    assert bench.status == (RANK_DEGRADED, DISCONNECTED)
    assert bench.connect() == []
    assert bench.live(2, run=1) == ["clear", (1, 2)]
    assert bench.status == (RANK_DEGRADED, UNKNOWN_HISTORY)
    far = Bench(has_replay=False)
    far.connect()
    far.live(*range(100))
    far.reconnect()
    assert far.live(100) == [100]
    assert far.status == (RANK_EXACT, 0)


# ---- with replay ----


def test_history_is_replayed_as_soon_as_connected() -> None:
    bench = Bench(has_replay=True)
    assert bench.connect() == [("ask", 0)]
    assert bench.status == (RANK_SYNCING, REPLAYING)
    assert bench.replay(0, 1, 2) == [0, 1, 2]
    assert bench.status == (RANK_SYNCING, REPLAYING)
    assert bench.replay(end=True) == []
    assert bench.status == (RANK_EXACT, 0)
    assert bench.live(3) == [3]


def test_engine_that_published_nothing() -> None:
    bench = Bench(has_replay=True)
    bench.connect()
    assert bench.replay(end=True) == []
    assert bench.status == (RANK_EXACT, 0)
    assert bench.live(0) == [0]


def test_first_batch_late_holds_and_replays() -> None:
    bench = Bench(has_replay=True)
    assert bench.live(5) == [("ask", 0)]
    assert bench.live(6) == []
    assert bench.stream.held_batches == 2
    assert bench.replay(0, 1, 2, 3) == [0, 1, 2, 3]
    assert bench.replay(4) == [4, 5, 6]
    assert bench.stream.held_batches == 0
    assert bench.replay(5, 6, end=True) == []
    assert bench.live(7) == [7]
    assert bench.status == (RANK_EXACT, 0)
    assert bench.stream.counters.duplicates == 2


def test_notice_after_the_first_batch_asks_no_second_time() -> None:
    bench = Bench(has_replay=True)
    assert bench.live(5) == [("ask", 0)]
    assert bench.connect() == []
    assert bench.replay(0, 1, 2, 3, 4, 5, end=True) == [0, 1, 2, 3, 4, 5]
    whole = Bench(has_replay=True)
    assert whole.live(0) == [0]
    assert whole.connect() == []


def test_history_that_the_engine_has_forgotten() -> None:
    bench = Bench(has_replay=True)
    bench.live(50)
    assert bench.replay(40) == [40]
    assert bench.replay(*range(41, 51), end=True) == [*range(41, 51)]
    assert bench.status == (RANK_DEGRADED, UNKNOWN_HISTORY)


def test_gap_is_filled_in_order() -> None:
    bench = Bench(has_replay=True)
    bench.live(0, 1, 2)
    assert bench.live(6, 7) == [("ask", 2)]
    assert bench.status == (RANK_SYNCING, REPLAYING)
    assert bench.replay(2, 3, 4, 5) == [3, 4, 5, 6, 7]
    assert bench.replay(6, 7, 8, end=True) == [8]
    assert bench.live(8, 9) == [9]
    assert bench.status == (RANK_EXACT, 0)
    counters = bench.stream.counters
    assert (counters.gaps, counters.replays, counters.restarts, counters.duplicates) == (1, 1, 0, 3)
    assert counters.batches == 10


def test_live_batch_overtaken_by_a_replay_is_a_copy() -> None:
    bench = Bench(has_replay=True)
    bench.connect()
    bench.replay(0, 1, 2, 3, 4, end=True)
    assert bench.live(2, 3, 4, 5) == [5]
    assert (bench.stream.counters.duplicates, bench.stream.counters.restarts) == (3, 0)


def test_batch_of_another_run_at_a_replayed_number_is_a_restart() -> None:
    bench = Bench(has_replay=True)
    bench.connect()
    bench.replay(0, 1, 2, 3, 4, end=True)
    assert bench.live(2, run=1) == ["clear", ("ask", 0)]
    assert bench.replay(0, 1, 2, run=1, end=True) == [(1, 0), (1, 1), (1, 2)]
    assert bench.status == (RANK_EXACT, 0)


def test_holes_in_a_replay_are_asked_for_again() -> None:
    bench = Bench(has_replay=True)
    bench.live(10)
    assert bench.replay(0, 1, 4, 5, 8, end=True) == [0, 1, ("ask", 1)]
    assert bench.replay(1, 2, 3, 9, end=True) == [2, 3, 4, 5, ("ask", 5)]
    assert bench.replay(5, 6, 7) == [6, 7, 8, 9, 10]
    assert bench.replay(end=True) == []
    assert bench.status == (RANK_EXACT, 0)
    assert (bench.stream.counters.replays, bench.stream.counters.give_ups) == (3, 0)


def test_hole_that_never_closes_clears_the_rank() -> None:
    bench = Bench(has_replay=True)
    bench.live(0, 1)
    assert bench.live(4) == [("ask", 1)]
    assert bench.replay(1, 3, 4, end=True) == [("ask", 1)]
    assert bench.replay(1, 3, 4, end=True) == [("ask", 1)]
    assert bench.replay(1, 3, 4, 5, end=True) == ["clear", 3, 4, 5]
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)
    assert bench.stream.counters.give_ups == 1
    assert bench.stream.held_batches == 0
    # ... and the next gap is replayed again
    assert bench.live(6, 8) == [6, ("ask", 6)]


def test_answer_that_does_not_show_the_last_batch_is_not_believed() -> None:
    """The number that we wait for is there, but nothing tells that it is the same engine: it may have restarted."""
    bench = Bench(has_replay=True)
    bench.connect()
    bench.replay(0, 1, end=True)
    bench.reconnect()
    for _ in range(2):
        assert bench.replay(2, 3, run=1, end=True) == [("ask", 1)]
    assert bench.replay(2, 3, run=1, end=True) == ["clear", (1, 2), (1, 3)]
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)


def test_two_holes_that_never_close_keep_what_follows_the_last() -> None:
    bench = Bench(has_replay=True)
    bench.live(0)
    bench.live(9)
    for _ in range(2):
        bench.replay(0, 2, 3, 7, 8, 9, end=True)
    assert bench.replay(0, 2, 3, 7, 8, 9, end=True) == ["clear", 7, 8, 9]
    assert bench.stream.next_seq == 10


def test_replay_cut_off_without_an_end() -> None:
    """Silence after some batches: what came counts as progress, the rest is asked for."""
    bench = Bench(has_replay=True)
    assert bench.connect() == [("ask", 0)]
    assert bench.replay(0, 1, 2) == [0, 1, 2]
    assert bench.timeout() == [("ask", 2)]
    assert bench.replay(2, 3, 4, end=True) == [3, 4]
    assert bench.status == (RANK_EXACT, 0)


def test_progress_moves_the_deadline() -> None:
    bench = Bench(has_replay=True)
    bench.connect()
    first = bench.stream.deadline_s
    assert first is not None
    bench.now_s += 0.9
    bench.replay(0)
    bench.now_s = first
    bench.stream.on_time(bench.now_s)
    assert bench.sink.take() == []
    assert bench.stream.deadline_s == pytest.approx(first + 0.9)


def test_long_answer_is_confirmed() -> None:
    """A full send queue loses the tail of a long answer unseen, so the end of it is asked for once more."""
    bench = Bench(has_replay=True, limits=Limits())
    bench.connect()
    bench.replay(*range(2000))
    assert bench.replay(end=True) == [("ask", 1999)]
    assert bench.status == (RANK_SYNCING, REPLAYING)
    assert bench.replay(1999, 2000, 2001, end=True) == [2000, 2001]
    assert bench.status == (RANK_EXACT, 0)


def test_mute_replay_socket_is_given_up() -> None:
    bench = Bench(has_replay=True)
    assert bench.live(5) == [("ask", 0)]
    assert bench.timeout() == [("ask", 0)]
    assert bench.live(6) == []
    assert bench.timeout() == [("ask", 0)]
    assert bench.timeout() == ["clear", 5, 6]
    assert bench.status == (RANK_DEGRADED, UNKNOWN_HISTORY)
    assert bench.live(7) == [7]
    # a gap now is treated as without replay, until the connection is made anew
    assert bench.live(9) == ["clear", 9]
    assert bench.reconnect() == [("ask", 9)]


def test_restart_with_replay() -> None:
    bench = Bench(has_replay=True)
    bench.connect()
    bench.replay(0, 1, 2, 3, 4, 5, end=True)
    assert bench.live(2, run=1) == ["clear", ("ask", 0)]
    assert bench.replay(0, 1, 2, run=1, end=True) == [(1, 0), (1, 1), (1, 2)]
    assert bench.status == (RANK_EXACT, 0)
    assert bench.stream.counters.restarts == 1


def test_restart_to_zero_is_applied_at_once() -> None:
    bench = Bench(has_replay=True)
    bench.live(0, 1)
    assert bench.live(0, 1, run=1) == ["clear", (1, 0), (1, 1)]
    assert bench.status == (RANK_EXACT, 0)


def test_restart_during_a_replay() -> None:
    bench = Bench(has_replay=True)
    bench.live(0, 1)
    assert bench.live(9) == [("ask", 1)]
    assert bench.live(4, run=1) == ["clear", ("ask", 0)]
    assert bench.replay(0, 1, 2, 3, 4, run=1, end=True) == [(1, i) for i in range(5)]
    assert bench.stream.held_batches == 0


def test_reconnect_to_the_same_engine_keeps_the_index() -> None:
    bench = Bench(has_replay=True)
    bench.connect()
    bench.replay(0, 1, end=True)
    assert bench.reconnect() == [("ask", 1)]
    assert bench.live(4) == []
    assert bench.replay(1, 2, 3, end=True) == [2, 3, 4]
    assert bench.status == (RANK_EXACT, 0)
    assert bench.stream.counters.restarts == 0


def test_reconnect_to_a_restarted_engine_at_the_same_number() -> None:
    """The number fits, the time in the batch does not."""
    bench = Bench(has_replay=True)
    bench.connect()
    bench.replay(0, 1, end=True)
    assert bench.reconnect() == [("ask", 1)]
    assert bench.replay(1, run=1) == ["clear", ("ask", 0)]
    assert bench.stream.counters.restarts == 1
    assert bench.replay(0, 1, 2, run=1, end=True) == [(1, 0), (1, 1), (1, 2)]


def test_batch_of_the_new_connection_before_its_notice() -> None:
    bench = Bench(has_replay=True)
    bench.connect()
    bench.replay(0, 1, end=True)
    bench.stream.on_disconnected()
    assert bench.live(2, run=1) == [("ask", 1)]
    assert bench.connect() == []
    assert bench.replay(1, run=1) == ["clear", ("ask", 0)]
    assert bench.replay(0, 1, 2, run=1, end=True) == [(1, 0), (1, 1), (1, 2)]
    assert bench.status == (RANK_EXACT, 0)


def test_reconnect_to_a_restarted_engine_that_is_not_as_far() -> None:
    bench = Bench(has_replay=True)
    bench.connect()
    bench.replay(0, 1, 2, 3, end=True)
    bench.reconnect()
    assert bench.replay(end=True) == ["clear", ("ask", 0)]
    assert bench.replay(0, run=1, end=True) == [(1, 0)]
    assert bench.status == (RANK_EXACT, 0)


def test_held_batches_of_the_old_connection_are_not_kept() -> None:
    bench = Bench(has_replay=True)
    bench.connect()
    bench.live(8, 9)
    assert bench.reconnect() == [("ask", 0)]
    assert bench.stream.held_batches == 0
    assert bench.replay(0, 1, run=1, end=True) == [(1, 0), (1, 1)]
    assert bench.status == (RANK_EXACT, 0)


def test_what_is_held_is_bounded_and_comes_back() -> None:
    by_number = Limits(replay_timeout_s=1.0, max_held_batches=5)
    by_size = Limits(replay_timeout_s=1.0, max_held_bytes=5 * len(payload(0)))
    for limits in (by_number, by_size):
        bench = Bench(has_replay=True, limits=limits)
        bench.live(0)
        bench.live(*range(2, 20))
        assert bench.stream.held_batches == 5
        assert bench.replay(0, 1) == [1, 2, 3, 4, 5, 6]
        assert bench.replay(end=True) == [("ask", 6)]
        assert bench.replay(*range(6, 20), end=True) == [*range(7, 20)]
        assert bench.status == (RANK_EXACT, 0)
        assert bench.live(20) == [20]


def test_unreadable_batch_takes_the_certainty() -> None:
    bench = Bench(has_replay=True)
    bench.sink.lossy.add(1)
    bench.sink.clearing.add(3)
    bench.live(0, 1, 2)
    assert bench.status == (RANK_DEGRADED, LOST)
    bench.live(3)
    assert bench.status == (RANK_EXACT, 0)


def test_answers_that_nobody_waits_for_are_ignored() -> None:
    bench = Bench(has_replay=True)
    bench.live(0, 1)
    assert bench.replay(0, 1, 2, end=True) == []
    assert bench.live(2) == [2]
