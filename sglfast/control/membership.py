"""Which workers there are: add, change, drain, remove, at any moment and from any side.

Runs in: control, in the event loop. Everybody who changes the list of workers does it here: the flags at start, POST /workers, a new
    configuration file. One method call is one step: nothing is half done between two.

  add -> JOINING -> (READY <-> UNHEALTHY) -> DRAINING -> removed -> slot released
                          ^------ PUT state ------^

Removal, one task a worker: no new requests; wait until every shard acts by that, so that the in-flight count only falls; wait until
    it is 0, or `cut`, or the drain timeout; out of the table (shards close its connections, index clears its blocks); wait until no shard
    has a request or a connection there and index has seen it; only then slot and ranks are free for another. A URL that is added
    while its removal is under way waits for its end: two workers never share a URL, and with it ranks, streams and metrics.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from sglfast._counters import W_CONNECTIONS, W_INFLIGHT_REQUESTS
from sglfast.config import ServeConfig
from sglfast.config.worker_urls import NamedWorker, named_workers
from sglfast.control.followers import Followers
from sglfast.control.health import rules_of
from sglfast.control.metrics import WorkerChanges
from sglfast.control.pool_watch import PoolWatch
from sglfast.control.worker_spec import WorkerChange, WorkerSpec, changed, spec_of
from sglfast.control.worker_totals import WorkerTotals
from sglfast.control.workers import TableFullError, Workers
from sglfast.errors import ConfigError

_POLL_S, _SLOW_POLL_S = 0.01, 0.25
_INDEX_S = 5.0  # index clears a rank before it follows its next owner, so a late index costs stale hints at worst
WAITING = -1


class AlreadyMemberError(Exception):
    """The URL is that of `member` already."""

    def __init__(self, member: "Member") -> None:
        super().__init__(f"Worker {member.spec.url} already exists")
        self.member = member


class LeavingError(Exception):
    """The worker is being removed: nothing of it can be changed."""


@dataclass(slots=True, eq=False)
class Member:
    """A worker as the operator knows it. worker_idx: its slot, WAITING while its URL's last worker is still being removed.

    cut: ends the drain of a removal at once; since: unix seconds when its removal began, or when it was asked for.
    """

    worker_id: str
    spec: WorkerSpec
    worker_idx: int = WAITING
    is_leaving: bool = False
    is_drained: bool = False  # by the operator, for maintenance
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    since: float = field(default_factory=time.time)


class Membership:
    """All workers. `close` ends what it began; workers stay in the table then."""

    def __init__(
        self,
        config: ServeConfig,
        workers: Workers,
        watch: PoolWatch,
        followers: Followers,
        totals: WorkerTotals,
        log: logging.Logger,
    ) -> None:
        self._config = config
        self._workers = workers
        self._watch = watch
        self._followers = followers
        self._totals = totals
        self._log = log
        self._by_id: dict[str, Member] = {}
        self._by_place: dict[str, Member] = {}  # also those whose slot is not free yet
        self._waiting: dict[str, Member] = {}
        self._removals: set[asyncio.Task[None]] = set()
        self.changes = WorkerChanges(additions=watch.outcomes)

    @property
    def members(self) -> Sequence[Member]:
        """All workers in slot order, those that wait for a slot last."""
        return sorted(self._by_id.values(), key=lambda member: (member.worker_idx == WAITING, member.worker_idx))

    def by_id(self, worker_id: str) -> Member | None:
        """The worker with this id."""
        return self._by_id.get(worker_id)

    def by_url(self, url: str) -> Member | None:
        """The worker with this URL, as config.worker_urls.worker_url writes it: the one that was added last."""
        place = place_of(url)
        member = self._waiting.get(place) or self._by_place.get(place)
        return member if member is not None and member.worker_id in self._by_id else None

    def add(self, spec: WorkerSpec) -> Member:
        """Take a worker in. It is checked and asked from now on and gets requests as soon as it is healthy.

        Raises AlreadyMemberError, TableFullError, ConfigError for a URL that is too long.
        """
        place = place_of(spec.url)
        present = self._by_place.get(place)
        if place in self._waiting or (present is not None and not present.is_leaving):
            self.changes.additions["duplicate"] += 1
            raise AlreadyMemberError(self._waiting.get(place) or self._by_place[place])
        member = Member(str(uuid.uuid4()), spec)
        if present is None:
            self._join(member, place)
        else:
            self._waiting[place] = member
        self._by_id[member.worker_id] = member
        role = None if spec.worker_type == "regular" else spec.worker_type
        self._say("worker added", member, model_id=spec.model_id, role=role, waits_for_removal=member.worker_idx == WAITING)
        return member

    def _join(self, member: Member, place: str) -> None:
        spec = member.spec
        worker_idx = self._workers.register(spec.url, model=spec.model_id, api_key=self._key_of(spec), named=spec.named)
        self._totals.begin(worker_idx)
        member.worker_idx = worker_idx
        self._by_place[place] = member
        self._workers.set_draining(worker_idx, member.is_drained)
        self._watch.add(worker_idx, rules_of(self._config, spec))

    def _key_of(self, spec: WorkerSpec) -> str | None:
        """What the worker is shown."""
        return spec.api_key or self._config.worker_api_key or self._config.api_key

    def change(self, member: Member, change: WorkerChange) -> None:
        """Change a worker. Raises LeavingError, SpecError."""
        if member.is_leaving:
            raise LeavingError(f"Worker {member.spec.url} is being removed")
        spec = changed(member.spec, change)
        member.spec = spec
        if change.state is not None:
            member.is_drained = change.state == "draining"
        if member.worker_idx != WAITING:
            self._take_up(member)
        # Names only: a value may be a key.
        names = [name for name in change.__struct_fields__ if getattr(change, name) is not None]
        self._say("worker changed", member, fields=",".join(names), state=change.state)

    def _take_up(self, member: Member) -> None:
        """Bring what others see of a member in line with what was asked for."""
        key = self._key_of(member.spec)
        if self._workers.view(member.worker_idx).record.api_key != key:
            self._workers.set_api_key(member.worker_idx, key)
        self._watch.set_rules(member.worker_idx, rules_of(self._config, member.spec))
        self._workers.set_draining(member.worker_idx, member.is_drained)

    def remove(self, member: Member, *, is_forced: bool = False) -> None:
        """Begin to remove a worker: drain it, then take it out. is_forced: its requests in flight are cut, also when it drains already."""
        if is_forced:
            member.cut.set()
        if member.is_leaving:
            return
        member.is_leaving, member.since = True, time.time()
        if member.worker_idx == WAITING:
            del self._waiting[place_of(member.spec.url)], self._by_id[member.worker_id]
            self.changes.removals["waiting"] += 1
            self._say("worker removed", member, how="before it had joined")
            return
        inflight = self.inflight(member)
        self._workers.set_draining(member.worker_idx, True)
        self._say("worker is being removed", member, inflight_requests=inflight, is_forced=is_forced)
        task = asyncio.create_task(self._leave(member), name=f"removal of {member.spec.url}")
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    def apply(self, config: ServeConfig) -> None:
        """Go on with other settings: workers that the flags named and name no more are removed, those that they name now are added."""
        before, self._config = self._config, config
        self._watch.apply(config)
        for member in self.members:
            if member.worker_idx != WAITING and not member.is_leaving:
                self._take_up(member)
        wanted, had = _by_place(config), _by_place(before)
        for place, worker in had.items():
            member_there = self.by_url(place)
            # A worker that is to do something else is another worker: what it has in flight ends as it began.
            if wanted.get(place) != worker and member_there is not None:
                self.remove(member_there)
        for place, worker in wanted.items():
            if had.get(place) != worker:
                try:
                    self.add(spec_of(worker))
                except (AlreadyMemberError, ConfigError) as error:
                    self._log.warning(f"not added: {error}", extra={"fields": {"worker": worker.url}})

    def inflight(self, member: Member) -> int:
        """Requests that the worker has and has not finished, over all shards."""
        return 0 if member.worker_idx == WAITING else max(0, self._totals.of(member.worker_idx)[W_INFLIGHT_REQUESTS])

    async def settled(self) -> None:
        """Wait until every shard acts by the table as it is now."""
        await self._followers.shards()

    async def _leave(self, member: Member) -> None:
        try:
            await self._leave_in_steps(member)
        except Exception:
            self._log.exception("a removal failed in an unforeseen way", extra={"fields": {"worker": member.spec.url}})

    async def _leave_in_steps(self, member: Member) -> None:
        worker_idx, place = member.worker_idx, place_of(member.spec.url)
        begun_s = time.monotonic()
        left = await self._drained(member)
        await self._watch.remove(worker_idx)
        self._workers.remove(worker_idx)
        del self._by_id[member.worker_id]
        self.changes.removals["cut" if left else "drained"] += 1
        self._say("worker removed", member, cut_requests=left, drained_s=round(time.monotonic() - begun_s, 3))
        await self._let_go(worker_idx)
        self._workers.release(worker_idx)
        del self._by_place[place]  # not before: whoever came to it meanwhile is not to have two owners
        after = self._waiting.pop(place, None)
        if after is not None:
            try:
                self._join(after, place)
            except TableFullError as error:  # cannot be: the slot became free a line ago
                del self._by_id[after.worker_id]
                self._log.error("worker cannot join", extra={"fields": {"worker": after.spec.url, "problem": str(error)}})

    async def _drained(self, member: Member) -> int:
        """Wait for the end of the worker's requests; returns how many are left when they are to be cut."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.worker_drain_timeout_secs):
                while not member.cut.is_set():
                    # Asked each time: a shard that is stopped has acknowledged nothing, and may yet count a request in.
                    if await self._followers.shards() and self.inflight(member) == 0:
                        return 0
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(member.cut.wait(), _POLL_S)
        return self.inflight(member)

    async def _let_go(self, worker_idx: int) -> None:
        """Wait until nobody has anything of the removed worker."""
        pause_s = _POLL_S
        while True:
            # Only after all know of the removal: until then a shard may open a connection.
            has_all_seen = await self._followers.shards()
            words = self._totals.of(worker_idx)
            if has_all_seen and words[W_INFLIGHT_REQUESTS] <= 0 and words[W_CONNECTIONS] <= 0:
                break
            await asyncio.sleep(pause_s)
            pause_s = min(_SLOW_POLL_S, 2 * pause_s)
        await self._followers.index(_INDEX_S)

    def _say(self, text: str, member: Member, **fields: object) -> None:
        self._log.info(text, extra={"fields": {"worker": member.spec.url, "worker_id": member.worker_id, **fields}})

    async def close(self) -> None:
        """End all removals where they are."""
        removals = list(self._removals)
        for task in removals:
            task.cancel()
        await asyncio.gather(*removals, return_exceptions=True)


def _by_place(config: ServeConfig) -> dict[str, NamedWorker]:
    return {place_of(worker.url): worker for worker in named_workers(config.worker_urls, config.prefill, config.decode)}


def place_of(url: str) -> str:
    """What two URLs of one server have in common."""
    return url.removesuffix(":80") if url.startswith("http:") else url.removesuffix(":443")
