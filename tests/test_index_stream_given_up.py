"""A hole that a replay socket does not fill although it answers: what is true of the rank then, and how it becomes exact again."""

from collections.abc import Iterator

import pytest
from stream_bench import LIMITS, Bench, payload

from sglfast._counters import RANK_DEGRADED, RANK_EXACT
from sglfast.index.sink import Resume
from sglfast.index.stream_state import FORGOTTEN, print_of
from sglfast.shm import RANK_REASONS


@pytest.fixture(autouse=True, params=["one by one", "in runs"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    Bench.has_runs = request.param == "in runs"
    yield
    Bench.has_runs = False


def answered_without(bench: Bench, first: int, *seqs: int) -> list[object]:
    """The socket answers each time with the last batch applied, `first`, and `seqs`, until the stream gives up."""
    done: list[object] = []
    for _ in range(LIMITS.max_tries):
        done = bench.replay(first, *seqs, end=True)
    return done


def given_up(*, clearing: int | None = None) -> Bench:
    """0 and 1 came, 2 and 3 are nowhere, 4 and 5 came."""
    bench = Bench(has_replay=True)
    if clearing is not None:
        bench.sink.clearing.add(clearing)
    bench.live(0, 1)
    assert bench.live(4, 5) == [("ask", 1)]
    assert answered_without(bench, 1, 4, 5) == ["clear", 4, 5]
    assert bench.stream.counters.give_ups == 1
    return bench


def test_the_reason_says_what_is_known() -> None:
    assert RANK_REASONS[FORGOTTEN] == "events were lost and could not be replayed: only what was stored since then is known"
    bench = given_up()
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)
    assert bench.live(6, 7) == [6, 7]
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)
    assert (bench.stream.deadline_s, bench.stream.missing_batches) == (None, 0)


def test_a_buffer_that_has_a_hole_is_asked_for_the_next_one_all_the_same() -> None:
    bench = given_up()
    assert bench.live(8) == [("ask", 5)]
    assert bench.replay(5, 6, 7, 8, end=True) == [6, 7, 8]
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)


def test_exact_when_the_engine_clears_its_cache() -> None:
    bench = given_up()
    bench.sink.clearing.add(7)
    assert bench.live(6, 7, 8) == [6, 7, 8]
    assert bench.status == (RANK_EXACT, 0)


@pytest.mark.parametrize("clearing", [4, 5])
def test_exact_at_once_when_the_engine_cleared_its_cache_behind_the_hole(clearing: int) -> None:
    assert given_up(clearing=clearing).status == (RANK_EXACT, 0)


def test_exact_when_a_clear_comes_by_replay() -> None:
    bench = given_up()
    bench.sink.clearing.add(7)
    assert bench.live(8) == [("ask", 5)]
    assert bench.replay(5, 6, 7, 8, end=True) == [6, 7, 8]
    assert bench.status == (RANK_EXACT, 0)


@pytest.mark.parametrize("first", [0, 3])
def test_exact_when_the_engine_is_started_again(first: int) -> None:
    bench = given_up()
    started = bench.live(first, run=1)
    if first:
        assert started == ["clear", ("ask", 0)]
        assert bench.replay(0, 1, 2, 3, run=1, end=True) == [(1, 0), (1, 1), (1, 2), (1, 3)]
    else:
        assert started == ["clear", (1, 0)]
    assert bench.status == (RANK_EXACT, 0)


def test_exact_when_another_engine_is_connected() -> None:
    bench = given_up()
    assert bench.reconnect() == [("ask", 5)]
    assert bench.replay(end=True) == ["clear", ("ask", 0)]
    assert bench.replay(0, run=1, end=True) == [(1, 0)]
    assert bench.status == (RANK_EXACT, 0)


def test_not_exact_when_the_same_engine_is_connected_again() -> None:
    bench = given_up()
    assert bench.reconnect() == [("ask", 5)]
    assert bench.replay(5, end=True) == []
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)


def test_blocks_of_a_former_process_are_not_said_to_be_kept_when_they_are_forgotten() -> None:
    bench = Bench(has_replay=True, resume=Resume(2, print_of(payload(1)), 0))
    assert bench.connect() == [("ask", 1)]
    assert bench.live(4) == []
    assert answered_without(bench, 1, 4) == ["clear", 4]
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)


def test_nor_when_replay_is_of_another_stream() -> None:
    bench = Bench(has_replay=True, resume=Resume(2, print_of(payload(1)), 0))
    assert bench.connect() == [("ask", 1)]
    assert bench.live(4) == []
    assert bench.replay(1) == []
    assert bench.replay(4, run=1) == ["clear", 4]
    assert bench.status == (RANK_DEGRADED, FORGOTTEN)
