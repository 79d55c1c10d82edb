"""The prefill half of a request that two workers serve: it computes the prompt, the decode worker's answer is the client's.

Runs in: shards, event loop. Theory: both workers get the same body at the same time and find each other by what it says
    (edge/bootstrap.py). The exchange is at the decode worker as at any other; beside it a PrefillLeg is at the prefill worker, counts
    as a request of its own there, and drops the answer as it comes.
    Without its other half neither can come to an end, so what ends one ends the other at once: by its connection and by
    /abort_request. The worker that failed is charged, the one that is told to stop is not. Then the pair is one failed attempt like any
    other (edge/retry.py), as long as no byte of an answer has gone to the client. So that streams have this as well, whose head
    comes before the prompt is computed, that head is kept until the first byte of the body, or until the prefill half is done.
Contract: `leave_worker` runs exactly once for a leg that has started, whoever ends it. A leg whose decode half has ended well may take
    _LINGER_SECS more to end its answer; so may one that has failed by its answer, so that its connection can be used again.
    What a prefill worker refuses for the request's own sake (4xx) is the client's answer: the exchange takes it over as it comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglfast import _counters
from sglfast._relay import PrefillLegBase
from sglfast.edge.bootstrap import with_bootstrap
from sglfast.edge.breaker import NO_PROBE, PROBE
from sglfast.edge.header_lines import without
from sglfast.edge.leg import Leg
from sglfast.edge.mishap import report

if TYPE_CHECKING:
    from sglfast.edge.exchange import Exchange
    from sglfast.edge.pools import Route
    from sglfast.edge.upstream import Upstream, UpstreamConnection

_LINGER_SECS = 5.0
_DECODE_URL = b"x-sgl-decode-url"


class PrefillLeg(PrefillLegBase, Leg):
    """One attempt's prefill half. What every answer does is compiled (cext/relaypair.pxi), the rest is here."""

    __slots__ = ()

    exchange: Exchange | None
    heir: Exchange | None
    first: Route
    decode: Upstream

    def __init__(self, exchange: Exchange, route: Route) -> None:
        assert route.prefill is not None
        kept = without(exchange.kept, _DECODE_URL) + route.upstream.decode_url_line
        super().__init__(exchange, route, with_bootstrap(exchange.body, exchange.endpoint.kind, route.prefill), kept)

    def start(self) -> None:
        """Count the load, and send on an idle connection or open one."""
        route = self.route = self.first
        upstream = route.upstream
        self.tokens = route.uncached_tokens
        self.shard.column.begin(upstream.worker_idx, self.tokens, route.decision)
        if route.prediction is not None:
            self.shard.router.note(route)
        self.shard.prefill_legs.add(self)
        connection = upstream.take_idle()
        if connection is None:
            upstream.open(self)
        else:
            self.on_connected(connection)

    def give_probe_back(self) -> None:
        """It will not start: another may be the probe."""
        if self.probe == PROBE:
            self.shard.breakers.left(self.first.upstream, _counters.W_CANCELLED, PROBE)
        self.probe = NO_PROBE

    @property
    def is_waiting(self) -> bool:
        """Whether the prefill worker has still to end its part."""
        return self.exchange is not None and self.route is not None

    # ---- how it ends by itself ----

    def on_complete(self) -> None:
        """The answer has come whole."""
        exchange, self.exchange = self.exchange, None
        if self.status < 400:
            if self.cached_tokens >= 0 and self.cached_tokens + self.predicted_tokens > 0 and self.route is not None:
                self.count_parity()
            self.leave_worker(_counters.W_OK)
        self._over()
        if exchange is not None:
            exchange.release_head()

    def on_refusal(self, connection: UpstreamConnection) -> None:
        """The head of an answer of 4xx or 5xx has come."""
        exchange, status = self.exchange, self.status
        if exchange is not None and not exchange.has_answer and (status < 500 or status == 501):
            exchange.take_over(self, connection)
            return
        self._linger()  # its body is read, so that the connection can be used again
        if status in (429, 503):
            self._failed(_counters.W_BUSY)
        else:
            self._failed(_counters.W_CLIENT_ERRORS if status < 500 or status == 501 else _counters.W_ERRORS)

    def on_unreachable(self, error: BaseException) -> None:
        """The worker took no connection: nothing was sent there."""
        if not self.is_over:
            self.shard.note_unreachable(self.first.upstream, error)
            self._lost(is_quick=True)

    def on_no_room(self) -> None:
        """We have no socket for one more connection, to any worker."""
        exchange = self.exchange
        if not self.is_over:
            self.cancel()
            if exchange is not None:
                exchange.on_no_room()

    def on_lost(self, connection: UpstreamConnection) -> None:
        """The worker closed the connection before its answer was complete."""
        if self.heir is not None:
            self.heir.on_lost(connection)
            return
        self.connection = None
        if not self.resends(connection):
            self._lost()

    def on_malformed(self, connection: UpstreamConnection) -> None:
        """The worker's bytes are no HTTP answer."""
        if self.heir is not None:
            self.heir.on_malformed(connection)
            return
        self.connection = None
        self._lost()

    def _lost(self, *, is_quick: bool = False) -> None:
        self._over()
        self._failed(_counters.W_ERRORS, is_quick=is_quick)

    def _failed(self, outcome: int, *, is_quick: bool = False) -> None:
        """This half came to nothing, so the other has to."""
        exchange, self.exchange = self.exchange, None
        self.leave_worker(outcome)
        if exchange is not None:
            exchange.on_prefill_failed(self, is_quick=is_quick)

    # ---- how others end it ----

    def on_left(self, outcome: int) -> None:
        """The exchange has left the worker at which it was, the other half's or, as heir, this one's."""
        if self.heir is not None:
            self._over()
        elif self.exchange is not None:
            if outcome == _counters.W_OK:
                self.exchange = None
                self._linger()
            else:
                self.cancel()

    def cancel(self, outcome: int = _counters.W_CANCELLED) -> None:
        """Nobody waits for it: close the connection, tell the worker."""
        self.exchange = None
        if not self.is_over:
            self._over()
            self.abandon()
            self.leave_worker(outcome)
            self.give_probe_back()  # if it has not started

    def on_mishap(self, error: Exception) -> None:
        """Our own code has failed for bytes of the worker: that ends the request, if it has not ended."""
        exchange = self.heir or self.exchange
        self.cancel()
        if exchange is not None:
            exchange.on_mishap(error)
        else:
            report(self.shard.log, error)

    def tick(self, now_s: float) -> None:
        """From the sweep: the worker fails its health checks, or takes too long over an answer that nobody waits for."""
        exchange = self.exchange
        if exchange is None:
            if now_s > self.deadline_s:
                self.cancel()
        elif self.first.upstream.is_out and not self.has_body and self.connection is not None and exchange.may_flee(self.first):
            self.abandon()
            self._lost(is_quick=True)

    def _linger(self) -> None:
        self.deadline_s = self.shard.loop.time() + _LINGER_SECS

    def _over(self) -> None:
        self.is_over = True
        self.heir = None
        self.shard.prefill_legs.discard(self)


def send_pair(exchange: Exchange, route: Route) -> None:
    """Give a request to both workers of a route, or to neither: a half-open one's probe is claimed before anything is sent."""
    first = route.prefill
    assert first is not None
    leg = PrefillLeg(exchange, route)
    probe = exchange.shard.breakers.claim(first.upstream) if first.upstream.needs_probe else NO_PROBE
    if probe is None:
        exchange.attempts().go_elsewhere(route, first.upstream)
        return
    leg.probe = probe
    exchange.pair = leg
    exchange.body, exchange.kept = leg.body, leg.kept
    exchange.count_body(len(leg.body) + len(leg.plain_body))
    exchange.dispatch(route)
    if exchange.route is route:  # else the decode worker's probe was out, and the request has gone elsewhere
        leg.start()
