"""Follow every worker: check its health, ask what it is, write both into the worker table.

Runs in: control, one task per worker and at most one introspection beside it. Contract: a worker is READY only when its health is
    good; its introspection is given one timeout to answer first, so that its first requests find the right pool, and goes on
    in the background when it does not. Checks are jittered; no more than fetch's bound run at once. A worker that has not been
    ready for `worker_startup_timeout_secs` counts as failed and is checked on: it may come back on the same address.
    A prefill worker whose bootstrap port nobody has told is kept back for PORT_GRACE_S, because requests without it find the wrong
    port or none; then it is READY as it is, and asked on (spec/router.md 3.5).
"""

import asyncio
import contextlib
import dataclasses
import logging
import random
import time
from collections import Counter
from dataclasses import dataclass

from sglfast._workers import JOINING, READY
from sglfast.config import ServeConfig
from sglfast.control.fetch import Fetcher
from sglfast.control.health import HealthMachine, HealthRules, Verdict, check, pause_s, rules_of
from sglfast.control.introspect import introspect, retry_pause_s
from sglfast.control.workers import Workers

_JITTER = 0.1  # of a pause, both ways
PORT_GRACE_S = 30.0
_NO_PORT = "its bootstrap port is not known: it tells none, and none was given"
_SPREAD_PER_S = 1000  # workers whose first check starts in a second


@dataclass(slots=True)
class Progress:
    """How far a worker's registration is. problem: of the last check, empty when it was good; since: unix seconds of the last change."""

    problem: str = "has not been asked yet"
    was_ready: bool = False
    is_failed: bool = False
    since: float = dataclasses.field(default_factory=time.time)


class PoolWatch:
    """The tasks of all workers. `start` once, inside the loop; `close` releases everything.

    outcomes: registrations by their result, "success" or "failed" (not ready within the startup timeout).
    """

    def __init__(self, config: ServeConfig, workers: Workers, fetcher: Fetcher, log: logging.Logger) -> None:
        self._config = config
        self._workers = workers
        self._fetcher = fetcher
        self._log = log
        self._watches: dict[int, _Watch] = {}
        self._next_start_s = 0.0
        self.outcomes: Counter[str] = Counter()

    def start(self) -> None:
        """Begin to follow all workers of the table that are not followed yet."""
        for view in self._workers.views:
            if view.worker_idx not in self._watches:
                self.add(view.worker_idx, rules_of(self._config))

    def add(self, worker_idx: int, rules: HealthRules) -> None:
        """Begin to follow a worker of the table."""
        watch = _Watch(self, self._config, self._workers, self._fetcher, self._log, worker_idx, rules)
        self._watches[worker_idx] = watch
        now_s = asyncio.get_running_loop().time()
        self._next_start_s = max(now_s, self._next_start_s) + 1 / _SPREAD_PER_S
        watch.task = asyncio.create_task(watch.run(self._next_start_s - now_s))

    async def remove(self, worker_idx: int) -> None:
        """Follow a worker no more; when this returns nothing writes its slot."""
        watch = self._watches.pop(worker_idx, None)
        if watch is not None:
            await watch.close()

    def set_rules(self, worker_idx: int, rules: HealthRules) -> None:
        """Check a worker in another way from its next check on."""
        self._watches[worker_idx].set_rules(rules)

    def apply(self, config: ServeConfig) -> None:
        """Go on with other settings; rules of workers: `set_rules`."""
        self._config = config
        for watch in self._watches.values():
            watch.config = config

    def ask_again(self, worker_idx: int) -> None:
        """Ask a worker what it is, now: it refuses what it should have. Returns at once; `Workers.confirm_ranks` when it has told."""
        watch = self._watches.get(worker_idx)
        if watch is not None:  # else it is on its way out
            watch.ask_again()

    def progress(self, worker_idx: int) -> Progress:
        """How far a worker is."""
        return self._watches[worker_idx].progress

    @property
    def size(self) -> int:
        """Workers that are followed."""
        return len(self._watches)

    async def close(self) -> None:
        """End all tasks."""
        watches, self._watches = self._watches, {}
        await asyncio.gather(*(watch.close() for watch in watches.values()))


class _Watch:
    """One worker."""

    def __init__(
        self,
        pool: PoolWatch,
        config: ServeConfig,
        workers: Workers,
        fetcher: Fetcher,
        log: logging.Logger,
        worker_idx: int,
        rules: HealthRules,
    ) -> None:
        self._pool = pool
        self.config = config
        self._workers = workers
        self._fetcher = fetcher
        self._log = log
        self._worker_idx = worker_idx
        self._url = workers.view(worker_idx).record.url
        self._machine = HealthMachine(rules)
        self._joined_s = 0.0
        self._has_told_port_missing = False
        self._introspection: asyncio.Task[None] | None = None
        self._doubts = self._answered_doubts = 0  # times that it was to be asked at once, and those before its last answer
        self._doubted = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.progress = Progress()

    def set_rules(self, rules: HealthRules) -> None:
        self._machine.rules = rules

    async def close(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        await self.forget()

    async def run(self, delay_s: float) -> None:
        """Check the worker for ever."""
        loop = asyncio.get_running_loop()
        self._joined_s = joined_s = loop.time()
        await asyncio.sleep(delay_s)
        while True:
            verdict = Verdict.NOTHING
            try:
                problem = await self._check()
                verdict = self._machine.checked(not problem, loop.time() - joined_s)
                if verdict in (Verdict.TAKE_IN, Verdict.LOOK_AGAIN):
                    await self._look_at_it()
                elif verdict is Verdict.TAKE_OUT:
                    await self.forget()
                self._tell(verdict, problem)
                self._note(verdict, problem)
                self._show_state()
            except Exception:
                # A worker that breaks our code must not leave the others, nor itself, unwatched.
                self._log.exception("a health check failed in an unforeseen way", extra={"fields": {"worker": self._url}})
            # Workers that join together are not to be checked together for ever.
            spread = random.random() if verdict is Verdict.TAKE_IN else random.uniform(1 - _JITTER, 1 + _JITTER)
            pause = pause_s(self._machine.state, loop.time() - joined_s, self._machine.rules, self._pool.size)
            pause *= spread
            if self._is_held_back:
                pause = min(pause, max(0.0, joined_s + PORT_GRACE_S - loop.time()))
            await asyncio.sleep(pause)

    async def _check(self) -> str:
        """What is wrong with the worker, the empty string when nothing is."""
        rules = self._machine.rules
        if rules.is_off:
            return ""
        url = self._url + self.config.health_check_endpoint
        return await check(self._fetcher, url, rules.timeout_s, self._workers.view(self._worker_idx).record.api_key)

    async def forget(self) -> None:
        """End the introspection, if one runs."""
        while self._introspection is not None:  # `ask_again` may start another meanwhile
            introspection, self._introspection = self._introspection, None
            introspection.cancel()
            await asyncio.gather(introspection, return_exceptions=True)

    def ask_again(self) -> None:
        self._doubts += 1
        self._doubted.set()
        if self._introspection is None or self._introspection.done():
            self._introspection = asyncio.create_task(self._introspect(asyncio.Event()))

    def _note(self, verdict: Verdict, problem: str) -> None:
        """Keep what GET /workers tells of the registration, and count how it ended."""
        progress = self.progress
        progress.problem = problem
        if verdict is Verdict.FAILED:
            progress.is_failed, progress.since = True, time.time()
            self._pool.outcomes["failed"] += 1

    @property
    def _is_held_back(self) -> bool:
        """Whether a worker that is well has to wait for its bootstrap port."""
        is_young = asyncio.get_running_loop().time() < self._joined_s + PORT_GRACE_S
        return self._machine.state == READY and is_young and self._workers.lacks_port(self._worker_idx)

    def _show_state(self) -> None:
        """Let the others see what the checks say; a line in the log, and the end of the registration, when the worker is ready."""
        if self._is_held_back:
            self.progress.problem = _NO_PORT
            self._workers.set_state(self._worker_idx, JOINING)
            return
        state = self._machine.state
        was_ready = self._workers.health(self._worker_idx) == READY
        self._workers.set_state(self._worker_idx, state)
        if state != READY or was_ready:
            return
        view = self._workers.view(self._worker_idx)
        fields: dict[str, object] = {"worker": self._url, "model": view.record.model}
        if view.record.role != "regular":
            fields |= {"role": view.record.role}
        if view.record.role == "prefill":
            fields |= {"bootstrap_port": view.record.bootstrap_port}
        self._log.info("worker is ready", extra={"fields": fields | {"kv_block_size": view.block_size, "ranks": view.dp_size}})
        if self._workers.lacks_port(self._worker_idx) and not self._has_told_port_missing:
            self._has_told_port_missing = True
            text = f"{_NO_PORT}; its requests say null, and it is asked again"
            self._log.warning(text, extra={"fields": {"worker": self._url}})
        if not self.progress.was_ready:
            self.progress.was_ready, self.progress.since = True, time.time()
            self._pool.outcomes["success"] += 1

    def _tell(self, verdict: Verdict, problem: str) -> None:
        """One log line for each transition but that to READY."""
        if verdict is Verdict.TAKE_OUT:
            self._log.warning("worker is unhealthy", extra={"fields": {"worker": self._url, "problem": problem}})
        elif verdict is Verdict.FAILED:
            text = f"worker was not healthy within --worker-startup-timeout-secs {self._machine.rules.startup_timeout_s:g}; it is asked on"
            self._log.error(text, extra={"fields": {"worker": self._url, "problem": problem}})
        elif verdict is Verdict.OVERDUE:
            self._log.warning("worker is not healthy yet", extra={"fields": {"worker": self._url, "problem": problem}})

    async def _look_at_it(self) -> None:
        """Start an introspection anew and give it one timeout."""
        await self.forget()
        done = asyncio.Event()
        self._introspection = asyncio.create_task(self._introspect(done))
        try:
            async with asyncio.timeout(self.config.introspect_timeout_secs):
                await done.wait()
        except TimeoutError:
            pass

    async def _introspect(self, done: asyncio.Event) -> None:
        """Ask until the worker has told all. done: set after the first attempt."""
        failures = 0
        while True:
            doubts = self._doubts
            self._doubted.clear()
            try:
                api_key = self._workers.view(self._worker_idx).record.api_key
                findings = await introspect(self._fetcher, self._url, self.config.introspect_timeout_secs, api_key)
                has_changed = self._workers.learn(self._worker_idx, findings)
                is_named = self._workers.view(self._worker_idx).record.model is not None  # maybe by the one who added it
                lacks_port = self._workers.lacks_port(self._worker_idx)
                if findings.has_spoken and doubts != self._answered_doubts:
                    self._workers.confirm_ranks(self._worker_idx)
                    self._answered_doubts = doubts
                is_complete = (findings.is_complete or (findings.has_spoken and is_named)) and not lacks_port
                problem = findings.problem or (_NO_PORT if lacks_port else "no path tells the model's name")
                if has_changed and self._machine.state == READY and done.is_set():
                    self._show_state()  # what it waited for may have come
            except Exception:
                self._log.exception("an introspection failed in an unforeseen way", extra={"fields": {"worker": self._url}})
                has_changed, is_complete, problem = False, False, "see above"
            view = self._workers.view(self._worker_idx)
            if has_changed and view.state == READY:
                fields = {"worker": self._url, "model": view.record.model}
                self._log.info("worker describes itself differently now", extra={"fields": fields})
            done.set()
            if doubts != self._doubts:
                continue
            if is_complete:
                return
            failures += 1
            if failures == 1:
                fields = {"worker": self._url, "problem": problem, "model": view.record.model}
                self._log.warning("worker does not tell what it is; it is asked again later", extra={"fields": fields})
            with contextlib.suppress(TimeoutError):
                pause = retry_pause_s(failures) * random.uniform(1 - _JITTER, 1 + _JITTER)
                await asyncio.wait_for(self._doubted.wait(), pause)
