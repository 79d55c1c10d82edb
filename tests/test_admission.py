"""sglfast._admission: limits over all shards, held without a lock."""

import contextlib
import fcntl
import mmap
import os
import re
import struct
import time
from pathlib import Path

import pytest
from shared_memory import forked, shared_segment

from sglfast import _counters
from sglfast._admission import Limits
from sglfast._counters import Totals
from sglfast._segment import Segment

SOURCE = (Path(__file__).parent.parent / "cext" / "admission.pyx").read_text()


def limits(segment: Segment, shard: int = 0, *, in_flight: int = 0, waiting: int = 0, rate: float = 0.0, burst: float = 0.0) -> Limits:
    return Limits(segment, shard, max_in_flight=in_flight, max_waiting=waiting, rate_per_s=rate, burst=burst)


def test_words_are_those_of_the_counters() -> None:
    words = dict(re.findall(r"^    c_([SW]_\w+) = (\d+)$", SOURCE, re.MULTILINE))
    assert len(words) == 4
    assert {name: int(value) for name, value in words.items()} == {name: getattr(_counters, name) for name in words}
    gauges = {"S": _counters.GAUGES_SHARD, "W": _counters.GAUGES_WORKER}
    assert all(getattr(_counters, name) in gauges[name[0]] for name in words), "a dead shard's places come back"


def test_what_one_shard_takes_another_cannot_have() -> None:
    with shared_segment() as (_, segment):
        one, two = (limits(segment, shard, in_flight=3) for shard in (0, 1))
        assert [one.take(), two.take(), one.take()] == [True] * 3
        assert [one.take(), two.take()] == [False, False]
        assert one.in_flight == two.in_flight == 3
        two.give_back()
        assert one.take()
        for _ in range(5):  # more than was taken: no shard owes anything
            two.give_back()
        assert two.in_flight == 3


def test_a_dead_shard_gives_its_places_back() -> None:
    with shared_segment() as (_, segment):
        one, two = (limits(segment, shard, in_flight=2, waiting=1) for shard in (0, 1))
        assert [one.take(), one.take(), one.line_up(), two.line_up(), two.take()] == [True, True, True, False, False]
        one.show_head(7)
        Totals(segment).retire(0)
        assert (two.in_flight, two.waiting, two.first_order()) == (0, 0, 0)
        assert [two.take(), two.line_up()] == [True, True]


def test_the_limit_holds_while_three_processes_fight_for_it() -> None:
    limit, rounds = 3, 3000
    held = mmap.mmap(-1, 16)  # how many hold a place now, and the most that ever did
    lock = os.memfd_create("lock")

    @contextlib.contextmanager
    def locked() -> object:  # type: ignore[misc]
        fd = os.open(f"/proc/self/fd/{lock}", os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(fd)

    def change(by: int) -> None:
        with locked():
            now, most = struct.unpack("<qq", held[:16])
            held[:16] = struct.pack("<qq", now + by, max(most, now + by))

    with shared_segment(max_shards=3) as (_, segment):

        def fight(shard: int) -> int:
            mine, taken = limits(segment, shard, in_flight=limit), 0
            for turn in range(rounds):
                if mine.take():
                    taken += 1
                    change(1)
                    if turn % 3 == 0:
                        time.sleep(0)
                    change(-1)
                    mine.give_back()
            return taken

        with contextlib.ExitStack() as running:
            children = [running.enter_context(forked(lambda shard=shard: fight(shard))) for shard in range(3)]  # type: ignore[misc]
            taken = [child.result(60) for child in children]
        now, most = struct.unpack("<qq", held[:16])
        assert now == 0
        assert 1 <= most <= limit
        assert min(taken) > rounds // 100, f"a shard starved: {taken}"
        assert limits(segment, in_flight=limit).in_flight == 0
    os.close(lock)


def test_a_rate_is_kept_over_two_shards_and_a_burst_is_let_through() -> None:
    with shared_segment() as (_, segment):
        one, two = (limits(segment, shard, rate=500, burst=20) for shard in (0, 1))
        begun = time.monotonic()
        at_once = sum(limits_.take() for limits_ in (one, two) for _ in range(50))
        assert 20 <= at_once <= 21 + 500 * (time.monotonic() - begun)
        taken = at_once
        while time.monotonic() - begun < 0.2:
            taken += one.take() + two.take()
        assert taken <= 21 + 500 * (time.monotonic() - begun)
        assert taken > at_once


def test_without_limits_everybody_may() -> None:
    with shared_segment() as (_, segment):
        free = limits(segment)
        assert all(free.take() for _ in range(1000))
        free.give_back()
        assert free.in_flight == 999, "counted all the same: a limit may come"
        assert not free.line_up()


def test_new_limits_find_what_runs() -> None:
    with shared_segment() as (_, segment):
        before = limits(segment)
        assert [before.take(), before.take()] == [True, True]
        after = limits(segment, in_flight=3)
        after.hold()  # began when nobody counted
        assert not after.take()
        for _ in range(3):
            after.give_back()
        assert (after.in_flight, after.take()) == (0, True)
        none = limits(segment)
        none.give_back()
        assert none.in_flight == 0


def test_a_debt_of_a_slower_rate_is_forgiven() -> None:
    """A burst at one request a second would keep a faster rate shut for a quarter of an hour."""
    with shared_segment() as (_, segment):
        slow = limits(segment, rate=1, burst=1000)
        while slow.take():
            pass
        fast = limits(segment, 1, rate=1000, burst=10)
        assert not fast.take()
        time.sleep(0.05)
        assert fast.take()


@pytest.mark.parametrize("rate", [300_000, 700_000])
def test_a_high_rate_is_not_exceeded(rate: int) -> None:
    with shared_segment() as (_, segment):
        fast = limits(segment, rate=rate, burst=1)
        begun, taken = time.monotonic(), 0
        while time.monotonic() - begun < 0.2:
            taken += fast.take()
        assert taken <= 2 + rate * (time.monotonic() - begun)


def test_whether_there_is_room_is_told_without_taking_it() -> None:
    with shared_segment() as (_, segment):
        one, two = (limits(segment, shard, in_flight=1) for shard in (0, 1))
        assert [one.has_room(), two.has_room(), one.take()] == [True] * 3
        assert [one.has_room(), two.has_room()] == [False, False]
        one.give_back()
        assert two.has_room()
        assert all(limits(segment).has_room() for _ in range(3)), "no limit"
    with shared_segment() as (_, segment):
        slow = limits(segment, rate=0.5, burst=1)
        assert [slow.has_room(), slow.has_room(), slow.take(), slow.has_room()] == [True, True, True, False]


def test_the_lowest_order_of_all_shards() -> None:
    with shared_segment() as (_, segment):
        one, two = limits(segment, 0), limits(segment, 1)
        assert one.first_order() == 0
        one.show_head(9)
        two.show_head(5)
        assert one.first_order() == two.first_order() == 5
        two.show_head(0)
        assert two.first_order() == 9


def test_the_lowest_order_that_waits_for_a_worker() -> None:
    with shared_segment() as (_, segment):
        one, two = limits(segment, 0), limits(segment, 1)
        one.show_line_head(1, 9)
        two.show_line_head(1, 5)
        two.show_line_head(0, 1)
        assert [one.first_in_line(worker) for worker in (0, 1, 2)] == [1, 5, 0]
        Totals(segment).retire(1)
        assert [one.first_in_line(worker) for worker in (0, 1)] == [0, 9]
        for worker in (-1, segment.max_workers):
            with pytest.raises((ValueError, OverflowError)):
                one.first_in_line(worker)


@pytest.mark.parametrize(
    "wrong",
    [
        {"in_flight": -1},
        {"waiting": -1},
        {"rate": -1.0},
        {"rate": float("nan")},
        {"rate": 1e7},
        {"burst": -1.0},
        {"shard": 2},
        {"shard": -1},
    ],
)
def test_limits_that_cannot_be(wrong: dict[str, float]) -> None:
    with shared_segment() as (_, segment), pytest.raises(ValueError, match=r"limits are|shard"):
        limits(segment, **wrong)  # type: ignore[arg-type]
