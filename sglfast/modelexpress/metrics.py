"""What the service counts, and the HTTP port that shows it.

Runs in: the metadata service. Contract: names start with `sglfast_modelexpress_` and end with their unit; sources by status are
    counted at the scrape from the storage, everything else when it happens. Label values are few and fixed: no model, no client.
"""

import asyncio
from collections import Counter as Tally
from collections.abc import Iterable

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sglfast import __version__
from sglfast.modelexpress.roster import STATUS_NAMES, Roster
from sglfast.modelexpress.storage import Storage, StorageError

_PREFIX = "sglfast_modelexpress_"
_LATENCY_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Meters:
    """The counters. Every label value that can occur stands here, so that a rate is known from the first scrape on."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody asked for
        self.registry = CollectorRegistry(auto_describe=False)
        self.publishes = self._counter("publishes", "PublishMetadata calls, by result.", "result", ("ok", "refused", "error"))
        self.lists = self._counter(
            "lists", "ListSources calls, by result; an error is answered with an empty list.", "result", ("ok", "error")
        )
        self.gets = self._counter("gets", "GetMetadata calls, by result.", "result", ("found", "missing", "error"))
        self.updates = self._counter("status_updates", "UpdateStatus calls, by result.", "result", ("ok", "refused", "missing", "error"))
        self.transitions = self._counter(
            "transitions", "Changes of a record's status to this one; DELETED: collected.", "to", (*STATUS_NAMES.values(), "DELETED")
        )
        self.renewals = self._counter("keep_alive_renewals", "Seeds without heartbeat kept READY, or not.", "result", ("kept", "unhealthy"))
        self.stale = Counter(_PREFIX + "stale_transitions", "Records made STALE because nothing was heard of them.", registry=self.registry)
        self.refusals = self._counter(
            "refused_calls", "Calls that ended with a gRPC code, by reason.", "reason", ("malformed", "client_limit", "token", "internal")
        )
        self.stored_bytes = Counter(_PREFIX + "published_bytes", "Bytes of the records that were published.", registry=self.registry)
        self.latency = Histogram(
            _PREFIX + "call_duration_seconds", "Time from a whole request to its answer.", ["method"], buckets=_LATENCY_S,
            registry=self.registry,
        )  # fmt: skip

    def _counter(self, name: str, text: str, label: str, values: Iterable[str]) -> Counter:
        counter = Counter(_PREFIX + name, text, [label], registry=self.registry)
        for value in values:
            counter.labels(value)
        return counter


class _Sources(Collector):
    """Gauges of what there is now."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster

    def collect(self) -> Iterable[Metric]:
        tally = Tally(STATUS_NAMES.get(entry.state.status, "UNKNOWN") for entry in self.roster)
        records = GaugeMetricFamily(_PREFIX + "records", "Records (ranks of workers) by status.", labels=["status"])
        for name in STATUS_NAMES.values():
            records.add_metric([name], tally[name])
        yield records
        yield GaugeMetricFamily(_PREFIX + "sources", "Different mx_source_ids that have a record.", len(self.roster.sources))
        info = GaugeMetricFamily(_PREFIX + "build_info", "Version of the service; always 1.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info


class MetricsServer:
    """HTTP: /metrics, and /healthz, which is 200 while the storage answers. port: 0 picks a free one."""

    def __init__(self, meters: Meters, storage: Storage, host: str, port: int) -> None:
        self._meters, self._storage, self._host, self.port = meters, storage, host, port

    async def start(self) -> None:
        """Listen. Raises OSError."""
        application = web.Application()
        application.add_routes([web.get("/metrics", self._metrics), web.get("/healthz", self._healthz)])
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self.port).start()
        except BaseException:
            await self._runner.cleanup()
            raise
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close the port."""
        await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        try:
            roster = await self._storage.roster()
        except StorageError:
            text = generate_latest(self._meters.registry)  # what was counted can be told all the same
        else:
            text = generate_latest(_Sources(roster)) + generate_latest(self._meters.registry)
        return web.Response(body=text, headers={"content-type": _CONTENT_TYPE})

    async def _healthz(self, request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(5.0):
                await self._storage.roster()
        except (StorageError, TimeoutError) as error:
            return web.Response(status=503, text=f"storage: {error}\n")
        return web.Response(text="ok\n")
