"""The rings from shards to index: full, wrapped, producers and consumers killed at any moment, and the doorbell between processes."""

import random
import threading
import time

import pytest
from shared_memory import Words, forked, packed, shared_segment

from sglfast import shm
from sglfast._predicted import KEEP, KEYS_MAX, SENT, Predictions, PredictionWriter, dropped_total, totals

RING_WORDS = 16384
HEAD, DROPPED, TAIL = 0, 8, 64


def chain(number: int, length: int) -> list[int]:
    """A prompt's keys that tell which prompt it was."""
    rng = random.Random(number)
    return [rng.getrandbits(64) | 1 for _ in range(length)]


def test_a_full_ring_drops_and_counts_and_never_blocks() -> None:
    with shared_segment(prediction_blocks=4000) as (_, segment):
        shard, writer = Predictions(segment, 1), PredictionWriter(segment)
        writer.own(0, 1)
        keys = packed(chain(1, KEYS_MAX))
        fits = RING_WORDS // (KEYS_MAX + 2)
        results = [shard.put(KEEP, 0, 1, keys) for _ in range(fits + 10)]
        assert results == [True] * fits + [False] * 10
        assert shard.dropped_total == dropped_total(segment) == 10
        rest = RING_WORDS - fits * (KEYS_MAX + 2)
        assert shard.put(KEEP, 0, 1, packed(chain(2, rest - 2))), "to the last word"
        assert not shard.put(KEEP, 0, 1, b""), "not one more"
        assert writer.drain() == fits + 1
        assert writer.drain() == 0
        assert shard.put(KEEP, 0, 1, packed(chain(3, 5)))
        assert writer.drain() == 1
        assert [shard.match(packed(chain(number, length))) for number, length in ((1, KEYS_MAX), (2, rest - 2), (3, 5))] == [
            KEYS_MAX,
            rest - 2,
            5,
        ]


def test_records_wrap_and_stay_whole(rng: random.Random) -> None:
    """A hundred times round the ring, in bursts of any size: each record arrives as it was, none twice."""
    with shared_segment(prediction_blocks=400) as (fd, segment):
        shard, writer, words = Predictions(segment, 0), PredictionWriter(segment), Words(fd)
        for rank in range(64):
            writer.own(rank, rank + 1)
        sent = 0
        while words.get(words.header("rings_offset") + HEAD) < 100 * RING_WORDS:
            burst = []
            for _ in range(rng.randrange(1, 60)):
                rank, keys = rng.randrange(64), chain(rng.getrandbits(60), rng.randrange(1, KEYS_MAX + 1))
                assert shard.put(KEEP, rank, rank + 1, packed(keys))
                burst.append((rank, keys))
            sent += len(burst)
            assert writer.drain() == len(burst)
            rank, keys = burst[-1]
            other = Predictions(segment, 1)  # without memory of its own
            # Its other keys may have made room, one of eight places for each.
            found = dict(other.hits()) if other.match(packed(keys[:1])) else {}
            assert found.get(rank) == 1
        assert totals(segment)["records"] == sent
        assert totals(segment)["refused"] == 0
        assert words.get(words.header("rings_offset") + TAIL) == words.get(words.header("rings_offset") + HEAD)


def test_a_torn_record_is_not_seen_and_not_in_the_way() -> None:
    """A shard killed inside `put` has written words and not moved the head."""
    with shared_segment(prediction_blocks=400) as (fd, segment):
        shard, writer, words = Predictions(segment, 0), PredictionWriter(segment), Words(fd)
        writer.own(0, 1)
        shard.put(KEEP, 0, 1, packed(chain(1, 10)))
        base = words.header("rings_offset")
        for i in range(5):
            words.put(base + 4096 + (words.get(base + HEAD) + i) * 8, 0xFFFF_FFFF_FFFF_FFFF)
        assert writer.drain() == 1
        successor = Predictions(shm.attach(fd), 0)
        successor.put(KEEP, 0, 1, packed(chain(2, 10)))
        assert writer.drain() == 1
        assert Predictions(segment, 1).match(packed(chain(2, 10))) == 10
        assert totals(segment) == {"records": 2, "refused": 0, "evicted": 0, "trimmed": 0}


@pytest.mark.parametrize(
    ("first", "head"),
    [
        (1 << 56 | 10, 5),  # more keys than words
        (1 << 56 | (KEYS_MAX + 1), 1000),  # more than any prompt has
        (1 << 56 | 0xFFFF_FFFF, RING_WORDS),
        (1 << 56 | 1, RING_WORDS + 1),  # more words than a ring has
    ],
)
def test_a_damaged_ring_is_emptied(first: int, head: int) -> None:
    with shared_segment(prediction_blocks=400) as (fd, segment):
        writer, words = PredictionWriter(segment), Words(fd)
        writer.own(0, 1)
        base = words.header("rings_offset")
        words.put(base + 4096, first)
        words.put(base + HEAD, head)
        assert writer.drain() == 1
        assert words.get(base + TAIL) == head
        assert totals(segment)["refused"] == 1
        shard = Predictions(segment, 0)
        shard.put(KEEP, 0, 1, packed(chain(1, 4)))
        assert writer.drain() == 1
        assert Predictions(segment, 1).match(packed(chain(1, 4))) == 4


def test_records_of_nobody_s_rank_are_refused() -> None:
    with shared_segment(prediction_blocks=400) as (fd, segment):
        shard, writer, words = Predictions(segment, 0), PredictionWriter(segment), Words(fd)
        writer.own(3, 7)
        for rank, generation in ((3, 6), (3, 0), (4, 7), (4, 0)):
            shard.put(KEEP, rank, generation, packed(chain(1, 4)))
        assert writer.drain() == 4
        base = words.header("rings_offset")
        for word in (9 << 56 | 3 << 32, 1 << 56 | 64 << 32, 3 << 32):  # no such op, no such rank, op 0
            at = words.get(base + HEAD)
            words.put(base + 4096 + at * 8, word)
            words.put(base + 4096 + (at + 1) * 8, 7)
            words.put(base + HEAD, at + 2)
        assert writer.drain() == 3
        assert totals(segment) == {"records": 0, "refused": 7, "evicted": 0, "trimmed": 0}


def test_index_killed_between_reading_and_saying_so_reads_again() -> None:
    """The tail moves after a record was applied: applied twice is as good as once."""
    with shared_segment(prediction_blocks=400) as (fd, segment):
        shard, writer, words = Predictions(segment, 0), PredictionWriter(segment), Words(fd)
        writer.own(0, 1)
        keys = packed(chain(1, 20))
        shard.put(SENT, 0, 1, keys)
        assert writer.drain() == 1
        words.put(words.header("rings_offset") + TAIL, 0)
        again = PredictionWriter(shm.attach(fd))
        again.own(0, 1)
        assert again.drain() == 1
        other = Predictions(segment, 1)
        assert other.match(keys) == 20
        assert other.hits() == [(0, 20)]
        assert other.is_in_flight(0)


@pytest.mark.parametrize("victim", ["shard", "index"])
def test_kill_9_at_any_moment(victim: str, rng: random.Random) -> None:
    """A shard at full speed, an index at full speed, one of them killed again and again: the other goes on, what is seen is true."""
    with shared_segment(prediction_blocks=4000) as (fd, _):

        def produce() -> bool:
            shard = Predictions(shm.attach(fd), 0)
            number = 0
            while True:
                number += 1
                shard.put(KEEP, number % 64, 1, packed(chain(number % 500, 1 + number % 90)))

        def consume() -> bool:
            writer = PredictionWriter(shm.attach(fd))
            for rank in range(64):
                writer.own(rank, 1)
            while True:
                if not writer.drain():
                    writer.wait(1000)

        lasting, mortal = (consume, produce) if victim == "shard" else (produce, consume)
        words = Words(fd)
        records = words.header("predictions_offset") + 64
        reader = Predictions(shm.attach(fd), 1)
        with forked(lasting):
            for _ in range(12):
                with forked(mortal) as child:
                    before, end_s = words.get(records), time.monotonic() + 20
                    while words.get(records) < before + 200:
                        assert time.monotonic() < end_s, "nothing goes through any more"
                        time.sleep(0.005)
                    time.sleep(rng.random() / 50)
                    child.kill()
                for number in range(500):
                    reader.match(packed(chain(number, 90)))
                    # Prompt `number` was only ever given to the ranks of numbers that are the same modulo 500.
                    legal = {n % 64 for n in range(number, number + 500 * 64, 500)}
                    assert {rank for rank, _ in reader.hits()} <= legal
        assert words.get(records + 8) == 0, "no record was refused"


def test_readers_beside_a_writer_at_full_speed_see_no_wrong_owner() -> None:
    """A table far too small: keys come and go in every place, each with one owner of its own, which a reader may miss but not mistake."""
    with shared_segment(prediction_blocks=16, max_ranks=128) as (fd, _):
        keys = chain(9, 64)

        def write() -> bool:
            segment = shm.attach(fd)
            shard, writer = Predictions(segment, 0), PredictionWriter(segment)
            for rank in range(128):
                writer.own(rank, 1)
            while True:
                for i, key in enumerate(keys):
                    shard.put(KEEP, i * 2, 1, packed([key]))
                writer.drain()

        reader = Predictions(shm.attach(fd), 1)
        with forked(write):
            seen, end_s = 0, time.monotonic() + 20
            while seen < 20_000:
                assert time.monotonic() < end_s
                for i, key in enumerate(keys):
                    if reader.match(packed([key])):
                        seen += 1
                        assert reader.hits() == [(i * 2, 1)]


def test_the_doorbell_wakes_a_sleeping_index_and_only_then() -> None:
    with shared_segment(prediction_blocks=400) as (fd, segment):
        words = Words(fd)
        doorbell = words.header("predictions_offset")

        def index() -> list[float]:
            writer = PredictionWriter(shm.attach(fd))
            writer.own(0, 1)
            delays_s = []
            while len(delays_s) < 20:
                writer.wait(10_000)
                at_s = time.monotonic()
                if writer.drain():
                    delays_s.append(at_s)
            return delays_s

        shard = Predictions(segment, 0)
        sent_s = []
        with forked(index) as child:
            for number in range(20):
                end_s = time.monotonic() + 20
                while not words.get(doorbell):
                    assert time.monotonic() < end_s, "index does not sleep"
                    time.sleep(0.001)
                time.sleep(0.01)  # until it really does
                sent_s.append(time.monotonic())
                shard.put(SENT, 0, 1, packed(chain(number, 3)))
            woken_s = child.result()
        assert all(woken > sent for sent, woken in zip(sent_s, woken_s, strict=True))
        words.put(doorbell, 1)
        shard.put(SENT, 0, 1, packed(chain(99, 3)))
        assert words.get(doorbell) == 0, "who rings takes the word back: the next one need not"
        assert sum(woken - sent for sent, woken in zip(sent_s, woken_s, strict=True)) < 10, "not by the end of its time"


def test_wait_ends_by_time_by_a_record_and_by_wake() -> None:
    with shared_segment(prediction_blocks=400) as (_, segment):
        shard, writer = Predictions(segment, 0), PredictionWriter(segment)
        writer.own(0, 1)
        writer.wait(0)
        writer.wait(1, 100)
        shard.put(SENT, 0, 1, packed(chain(1, 3)))
        begun_s = time.monotonic()
        writer.wait(20_000)  # something is there already
        assert time.monotonic() - begun_s < 10
        writer.drain()
        waker = threading.Timer(0.05, writer.wake)
        waker.start()
        writer.wait(20_000)
        waker.join()
        assert time.monotonic() - begun_s < 10


def test_the_writer_belongs_to_its_process() -> None:
    with shared_segment(prediction_blocks=400) as (_, segment):
        writer = PredictionWriter(segment)

        def use() -> str:
            try:
                writer.drain()
            except RuntimeError as error:
                return str(error)
            return ""

        with forked(use) as child:
            assert "belongs to the process" in child.result()
