"""Workers as they come, go, lie and leak, over real sockets: what of it reaches the worker table and the log."""

import asyncio
import contextlib
import mmap
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
from control_doubles import (
    GOOD,
    HANG,
    NOT_THERE,
    SECRET,
    Remembered,
    ScriptedWorker,
    answer,
    no_task_is_left,
    remembering_log,
    server_info,
    until,
)
from shared_memory import shared_segment

from sglfast._workers import JOINING, READY, UNHEALTHY, WorkerTable
from sglfast.config import ServeConfig
from sglfast.control.fetch import Fetcher
from sglfast.control.health import rules_of
from sglfast.control.pool_watch import PoolWatch
from sglfast.control.roles import Named
from sglfast.control.workers import Workers
from sglfast.shm import WorkerView, read_workers

BAD = answer(b"", 503)


class Pool:
    """Watched workers and what the others see of them."""

    def __init__(self, table: WorkerTable, workers: Workers, seen: Remembered, shm_fd: int, watch: PoolWatch, config: ServeConfig) -> None:
        self.watch = watch
        self.config = config
        self.table = table
        self.workers = workers
        self.seen = seen
        self.shm_fd = shm_fd

    def view(self, worker_idx: int = 0) -> WorkerView:
        return read_workers(self.table)[worker_idx]

    async def until_state(self, state: int, worker_idx: int = 0) -> None:
        await until(lambda: self.table.state(worker_idx) == state, f"worker {worker_idx} in state {state}\n{self.seen.text}")

    def memory(self) -> bytes:
        """All of shared memory."""
        with mmap.mmap(self.shm_fd, os.fstat(self.shm_fd).st_size) as memory:
            return memory[:]


@contextlib.asynccontextmanager
async def watched(*urls: str, **settings: Any) -> AsyncIterator[Pool]:
    settings = {"health_check_interval_secs": 0.1, "health_check_timeout_secs": 0.2, "introspect_timeout_secs": 0.2} | settings
    config = ServeConfig(worker_urls=urls, **settings)
    with shared_segment() as (shm_fd, segment):
        log, seen = remembering_log()
        workers = Workers(WorkerTable(segment), 64, log)
        for url in urls:
            workers.register(url)
        async with no_task_is_left(), Fetcher() as fetcher:
            watch = PoolWatch(config, workers, fetcher, log)
            watch.start()
            try:
                yield Pool(WorkerTable(segment), workers, seen, shm_fd, watch, config)
            finally:
                await watch.close()
        assert SECRET not in seen.text
        assert "unforeseen" not in seen.text


def test_a_good_worker_is_ready_with_its_facts_at_once_and_its_secrets_stay_its_own() -> None:
    async def run() -> None:
        async with ScriptedWorker({"/health": [GOOD], "/server_info": [server_info()]}) as worker, watched(worker.url) as pool:
            versions = set()
            while pool.table.state(0) != READY:
                versions.add((pool.view().state, pool.view().record.model))
                await asyncio.sleep(0)
            # No request can find it between its health and its model: it would land in the wrong pool.
            assert (JOINING, None) in versions
            assert pool.view().record.model == "m1"
            assert (pool.view().dp_size, pool.view().block_size) == (2, 64)
            assert pool.seen.lines == [
                f"INFO worker is ready {{'worker': '{worker.url}', 'model': 'm1', 'kv_block_size': 64, 'ranks': 2}}"
            ]  # fmt: skip
            assert SECRET.encode() not in pool.memory()
            assert b"0.5.23" in pool.memory(), "the search above would find nothing anyway"

    asyncio.run(run())


@pytest.mark.parametrize(
    "scripts",
    [
        {"/server_info": [HANG]},
        {"/server_info": [answer(f'{{"api_key": "{SECRET}",'.encode())]},
        {"/server_info": [answer(f'{{"api_key": "{SECRET}"'.encode(), claims_bytes=900)]},
        {"/server_info": [answer({"error": SECRET}, 500)]},
        {},
    ],
    ids=["hangs", "broken JSON", "cut", "500", "nothing but health"],
)
def test_a_worker_that_never_tells_is_routed_all_the_same(scripts: dict[str, list[bytes]]) -> None:
    async def run() -> None:
        async with ScriptedWorker({"/health": [GOOD], **scripts}) as worker, watched(worker.url) as pool:
            await pool.until_state(READY)
            assert (pool.view().record.model, pool.view().block_size) == (None, 0)
            await until(lambda: "worker does not tell what it is" in pool.seen.text, "the log says it")
            assert SECRET.encode() not in pool.memory()

    asyncio.run(run())


def test_facts_that_come_late_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglfast.control.introspect._RETRY_LATER_FIRST_S", 0.05)

    async def run() -> None:
        scripts = {"/health": [GOOD], "/server_info": [NOT_THERE] * 4 + [server_info()]}
        async with ScriptedWorker(scripts) as worker, watched(worker.url) as pool:
            await pool.until_state(READY)
            await until(lambda: pool.view().record.model == "m1", "facts")
            assert pool.view().block_size == 64
            assert pool.seen.text.count("worker does not tell what it is") == 1
            asked = worker.hits["/server_info"]
            await until(lambda: worker.hits["/health"] > 8, "more checks")
            assert worker.hits["/server_info"] == asked == 5, "a worker that told all is left in peace"

    asyncio.run(run())


def test_a_worker_that_starts_late_is_joining_until_then() -> None:
    async def run() -> None:
        worker = ScriptedWorker({"/health": [BAD, BAD, BAD, BAD, GOOD], "/server_info": [server_info()]})
        await worker.open()
        await worker.close()  # nothing listens there at first
        async with watched(worker.url) as pool:
            await asyncio.sleep(0.3)
            assert pool.table.state(0) == JOINING
            await worker.open()
            try:
                await pool.until_state(READY)
            finally:
                await worker.close()
            assert worker.hits == {"/health": 5, "/server_info": 1}
            assert [line.split(" {")[0] for line in pool.seen.lines] == ["INFO worker is ready"]

    asyncio.run(run())


def test_out_and_in_again_as_another_engine() -> None:
    async def run() -> None:
        scripts = {"/health": [GOOD, GOOD, BAD, BAD, BAD, BAD, GOOD], "/server_info": [server_info(), server_info(served_model_name="m2")]}
        async with ScriptedWorker(scripts) as worker, watched(worker.url) as pool:
            await pool.until_state(READY)
            assert pool.view().record.model == "m1"
            await pool.until_state(UNHEALTHY)
            assert worker.hits["/health"] == 5, "taken out by the third failure"
            assert pool.view().record.model == "m1", "a worker that is away keeps its name: /v1/models shows it"
            await pool.until_state(READY)
            assert pool.view().record.model == "m2"
            said = [line.split(" {")[0] for line in pool.seen.lines]
            assert said == ["INFO worker is ready", "WARNING worker is unhealthy", "INFO worker is ready"]
            assert "'problem': '/health: status 503'" in pool.seen.text

    asyncio.run(run())


def test_one_failed_check_is_reason_to_look_again() -> None:
    """An engine can be replaced faster than three checks fail."""

    async def run() -> None:
        scripts = {"/health": [GOOD, BAD, GOOD], "/server_info": [server_info(), server_info(served_model_name="m2")]}
        async with ScriptedWorker(scripts) as worker, watched(worker.url) as pool:
            await until(lambda: pool.view().record.model == "m2", "the other engine is seen")
            assert pool.table.state(0) == READY
            assert worker.hits["/server_info"] == 2
            assert "worker describes itself differently now" in pool.seen.text

    asyncio.run(run())


def test_a_worker_in_doubt_is_asked_at_once_and_its_answer_is_marked() -> None:
    async def run() -> None:
        kv = {"publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 5557, "topic": "kv", "block_size": 64}
        infos = [server_info(kv_events=kv | {"dp_size": ranks}) for ranks in (4, 2, 2)]
        scripts = {"/health": [GOOD], "/server_info": [infos[0], infos[1], HANG, HANG, HANG, infos[2]]}
        async with ScriptedWorker(scripts) as worker, watched(worker.url, health_check_interval_secs=60.0) as pool:
            await pool.until_state(READY)
            assert (pool.view().dp_size, pool.view().record.ranks_asked) == (4, 0)
            pool.watch.ask_again(0)
            await until(lambda: pool.view().record.ranks_asked == 1, "it has been asked")
            assert pool.view().dp_size == 2
            pool.watch.ask_again(0)
            await asyncio.sleep(0.1)
            pool.watch.ask_again(0)  # while it is asked: what it says after that counts
            await until(lambda: pool.view().record.ranks_asked > 1, "it has been asked until it told")
            assert worker.hits["/server_info"] == 6

    asyncio.run(run())


def test_a_slow_server_info_costs_a_returning_worker_no_facts() -> None:
    async def run() -> None:
        scripts = {"/health": [GOOD, BAD, BAD, BAD, GOOD], "/server_info": [server_info(), HANG]}
        async with ScriptedWorker(scripts) as worker, watched(worker.url) as pool:
            await pool.until_state(UNHEALTHY)
            await pool.until_state(READY)
            assert (pool.view().record.model, pool.view().block_size) == ("m1", 64)

    asyncio.run(run())


def test_one_silent_worker_does_not_hold_up_the_others() -> None:
    async def run() -> None:
        silent = ScriptedWorker({"/health": [HANG]})
        good = ScriptedWorker({"/health": [GOOD], "/server_info": [server_info()]})
        async with silent, good, watched(silent.url, good.url, silent.url.replace("127.0.0.1", "127.0.0.2")) as pool:
            await pool.until_state(READY, 1)
            await until(lambda: good.hits["/health"] > 3, "checks go on")
            assert [pool.table.state(idx) for idx in range(3)] == [JOINING, READY, JOINING]

    asyncio.run(run())


def test_a_check_that_breaks_our_own_code_is_logged_and_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def breaks_once(self: Workers, worker_idx: int, state: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("not thought of")
        real(self, worker_idx, state)

    real = Workers.set_state

    async def run() -> None:
        monkeypatch.setattr(Workers, "set_state", breaks_once)
        async with ScriptedWorker({"/health": [GOOD], "/server_info": [server_info()]}) as worker, watched(worker.url) as pool:
            await pool.until_state(READY)
            assert "RuntimeError: not thought of" in pool.seen.text
            pool.seen.lines.clear()

    asyncio.run(run())


# ---- prefill workers ----


@contextlib.asynccontextmanager
async def watched_prefill(url: str, **settings: Any) -> AsyncIterator[Pool]:
    """One worker, named a prefill worker without a port."""
    async with watched(**settings) as pool:
        idx = pool.workers.register(url, named=Named("prefill"))
        pool.watch.add(idx, rules_of(pool.config))
        yield pool


def test_a_prefill_worker_tells_its_port_and_is_ready_at_once() -> None:
    async def run() -> None:
        told = server_info(disaggregation_mode="prefill", disaggregation_bootstrap_port=8998)
        async with ScriptedWorker({"/health": [GOOD], "/server_info": [told]}) as worker, watched_prefill(worker.url) as pool:
            await pool.until_state(READY)
            assert (pool.view().record.role, pool.view().record.bootstrap_port) == ("prefill", 8998)
            assert "'role': 'prefill', 'bootstrap_port': 8998" in pool.seen.text

    asyncio.run(run())


def test_a_prefill_worker_waits_for_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglfast.control.introspect._RETRY_LATER_FIRST_S", 0.05)

    async def run() -> None:
        late = server_info(disaggregation_mode="prefill", disaggregation_bootstrap_port=8998)
        scripts = {
            "/health": [GOOD],
            "/server_info": [*[answer(b"", 404)] * 3, late],
            "/get_server_info": [NOT_THERE],
            "/model_info": [answer({"served_model_name": "m1"})],
        }
        # The next check is far away: what was waited for is seen when it comes.
        settings = {"health_check_interval_secs": 60.0}
        async with ScriptedWorker(scripts) as worker, watched_prefill(worker.url, **settings) as pool:
            await until(lambda: pool.watch.progress(0).problem.startswith("its bootstrap port is not known"), "it waits")
            assert (pool.table.state(0), pool.watch.outcomes) == (JOINING, {})
            await pool.until_state(READY)
            assert pool.view().record.bootstrap_port == 8998
            assert pool.seen.text.count("worker is ready") == pool.watch.outcomes["success"] == 1

    asyncio.run(run())


def test_a_prefill_worker_without_a_port_is_ready_after_the_grace_and_asked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglfast.control.introspect._RETRY_LATER_FIRST_S", 0.05)
    monkeypatch.setattr("sglfast.control.pool_watch.PORT_GRACE_S", 0.5)

    async def run() -> None:
        scripts = {"/health": [GOOD], "/server_info": [server_info()], "/v1/models": [NOT_THERE]}
        scripts["/server_info"] = [server_info(disaggregation_mode="prefill")]
        async with ScriptedWorker(scripts) as worker, watched_prefill(worker.url, health_check_interval_secs=60.0) as pool:
            await until(lambda: pool.watch.progress(0).problem.startswith("its bootstrap port is not known"), "it waits")
            assert pool.table.state(0) == JOINING
            await pool.until_state(READY)
            assert (pool.view().record.role, pool.view().record.bootstrap_port) == ("prefill", None)
            assert pool.seen.text.count("its requests say null, and it is asked again") == 1
            worker.scripts = scripts | {"/server_info": [server_info(disaggregation_mode="prefill", disaggregation_bootstrap_port=7)]}
            await until(lambda: pool.view().record.bootstrap_port == 7, "it was asked on")
            assert pool.table.state(0) == READY
            assert pool.seen.text.count("worker is ready") == 1

    asyncio.run(run())


def test_a_worker_that_comes_back_in_another_role_changes_in_place() -> None:
    async def run() -> None:
        prefill = server_info(disaggregation_mode="prefill", disaggregation_bootstrap_port=8998)
        async with ScriptedWorker({"/health": [GOOD], "/server_info": [prefill]}) as worker, watched(worker.url) as pool:
            await pool.until_state(READY)
            before = pool.view()
            assert before.record.role == "prefill"
            worker.scripts = {"/health": [BAD, GOOD], "/server_info": [server_info(disaggregation_mode="decode", kv_events=None)]}
            worker.hits.clear()
            await until(lambda: pool.view().record.role == "decode", "it was asked again")
            after = pool.view()
            assert (after.worker_idx, after.generation, after.record.bootstrap_port) == (before.worker_idx, before.generation, None)

    asyncio.run(run())
