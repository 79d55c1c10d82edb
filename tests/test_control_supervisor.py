"""The supervisor with stand-in children: deaths are healed, counted and, in the end, believed."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
from control_doubles import WAIT_S, Remembered, is_there, no_task_is_left, remembering_log, standin, standins, until
from shared_memory import shared_segment

from sglfast import _counters
from sglfast._counters import Totals
from sglfast._segment import Segment
from sglfast.config import ServeConfig, to_json
from sglfast.control.children import Inheritance
from sglfast.control.listen import listen
from sglfast.control.supervisor import Commands, RestartRecord, Supervisor

INDEX, SHARD0, SHARD1 = 0, 1, 2  # process slots


class Crew:
    """Supervised children, and what the others see of them."""

    def __init__(self, supervisor: Supervisor, segment: Segment, port: int, seen: Remembered) -> None:
        self.supervisor = supervisor
        self.segment = segment
        self.port = port
        self.seen = seen
        self._writers: list[asyncio.StreamWriter] = []

    def pid(self, slot: int) -> int:
        return self.segment.process_info(slot)[0]

    def restarts(self, slot: int) -> int:
        return self.segment.process_info(slot)[3]

    async def until_ready(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self.supervisor.wait_ready()

    async def until_restarted(self, slot: int, times: int) -> None:
        await until(lambda: self.segment.process_info(slot)[3:] == (times, True), f"slot {slot} restarted\n{self.seen.text}")

    async def say(self, line: str) -> asyncio.StreamReader:
        """Send a line to one of the shards; returns where its answer comes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(line.encode() + b"\n")
        self._writers.append(writer)
        return reader

    async def hang_up(self) -> None:
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def say(lines: bytes) -> None:
    os.write(2, lines)


@contextlib.asynccontextmanager
async def crew(commands: Commands, shards: int = 1) -> AsyncIterator[Crew]:
    config = to_json(ServeConfig(worker_urls=("http://127.0.0.1:1",), shards=shards))
    with shared_segment(max_shards=2) as (shm_fd, segment), contextlib.ExitStack() as owned:
        listeners = [owned.enter_context(listener) for listener in listen("127.0.0.1", 0, shards)]
        config_fd = os.memfd_create("config")
        owned.callback(os.close, config_fd)
        os.write(config_fd, config)
        log, seen = remembering_log()
        fds = sorted(os.listdir("/proc/self/fd"))
        async with no_task_is_left():
            supervisor = Supervisor(segment, Inheritance(shm_fd, config_fd, "@x", 2, say), listeners, commands, log)
            supervisor.start()
            them = Crew(supervisor, segment, listeners[0].getsockname()[1], seen)
            try:
                yield them
            finally:
                await supervisor.stop()
                await them.hang_up()
        assert set(os.listdir("/proc/self/fd")) <= set(fds), "a descriptor is left"
        assert not [slot for slot in range(3) if segment.process_info(slot)[0]], "a process slot is not freed"


def check(scenario: Any, commands: Commands, shards: int = 1) -> None:
    async def run() -> None:
        async with crew(commands, shards) as them:
            await scenario(them)

    asyncio.run(run())


# ---- when to start again ----


def pauses(*lives: tuple[float, bool]) -> list[float | str]:
    record = RestartRecord()
    return [record.died(lived_s, was_ready) for lived_s, was_ready in lives]


def test_pauses_double_up_to_two_seconds_and_begin_anew_after_a_long_life() -> None:
    assert pauses(*[(11.0, True)] * 8) == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert pauses((1.0, True), (1.0, True), (30.0, True), (1.0, True)) == [0.05, 0.1, 0.05, 0.1]


def test_five_short_lives_in_a_row_are_a_crash_loop() -> None:
    assert pauses(*[(9.9, True)] * 5)[3:] == [0.4, "died 5 times in a row within 10 s of its start"]
    assert isinstance(pauses(*[(9.9, True)] * 4, (10.0, True), *[(9.9, True)] * 4)[-1], float)


def test_who_is_killed_from_outside_again_and_again_comes_back() -> None:
    record = RestartRecord()
    assert [record.died(0.5, True, was_killed=True) for _ in range(50)][5:] == [1.6, *[2.0] * 44]
    assert isinstance(record.died(0.5, False, was_killed=True), float), "also while it starts, once it has served"
    assert [isinstance(record.died(0.5, True), str) for _ in range(5)] == [False] * 4 + [True], "its own crashes count as ever"
    record = RestartRecord()
    assert [record.died(0.5, False, was_killed=True) for _ in range(3)] == [0.05, 0.1, "did not start in 3 attempts"]


def test_a_first_start_that_fails_three_times_is_hopeless() -> None:
    assert pauses(*[(0.5, False)] * 3) == [0.05, 0.1, "did not start in 3 attempts"]
    assert pauses(*[(60.0, False)] * 3)[-1] == "did not start in 3 attempts"
    # One that was up once is given the five.
    assert isinstance(pauses((0.5, False), (0.5, True), (0.5, False), (0.5, False))[-1], float)


# ---- real processes ----


def test_a_dead_shard_is_folded_away_and_started_again_on_its_socket() -> None:
    async def scenario(them: Crew) -> None:
        await them.until_ready()
        busy = await them.say("work 60")
        assert await busy.readline() == b"begun\n"
        totals = Totals(them.segment)
        assert (totals.shard()[_counters.S_INFLIGHT], totals.worker(0)[_counters.W_INFLIGHT_TOKENS]) == (1, 100)
        os.kill(first := them.pid(SHARD0), signal.SIGSTOP)
        waiting = await them.say("who")  # in the queue of the socket when its shard dies
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(WAIT_S):
            answer = await waiting.readline()
        assert int(answer) == them.pid(SHARD0) != first
        assert them.restarts(SHARD0) == 1
        shard, worker = totals.shard(), totals.worker(0)
        assert (shard[_counters.S_INFLIGHT], worker[_counters.W_INFLIGHT_REQUESTS], worker[_counters.W_INFLIGHT_TOKENS]) == (0, 0, 0)
        assert (shard[_counters.S_REQUESTS], worker[_counters.W_REQUESTS]) == (1, 1), "what was counted stays counted"
        assert "'process': 'shard0', 'end': 'killed by SIGKILL'" in them.seen.text
        assert not them.supervisor.failed.done()

    check(scenario, standins())


def test_only_the_dead_one_is_started_again() -> None:
    async def scenario(them: Crew) -> None:
        await them.until_ready()
        await them.until_restarted(INDEX, 0)
        shards = [them.pid(SHARD0), them.pid(SHARD1)]
        os.kill(them.pid(INDEX), signal.SIGKILL)
        await them.until_restarted(INDEX, 1)
        assert [them.pid(SHARD0), them.pid(SHARD1)] == shards
        assert [them.restarts(slot) for slot in (INDEX, SHARD0, SHARD1)] == [1, 0, 0]

    check(scenario, standins(), shards=2)


def test_an_index_that_is_killed_again_and_again_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglfast.control.supervisor._LAST_PAUSE_S", 0.1)

    async def scenario(them: Crew) -> None:
        await them.until_ready()
        shard = them.pid(SHARD0)
        for restarts in range(8):
            await them.until_restarted(INDEX, restarts)
            os.kill(them.pid(INDEX), signal.SIGKILL)
        await them.until_restarted(INDEX, 8)
        assert them.pid(SHARD0) == shard
        assert not them.supervisor.failed.done()

    check(scenario, standins())


def test_an_exit_code_of_0_is_a_death_too() -> None:
    async def scenario(them: Crew) -> None:
        await them.until_ready()
        await them.until_restarted(INDEX, 0)
        os.kill(them.pid(INDEX), signal.SIGTERM)
        await them.until_restarted(INDEX, 1)
        reader = await them.say("die of boredom")
        assert await reader.read() == b""
        await them.until_restarted(SHARD0, 1)
        assert "exit code 3: of boredom" in them.seen.text

    check(scenario, standins())


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        (standins(shard=["crash"]), "shard0 did not start in 3 attempts; the last time: exit code 1: ValueError: there is no tokenizer"),
        (standins(index=["crash"]), "index did not start in 3 attempts; the last time: exit code 1: ValueError: there is no tokenizer"),
        (
            standins(shard=["crash_when_ready"]),
            "shard0 died 5 times in a row within 10 s of its start; the last time: killed by SIGABRT: died of old age",
        ),
        (standins(shard=["unusable"]), "shard0: tokenizer path '/x': no such folder"),
        (
            Commands(index=standin("index", "serve"), shard=["/no/such/python"]),
            "shard0 did not start in 3 attempts; the last time: cannot be started: No such file or directory",
        ),
    ],
    ids=["shard", "index", "after ready", "settings", "no program"],
)
def test_a_child_that_keeps_dying_is_given_up_with_its_last_words(commands: Commands, message: str) -> None:
    async def scenario(them: Crew) -> None:
        async with asyncio.timeout(WAIT_S):
            assert await them.supervisor.failed == message

    check(scenario, commands)


def test_stop_asks_shards_by_their_byte_and_index_by_sigterm(capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario(them: Crew) -> None:
        await them.until_ready()
        await until(lambda: them.segment.process_info(INDEX)[4], "index")
        pids = [them.pid(slot) for slot in (INDEX, SHARD0, SHARD1)]
        async with asyncio.timeout(WAIT_S):
            await them.supervisor.stop()
        assert not [pid for pid in pids if is_there(pid)]
        assert "does not stop" not in them.seen.text

    check(scenario, standins(), shards=2)
    told = capfd.readouterr().err
    assert "shard0 was told b'q'" in told
    assert "shard1 was told b'q'" in told


def test_stop_ends_those_that_do_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglfast.control.supervisor._STOP_S", 0.1)
    monkeypatch.setattr("sglfast.control.supervisor._TERM_S", 0.1)

    async def scenario(them: Crew) -> None:
        await them.until_ready()
        await until(lambda: them.segment.process_info(INDEX)[4], "index")
        pids = [them.pid(INDEX), them.pid(SHARD0)]
        async with asyncio.timeout(WAIT_S):
            await them.supervisor.stop()
        assert not [pid for pid in pids if is_there(pid)]
        assert "'signal': 'SIGKILL'" in them.seen.text

    check(scenario, standins(index=["stubborn"], shard=["stubborn"]))


def test_stop_does_not_wait_for_a_child_that_is_still_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglfast.control.supervisor._STOP_S", 10 * WAIT_S)

    async def scenario(them: Crew) -> None:
        async with asyncio.timeout(WAIT_S):  # nobody reads the byte yet
            await them.supervisor.stop()

    check(scenario, standins())


def test_stop_between_a_death_and_the_next_start_starts_nothing() -> None:
    async def scenario(them: Crew) -> None:
        await them.until_ready()
        os.kill(them.pid(SHARD0), signal.SIGKILL)
        await until(lambda: them.restarts(SHARD0) == 1, "death is noticed")
        await them.supervisor.stop()
        await asyncio.sleep(0.2)
        assert them.pid(SHARD0) == 0

    check(scenario, standins())
