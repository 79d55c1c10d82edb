"""An index that hangs is found out by its heartbeat, and by nothing else."""

import asyncio
import os
import signal

from control_doubles import remembering_log, standins, until
from shared_memory import shared_segment
from test_control_supervisor import INDEX, Crew, check

from sglfast.control.index_watch import SILENT_LOOKS, IndexWatch


def test_only_an_index_that_was_up_and_fell_silent_is_killed() -> None:
    with shared_segment() as (_, segment):
        log, seen = remembering_log()
        kills: list[int] = []
        watch = IndexWatch(segment, lambda: kills.append(1), log)

        def look(times: int, beat_ms: int | None = None) -> int:
            for number in range(times):
                if beat_ms is not None:
                    segment.process_heartbeat(INDEX, beat_ms + number)
                watch.look()
            return len(kills)

        assert look(3 * SILENT_LOOKS) == 0, "there is none"
        segment.process_start(INDEX, 42, 1000)
        assert look(3 * SILENT_LOOKS) == 0, "it is starting"
        segment.process_ready(INDEX)
        assert look(3 * SILENT_LOOKS) == 0, "it has never beaten"
        assert look(3 * SILENT_LOOKS, 2000) == 0, "it beats"
        assert look(SILENT_LOOKS - 1) == 0
        assert look(1, 5) == 0, "a clock that is set back is a beat, too"
        assert look(SILENT_LOOKS) == 1
        assert look(5 * SILENT_LOOKS) == 1, "killed once"
        assert "no sign of life for 10 s" in seen.text
        segment.process_died(INDEX)
        segment.process_start(INDEX, 43, 9000)
        segment.process_ready(INDEX)
        assert look(3 * SILENT_LOOKS) == 1, "the next one is starting"
        look(1, 9500)
        assert look(SILENT_LOOKS) == 2


def test_a_stopped_index_is_killed_and_started_again() -> None:
    async def scenario(them: Crew) -> None:
        await them.until_ready()
        await them.until_restarted(INDEX, 0)
        watch = IndexWatch(them.segment, them.supervisor.kill_index, remembering_log()[0])
        watch.look()
        them.segment.process_heartbeat(INDEX, 1)  # the stand-in has no clock
        stopped = them.pid(INDEX)
        os.kill(stopped, signal.SIGSTOP)
        for _ in range(SILENT_LOOKS + 1):
            watch.look()
        await them.until_restarted(INDEX, 1)
        await until(lambda: them.pid(INDEX) not in (0, stopped), "another index")

    check(scenario, standins())


def test_the_task_looks_by_itself() -> None:
    async def scenario() -> None:
        with shared_segment() as (_, segment):
            task = asyncio.create_task(IndexWatch(segment, lambda: None, remembering_log()[0]).run())
            await asyncio.sleep(0)
            assert not task.done()
            task.cancel()

    asyncio.run(scenario())
