"""Who follows the worker table: shards that serve are waited for, dead and starting ones are not."""

import asyncio
import os

from control_doubles import remembering_log
from shared_memory import shared_segment

from sglfast._segment import Segment
from sglfast._workers import JOINING, WorkerTable
from sglfast.control.followers import Followers


def changed(segment: Segment) -> int:
    table = WorkerTable(segment)
    table.put(0, state=JOINING, rank_base=0, dp_size=0, block_size=0, flags=0, blob=b"", is_new=True)
    return table.version()


def serving(segment: Segment, slot: int) -> None:
    segment.process_start(slot, os.getpid(), 1)
    segment.process_ready(slot)


def test_only_shards_that_serve_are_behind() -> None:
    with shared_segment(max_shards=3) as (_, segment):
        followers = Followers(segment, remembering_log()[0])
        version = changed(segment)
        assert followers.behind(version) == []
        for slot in range(3):
            serving(segment, slot)
        segment.process_start(3, 1, 1)  # starting: it reads the table before it serves
        assert followers.behind(version) == [0, 1], "index is no shard"
        segment.process_saw(1, version)
        assert followers.behind(version) == [1]
        segment.process_died(2)
        assert followers.behind(version) == []
        assert followers.behind(version + 1) == [0]


def test_waiting_for_shards_ends_with_them_or_in_time_and_says_who_is_late() -> None:
    async def run(segment: Segment) -> None:
        log, seen = remembering_log()
        followers = Followers(segment, log)
        version = changed(segment)
        serving(segment, 1)
        serving(segment, 2)
        segment.process_saw(2, version)
        assert not await followers.shards(timeout_s=0.05)
        assert not await followers.shards(timeout_s=0.05)
        assert seen.text.count("shards do not follow the worker table {'shards': [0]}") == 1
        waiting = asyncio.create_task(followers.shards())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        changed(segment)  # what comes later is not waited for
        segment.process_saw(1, version)
        assert await waiting
        assert not await followers.shards(timeout_s=0.05)

    with shared_segment() as (_, segment):
        asyncio.run(run(segment))


def test_waiting_for_index() -> None:
    async def run(segment: Segment) -> None:
        followers = Followers(segment, remembering_log()[0])
        version = changed(segment)
        assert await followers.index(0.05), "none runs"
        serving(segment, 0)
        assert not await followers.index(0.05)
        segment.process_saw(0, version)
        assert await followers.index(0.05)

    with shared_segment() as (_, segment):
        asyncio.run(run(segment))
