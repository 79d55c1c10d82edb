"""sglfast._breaker: every transition, the single probe, reports that come too late, many processes at one word, kill -9."""

from __future__ import annotations

import functools
import random
import time
from dataclasses import dataclass

import pytest
from conftest import SeededRandom
from hypothesis import given
from hypothesis import strategies as st
from shared_memory import forked, shared_segment

from sglfast import shm
from sglfast._breaker import BUSY, CLAIMED, CLOSED, HALF_OPEN, NEEDLESS, OPEN, SAME, Breakers
from sglfast._counters import W_BREAKER_HALF_OPENED, Totals
from sglfast._segment import Segment
from sglfast._workers import JOINING, READY, UNHEALTHY, WorkerTable
from sglfast.shm import WorkerRecord, WorkerView, put_worker


def put(segment: Segment, worker_idx: int = 0, state: int = READY) -> int:
    """A worker in the slot; returns its generation."""
    table = WorkerTable(segment)
    record = WorkerRecord(url=f"http://w{worker_idx}:1")
    view = WorkerView(
        worker_idx=worker_idx, generation=0, state=state, rank_base=0, dp_size=1, block_size=0, bigram=False, record=record
    )  # fmt: skip
    put_worker(table, view, is_new=True)
    row = table.read(worker_idx)
    assert row is not None
    return row[0]


def opened(breakers: Breakers, generation: int, now_s: float = 100.0) -> None:
    """Fail until it opens."""
    while breakers.failed(0, generation, False, now_s) != OPEN:
        pass


def half_opened(breakers: Breakers, generation: int) -> None:
    opened(breakers, generation)
    assert breakers.wake(0, 1000.0)


def test_failures_in_a_row_open_it() -> None:
    with shared_segment() as (_, segment):
        generation = put(segment)
        breakers = Breakers(segment, 0, failure_threshold=3)
        version = breakers.version()
        for _ in range(5):
            assert [breakers.failed(0, generation, False, 1.0) for _ in range(2)] == [SAME, SAME]
            assert breakers.succeeded(0, generation, False, 1.0) == SAME
        assert (breakers.state(0), breakers.is_selectable(0), breakers.version()) == (CLOSED, True, version)
        assert [breakers.failed(0, generation, False, 1.0) for _ in range(4)] == [SAME, SAME, OPEN, SAME]
        assert (breakers.state(0), breakers.is_selectable(0), breakers.version()) == (OPEN, False, version + 1)
        assert breakers.state(1) == CLOSED, "each worker has its own"


def test_only_failures_within_the_window_count() -> None:
    with shared_segment() as (_, segment):
        generation = put(segment)
        breakers = Breakers(segment, 0, failure_threshold=3, window_secs=10.0)
        assert [breakers.failed(0, generation, False, now_s) for now_s in (1.0, 5.0, 11.5)] == [SAME, SAME, SAME], "a new row at 11.5"
        assert [breakers.failed(0, generation, False, now_s) for now_s in (15.0, 21.0)] == [SAME, OPEN]


def test_it_wakes_when_its_time_is_over_and_once() -> None:
    with shared_segment() as (_, segment):
        breakers, other = Breakers(segment, 0, open_secs=30.0), Breakers(segment, 1, open_secs=30.0)
        opened(breakers, put(segment), 100.0)
        assert [breakers.wake(0, now_s) for now_s in (100.0, 129.9)] == [False, False]
        version = breakers.version()
        assert other.wake(0, 130.1)
        assert not breakers.wake(0, 131.0)
        assert (breakers.state(0), breakers.is_selectable(0), breakers.version()) == (HALF_OPEN, True, version + 1)


def test_the_clock_may_go_round() -> None:
    """Its ticks are kept modulo 62 days; an uptime is not."""
    circle_s = 2**29 / 100
    with shared_segment() as (_, segment):
        breakers = Breakers(segment, 0, open_secs=30.0)
        opened(breakers, put(segment), 3 * circle_s - 10.0)
        assert not breakers.wake(0, 3 * circle_s + 19.0)
        assert breakers.wake(0, 3 * circle_s + 21.0)


def test_one_probe_at_a_time() -> None:
    with shared_segment() as (_, segment):
        generation = put(segment)
        here, there = Breakers(segment, 0, success_threshold=2), Breakers(segment, 1, success_threshold=2)
        assert here.claim(0, generation) == NEEDLESS
        half_opened(here, generation)
        version = here.version()
        assert (here.claim(0, generation), there.claim(0, generation), here.claim(0, generation)) == (CLAIMED, BUSY, BUSY)
        assert (here.is_selectable(0), here.version()) == (False, version + 1), "and nobody need ask"
        assert there.succeeded(0, generation, True, 1.0) == SAME, "it is not the other's probe"
        assert there.succeeded(0, generation, False, 1.0) == SAME, "a request that was sent before is no probe"
        assert here.succeeded(0, generation, True, 1.0) == HALF_OPEN
        assert (here.state(0), here.is_selectable(0), here.version()) == (HALF_OPEN, True, version + 2)
        assert there.claim(0, generation) == CLAIMED
        assert there.succeeded(0, generation, True, 1.0) == CLOSED
        assert (here.state(0), here.is_selectable(0)) == (CLOSED, True)
        assert [here.failed(0, generation, False, 1.0) for _ in range(10)] == [SAME] * 9 + [OPEN], "its failures begin at 0"


def test_a_probe_that_fails_opens_it_again() -> None:
    with shared_segment() as (_, segment):
        generation = put(segment)
        breakers = Breakers(segment, 0, open_secs=30.0)
        half_opened(breakers, generation)
        assert breakers.claim(0, generation) == CLAIMED
        assert breakers.failed(0, generation, False, 2000.0) == SAME, "a request that was sent before the probe"
        assert breakers.failed(0, generation, True, 2000.0) == OPEN
        assert not breakers.wake(0, 2029.0)
        assert breakers.wake(0, 2031.0)
        assert breakers.claim(0, generation) == CLAIMED, "the last probe's slot is free"


def test_a_probe_without_a_verdict_gives_its_slot_back() -> None:
    with shared_segment() as (_, segment):
        generation = put(segment)
        here, there = Breakers(segment, 0), Breakers(segment, 1)
        half_opened(here, generation)
        assert here.claim(0, generation) == CLAIMED
        assert not there.release(0)
        assert here.release(0)
        assert not here.release(0)
        assert there.claim(0, generation) == CLAIMED
        version = here.version()
        here.release_shard(1)  # control's work when that shard is dead
        assert (here.is_selectable(0), here.version()) == (True, version + 1)
        assert here.claim(0, generation) == CLAIMED
        here.release_shard(1)
        assert not here.is_selectable(0), "the living one keeps its probe"


def test_reports_of_a_removed_worker_change_nothing() -> None:
    with shared_segment() as (_, segment):
        breakers = Breakers(segment, 0, failure_threshold=1)
        old = put(segment)
        opened(breakers, old)
        new = put(segment)
        assert new == old + 1
        assert breakers.state(0) == CLOSED
        assert breakers.failed(0, old, False, 1.0) == SAME
        assert breakers.claim(0, old) == BUSY
        half_opened(breakers, new)
        assert breakers.claim(0, new) == CLAIMED
        assert breakers.succeeded(0, old, True, 1.0) == SAME


def test_health_checks_that_take_a_worker_in_give_it_a_chance() -> None:
    with shared_segment() as (_, segment):
        table, breakers = WorkerTable(segment), Breakers(segment, 0)
        generation = put(segment, state=JOINING)
        table.set_state(0, READY)
        assert breakers.state(0) == CLOSED
        opened(breakers, generation)
        table.set_state(0, READY)
        assert breakers.state(0) == OPEN, "it has been READY all the time"
        table.set_state(0, UNHEALTHY)
        assert breakers.state(0) == OPEN
        table.set_state(0, READY)
        assert breakers.state(0) == HALF_OPEN
        assert Totals(segment).worker(0)[W_BREAKER_HALF_OPENED] == 1


def test_thresholds_that_cannot_be_counted() -> None:
    with shared_segment() as (_, segment):
        generation = put(segment)
        never = Breakers(segment, 0, failure_threshold=2**32 - 1, success_threshold=2**32 - 1)
        assert {never.failed(0, generation, False, 1.0) for _ in range(5000)} == {SAME}
        assert Breakers(segment, 0, failure_threshold=1).failed(0, generation, False, 1.0) == OPEN
    for wrong in ({"failure_threshold": 0}, {"success_threshold": 0}, {"open_secs": -1.0}, {"window_secs": float("nan")}):
        with shared_segment() as (_, segment), pytest.raises(ValueError, match="thresholds must be"):
            Breakers(segment, 0, **wrong)  # type: ignore[arg-type]


def test_bad_indexes_raise() -> None:
    with shared_segment(max_workers=4, max_shards=2) as (_, segment):
        breakers = Breakers(segment, 0)
        for call in (
            lambda: breakers.state(4), lambda: breakers.is_selectable(4), lambda: breakers.claim(4, 1), lambda: breakers.release(4),
            lambda: breakers.failed(4, 1, False, 0.0), lambda: breakers.succeeded(1 << 31, 1, False, 0.0), lambda: breakers.wake(4, 0.0),
        ):  # fmt: skip
            with pytest.raises(IndexError, match=r"^worker \d+ is outside 0\.\.3$"):
                call()
        with pytest.raises(IndexError, match=r"^shard 2 is outside 0\.\.1$"):
            breakers.release_shard(2)
        with pytest.raises(ValueError, match=r"^shard 2 is outside -1\.\.1$"):
            Breakers(segment, 2)


# ---- against a model, and from many processes ----


@dataclass
class Model:
    """The drawing at the top of cext/sf_breaker.h, with thresholds 3 and 2, 10 s open and a window of 5 s."""

    state: int = CLOSED
    count: int = 0
    prober: int = -1
    since_s: float = 0.0

    def failed(self, is_probe: bool, now_s: float) -> None:
        if self.state == HALF_OPEN and is_probe:
            self.state, self.count, self.prober, self.since_s = OPEN, 0, -1, now_s
        elif self.state == CLOSED:
            if not self.count or now_s - self.since_s > 5:
                self.count, self.since_s = 0, now_s
            self.count += 1
            if self.count == 3:
                self.state, self.count, self.since_s = OPEN, 0, now_s

    def succeeded(self, shard: int, is_probe: bool) -> None:
        if self.state == CLOSED:
            self.count = 0
        elif self.state == HALF_OPEN and is_probe and self.prober == shard:
            self.prober, self.count = -1, self.count + 1
            if self.count == 2:
                self.state, self.count = CLOSED, 0

    def claim(self, shard: int) -> int:
        if self.state == HALF_OPEN and self.prober < 0:
            self.prober = shard
            return CLAIMED
        return NEEDLESS if self.state == CLOSED else BUSY

    def release(self, shard: int) -> None:
        if self.state == HALF_OPEN and self.prober == shard:
            self.prober = -1

    def wake(self, now_s: float) -> None:
        if self.state == OPEN and now_s - self.since_s >= 10:
            self.state, self.count, self.prober = HALF_OPEN, 0, -1


steps = st.lists(
    st.tuples(st.sampled_from(["failed", "failed", "succeeded", "claim", "release", "wake"]), st.integers(0, 2), st.booleans(),
              st.integers(0, 12)),
    max_size=60,
)  # fmt: skip


@given(steps)
def test_any_order_of_events_is_the_model_s(steps: list[tuple[str, int, bool, int]]) -> None:
    with shared_segment(max_shards=3) as (_, segment):
        generation, model, now_s = put(segment), Model(), 1.0
        shards = [
            Breakers(segment, shard, failure_threshold=3, success_threshold=2, open_secs=10, window_secs=5) for shard in range(3)
        ]  # fmt: skip
        for what, shard, is_probe, pause_s in steps:
            now_s += pause_s
            breakers, before, could = shards[shard], shards[0].version(), shards[0].is_selectable(0)
            if what == "failed":
                breakers.failed(0, generation, is_probe, now_s)
                model.failed(is_probe, now_s)
            elif what == "succeeded":
                breakers.succeeded(0, generation, is_probe, now_s)
                model.succeeded(shard, is_probe)
            elif what == "claim":
                assert breakers.claim(0, generation) == model.claim(shard)
            elif what == "release":
                breakers.release(0)
                model.release(shard)
            else:
                breakers.wake(0, now_s)
                model.wake(now_s)
            can = model.state == CLOSED or (model.state == HALF_OPEN and model.prober < 0)
            assert (breakers.state(0), breakers.is_selectable(0)) == (model.state, can)
            assert breakers.version() > before or can == could, "whoever selects is told"


def test_many_processes_send_one_probe(rng: SeededRandom) -> None:
    """Four processes report and claim as fast as they can; one of them is killed in the middle, again and again."""
    with shared_segment(max_shards=5) as (fd, segment):
        generation = put(segment)
        control = Breakers(segment)

        def hammer(shard: int, seed: int) -> None:
            own, chance = shm.attach(fd), random.Random(seed)
            breakers = Breakers(own, shard, failure_threshold=2, success_threshold=2, open_secs=0.0)
            while True:
                breakers.wake(0, time.monotonic())
                answer = breakers.claim(0, generation)
                if answer != BUSY:
                    is_probe, now_s = answer == CLAIMED, time.monotonic()
                    match chance.randrange(4):
                        case 0:
                            breakers.failed(0, generation, is_probe, now_s)
                        case 1:
                            is_probe and breakers.release(0)
                        case _:
                            breakers.succeeded(0, generation, is_probe, now_s)

        # Drawn here: children that draw from their copies of one generator all draw the same.
        seeds = [rng.getrandbits(32) for _ in range(23)]
        with (
            forked(lambda: hammer(0, seeds[20])), forked(lambda: hammer(1, seeds[21])), forked(lambda: hammer(2, seeds[22])),
        ):  # fmt: skip
            for seed in seeds[:20]:
                with forked(functools.partial(hammer, 3, seed)) as victim:
                    time.sleep(0.02)
                    victim.kill()
                control.release_shard(3)
            before, states = control.version(), set()
            deadline = time.monotonic() + 20
            while states != {CLOSED, OPEN, HALF_OPEN}:
                assert time.monotonic() < deadline, f"only {states}"
                states.add(control.state(0))
            assert control.version() > before, "life goes on"
        for shard in range(4):
            control.release_shard(shard)
        # Whatever they left, it is a state that can go on.
        last = Breakers(segment, 4, success_threshold=1, open_secs=0.0)
        last.wake(0, time.monotonic())
        assert last.claim(0, generation) in (CLAIMED, NEEDLESS)
        last.succeeded(0, generation, True, time.monotonic())
        assert control.state(0) == CLOSED
