"""sglfast.edge.shard: ids, the tick, what is counted and logged."""

import asyncio
import dataclasses
import itertools
import logging
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from edge_harness import Memory, run, shard_in_loop, stub_client
from raw_client import WAIT_S

from sglfast import _counters as c
from sglfast import _segment, errors
from sglfast._breaker import OPEN
from sglfast.edge import shard as shard_module
from sglfast.edge.shard import Shard
from sglfast.errors import REASON_INDEX

ENGINES = ["http://10.0.0.1:30000", "http://10.0.0.2:30000"]


def with_shard(test: Any, **settings: Any) -> None:
    """Run the coroutine `test(shard, memory)` in a loop."""
    memory = Memory(ENGINES)

    async def inside() -> None:
        await test(shard_in_loop(memory, **settings), memory)

    run(inside())


async def until(is_true: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline_s, f"not in time: {what}"
        await asyncio.sleep(0.01)


def test_request_ids_are_unique_over_shards() -> None:
    async def test(shard: Shard, memory: Memory) -> None:
        other = shard_in_loop(memory)
        ids = [each.new_request_id() for each in (shard, other) for _ in range(1000)]
        assert len(set(ids)) == 2000
        assert all(len(one) == 32 and bytes.fromhex(one.decode()) for one in ids)

    with_shard(test)


def test_errors_are_counted_under_their_code() -> None:
    async def test(shard: Shard, memory: Memory) -> None:
        for number, reason in enumerate(errors.REASONS, 1):
            for _ in range(number):
                shard.count_error(reason)
        words = [memory.word(c.S_REASONS + REASON_INDEX[reason.code]) for reason in errors.REASONS]
        assert words == list(range(1, len(errors.REASONS) + 1))

    with_shard(test)


def test_the_tick_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in what it looks at must not stop the shard's only clock."""

    async def test(shard: Shard, memory: Memory) -> None:
        failures: list[str] = []
        shard.loop.set_exception_handler(lambda _, context: failures.append(str(context.get("exception"))))

        def breaks() -> None:
            raise RuntimeError("bug")

        monkeypatch.setattr(shard.router, "refresh", breaks)
        shard.loop.call_soon(shard.tick)
        await until(lambda: len(failures) >= 2, "it breaks again")
        assert failures[0] == "bug"
        assert shard.loop.time() - shard.now_s < 0.5

    with_shard(test)


def test_the_sweep_looks_at_clients_and_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "_TICK_SECS", 0.01)

    async def test(shard: Shard, memory: Memory) -> None:
        memory.segment.process_start(1, 4711, 1000)
        connection, transport = stub_client(shard)
        shard.tick()
        await until(lambda: any(abs(value - time.time() * 1000) < 5000 for value in memory.segment.process_info(1)), "it beats")
        assert not transport.is_closed
        connection.quiet_since_s -= 100  # idle for longer than the limit
        await until(lambda: transport.is_closed, "it is closed")
        assert not transport.is_aborted

    with_shard(test, idle_timeout_secs=50.0)


def test_a_sweep_is_spread_over_ticks() -> None:
    """Each connection is looked at in every five turns, whatever comes and goes; nobody is in two parts."""

    async def test(shard: Shard, memory: Memory) -> None:
        clients = [stub_client(shard)[0] for _ in range(1000)]
        assert (len(shard.clients), set(shard.clients)) == (1000, set(clients))
        for client in clients:
            client.was_active = True
        looked_at = []
        for turn in range(5):
            shard.clients.sweep(turn, shard.now_s)
            looked_at.append(sum(not client.was_active for client in clients))
        steps = [after - before for before, after in zip([0, *looked_at], looked_at, strict=False)]
        assert steps == [200] * 5
        random.shuffle(clients)
        while clients:
            gone = clients.pop()
            shard.clients.discard(gone)
            shard.clients.discard(gone)
            for again in clients[:1]:
                shard.clients.add(again)
            assert (len(shard.clients), set(shard.clients)) == (len(clients), set(clients))

    with_shard(test)


def test_connections_that_are_due_together_are_not_closed_together() -> None:
    async def test(shard: Shard, memory: Memory) -> None:
        transports = [stub_client(shard)[1] for _ in range(3000)]
        shard.now_s += shard.config.idle_timeout_secs + 1
        closed = [0]
        for turn in range(25):
            shard.clients.sweep(turn, shard.now_s)
            closed.append(sum(transport.is_closed for transport in transports))
        assert max(after - before for before, after in itertools.pairwise(closed)) == 200
        assert closed[-1] == 3000

    with_shard(test)


def test_draining_drops_idle_clients_at_once_and_keeps_busy_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "_TICK_SECS", 0.01)

    async def test(shard: Shard, memory: Memory) -> None:
        _, idle = stub_client(shard)
        begun, half = stub_client(shard)
        begun.data_received(b"GET /health HTT")
        shard.tick()
        await asyncio.sleep(0.03)
        assert not idle.is_closed
        memory.segment.state = _segment.DRAINING
        await until(lambda: idle.is_closed, "the idle one is closed")
        assert shard.is_draining
        await asyncio.sleep(0.15)
        assert not half.is_closed
        begun.data_received(b"P/1.1\r\nhost: a\r\n\r\n")
        assert b"\r\nconnection: close\r\n" in half.written
        assert half.is_closed

    with_shard(test)


def test_unreachable_workers_are_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    async def test(shard: Shard, memory: Memory) -> None:
        shard.router.refresh()
        upstream = shard.router.pools["demo"].upstreams[0]
        for _ in range(100):
            shard.note_unreachable(upstream, ConnectionRefusedError("no"))
        assert len(caplog.records) == 1
        assert caplog.records[0].levelno == logging.WARNING
        assert caplog.records[0].fields == {"worker": ENGINES[0], "error": "no"}  # type: ignore[attr-defined]
        shard.now_s += 5.1
        shard.note_unreachable(upstream, TimeoutError())
        assert caplog.records[1].fields["error"] == "TimeoutError()"  # type: ignore[attr-defined]

    with_shard(test)


def test_new_settings_make_new_policies_and_new_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[str] = []
    monkeypatch.setattr(shard_module, "set_level", levels.append)

    async def test(shard: Shard, memory: Memory) -> None:
        shard.router.refresh()
        assert shard.router.only is not None
        assert shard.router.only.policy.name == "round_robin"
        upstreams = list(shard.router.only.upstreams)
        shard.apply(dataclasses.replace(shard.config, policy="power_of_two", max_payload_size=10, log_level="debug"))
        assert shard.router.only is not None
        assert shard.router.only.policy.name == "power_of_two"
        assert shard.router.only.upstreams == upstreams, "connections to workers are kept"
        assert levels == ["debug"]
        client, transport = stub_client(shard)
        client.data_received(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 11\r\n\r\n")
        assert transport.take().startswith(b"HTTP/1.1 413 ")

    with_shard(test)


def test_other_settings_of_retries_and_breakers_are_taken_up() -> None:
    """Also while a circuit is open: with breakers off nobody is left out, and with them on again it is as open as it was."""

    async def test(shard: Shard, memory: Memory) -> None:
        generation = memory.table.read(0)[0]  # type: ignore[index]
        shard.router.refresh()
        assert shard.breakers.table.failed(0, generation, False, shard.loop.time()) == OPEN
        assert shard.retry.max_attempts == 1
        for is_off, workers in ((False, [1]), (True, [0, 1]), (False, [1])):
            changed = dataclasses.replace(shard.config, disable_retries=False, retry_max_retries=7, disable_circuit_breaker=is_off)
            shard.apply(changed)
            assert shard.router.only is not None
            assert list(shard.router.only.view.worker_idxs) == workers
            assert not any(upstream.needs_probe for upstream in shard.router.only.upstreams)
        assert shard.retry.max_attempts == 7

    with_shard(test, disable_circuit_breaker=False, cb_failure_threshold=1)
