"""Follow every worker: check its health, ask what it is, write both into the worker table.

Runs in: control, one task per worker and at most one introspection beside it. Contract: a worker is READY only when its health is
    good; its introspection is given one timeout to answer first, so that its first requests find the right pool, and goes on
    in the background when it does not. Checks are jittered; no more than fetch's bound run at once.
"""

import asyncio
import logging
import random
from typing import Any

from sglfast._workers import READY
from sglfast.config import ServeConfig
from sglfast.control.fetch import Fetcher
from sglfast.control.health import HealthMachine, Verdict, check, pause_s
from sglfast.control.introspect import introspect, retry_pause_s
from sglfast.control.workers import Workers

_JITTER = 0.1  # of a pause, both ways
_SPREAD_PER_S = 1000  # workers whose first check starts in a second


def _thresholds(config: ServeConfig) -> dict[str, Any]:
    return {
        "failure_threshold": config.health_failure_threshold,
        "success_threshold": config.health_success_threshold,
        "startup_timeout_s": config.worker_startup_timeout_secs,
    }


class PoolWatch:
    """The tasks of all workers. `start` once, inside the loop; `close` releases everything."""

    def __init__(self, config: ServeConfig, workers: Workers, fetcher: Fetcher, log: logging.Logger) -> None:
        self._watches = [_Watch(config, workers, fetcher, log, worker_idx, len(workers.views)) for worker_idx in range(len(workers.views))]
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to follow all workers."""
        self._tasks = [asyncio.create_task(watch.run()) for watch in self._watches]

    def apply(self, config: ServeConfig) -> None:
        """Go on with other settings, from each worker's next check on."""
        for watch in self._watches:
            watch.apply(config)

    async def close(self) -> None:
        """End all tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(watch.forget() for watch in self._watches))
        self._tasks.clear()


class _Watch:
    """One worker."""

    def __init__(
        self, config: ServeConfig, workers: Workers, fetcher: Fetcher, log: logging.Logger, worker_idx: int, pool_size: int
    ) -> None:
        self._config = config
        self._workers = workers
        self._fetcher = fetcher
        self._log = log
        self._worker_idx = worker_idx
        self._pool_size = pool_size
        self._url = workers.views[worker_idx].record.url
        self._machine = HealthMachine(**_thresholds(config))
        self._introspection: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Check the worker for ever."""
        loop = asyncio.get_running_loop()
        joined_s = loop.time()
        await asyncio.sleep(self._worker_idx / _SPREAD_PER_S)
        while True:
            verdict = Verdict.NOTHING
            try:
                problem = await self._check()
                verdict = self._machine.checked(not problem, loop.time() - joined_s)
                if verdict in (Verdict.TAKE_IN, Verdict.LOOK_AGAIN):
                    await self._look_at_it()
                elif verdict is Verdict.TAKE_OUT:
                    await self.forget()
                self._workers.set_state(self._worker_idx, self._machine.state)
                self._tell(verdict, problem)
            except Exception:
                # A worker that breaks our code must not leave the others, nor itself, unwatched.
                self._log.exception("a health check failed in an unforeseen way", extra={"fields": {"worker": self._url}})
            config, age_s = self._config, loop.time() - joined_s
            pause = pause_s(
                self._machine.state, age_s, config.health_check_interval_secs, self._pool_size, config.worker_startup_check_interval
            )  # fmt: skip
            # Workers that join together are not to be checked together for ever.
            await asyncio.sleep(pause * (random.random() if verdict is Verdict.TAKE_IN else random.uniform(1 - _JITTER, 1 + _JITTER)))

    async def _check(self) -> str:
        """What is wrong with the worker, the empty string when nothing is."""
        if self._config.disable_health_check:
            return ""
        return await check(self._fetcher, self._url + self._config.health_check_endpoint, self._config.health_check_timeout_secs)

    def apply(self, config: ServeConfig) -> None:
        """Go on with other settings."""
        self._config = config
        self._machine.apply(**_thresholds(config))

    async def forget(self) -> None:
        """End the introspection, if one runs."""
        if self._introspection is not None:
            self._introspection.cancel()
            await asyncio.gather(self._introspection, return_exceptions=True)
            self._introspection = None

    def _tell(self, verdict: Verdict, problem: str) -> None:
        """One log line for each transition."""
        if verdict is Verdict.TAKE_IN:
            view = self._workers.views[self._worker_idx]
            fields = {"worker": self._url, "model": view.record.model, "kv_block_size": view.block_size, "ranks": view.dp_size}
            self._log.info("worker is ready", extra={"fields": fields})
        elif verdict is Verdict.TAKE_OUT:
            self._log.warning("worker is unhealthy", extra={"fields": {"worker": self._url, "problem": problem}})
        elif verdict is Verdict.FAILED:
            seconds = self._config.worker_startup_timeout_secs
            text = f"worker was not healthy within --worker-startup-timeout-secs {seconds:g}; it is asked on"
            self._log.error(text, extra={"fields": {"worker": self._url, "problem": problem}})
        elif verdict is Verdict.OVERDUE:
            self._log.warning("worker is not healthy yet", extra={"fields": {"worker": self._url, "problem": problem}})

    async def _look_at_it(self) -> None:
        """Start an introspection anew and give it one timeout."""
        await self.forget()
        done = asyncio.Event()
        self._introspection = asyncio.create_task(self._introspect(done))
        try:
            async with asyncio.timeout(self._config.introspect_timeout_secs):
                await done.wait()
        except TimeoutError:
            pass

    async def _introspect(self, done: asyncio.Event) -> None:
        """Ask until the worker has told all. done: set after the first attempt."""
        failures = 0
        while True:
            try:
                findings = await introspect(self._fetcher, self._url, self._config.introspect_timeout_secs)
                has_changed = self._workers.learn(self._worker_idx, findings)
                is_complete, problem = findings.is_complete, findings.problem or "no path tells the model's name"
            except Exception:
                self._log.exception("an introspection failed in an unforeseen way", extra={"fields": {"worker": self._url}})
                has_changed, is_complete, problem = False, False, "see above"
            if has_changed and self._workers.views[self._worker_idx].state == READY:
                record = self._workers.views[self._worker_idx].record
                self._log.info("worker describes itself differently now", extra={"fields": {"worker": self._url, "model": record.model}})
            done.set()
            if is_complete:
                return
            failures += 1
            if failures == 1:
                fields = {"worker": self._url, "problem": problem, "model": self._workers.views[self._worker_idx].record.model}
                self._log.warning("worker does not tell what it is; it is asked again later", extra={"fields": fields})
            await asyncio.sleep(retry_pause_s(failures) * random.uniform(1 - _JITTER, 1 + _JITTER))
