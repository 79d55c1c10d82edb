"""A replay socket that was mute and speaks again: when it is asked, what is made of what it says, and what is not."""

import pytest
from stream_bench import LIMITS, Bench, payload

from sglfast._counters import RANK_DEGRADED, RANK_EXACT, RANK_SYNCING
from sglfast.index.sink import Resume
from sglfast.index.stream_state import FORGOTTEN, LOST, NOT_KEPT, REPLAYING, UNKNOWN_HISTORY, print_of


def mute(bench: Bench) -> list[object]:
    """Nobody answers, until the stream gives up."""
    done: list[object] = []
    for _ in range(LIMITS.max_tries):
        done += bench.timeout()
    return done


def lost_at(seq: int) -> Bench:
    """0 and 1 came, then `seq` and the next, and replay is mute."""
    bench = Bench(has_replay=True)
    bench.live(0, 1)
    assert bench.live(seq, seq + 1) == [("ask", 1)]
    assert mute(bench)[-3:] == ["clear", seq, seq + 1]
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)
    assert not bench.stream.is_asking
    return bench


def test_it_heals_by_itself_when_the_socket_is_back() -> None:
    bench = lost_at(4)
    assert bench.live(6) == [6], "live events are indexed meanwhile"
    assert bench.timeout() == [("ask", 0)]
    assert bench.stream.is_asking
    assert bench.status == (RANK_DEGRADED, FORGOTTEN), "nothing is held back for it"
    assert bench.live(7) == [7]
    assert bench.replay(0, 1) == ["clear", 0, 1]
    assert bench.status == (RANK_SYNCING, REPLAYING)
    assert bench.live(8) == []
    assert bench.replay(2, 3, 4, 5, 6, 7) == [2, 3, 4, 5, 6, 7, 8]
    assert bench.replay(8, end=True) == []
    assert bench.status == (RANK_EXACT, 0)
    assert bench.stream.deadline_s is None
    assert bench.live(9, 11) == [9, ("ask", 9)], "and the next gap is replayed at once"


def test_the_pauses_double_up_to_a_minute() -> None:
    bench = lost_at(4)
    pauses, at_s = [], bench.now_s
    for _ in range(9):
        assert bench.timeout() == [("ask", 0)]
        pauses.append(round(bench.now_s - at_s))
        assert bench.timeout() == [], "no answer"
        at_s = bench.now_s
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert bench.live(6, 7) == [6, 7]
    assert bench.reconnect() == [("ask", 7)], "another connection is another matter"


def test_a_socket_that_breaks_off_again_is_asked_more_seldom() -> None:
    bench = lost_at(4)
    bench.timeout()
    assert bench.replay(0) == ["clear", 0]
    assert bench.timeout() == [("ask", 0)]
    mute(bench)
    assert bench.status[0] == RANK_DEGRADED
    at_s = bench.now_s
    bench.timeout()
    assert bench.now_s - at_s == 2.0


def test_a_batch_that_was_lost_meanwhile_is_not_found_again_by_the_engine_being_the_same() -> None:
    bench = Bench(has_replay=True)
    bench.live(*range(100))
    bench.reconnect()
    mute(bench)
    bench.sink.lossy.add(100)
    bench.live(100)
    bench.timeout()
    bench.replay(99, 100, end=True)
    assert bench.status[0] == RANK_DEGRADED


@pytest.mark.parametrize(("oldest", "is_healed"), [(0, True), (1, False)])
def test_a_loss_that_a_killed_process_left_is_healed_by_the_whole_history_only(oldest: int, is_healed: bool) -> None:
    bench = Bench(has_replay=True, resume=Resume(5, print_of(payload(4)), LOST))
    assert bench.connect() == [("ask", 4)]
    assert bench.replay(4, end=True) == []
    assert bench.status == (RANK_DEGRADED, LOST)
    assert bench.timeout() == [("ask", 0)]
    applied = bench.replay(*range(oldest, 5), end=True)
    assert applied == (["clear", 0, 1, 2, 3, 4] if is_healed else [])
    assert bench.status == ((RANK_EXACT, 0) if is_healed else (RANK_DEGRADED, NOT_KEPT))
    assert bench.stream.deadline_s is None, "it is asked once"


def test_a_buffer_that_does_not_reach_back_brings_nothing_and_is_not_asked_again() -> None:
    bench = lost_at(4)
    bench.timeout()
    assert bench.replay(4, 5, end=True) == []
    assert bench.status == (RANK_DEGRADED, NOT_KEPT)
    assert bench.stream.deadline_s is None
    assert bench.live(6) == [6]
    assert bench.live(8) == [("ask", 6)], "it answers, so a gap is replayed"


def test_a_buffer_that_reaches_back_in_part_brings_that() -> None:
    bench = lost_at(4)
    bench.timeout()
    assert bench.replay(2, 3, 4, 5, end=True) == ["clear", 2, 3, 4, 5]
    assert bench.status == (RANK_DEGRADED, NOT_KEPT)
    assert bench.stream.deadline_s is None


def test_late_and_mute() -> None:
    bench = Bench(has_replay=True)
    bench.connect()
    mute(bench)
    assert bench.live(5, 6) == [5, 6]
    assert bench.status == (RANK_DEGRADED, UNKNOWN_HISTORY)
    assert bench.timeout() == [("ask", 0)]
    assert bench.replay(0, 1, 2, 3, 4, 5, 6, end=True) == ["clear", 0, 1, 2, 3, 4, 5, 6]
    assert bench.status == (RANK_EXACT, 0)


def test_an_engine_that_has_published_nothing_yet() -> None:
    bench = Bench(has_replay=True)
    bench.connect()
    mute(bench)
    assert bench.timeout() == [("ask", 0)]
    assert bench.replay(end=True) == []
    assert bench.status == (RANK_EXACT, 0)
    assert bench.live(0) == [0]


@pytest.mark.parametrize("live", [(), (100,), (100, 101)])
def test_the_same_engine_is_known_by_its_last_batch_though_its_buffer_is_short(live: tuple[int, ...]) -> None:
    """The connection was lost, replay mute: nothing is missing, if it is the engine that was left."""
    bench = Bench(has_replay=True)
    bench.live(*range(100))
    bench.reconnect()
    assert "clear" not in mute(bench)
    assert bench.live(*live) == [*live]
    assert bench.status == (RANK_DEGRADED, LOST)
    front = 100 + len(live)
    assert bench.timeout() == [("ask", front - 1)]
    assert bench.live(front) == [front]
    assert bench.replay(front - 1, front, end=True) == []
    assert bench.status == (RANK_EXACT, 0)


@pytest.mark.parametrize("answer", [(99,), ()])
def test_another_engine_is_found_out_as_well(answer: tuple[int, ...]) -> None:
    bench = Bench(has_replay=True)
    bench.live(*range(100))
    bench.reconnect()
    mute(bench)
    bench.timeout()
    assert bench.replay(*answer, run=1, end=not answer) == ["clear", ("ask", 0)]
    assert bench.replay(0, 1, run=1, end=True) == [(1, 0), (1, 1)]
    assert bench.status == (RANK_EXACT, 0)


def test_an_engine_that_shows_the_last_batch_no_more() -> None:
    bench = Bench(has_replay=True)
    bench.live(*range(100))
    bench.reconnect()
    mute(bench)
    bench.timeout()
    assert bench.replay(110, 111, end=True) == []
    assert bench.status == (RANK_DEGRADED, NOT_KEPT)
    assert bench.stream.deadline_s is None


def test_replay_of_another_stream_is_found_out_and_not_asked_again() -> None:
    bench = lost_at(4)
    bench.timeout()
    assert bench.replay(0, 1, 2, 3, 4, 5, run=1) == ["clear", (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), "clear"]
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)
    assert bench.stream.deadline_s is None
    assert bench.live(6) == ["clear", 6]
    assert bench.live(8) == ["clear", 8]
    assert bench.stream.deadline_s is None


def test_a_gap_or_a_restart_ends_a_look_and_plans_another() -> None:
    bench = lost_at(4)
    bench.timeout()
    assert bench.live(9) == ["clear", 9]
    assert not bench.stream.is_asking
    assert bench.replay(0, 1) == [], "of the look that is over"
    bench.timeout()
    assert bench.live(3, run=1) == ["clear", (1, 3)]
    assert bench.replay(0, 1) == []
    assert bench.timeout() == [("ask", 0)]
    assert bench.replay(0, 1, 2, 3, run=1, end=True) == ["clear", (1, 0), (1, 1), (1, 2), (1, 3)]
    assert bench.status == (RANK_EXACT, 0)


def test_what_is_whole_by_now_is_not_asked_for() -> None:
    bench = lost_at(4)
    bench.sink.clearing.add(6)
    assert bench.live(6) == [6]
    assert bench.status == (RANK_EXACT, 0)
    assert bench.timeout() == []
    assert bench.stream.deadline_s is None
