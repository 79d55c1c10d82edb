"""One request's way to a worker and back: dispatch, further attempts when one fails, relay, accounting.

Runs in: shards, event loop. States: choosing -> connecting -> sent -> relaying -> over; a failed attempt goes back to connecting, maybe
    after a pause (edge/retry.py), as long as no byte of an answer has gone to the client. Law: `finish` runs exactly once; what a
    request counts for at a worker is given back when it leaves that worker, and the worker's breaker hears of it then. When a
    pooled connection dies before the first byte of an answer the same worker is sent the request once more: it had closed the
    connection, so that is no failed attempt. All attempts together have `--request-timeout-secs`.
    Bodies are the client's bytes; a `rid` may be put in front (edge/abort.py). Back-pressure: a client that does not read stops our
    reading from the worker.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sglfast import _counters, errors
from sglfast._relay import UNTIL_CLOSE, ExchangeBase
from sglfast.edge.abort import abort
from sglfast.edge.answers import error_event
from sglfast.edge.breaker import NO_PROBE, PROBE, PROBE_ANSWERED
from sglfast.edge.header_lines import without
from sglfast.edge.parity import cached_tokens_in, outcome_word
from sglfast.edge.retry import RETRYABLE, Attempts

if TYPE_CHECKING:
    from sglfast._httphead import ResponseHead
    from sglfast.edge.request import Endpoint
    from sglfast.edge.route import Route
    from sglfast.edge.server import ClientConnection
    from sglfast.edge.shard import Shard
    from sglfast.edge.upstream import Upstream, UpstreamConnection


class Exchange(ExchangeBase):
    """A request that was given to the router's data plane, from its last body byte to its last answer byte."""

    __slots__ = ()

    client: ClientConnection
    shard: Shard
    endpoint: Endpoint
    route: Route | None
    connection: UpstreamConnection | None
    failed_attempts: Attempts | None

    # ---- towards the worker ----

    def take_id(self, request_id: bytes | None) -> None:
        """Name the request by this id, or one of our own, whatever its x-request-id says."""
        self.request_id = request_id or self.shard.new_request_id()
        self.kept = without(self.kept, b"x-request-id")
        self.makes_id = True

    def start(self) -> None:
        """Begin, or wait for leave to begin."""
        if self.shard.admission is None:
            self.choose()
        else:
            self.shard.admission.ask(self)

    def choose(self) -> None:
        """Choose a worker, at once or when the prompt has been tokenized, and send the request."""
        try:
            self.shard.router.choose(self.endpoint, self.body, self.on_route)
        except Exception as error:  # here, because it may be another client's end that made place for this one
            self.client.on_broken(error)

    def on_route(self, route: Route | errors.Reason) -> None:
        """The router has chosen: a route, or the reason why there is none."""
        if self.is_over:
            return  # the client left while its prompt was being tokenized
        if isinstance(route, errors.Reason):
            self.refuse(route)
            return
        granted = route if self.shard.admission is None else self.shard.admission.take_worker(self, route)
        if granted is not None:
            self.dispatch(granted)

    def may_probe(self, route: Route) -> bool:
        """Be the probe of a half-open worker; False: another is, and this request has gone elsewhere."""
        probe = self.shard.breakers.claim(route.upstream)
        if probe is None:
            self._attempts().go_elsewhere(route)
            return False
        self.probe = probe
        return True

    def on_unreachable(self, error: BaseException) -> None:
        """The worker took no connection: nothing was sent."""
        if self.is_over:
            return
        route = self.route
        assert route is not None
        self.shard.note_unreachable(route.upstream, error)
        self.leave_worker(_counters.W_ERRORS)
        is_late = isinstance(error, TimeoutError)
        self._attempts().failed(route, errors.UPSTREAM_TIMEOUT if is_late else errors.UPSTREAM_UNREACHABLE, is_quick=True)

    @property
    def tried(self) -> tuple[int, ...]:
        """Workers that this request was given to in vain."""
        return self.failed_attempts.tried if self.failed_attempts is not None else ()

    def _attempts(self) -> Attempts:
        if self.failed_attempts is None:
            self.failed_attempts = Attempts(self)
        return self.failed_attempts

    def on_no_room(self) -> None:
        """We have no socket for one more connection, to any worker."""
        if not self.is_over:
            self.leave_worker(_counters.W_CANCELLED)
            self.refuse(errors.TOO_MANY_CONNECTIONS)

    def kept_with_key(self, upstream: Upstream) -> bytes:
        """The header lines with the worker's key in the place of the client's."""
        return without(self.kept, b"authorization") + (upstream.key_line or b"")

    # ---- back to the client ----

    def holds(self, head: ResponseHead, payload: bytes) -> bool:
        """Keep an answer of 4xx or 5xx from the client, because another attempt may better it; False: it is the answer."""
        if head.status not in RETRYABLE or not self._attempts().may_hold():
            return False
        self._attempts().hold(head, payload)
        self.status = head.status
        self.keeps_alive = head.keeps_alive
        self.decodes_chunks = self.head.is_http10 and head.is_chunked
        return True

    def hold_more(self, data: bytes) -> None:
        """A further piece of the body of such an answer."""
        self._attempts().hold_more(data)

    def end_held(self, outcome_word: int) -> None:
        """Such an answer is complete."""
        route = self.route
        assert route is not None
        self.leave_worker(outcome_word)
        self._attempts().end_held(route)

    def probe_answered(self) -> None:
        """A good answer to the probe of a half-open worker begins."""
        if self.probe == PROBE and self.route is not None:
            self.probe = PROBE_ANSWERED
            self.shard.breakers.answered(self.route.upstream)

    def tell_breaker(self, route: Route, outcome_word: int) -> None:
        """The request has left this worker in a way that its breaker has to hear of.

        One request charges a worker once, however often it is tried there: it may be the request that is at fault.
        """
        attempts = self.failed_attempts
        if self.probe or outcome_word != _counters.W_ERRORS or attempts is None or not attempts.has_tried(route):
            self.shard.breakers.left(route.upstream, outcome_word, self.probe)
        self.probe = NO_PROBE

    def unchunked(self, kept: bytes) -> bytes:
        """An answer in chunks for a client that knows none: its head lines without that, and the connection's end is its end."""
        self.decodes_chunks = True
        self.client.closes = True
        return b"\r\n".join(line for line in kept.split(b"\r\n") if not line.lower().startswith(b"transfer-encoding:"))

    def kv_header(self) -> bytes:
        """The line that a client asks for with `x-sglfast-kv: 1`."""
        if self.route is None:
            return b""
        return b"x-sglfast-kv: %b\r\n" % self.shard.router.describe(self.route)

    def look_for_cached_tokens(self, piece: bytes) -> None:
        """What a piece of an answer reports of the worker's cache is kept for `count_parity`."""
        found = cached_tokens_in(piece)
        if found >= 0:
            self.cached_tokens = found

    def count_parity(self) -> None:
        """Count the worker's report against the prediction."""
        assert self.route is not None
        self.shard.column.add_worker(self.route.upstream.worker_idx, outcome_word(self.predicted_tokens, self.cached_tokens))

    def on_lost(self, connection: UpstreamConnection) -> None:
        """The worker closed the connection before its answer was complete."""
        self.connection = None
        route = self.route
        assert route is not None
        if not connection.has_spoken and connection.uses > 1 and not self.is_resent and not route.upstream.is_removed:
            # It had been idle: the worker closed it while our request was on its way. A fresh connection tells for sure.
            self.is_resent = True
            self.shard.column.add(_counters.S_RESENDS)
            route.upstream.open(self)
            return
        self._broke(route, connection, errors.UPSTREAM_CLOSED)

    def on_malformed(self, connection: UpstreamConnection) -> None:
        """The worker's bytes are no HTTP answer."""
        self.connection = None
        assert self.route is not None
        self._broke(self.route, connection, errors.UPSTREAM_BAD_RESPONSE)

    def _broke(self, route: Route, connection: UpstreamConnection, reason: errors.Reason) -> None:
        self.leave_worker(_counters.W_ERRORS)
        if self.has_answer:
            self._cut(connection, errors.UPSTREAM_BODY_INCOMPLETE)
        else:
            self._attempts().failed(route, reason)

    def tick(self, now_s: float) -> None:
        """Has the worker been silent for too long? A client that does not read stops this clock. From the sweep, by `needs_tick`.

        Before the answer's head is complete its bytes are no progress: the whole head has to come in time. Whatever its progress,
        no request lasts longer than `--stale-request-timeout-secs`.
        """
        config = self.shard.config
        was_active, self.was_active = self.was_active, False
        if now_s - self.started_s > config.stale_request_timeout_secs and (self.has_answer or now_s <= self.deadline_s):
            self.shard.column.add(_counters.S_STALE)
            self._expire(errors.STALE_REQUEST_EXPIRED, _counters.W_CANCELLED if self.has_answer else _counters.W_ERRORS)
        elif (was_active and self.has_answer) or self.client.is_write_paused:
            if self.has_answer:
                self.deadline_s = now_s + config.stream_idle_timeout_secs
        elif self.has_answer and self.deadline_s == math.inf:
            self.deadline_s = now_s + config.stream_idle_timeout_secs
        elif now_s > self.deadline_s:
            self._expire(errors.UPSTREAM_TIMEOUT, _counters.W_ERRORS)
        elif not self.has_answer and self.connection is not None and self.route is not None and self.route.upstream.is_out:
            self._flee(self.route)

    def _expire(self, reason: errors.Reason, outcome: int) -> None:
        """The time is over."""
        connection = self._abandon()
        self.leave_worker(outcome)
        if self.has_answer:
            self._cut(connection, reason)
        else:
            self._attempts().give_up(reason)

    def _flee(self, route: Route) -> None:
        """The worker fails its health checks and has not answered: give the request to another, if there is one."""
        if self._attempts().has_other(route):
            self._abandon()
            self.leave_worker(_counters.W_ERRORS)
            self._attempts().failed(route, errors.UPSTREAM_TIMEOUT, is_quick=True)

    def _abandon(self) -> UpstreamConnection | None:
        """Leave the worker in the middle: it learns it at once by the end of the connection, and by name if it takes names."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()
            if self.rid:
                abort(connection.upstream, self.head, self.rid)
        return connection

    def cancel(self) -> None:
        """The client went away: so does its request."""
        if self.is_over:
            return
        self._abandon()
        self.leave_worker(_counters.W_CANCELLED)
        self.shard.column.add(_counters.S_CLIENT_GONE)
        self.finish()

    def on_broken(self) -> None:
        """Our own code has failed in the middle of it: that is nothing against the worker."""
        connection = self._abandon()
        self.leave_worker(_counters.W_CANCELLED)
        if self.has_answer:
            self._cut(connection, errors.INTERNAL_ERROR)
        else:
            self.refuse(errors.INTERNAL_ERROR)

    # ---- ends ----

    def refuse(self, reason: errors.Reason) -> None:
        """No byte of an answer has gone to the client: send an error of our own."""
        self.status = reason.status
        self.finish()
        self.client.answer_error(reason, self.request_id)
        self.client.on_exchange_end()

    def _cut(self, connection: UpstreamConnection | None, reason: errors.Reason) -> None:
        """The answer ends in the middle: tell a stream's reader by an error event, then close; others see a short body."""
        client = self.client
        self.shard.column.add(_counters.S_STREAMS_CUT)
        self.shard.count_error(reason)
        if self.is_event_stream and connection is not None:
            event = error_event(reason)
            if self.decodes_chunks or connection.state == UNTIL_CLOSE:
                client.write(event)
            elif connection.chunks is not None and connection.chunks.is_between:
                client.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event))
            # else in the middle of a chunk or of a counted length, where it would be taken for data
        self.finish()
        client.close_after_write()
