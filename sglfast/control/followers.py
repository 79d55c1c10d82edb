"""Who follows the worker table, and how far: shards and index say in their process slots by which version they act.

Runs in: control. Law: a shard reads the table before every choice, so no request is given out by an older version than the newest; what a
    shard has acknowledged tells more: no choice of an older version is still on its way to a worker, so from then on the in-flight
    count of a worker that takes no new requests only falls. A process that serves not (pid 0, not ready) follows nothing.
"""

import asyncio
import logging

from sglfast._segment import Segment
from sglfast._workers import WorkerTable

INDEX_SLOT = 0
_POLL_S = 0.005
_SHARDS_S = 2.0  # shards look ten times a second; one that takes longer is stopped, and serves nobody either
_LOG_PAUSE_S = 10.0


class Followers:
    """The processes behind the table."""

    def __init__(self, segment: Segment, log: logging.Logger) -> None:
        self._segment = segment
        self._table = WorkerTable(segment)
        self._log = log
        self._quiet_until_s = 0.0

    def behind(self, version: int) -> list[int]:
        """Shards that serve and may still act by an older version."""
        return [slot - 1 for slot in range(1, self._segment.max_shards + 1) if self._is_behind(slot, version)]

    def _is_behind(self, slot: int, version: int) -> bool:
        return self._segment.process_info(slot)[4] and self._segment.workers_seen(slot) < version

    async def shards(self, version: int | None = None, timeout_s: float = _SHARDS_S) -> bool:
        """Wait until every shard that serves acts by this version of the table (None: the present one); False when not in time."""
        wanted = self._table.version() if version is None else version
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while left := self.behind(wanted):
            if loop.time() >= end_s:
                if loop.time() >= self._quiet_until_s:
                    self._quiet_until_s = loop.time() + _LOG_PAUSE_S
                    self._log.warning("shards do not follow the worker table", extra={"fields": {"shards": left}})
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def index(self, timeout_s: float) -> bool:
        """Wait until index, if it runs, acts by the present version; False when not in time."""
        wanted = self._table.version()
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while self._is_behind(INDEX_SLOT, wanted):
            if loop.time() >= end_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True
