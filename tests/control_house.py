"""Membership with all that it moves, and two shards and an index that a test plays: it decides when they see the worker table."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
from control_doubles import no_task_is_left, remembering_log, until
from shared_memory import shared_segment
from yarl import URL

from sglfast import _counters as words
from sglfast._counters import Column, Loads, RankTable
from sglfast._segment import Segment
from sglfast._workers import WorkerTable
from sglfast.config import ServeConfig
from sglfast.control.admin import AdminServer
from sglfast.control.admin_keys import AdminKeys
from sglfast.control.admin_workers import WorkerRoutes
from sglfast.control.fanout import Fanout
from sglfast.control.fetch import Fetcher
from sglfast.control.followers import Followers
from sglfast.control.membership import Member, Membership
from sglfast.control.pool_watch import PoolWatch
from sglfast.control.worker_spec import WorkerSpec
from sglfast.control.worker_totals import WorkerTotals
from sglfast.control.workers import Workers

QUICK = {"health_check_interval_secs": 0.1, "health_check_timeout_secs": 0.2, "introspect_timeout_secs": 0.2}


class House:
    """sees: which process slots keep up with the table by themselves (0 = index, 1 and 2 = shards)."""

    def __init__(self, segment: Segment, fetcher: Fetcher, **settings: Any) -> None:
        self.config = ServeConfig(**{**QUICK, **settings})
        self.segment = segment
        self.log, self.seen = remembering_log()
        self.table = WorkerTable(segment)
        self.workers = Workers(WorkerTable(segment), 64, self.log)
        self.watch = PoolWatch(self.config, self.workers, fetcher, self.log)
        self.followers = Followers(segment, self.log)
        self.totals = WorkerTotals(segment)
        self.members = Membership(self.config, self.workers, self.watch, self.followers, self.totals, self.log)
        self.columns = [Column(segment, shard) for shard in range(2)]
        self.loads = Loads(segment)
        self.sees = {0, 1, 2}
        for slot in range(3):
            segment.process_start(slot, os.getpid(), 1)
            segment.process_ready(slot)

    async def follow(self) -> None:
        """The processes, as far as `sees` lets them."""
        while True:
            for slot in self.sees:
                self.segment.process_saw(slot, self.table.version())
            await asyncio.sleep(0.002)

    def add(self, url: str, **fields: Any) -> Member:
        return self.members.add(WorkerSpec(url=url, **fields))

    def begin(self, member: Member, shard: int = 0) -> None:
        """A request of 100 tokens on a connection of its own."""
        self.columns[shard].add_worker(member.worker_idx, words.W_CONNECTIONS, 1)
        self.columns[shard].begin(member.worker_idx, 100, 0)

    def end(self, worker_idx: int, shard: int = 0) -> None:
        self.columns[shard].end(worker_idx, 100, words.W_OK, 10)
        self.columns[shard].add_worker(worker_idx, words.W_CONNECTIONS, -1)

    async def until_gone(self, member: Member) -> None:
        await until(lambda: self.members.by_id(member.worker_id) is None, f"{member.spec.url} is gone\n{self.seen.text}")

    async def until_released(self, worker_idx: int) -> None:
        """The slot is nobody's."""
        await until(lambda: worker_idx in self.workers._free_slots, f"slot {worker_idx} is free\n{self.seen.text}")


@contextlib.asynccontextmanager
async def house(*, max_workers: int = 4, **settings: Any) -> AsyncIterator[House]:
    with shared_segment(max_workers=max_workers) as (_, segment):
        async with no_task_is_left(), Fetcher() as fetcher:
            made = House(segment, fetcher, **settings)
            following = asyncio.create_task(made.follow())
            try:
                yield made
            finally:
                await made.members.close()
                await made.watch.close()
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        assert "unforeseen" not in made.seen.text


class Asked:
    """An answer of control's admin server."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Admin:
    """An AdminServer before a house, and a client of it."""

    def __init__(self, made: House, fetcher: Fetcher) -> None:
        self.house = made
        self.fanout = Fanout(made.workers, fetcher)
        self.server = AdminServer(lambda: b"", AdminKeys(ServeConfig()), made.log)
        self.server.add(WorkerRoutes(made.members, made.workers, made.watch, RankTable(made.segment)).routes())
        self.server.add(self.fanout.routes())
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Admin":
        await self.server.start(ServeConfig())
        connector = aiohttp.UnixConnector("\0" + self.server.address.removeprefix("@"), force_close=True)
        self._session = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()
        await self.fanout.close()
        await self.server.close()

    async def ask(self, method: str, target: str, body: Any = None) -> Asked:
        """target: as it stands on the wire; body: JSON, or bytes as they are."""
        assert self._session is not None
        data = body if isinstance(body, bytes) or body is None else msgspec.json.encode(body)
        url = URL("http://control" + target, encoded=True)
        async with self._session.request(method, url, data=data) as response:
            return Asked(response.status, response.headers, await response.read())


@contextlib.asynccontextmanager
async def admin(**settings: Any) -> AsyncIterator[Admin]:
    async with house(**settings) as made, Fetcher() as fetcher, Admin(made, fetcher) as asking:
        yield asking
