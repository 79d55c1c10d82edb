"""Makes sources STALE that are not heard of, deletes what nobody renews, and speaks for seeds that cannot.

Runs in: the metadata service, one task. Contract: every change names the state it was decided on, so a heartbeat that comes in
    between wins, and of several services on one storage each change is made, logged and counted by one.
Rules: spec/modelexpress.md 2.7; beyond upstream, a record that never said READY is deleted as a STALE one is, since it would stay for ever.
Keeping alive: a seed of SGLang's first ModelExpress support says READY once and never again. For such a source the service says it
    itself at every scan, and if it is told where, only while the seed's own health URL answers.
"""

import asyncio
from collections.abc import Callable
from logging import Logger

import aiohttp

from sglfast.modelexpress.metrics import Meters
from sglfast.modelexpress.roster import INITIALIZING, READY, STALE, Entry, Key, Roster, status_name
from sglfast.modelexpress.service import P2pService, wall_clock_ms
from sglfast.modelexpress.settings import ServeSettings
from sglfast.modelexpress.storage import Storage, StorageError

_PROBE_TIMEOUT_S = 3.0
_PROBES_AT_ONCE = 64


class Reaper:
    """The task. clock_ms: unix milliseconds."""

    def __init__(
        self,
        storage: Storage,
        service: P2pService,
        settings: ServeSettings,
        meters: Meters,
        log: Logger,
        *,
        clock_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._storage, self._service, self._settings, self._meters, self._log = storage, service, settings, meters, log
        self._clock_ms = clock_ms
        self._timeout_ms = round(settings.heartbeat_timeout_secs * 1000)
        self._gc_ms = round(settings.gc_timeout_secs * 1000)

    async def run(self) -> None:
        """Scan for ever, at once and then at each interval."""
        while True:
            try:
                await self.scan()
            except StorageError as error:
                self._log.warning("scan for stale sources failed", extra={"fields": {"error": str(error)}})
            except Exception:
                self._log.exception("scan for stale sources failed")
            await asyncio.sleep(self._settings.scan_interval_secs)

    async def scan(self) -> None:
        """Look at every record once. Raises StorageError."""
        roster = await self._storage.roster()
        kept = await self._keep(roster)
        for entry in list(await self._storage.roster()):
            state, age_ms = entry.state, self._clock_ms() - entry.state.updated_at_ms
            if state.status in (READY, INITIALIZING):
                if age_ms > self._timeout_ms and entry.key not in kept:
                    await self._make_stale(entry, age_ms)
            elif age_ms > self._gc_ms and await self._storage.remove(entry.key, state):
                self._service.tell(
                    entry.key, "DELETED", "collected", {"before": status_name(state.status), "silent_secs": round(age_ms / 1000, 1)}
                )

    async def _make_stale(self, entry: Entry, age_ms: int) -> None:
        state = entry.state
        if await self._storage.update(entry.key, STALE, self._clock_ms(), seen=state) is not None:
            self._meters.stale.inc()
            fields = {"before": status_name(state.status), "silent_secs": round(age_ms / 1000, 1)}
            self._service.tell(entry.key, "STALE", "no heartbeat", fields)

    async def _keep(self, roster: Roster) -> set[Key]:
        """Renew the seeds that are to be kept; returns their keys."""
        wanted = set(self._settings.keep_alive)
        if not wanted:
            return set()
        entries = [
            entry
            for entry in roster
            if entry.state.status == READY
            and entry.state.beats < 2
            and ("all" in wanted or entry.key.source_id in wanted or roster.sources[entry.key.source_id].model_name in wanted)
        ]
        if self._settings.keep_alive_health_url is not None:
            entries = await self._healthy(_newest_of_each_place(entries), self._settings.keep_alive_health_url)
        renewed: set[Key] = set()
        for entry in entries:
            if await self._storage.update(entry.key, READY, self._clock_ms(), source_load=entry.state.source_load, seen=entry.state):
                renewed.add(entry.key)
                self._meters.renewals.labels("kept").inc()
        return renewed

    async def _healthy(self, entries: list[Entry], template: str) -> list[Entry]:
        gate = asyncio.Semaphore(_PROBES_AT_ONCE)
        urls = sorted({url for entry in entries if (url := url_of(entry, template)) is not None})
        timeout = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:

            async def probe(url: str) -> bool:
                async with gate:
                    try:
                        async with session.get(url, allow_redirects=False) as answer:
                            return answer.status == 200
                    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
                        return False

            answers = await asyncio.gather(*map(probe, urls))
        good = {url for url, is_good in zip(urls, answers, strict=True) if is_good}
        healthy = [entry for entry in entries if url_of(entry, template) in good]
        self._meters.renewals.labels("unhealthy").inc(len(entries) - len(healthy))
        return healthy


def url_of(entry: Entry, template: str) -> str | None:
    """The health URL of a seed; None when {host} is asked for and the record tells no host."""
    host = entry.static.peer_host
    if "{host}" in template and not host:
        return None
    return template.replace("{host}", f"[{host}]" if ":" in host else host)


def _newest_of_each_place(entries: list[Entry]) -> list[Entry]:
    """Of one host, source and rank the last published: a restarted engine answers at the URL of the one whose memory is gone."""
    newest: dict[tuple[str, str, int], Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.state.order):
        newest[entry.static.peer_host, entry.key.source_id, entry.key.rank] = entry
    return list(newest.values())
