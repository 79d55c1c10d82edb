"""What all connections of one shard share: settings, shared memory, the router, the sweep.

Runs in: a shard's event loop; made once by edge/main. The sweep is the shard's only timer: every tick it looks at a fifth of the
    connections and running exchanges, so that a request sets and cancels no timer of its own. An idle connection costs it a few
    reads of memory (`_relay.Clients`): 10,000 of them hold the loop for less than a millisecond at a time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from typing import TYPE_CHECKING

from sglfast import _counters, _segment
from sglfast._counters import Column, Loads, RankLoads, RankTable
from sglfast._hashtree import TreeReader
from sglfast._relay import Clients, ShardBase
from sglfast._workers import WorkerTable
from sglfast.config import REQUEST_ID_HEADERS
from sglfast.edge.admission import Admission
from sglfast.edge.breaker import BreakerDesk
from sglfast.edge.cors import Cors
from sglfast.edge.door import Door, most_clients
from sglfast.edge.guard import Guard
from sglfast.edge.header_lines import value_of
from sglfast.edge.relay import elsewhere
from sglfast.edge.request import ENDPOINTS
from sglfast.edge.request_log import RequestLog
from sglfast.edge.retry import RetryPolicy
from sglfast.edge.route import Router
from sglfast.edge.untold import Untold
from sglfast.errors import REASON_INDEX, ConfigError, Reason
from sglfast.logs import set_level
from sglfast.tls import renew_server, server_context, worker_context

if TYPE_CHECKING:
    from sglfast._httphead import RequestHead
    from sglfast.boot import Boot
    from sglfast.config import ServeConfig
    from sglfast.edge.prefill_leg import PrefillLeg
    from sglfast.edge.request import PromptKeyer
    from sglfast.edge.upstream import Upstream

_TICK_SECS = 0.1
_SWEEP_TICKS = 5  # each connection is looked at every 0.5 s; their timeouts are seconds
_LOG_PAUSE_SECS = 5.0
_FULL_PAUSE_SECS = 60.0


class Shard(ShardBase):
    """One serving process."""

    def __init__(self, boot: Boot, loop: asyncio.AbstractEventLoop, keyer: PromptKeyer | None, log: logging.Logger) -> None:
        self.configure(boot.config)
        self.segment = boot.segment
        self.shard = boot.shard
        self.process_slot = boot.process_slot
        self.control_address = boot.control_address
        self.loop = loop
        self.log = log
        self.column = Column(boot.segment, boot.shard)
        self.loads = Loads(boot.segment)
        self.rank_loads = RankLoads(boot.segment, self.loads)
        self.ranks = RankTable(boot.segment)
        self.tree = TreeReader(boot.segment)
        self.untold = Untold(self.tree, self.ranks, self.column)
        self.table = WorkerTable(boot.segment)
        self.kinds_elsewhere = elsewhere(boot.config)
        self.clients = Clients()
        self.prefill_legs: set[PrefillLeg] = set()  # halves of requests that prefill workers have
        self.max_clients = most_clients(boot.config)
        self.door: Door | None = None
        self.is_draining = False
        self.endpoints = {path: endpoint for path, endpoint in ENDPOINTS.items() if not endpoint.worker_path}
        self.started_s = int(time.time())
        self.now_s = loop.time()  # coarse: moved by the tick
        self._silent_until_s = 0.0
        self._full_until_s = 0.0
        self._ticks = 0
        self.guard = Guard(boot.config)
        self.cors = Cors(boot.config)
        self.worker_tls = worker_context(boot.config)
        self.client_tls = server_context(boot.config)
        self._log_fd = boot.log_fd
        self.request_log = self._open_request_log()
        self.retry = RetryPolicy(self.config)
        self.breakers = BreakerDesk(self)
        self.router = Router(self, keyer)
        self.admission = Admission(self) if boot.config.is_limited else None
        self._gate()

    def apply(self, config: ServeConfig) -> None:
        """Go on with other settings, from the next request on; what cannot change in a running program is the same in both."""
        had_log = self.config.request_log
        self.configure(config)
        set_level(config.log_level)
        self.max_clients = most_clients(config)
        self.retry = RetryPolicy(config)
        self.breakers = BreakerDesk(self)
        self.guard = Guard(config)
        self.cors = Cors(config)
        self._renew_certificates(config)
        if config.request_log != had_log:
            if self.request_log is not None:
                self.request_log.retire()
            self.request_log = self._open_request_log()
        if self.admission is not None:
            self.admission.apply()
        elif config.is_limited:
            self.admission = Admission(self)
        if self.admission is not None and self.admission.is_limiting:
            self.admission.count_running(client.exchange for client in self.clients)
        self._gate()
        self.router.renew_policies()  # at last: what it says of a worker depends on the keys and on the log

    def _renew_certificates(self, config: ServeConfig) -> None:
        """The files may be others under the same names. Control has read them a moment ago."""
        try:
            if self.client_tls is not None:
                renew_server(self.client_tls, config)
            self.worker_tls = worker_context(config)
        except ConfigError as error:
            self.log.error(f"{error}; the certificates stay as they were")

    def _gate(self) -> None:
        """Whether anything has to be asked of a request before it may begin."""
        is_limiting = self.admission is not None and self.admission.is_limiting
        self.is_gated = is_limiting or bool(self.guard) or bool(self.cors) or self.has_own_ids

    def _open_request_log(self) -> RequestLog | None:
        config, name = self.config, f"shard{self.shard}"
        if config.request_log == "off":
            return None
        try:
            return RequestLog(config, name, self._log_fd)
        except ConfigError as error:  # control could write there when it started
            self.log.error(f"{error}; requests are logged to standard error only")
            return RequestLog(dataclasses.replace(config, log_dir=None), name, self._log_fd)

    @property
    def has_own_ids(self) -> bool:
        """Whether requests are named by other headers than the scanner knows."""
        return bool(self.config.request_id_headers != REQUEST_ID_HEADERS)

    def id_in(self, head: RequestHead) -> bytes | None:
        """The id of a request by the headers of the settings."""
        return next((value for name in self.config.request_id_headers if (value := value_of(head.kept, name.encode()))), None)

    def key_line(self, api_key: str | None) -> bytes | None:
        """The header line by which a worker is shown its key; empty when it gets none and must not see the client's either, else None."""
        if api_key is not None:
            return b"authorization: Bearer %b\r\n" % api_key.encode()
        return b"" if self.guard else None

    def count_error(self, reason: Reason) -> None:
        """Count an answer of our own in the metric of its code."""
        self.column.add(_counters.S_REASONS + REASON_INDEX[reason.code])

    def note_unreachable(self, upstream: Upstream, error: BaseException) -> None:
        """Log a worker that takes no connection; at most once in a while, because every request may find out."""
        if self.now_s >= self._silent_until_s:
            self._silent_until_s = self.now_s + _LOG_PAUSE_SECS
            self.log.warning("worker cannot be reached", extra={"fields": {"worker": upstream.url, "error": str(error) or repr(error)}})

    def note_full(self, what: str) -> None:
        """Log that connections are turned away; once a minute, because there may be very many."""
        if self.now_s >= self._full_until_s:
            self._full_until_s = self.now_s + _FULL_PAUSE_SECS
            self.log.warning(what)

    def cut(self, gone: set[Upstream]) -> None:
        """End the exchanges with workers that were removed: control takes a worker out when it is idle, or to cut what it has."""
        for client in self.clients:
            exchange = client.exchange
            connection = exchange.connection if exchange is not None else None
            if connection is not None and connection.upstream in gone:
                connection.cut()
        for leg in self.prefill_legs:
            if leg.connection is not None and leg.connection.upstream in gone:
                leg.connection.cut()

    def tick(self) -> None:
        """Move the coarse clock, follow the program's state, now and then sweep."""
        self.loop.call_later(_TICK_SECS, self.tick)  # first: an error below must not stop the clock
        now_s = self.now_s = self.loop.time()
        self._ticks += 1
        if self.request_log is not None:
            self.request_log.flush()
            self.column.add(_counters.S_LOG_LINES_LOST, self.request_log.newly_lost())
        if not self.is_draining and self.segment.state >= _segment.DRAINING:
            self.is_draining = True
        if self.door is not None:
            self.door.take_waiting()
        self.clients.sweep(self._ticks, now_s)
        if self.untold.waiting:
            self.untold.look()
        self.router.refresh()  # a shard without requests follows too
        if self._ticks % _SWEEP_TICKS == 0:
            for leg in [*self.prefill_legs]:
                try:
                    leg.tick(now_s)
                except Exception as error:
                    leg.on_mishap(error)
            self.router.sweep(now_s - self.config.upstream_keepalive_secs)
            self.segment.process_heartbeat(self.process_slot, int(time.time() * 1000))
