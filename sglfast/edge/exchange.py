"""One request's way to a worker and back: dispatch, the next choice when a worker cannot be reached, relay, accounting.

Runs in: shards, event loop. States: choosing -> connecting -> sent -> relaying -> over. Law: `finish` runs exactly once and gives back
    the load counters; nothing is sent twice once a byte of the answer has arrived; a request is sent again at most once, and only
    when a pooled connection died before the first byte of an answer (the worker had closed it, so it did not take the request).
    Bodies are not touched. Back-pressure: a client that does not read stops our reading from the worker.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sglfast import _counters, errors
from sglfast._relay import UNTIL_CLOSE, ExchangeBase
from sglfast.edge.answers import error_event
from sglfast.edge.header_lines import without
from sglfast.edge.parity import cached_tokens_in, outcome_word

if TYPE_CHECKING:
    from sglfast.edge.request import Endpoint
    from sglfast.edge.route import Route
    from sglfast.edge.server import ClientConnection
    from sglfast.edge.shard import Shard
    from sglfast.edge.upstream import Upstream, UpstreamConnection

_MAX_CHOICES = 3  # workers that are tried when they cannot be reached, the first one included


class Exchange(ExchangeBase):
    """A request that was given to the router's data plane, from its last body byte to its last answer byte."""

    __slots__ = ()

    client: ClientConnection
    shard: Shard
    endpoint: Endpoint
    route: Route | None
    connection: UpstreamConnection | None

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
        self.shard.router.choose(self.endpoint, self.body, self.on_route)

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

    def on_unreachable(self, error: BaseException) -> None:
        """The worker took no connection: nothing was sent, so the next choice may have the request."""
        if self.is_over:
            return
        route = self.route
        assert route is not None
        self.shard.note_unreachable(route.upstream, error)
        self.leave_worker(_counters.W_ERRORS)
        self.tried += (route.upstream.worker_idx,)
        following = self.shard.router.next_choice(route, self.tried) if len(self.tried) < _MAX_CHOICES else None
        if following is None:
            self.refuse(errors.UPSTREAM_TIMEOUT if isinstance(error, TimeoutError) else errors.UPSTREAM_UNREACHABLE)
        else:
            self.dispatch(following)

    def on_no_room(self) -> None:
        """We have no socket for one more connection, to any worker."""
        if not self.is_over:
            self.leave_worker(_counters.W_CANCELLED)
            self.refuse(errors.TOO_MANY_CONNECTIONS)

    def kept_with_key(self, upstream: Upstream) -> bytes:
        """The header lines with the worker's key in the place of the client's."""
        return without(self.kept, b"authorization") + (upstream.key_line or b"")

    # ---- back to the client ----

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
        self.leave_worker(_counters.W_ERRORS)
        if not self.has_answer:
            self.refuse(errors.UPSTREAM_CLOSED)
        else:
            self._cut(connection, errors.UPSTREAM_BODY_INCOMPLETE)

    def on_malformed(self, connection: UpstreamConnection) -> None:
        """The worker's bytes are no HTTP answer."""
        self.connection = None
        self.leave_worker(_counters.W_ERRORS)
        if self.has_answer:
            self._cut(connection, errors.UPSTREAM_BODY_INCOMPLETE)
        else:
            self.refuse(errors.UPSTREAM_BAD_RESPONSE)

    def tick(self, now_s: float) -> None:
        """Has the worker been silent for too long? A client that does not read stops this clock. From the sweep, by `needs_tick`.

        Before the answer's head is complete its bytes are no progress: the whole head has to come in time.
        """
        config = self.shard.config
        was_active, self.was_active = self.was_active, False
        if (was_active and self.has_answer) or self.client.is_write_paused:
            if self.has_answer:
                self.deadline_s = now_s + config.stream_idle_timeout_secs
        elif self.has_answer and self.deadline_s == math.inf:
            self.deadline_s = now_s + config.stream_idle_timeout_secs
        elif now_s > self.deadline_s:
            connection, self.connection = self.connection, None
            if connection is not None:
                connection.close()
            if self.route is not None:
                self.leave_worker(_counters.W_ERRORS)
            if self.has_answer:
                self._cut(connection, errors.UPSTREAM_TIMEOUT)
            else:
                self.refuse(errors.UPSTREAM_TIMEOUT)

    def cancel(self) -> None:
        """The client went away: the worker learns it at once by the end of its connection."""
        if self.is_over:
            return
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()
        if self.route is not None:
            self.leave_worker(_counters.W_CANCELLED)
        self.shard.column.add(_counters.S_CLIENT_GONE)
        self.finish()

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
