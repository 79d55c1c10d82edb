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
from dataclasses import replace
from typing import TYPE_CHECKING

from sglfast import _counters, errors
from sglfast._relay import UNTIL_CLOSE
from sglfast.edge.answers import error_event
from sglfast.edge.breaker import NO_PROBE
from sglfast.edge.header_lines import without
from sglfast.edge.leg import Leg
from sglfast.edge.named_rank import at_rank, named_rank
from sglfast.edge.prefill_leg import PrefillLeg, send_pair
from sglfast.edge.rank_refusal import REFUSED, doubt_rank, is_about_rank
from sglfast.edge.retry import RETRYABLE, Attempts

if TYPE_CHECKING:
    from sglfast._httphead import ResponseHead
    from sglfast.edge.pools import Route
    from sglfast.edge.request import Endpoint
    from sglfast.edge.server import ClientConnection
    from sglfast.edge.upstream import UpstreamConnection


class Exchange(Leg):
    """A request that was given to the router's data plane, from its last body byte to its last answer byte."""

    __slots__ = ()

    client: ClientConnection
    endpoint: Endpoint
    pair: PrefillLeg | None

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
        self._unpair()
        self.is_choosing = True
        try:
            self.shard.router.choose(self.endpoint, self.body, self.on_route, self.is_wanted)
        except Exception as error:  # here, because it may be another client's end that made place for this one
            self.is_choosing = False
            self.client.on_broken(error)

    def is_wanted(self) -> bool:
        """Whether the client is still there."""
        return not self.is_over

    def on_route(self, route: Route | errors.Reason) -> None:
        """The router has chosen: a route, or the reason why there is none."""
        self.is_choosing = False
        if self.is_over:
            self.drop_body()
            return  # the client left while its prompt was being tokenized
        if isinstance(route, errors.Reason):
            self.give_up(route)
            return
        granted = route if self.shard.admission is None else self.shard.admission.take_worker(self, route)
        if granted is not None:
            self.send(granted)

    def send(self, route: Route) -> None:
        """Give the request to the route's worker, or to both of a pair."""
        self._unpair()
        if route.prefill is None:
            self.dispatch(route)
        else:
            send_pair(self, route)

    def _unpair(self) -> None:
        """The pair of the last attempt is over: the request is as its client wrote it."""
        if self.pair is not None:
            self.body, self.kept = self.pair.plain_body, self.pair.plain_kept
            self.count_body(len(self.body))
            self.pair = None

    def may_probe(self, route: Route) -> bool:
        """Be the probe of a half-open worker; False: another is, and this request has gone elsewhere."""
        probe = self.shard.breakers.claim(route.upstream)
        if probe is None:
            if self.pair is not None:
                self.pair.give_probe_back()
            self.attempts().go_elsewhere(route, route.upstream)
            return False
        self.probe = probe
        return True

    def at_named_rank(self, route: Route) -> Route:
        """The route at the rank that the client asks for itself, where it counts. One that the worker has not will be refused there."""
        dp_rank = named_rank(self.kept, self.body, route.upstream.rank_ways or b"", self.endpoint.kind)
        found = at_rank(route, dp_rank) if dp_rank is not None else None
        if found is None:
            self.predicted_tokens = -1
            return route if dp_rank is None else replace(route, prediction=None)
        self.rank, self.dp_rank, self.predicted_tokens = found.rank, found.dp_rank, found.predicted_tokens
        return found

    def on_unreachable(self, error: BaseException) -> None:
        """The worker took no connection: nothing was sent."""
        if self.is_over:
            return
        route = self.route
        assert route is not None
        self.shard.note_unreachable(route.upstream, error)
        self.leave_worker(_counters.W_ERRORS)
        is_late = isinstance(error, TimeoutError)
        self.attempts().failed(route, errors.UPSTREAM_TIMEOUT if is_late else errors.UPSTREAM_UNREACHABLE, is_quick=True)

    @property
    def tried(self) -> tuple[int, ...]:
        """Workers that this request was given to in vain."""
        return self.failed_attempts.tried if self.failed_attempts is not None else ()

    def attempts(self) -> Attempts:
        """What has failed so far."""
        if self.failed_attempts is None:
            self.failed_attempts = Attempts(self)
        return self.failed_attempts

    def on_no_room(self) -> None:
        """We have no socket for one more connection, to any worker."""
        if self.is_over:
            return
        connection = self.abandon()  # only of a pair there may be one
        self.leave_worker(_counters.W_CANCELLED)
        if self.has_answer:
            self._cut(connection, errors.TOO_MANY_CONNECTIONS)
        else:
            self.refuse(errors.TOO_MANY_CONNECTIONS)

    # ---- the prefill half of a pair ----

    def on_prefill_failed(self, leg: PrefillLeg, *, is_quick: bool) -> None:
        """It has ended without success: so does this half, and maybe another pair is tried."""
        route = self.route
        assert route is not None
        leg.held = None
        connection = self.abandon()
        self.leave_worker(_counters.W_CANCELLED)
        self.outcome = leg.outcome
        if self.has_answer:
            self._cut(connection, errors.PREFILL_FAILED)
        else:
            self.attempts().failed(route, errors.PREFILL_FAILED, at=leg.first.upstream, is_quick=is_quick)

    def take_over(self, leg: PrefillLeg, connection: UpstreamConnection) -> None:
        """The prefill worker answers 4xx: what it says is the answer, as if the request had gone there alone."""
        leg.exchange = leg.held = None
        self.abandon()
        self.leave_worker(_counters.W_CANCELLED)
        self.route, self.tokens, self.probe, self.rid = leg.route, leg.tokens, leg.probe, leg.rid
        leg.route, leg.tokens, leg.probe = None, 0, NO_PROBE
        self.connection = connection
        leg.heir = self
        if self.client.is_write_paused and connection.transport is not None:
            connection.transport.pause_reading()

    def left_pair(self, outcome: int) -> None:
        """The request has left the worker at which it was."""
        assert self.pair is not None
        if self.last_route.prefill is not None and self.last_route.prediction is not None:
            self.shard.router.settle(self.last_route)
        self.pair.on_left(outcome)

    def holds_head(self, head: ResponseHead, payload: bytes) -> bool:
        """Keep the head of a stream from the client as long as nothing else has come and the prefill half may fail."""
        pair = self.pair
        if pair is None or payload or not head.is_event_stream or not pair.is_waiting:
            return False
        pair.held = head
        self.status = head.status
        self.keeps_alive = head.keeps_alive
        self.decodes_chunks = self.head.is_http10 and head.is_chunked
        return True

    def release_head(self, data: bytes = b"") -> None:
        """Send such a head now, with the first of its body."""
        pair = self.pair
        if pair is not None and pair.held is not None:
            head, pair.held = pair.held, None
            self.begin_answer(head, data)

    def pair_header(self, head: ResponseHead) -> bytes:
        """The line that names the decode worker, on good answers."""
        pair = self.pair
        assert pair is not None
        pair.plain_body = b""  # there is no other attempt
        return pair.decode.decode_url_line if head.status < 400 else b""

    def may_flee(self, route: Route) -> bool:
        """Whether the request may go to other workers than the prefill worker of this route."""
        return not self.has_answer and self.attempts().has_other(route, route.upstream)

    # ---- back to the client ----

    def holds(self, head: ResponseHead, payload: bytes) -> bool:
        """Keep an answer of 4xx or 5xx from the client, because another attempt may better it; False: it is the answer."""
        if head.status == REFUSED and self.is_told_rank and self.route is not None:
            if not self.route.upstream.doubt.heeds(self.shard.loop.time()):
                return False
        elif head.status not in RETRYABLE or not self.attempts().may_hold():
            return False
        self.attempts().hold(head, payload)
        self.status = head.status
        self.keeps_alive = head.keeps_alive
        self.decodes_chunks = self.head.is_http10 and head.is_chunked
        return True

    def hold_more(self, data: bytes) -> None:
        """A further piece of the body of such an answer, or the first behind a head that was kept."""
        if self.pair is not None and self.pair.held is not None:
            self.release_head(data)
        else:
            self.attempts().hold_more(data)

    def end_held(self, outcome_word: int) -> None:
        """Such an answer is complete."""
        route = self.route
        assert route is not None
        if self.pair is not None and self.pair.held is not None:  # a stream without a byte
            self.release_head()
        elif self.status == REFUSED and not is_about_rank(self.attempts().held_body):
            self.attempts().release()
        else:
            dp_rank = self.dp_rank
            self.leave_worker(outcome_word)
            if self.status == REFUSED:
                doubt_rank(self.shard, route, dp_rank)
                self.attempts().again(route)
            else:
                self.attempts().end_held(route)
            return
        if not self.is_over:  # writing can tell that the client is gone
            self.leave_worker(outcome_word)
            self.finish()
            self.client.on_exchange_end()

    def unchunked(self, kept: bytes) -> bytes:
        """An answer in chunks for a client that knows none: its head lines without that, and the connection's end is its end."""
        self.decodes_chunks = True
        self.client.closes = True
        return b"\r\n".join(line for line in kept.split(b"\r\n") if not line.lower().startswith(b"transfer-encoding:"))

    def kv_header(self) -> bytes:
        """The line that a client asks for with `x-sglfast-kv: 1`."""
        if self.route is None:
            return b""
        return b"x-sglfast-kv: %b\r\n" % self.shard.router.describe(self.pair.first if self.pair is not None else self.route)

    def on_lost(self, connection: UpstreamConnection) -> None:
        """The worker closed the connection before its answer was complete."""
        self.connection = None
        route = self.route
        assert route is not None
        if not self.resends(connection):
            self._broke(route, connection, errors.UPSTREAM_CLOSED)

    def on_malformed(self, connection: UpstreamConnection) -> None:
        """The worker's bytes are no HTTP answer."""
        self.connection = None
        assert self.route is not None
        self._broke(self.route, connection, errors.UPSTREAM_BAD_RESPONSE)

    def _broke(self, route: Route, connection: UpstreamConnection, reason: errors.Reason) -> None:
        if self.failed_attempts is not None:
            self.failed_attempts.release_refusal()
        if self.is_over:
            return
        self.leave_worker(_counters.W_ERRORS)
        if self.has_answer:
            self._cut(connection, errors.UPSTREAM_BODY_INCOMPLETE)
        else:
            self.attempts().failed(route, reason)

    def tick(self, now_s: float) -> None:
        """Has the worker been silent for too long? A client that does not read stops this clock. From the sweep, by `needs_tick`.

        Before the answer's head is complete its bytes are no progress: the whole head has to come in time. Whatever its progress,
        no request lasts longer than `--stale-request-timeout-secs`. A refusal that is kept because it may be for a rank is passed on when
        it stalls.
        """
        config, attempts = self.shard.config, self.failed_attempts
        was_active, self.was_active = self.was_active, False
        if attempts is not None and (not was_active or now_s > self.deadline_s) and attempts.release_refusal():
            return
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
        pair = self.pair
        connection = self.abandon()
        if pair is not None and pair.is_waiting:  # for whom this half waits
            pair.cancel(outcome)
            self.leave_worker(_counters.W_CANCELLED)
            self.outcome = outcome
        else:
            self.leave_worker(outcome)
        if self.has_answer:
            self._cut(connection, reason)
        else:
            self.attempts().give_up(reason)

    def _flee(self, route: Route) -> None:
        """The worker fails its health checks and has not answered: give the request to another, if there is one."""
        if self.attempts().has_other(route, route.upstream):
            self.abandon()
            self.leave_worker(_counters.W_ERRORS)
            self.attempts().failed(route, errors.UPSTREAM_TIMEOUT, is_quick=True)

    def cancel(self) -> None:
        """The client went away: so does its request."""
        if self.is_over:
            return
        self.abandon()
        self.leave_worker(_counters.W_CANCELLED)
        self.shard.column.add(_counters.S_CLIENT_GONE)
        self.finish()

    def on_mishap(self, error: Exception) -> None:
        """Our own code has failed for bytes of the worker."""
        self.client.on_broken(error)

    def break_off(self, reason: errors.Reason) -> None:
        """End it for a reason of our own: that is nothing against the worker."""
        if self.pair is not None:
            self.pair.cancel()
        connection = self.abandon()
        self.leave_worker(_counters.W_CANCELLED)
        if self.has_answer:
            self._cut(connection, reason)
        else:
            self.refuse(reason)

    # ---- ends ----

    def give_up(self, reason: errors.Reason) -> None:
        """Refuse the request, unless a worker has answered it: then with that."""
        if self.failed_attempts is None:
            self.refuse(reason)
        else:
            self.failed_attempts.give_up(reason)

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
