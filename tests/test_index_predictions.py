"""sglfast.index.predictions: the thread that drains, whose rank is whose, and what the next index process finds."""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator

import pytest
import zmq
from kv_publisher import Publisher
from shared_memory import packed, shared_segment
from test_index_main import Control
from test_index_main_process import started

from sglfast import shm
from sglfast._predicted import KEEP, SENT, SETTLED, Predictions, totals
from sglfast._segment import Segment
from sglfast._workers import FREE
from sglfast.index import predictions as module
from sglfast.index.main import Index
from sglfast.index.predictions import PredictionKeeper

LOG = logging.getLogger("test.predictions")
KEYS = packed([number * 0x9E3779B97F4A7C15 % 2**64 for number in range(1, 21)])
WAIT_S = 20.0


def wait_until(is_true: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < end_s, f"not within {WAIT_S:.0f} s: {what}"
        time.sleep(0.002)


@contextlib.contextmanager
def keeping(segment: Segment, worker_blocks: int = 1000, *, keeps_all: bool = False) -> Iterator[PredictionKeeper]:
    """A keeper; its owner says `ready`."""
    keeper = PredictionKeeper(segment, worker_blocks, LOG, keeps_all=keeps_all)
    try:
        yield keeper
    finally:
        assert keeper.close(WAIT_S)


@contextlib.contextmanager
def segments() -> Iterator[tuple[int, Segment, Predictions, Predictions]]:
    """A segment, a shard that sends, and one that only looks."""
    with shared_segment(prediction_blocks=4000) as (fd, segment):
        yield fd, segment, Predictions(segment, 0), Predictions(segment, 1)


def test_what_a_shard_sends_another_sees_soon() -> None:
    with segments() as (_, segment, shard, other), keeping(segment) as keeper:
        keeper.own(3, 2, 7, has_events=True, was_there=False)
        keeper.ready()
        shard.put(SENT, 4, 7, KEYS)
        wait_until(lambda: other.match(KEYS) == 20, "the other shard sees it")
        assert other.is_in_flight(4)
        shard.put(SETTLED, 4, 7, KEYS)
        wait_until(lambda: other.match(KEYS) == 20 and not other.is_in_flight(4), "it is settled")
        wait_until(lambda: other.match(KEYS) == 0, "it is over, without a further record")


def test_a_rank_s_next_worker_inherits_nothing() -> None:
    with segments() as (_, segment, shard, other), keeping(segment) as keeper:
        keeper.own(3, 1, 7, has_events=False, was_there=False)
        keeper.ready()
        shard.put(KEEP, 3, 7, KEYS)
        wait_until(lambda: other.match(KEYS) == 20, "kept")
        keeper.disown([3])
        assert other.match(KEYS) == 0
        shard.put(KEEP, 3, 7, KEYS)  # on its way when the worker went
        keeper.own(3, 1, 8, has_events=False, was_there=False)
        shard.put(KEEP, 3, 7, KEYS)
        wait_until(lambda: totals(segment)["refused"] == 2, "both are refused")
        assert other.match(KEYS) == 0
        shard.put(KEEP, 3, 8, KEYS)
        wait_until(lambda: other.match(KEYS) == 20, "the new worker's own")


@pytest.mark.parametrize(
    ("has_events", "keeps_all", "was_there", "stays"),
    [(False, False, True, True), (True, False, True, False), (True, True, True, True), (False, False, False, False)],
)
def test_what_the_next_index_finds(has_events: bool, keeps_all: bool, was_there: bool, stays: bool) -> None:
    with segments() as (_, segment, shard, other):
        with keeping(segment) as keeper:
            keeper.own(3, 1, 7, has_events=has_events, was_there=False)
            keeper.ready()
            shard.put(KEEP, 3, 7, KEYS)
            wait_until(lambda: other.match(KEYS) == 20, "kept")
        with keeping(segment, keeps_all=keeps_all) as keeper:
            keeper.own(3, 1, 7, has_events=has_events, was_there=was_there)
            keeper.ready()
            assert other.match(KEYS) == (20 if stays else 0)
            shard.put(KEEP, 3, 7, KEYS)
            wait_until(lambda: other.match(KEYS) == 20, "kept again")
            keeper.ready()
            assert other.match(KEYS) == 20, "only the first look forgets"


def test_a_rank_keeps_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TRIM_S", 0.0)
    with segments() as (_, segment, shard, other), keeping(segment, 12) as keeper:
        keeper.own(3, 1, 7, has_events=False, was_there=False)
        keeper.ready()
        shard.put(KEEP, 3, 7, KEYS)
        wait_until(lambda: totals(segment)["trimmed"] == 8, "8 of 20 are gone")
        assert sum(other.match(KEYS[i : i + 8]) for i in range(0, len(KEYS), 8)) == 12


def test_a_burst_wakes_index_a_few_times_only() -> None:
    """While records come it looks once in a millisecond."""
    with segments() as (_, segment, shard, _), keeping(segment) as keeper:
        keeper.own(0, 1, 1, has_events=True, was_there=False)
        keeper.ready()
        writer, drained = keeper._writer, []

        class Counting:
            def __getattr__(self, name: str) -> object:
                return getattr(writer, name)

            def drain(self) -> int:
                drained.append(writer.drain())
                return drained[-1]

        keeper._writer = Counting()  # type: ignore[assignment]
        begun_s = time.monotonic()
        sent = 0
        while time.monotonic() - begun_s < 0.2:
            shard.put(SENT, 0, 1, KEYS)
            sent += 1
            time.sleep(0)
        took_ms = (time.monotonic() - begun_s) * 1000
        wait_until(lambda: totals(segment)["records"] == sent, "all are there")
        assert len([n for n in drained if n]) <= took_ms + 10


# ---- in the index ----


def put(control: Control, publisher: Publisher | None, **fields: float) -> None:
    control.put(0, publisher, rank_base=3, **fields)  # type: ignore[arg-type]


def test_the_index_follows_workers_with_and_without_events() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher = Publisher(context, has_replay=True)
    with segments() as (_, segment, shard, other), keeping(segment) as keeper:
        control, index = Control(segment), Index(segment, LOG, predictions=keeper)
        try:
            put(control, None)
            index.sync()
            shard.put(KEEP, 3, 1, KEYS)
            wait_until(lambda: other.match(KEYS) == 20, "kept")
            control.table.set_state(0, FREE)
            index.sync()
            assert other.match(KEYS) == 0, "the worker is gone"
            put(control, None)
            index.sync()
            shard.put(KEEP, 3, 2, KEYS)
            wait_until(lambda: other.match(KEYS) == 20, "another worker in its slot")
            put(control, None, is_new=False, startup_time=2.0)
            index.sync()
            assert other.match(KEYS) == 0, "it was started again: its cache is empty"
            shard.put(KEEP, 3, 2, KEYS)
            wait_until(lambda: other.match(KEYS) == 20, "kept again")
            put(control, publisher, is_new=False, startup_time=2.0)
            index.sync()
            assert other.match(KEYS) == 0, "now its events tell"
        finally:
            index.close()
            publisher.close()
            context.term()


def test_the_process_drains_and_its_successor_goes_on() -> None:
    fd, segment = shm.create(max_workers=4, max_ranks=64, max_shards=2, capacity_blocks=4096, prediction_blocks=4000)
    fcntl.fcntl(fd, fcntl.F_SETFD, 0)
    control, shard, other = Control(segment), Predictions(segment, 0), Predictions(segment, 1)
    put(control, None)
    try:
        with started(fd) as process:
            wait_until(lambda: segment.process_info(0)[4], "index is ready")
            shard.put(KEEP, 3, 1, KEYS)
            wait_until(lambda: other.match(KEYS) == 20, "drained")
            process.popen.kill()
            process.end()
        shard.put(KEEP, 3, 1, KEYS[:80])  # while there is none
        assert other.match(KEYS) == 20
        with started(fd) as process:
            wait_until(lambda: totals(segment)["records"] == 2, "the ring is read on")
            assert other.match(KEYS) == 20, "and nothing was forgotten"
            process.popen.terminate()
            code, log = process.end()
        assert (code, "Traceback" in log) == (0, False)
    finally:
        os.close(fd)


def test_rings_are_read_only_when_ranks_have_their_workers() -> None:
    """What came while there was no index is not refused because its worker is not known yet."""
    with segments() as (_, segment, shard, other), keeping(segment) as keeper:
        shard.put(KEEP, 3, 7, KEYS)
        time.sleep(0.05)
        keeper.own(3, 1, 7, has_events=False, was_there=True)
        assert totals(segment) == {"records": 0, "refused": 0, "evicted": 0, "trimmed": 0}
        keeper.ready()
        wait_until(lambda: other.match(KEYS) == 20, "read")
    with segments() as (_, segment, shard, other), keeping(segment):
        pass  # never ready: nothing to end
