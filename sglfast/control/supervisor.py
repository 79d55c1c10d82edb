"""Start index and shards, start again what died, give up on what keeps dying, end all.

Runs in: control. Contract: of a dead shard the counter column is folded away, its probes are given back and the process slot freed
    before its successor starts, on the same listening socket. `failed` is set once, with a message for the operator, when a child
    cannot be kept alive. After `stop` no child is left.
    A first start that ends because the settings cannot work is not tried again. Who has served once and is killed from outside has
    not crashed: it comes back however often that happens.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sglfast._breaker import Breakers
from sglfast._counters import R_REASON, R_STATE, RANK_DEGRADED, RANK_EXACT, RANK_SYNCING, RankTable, Totals
from sglfast._segment import Segment
from sglfast.control.children import Child, Inheritance
from sglfast.shm import REASON_INDEX_RESTARTS

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 2.0
_LONG_LIFE_S, _SHORT_LIFE_S = 30.0, 10.0
_SHORT_LIVES_MAX = 5
_STARTS_MAX = 3
_READY_POLL_S = 0.02
_STOP_S, _TERM_S, _KILL_S = 2.0, 0.5, 5.0


@dataclass(frozen=True, slots=True)
class Commands:
    """What is run as a child, without the arguments of boot.py."""

    index: Sequence[str] = (sys.executable, "-m", "sglfast.index.main")
    shard: Sequence[str] = (sys.executable, "-m", "sglfast.edge.main")


class RestartRecord:
    """When one child is started again. Pauses double from 0.05 s to 2 s and begin anew after a life of 30 s."""

    def __init__(self) -> None:
        self._pause_s = _FIRST_PAUSE_S
        self.was_ever_ready = False
        self._deaths = 0
        self._short_lives = 0

    def died(self, lived_s: float, was_ready: bool, was_killed: bool = False) -> float | str:
        """Take note of a death; returns the pause before the next start in seconds, or why there is none.

        was_killed: by a signal that no fault of its own raises.
        """
        self._deaths += 1
        self.was_ever_ready |= was_ready
        if lived_s >= _LONG_LIFE_S:
            self._pause_s = _FIRST_PAUSE_S
        if lived_s >= _SHORT_LIFE_S:
            self._short_lives = 0
        elif not (was_killed and self.was_ever_ready):
            self._short_lives += 1
        if not self.was_ever_ready and self._deaths >= _STARTS_MAX:
            return f"did not start in {_STARTS_MAX} attempts"
        if self._short_lives >= _SHORT_LIVES_MAX:
            return f"died {_SHORT_LIVES_MAX} times in a row within {_SHORT_LIFE_S:g} s of its start"
        pause_s, self._pause_s = self._pause_s, min(_LAST_PAUSE_S, 2 * self._pause_s)
        return pause_s


@dataclass(slots=True)
class _Post:
    """A place that a child has to hold. slot: in the segment; shard: -1 for index."""

    name: str
    command: Sequence[str]
    shard: int = -1
    listener: socket.socket | None = None
    record: RestartRecord = field(default_factory=RestartRecord)
    child: Child | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def slot(self) -> int:
        return self.shard + 1


class Supervisor:
    """All children. Inside the loop, in the main thread. listeners: one for each shard, owned by the caller."""

    def __init__(
        self,
        segment: Segment,
        inheritance: Inheritance,
        listeners: Sequence[socket.socket],
        commands: Commands,
        log: logging.Logger,
    ) -> None:
        self._segment = segment
        self._totals = Totals(segment)
        self._breakers = Breakers(segment)
        self._ranks = RankTable(segment)
        self._inheritance = inheritance
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._is_stopping = False
        self._none_left = asyncio.Event()
        self._posts = [_Post("index", commands.index)]
        self._posts += [_Post(f"shard{shard}", commands.shard, shard, listener) for shard, listener in enumerate(listeners)]
        self.failed: asyncio.Future[str] = self._loop.create_future()
        self.exit_code = 1  # of the program when that is set

    def start(self) -> None:
        """Start all children; `wait_ready` tells when they serve."""
        for post in self._posts:
            self._spawn(post)

    async def wait_ready(self) -> None:
        """Return when every shard serves. Index may still be starting: until it is up, shards choose by load."""
        while not all(self._segment.process_info(post.slot)[4] for post in self._posts if post.shard >= 0):  # noqa: ASYNC110
            await asyncio.sleep(_READY_POLL_S)  # shared memory wakes nobody

    def tell_settings(self, config_fd: int) -> None:
        """Hand new settings to all children, also to those that start later. config_fd: memfd, owned by the caller as long as we run."""
        self._inheritance = replace(self._inheritance, config_fd=config_fd)
        for post in self._posts:
            if post.child is not None:
                post.child.tell_settings(config_fd)

    async def stop(self) -> None:
        """End all children: ask, then SIGTERM, then SIGKILL. What is in flight is cut."""
        self._is_stopping = True
        self._note_if_none_left()
        for post in self._posts:
            if post.timer is not None:
                post.timer.cancel()
            if post.child is not None:
                post.child.tell_to_stop()
                if post.shard < 0 or not self._segment.process_info(post.slot)[4]:
                    post.child.send_signal(signal.SIGTERM)  # nobody reads the byte there
        for number, wait_s in ((None, _STOP_S), (signal.SIGTERM, _TERM_S), (signal.SIGKILL, _KILL_S)):
            for post in self._posts:
                if post.child is not None and number is not None:
                    self._log.debug("child does not stop", extra={"fields": {"process": post.name, "signal": number.name}})
                    post.child.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._none_left.wait()
                return
        self._log.error("children are left: the kernel does not end them")

    def kill_index(self) -> None:
        """End an index that hangs; as after any other death another one is started."""
        index = self._posts[0].child
        if index is not None and not self._is_stopping:
            index.send_signal(signal.SIGKILL)

    def kill(self) -> None:
        """End all children now."""
        self._is_stopping = True
        for post in self._posts:
            if post.child is not None:
                post.child.send_signal(signal.SIGKILL)

    def _note_if_none_left(self) -> None:
        if all(post.child is None for post in self._posts):
            self._none_left.set()

    def _spawn(self, post: _Post) -> None:
        post.timer = None
        if self._is_stopping:
            return
        try:
            post.child = Child(post.command, self._inheritance, post.shard, post.listener, lambda child: self._exited(post, child))
        except OSError as error:
            self._lost(post, 0.0, f"cannot be started: {error.strerror}")
        else:
            self._log.debug("started", extra={"fields": {"process": post.name, "pid": post.child.pid}})

    def _distrust_ranks(self) -> None:
        """Index is dead: what it said of its streams holds no longer. Its successor writes all of it anew."""
        for rank in range(self._segment.max_ranks):
            if self._ranks.get(rank, R_STATE) in (RANK_EXACT, RANK_DEGRADED):
                self._ranks.set(rank, R_REASON, REASON_INDEX_RESTARTS)
                self._ranks.set(rank, R_STATE, RANK_SYNCING)

    def _exited(self, post: _Post, child: Child) -> None:
        post.child = None
        is_hopeless = child.cannot_work and not post.record.was_ever_ready
        end = child.last_line if is_hopeless else child.describe_end()
        self._lost(post, self._loop.time() - child.started_s, end, is_hopeless, child.was_killed)

    def _lost(self, post: _Post, lived_s: float, end: str, is_hopeless: bool = False, was_killed: bool = False) -> None:
        was_ready = self._segment.process_info(post.slot)[4]
        if post.shard >= 0:
            self._totals.retire(post.shard)
            self._breakers.release_shard(post.shard)
        else:
            self._distrust_ranks()
        self._segment.process_died(post.slot)
        if self._is_stopping:
            self._note_if_none_left()
            return
        if is_hopeless:
            if not self.failed.done():
                self.exit_code = 2
                self.failed.set_result(f"{post.name}: {end}")
            return
        verdict = post.record.died(lived_s, was_ready, was_killed)
        if isinstance(verdict, str):
            if not self.failed.done():
                self.failed.set_result(f"{post.name} {verdict}; the last time: {end}")
            return
        fields = {"process": post.name, "end": end, "lived_s": round(lived_s, 3), "pause_s": verdict}
        self._log.warning("child process died, it is started again", extra={"fields": fields})
        post.timer = self._loop.call_later(verdict, self._spawn, post)
