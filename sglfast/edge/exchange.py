"""One request's way to a worker and back: dispatch, the next choice when a worker cannot be reached, relay, accounting.

Runs in: shards, event loop. States: choosing -> connecting -> sent -> relaying -> over. Law: `_finish` runs exactly once and gives back
    the load counters; nothing is sent twice once a byte of the answer has arrived; a request is sent again at most once, and only
    when a pooled connection died before the first byte of an answer (the worker had closed it, so it did not take the request).
    Bodies are not touched. Back-pressure: a client that does not read stops our reading from the worker.
"""

from __future__ import annotations

import math
from time import monotonic
from typing import TYPE_CHECKING

from sglfast import _counters, errors
from sglfast._httphead import RequestHead, ResponseHead
from sglfast.edge.answers import error_event
from sglfast.edge.parity import cached_tokens_in, outcome_word
from sglfast.edge.upstream import UNTIL_CLOSE

if TYPE_CHECKING:
    from sglfast.edge.request import Endpoint
    from sglfast.edge.route import Route
    from sglfast.edge.server import ClientConnection
    from sglfast.edge.upstream import UpstreamConnection

_MAX_CHOICES = 3  # workers that are tried when they cannot be reached, the first one included


class Exchange:
    """A request that was given to the router's data plane, from its last body byte to its last answer byte."""

    __slots__ = (
        "body",
        "bytes_out",
        "cached_tokens",
        "client",
        "connection",
        "deadline_s",
        "decodes_chunks",
        "endpoint",
        "has_answer",
        "has_body",
        "head",
        "is_event_stream",
        "is_over",
        "is_resent",
        "keeps_alive",
        "predicted_tokens",
        "request_id",
        "route",
        "shard",
        "started_s",
        "status",
        "tokens",
        "tried",
        "ttft_us",
        "was_active",
    )

    def __init__(self, client: ClientConnection, endpoint: Endpoint, head: RequestHead, body: bytes) -> None:
        self.client = client
        self.shard = client.shard
        self.endpoint = endpoint
        self.head = head
        self.body = body
        self.request_id: bytes = head.request_id or client.shard.new_request_id()
        self.route: Route | None = None
        self.connection: UpstreamConnection | None = None
        self.started_s = monotonic()
        self.deadline_s = math.inf
        self.tokens = 0
        self.tried: tuple[int, ...] = ()
        self.bytes_out = 0
        self.predicted_tokens = -1  # of the prompt, in the worker's cache; -1 = nobody looked
        self.cached_tokens = -1  # as the worker reports it; -1 = it has not
        self.status = 0
        self.ttft_us = 0
        self.has_answer = False
        self.has_body = False
        self.keeps_alive = False
        self.is_event_stream = False
        self.decodes_chunks = False
        self.is_resent = False
        self.is_over = False
        self.was_active = False

    # ---- towards the worker ----

    def start(self) -> None:
        """Choose a worker, at once or when the prompt has been tokenized, and send the request."""
        self.shard.router.choose(self.endpoint, self.body, self.on_route)

    def on_route(self, route: Route | errors.Reason) -> None:
        """The router has chosen: a route, or the reason why there is none."""
        if self.is_over:
            return  # the client left while its prompt was being tokenized
        if isinstance(route, errors.Reason):
            self._refuse(route)
        else:
            self._dispatch(route)

    def _dispatch(self, route: Route) -> None:
        self.route = route
        self.tokens = route.uncached_tokens
        self.predicted_tokens = route.predicted_tokens
        upstream = route.upstream
        self.shard.column.begin(upstream.worker_idx, self.tokens, route.decision, len(self.body))
        self.deadline_s = self.started_s + self.shard.config.request_timeout_secs
        connection = upstream.take_idle()
        if connection is None:
            upstream.open(self)
        else:
            self.on_connected(connection)

    def on_connected(self, connection: UpstreamConnection) -> None:
        """A connection to the chosen worker is ready: send."""
        head = self.head
        self.connection = connection
        made = b"" if head.request_id is not None else b"x-request-id: %b\r\n" % self.request_id
        connection.send(
            self,
            b"%b %b HTTP/1.1\r\nhost: %b\r\n%b%bcontent-length: %d\r\n\r\n"
            % (head.method, head.target, connection.upstream.host_header, head.kept, made, len(self.body)),
            self.body,
        )
        if self.client.is_write_paused and connection.transport is not None:
            connection.transport.pause_reading()

    def on_unreachable(self, error: BaseException) -> None:
        """The worker took no connection: nothing was sent, so the next choice may have the request."""
        if self.is_over:
            return
        route = self.route
        assert route is not None
        self.shard.note_unreachable(route.upstream, error)
        self._leave_worker(_counters.W_ERRORS)
        self.tried += (route.upstream.worker_idx,)
        following = self.shard.router.next_choice(route, self.tried) if len(self.tried) < _MAX_CHOICES else None
        if following is None:
            self._refuse(errors.UPSTREAM_TIMEOUT if isinstance(error, TimeoutError) else errors.UPSTREAM_UNREACHABLE)
        else:
            self._dispatch(following)

    # ---- back to the client ----

    def on_head(self, connection: UpstreamConnection, head: ResponseHead, payload: bytes) -> bool:
        """The worker's answer begins: hand its head on, with the part of the body that came along.

        Returns whether the exchange goes on (writing can end it, when the client turns out to be gone).
        """
        self.has_answer = True
        self.body = b""  # it is not sent again from here on; a stream may last long
        self.status = head.status
        self.keeps_alive = head.keeps_alive
        self.is_event_stream = head.is_event_stream
        self.deadline_s = math.inf
        client = self.client
        kept = head.kept
        if self.head.is_http10 and head.is_chunked:
            self.decodes_chunks = True
            client.closes = True
            lines = kept.split(b"\r\n")
            kept = b"\r\n".join(line for line in lines if not line.lower().startswith(b"transfer-encoding:"))
        elif not head.is_chunked and head.content_length < 0 and head.status not in (204, 304):
            client.closes = True  # the end of the connection is the end of the answer
        if payload:
            self._first_byte()
            self.bytes_out = len(payload)
            if self.predicted_tokens >= 0:
                self.cached_tokens = cached_tokens_in(payload)
        client.write_head(kept, None if head.has_request_id else self.request_id, self._kv_header() if self.head.wants_kv else b"", payload)
        return not self.is_over

    def _kv_header(self) -> bytes:
        if self.route is None:
            return b""
        return b"x-sglfast-kv: %b\r\n" % self.shard.router.describe(self.route)

    def on_body(self, data: bytes) -> None:
        """A piece of the answer's body, framing included."""
        if not self.has_body:
            self._first_byte()
        self.bytes_out += len(data)
        if self.predicted_tokens >= 0:
            found = cached_tokens_in(data)
            if found >= 0:
                self.cached_tokens = found
        self.client.write(data)

    def _first_byte(self) -> None:
        self.has_body = True
        self.ttft_us = int((monotonic() - self.started_s) * 1e6)
        if self.tokens and self.route is not None:
            self.shard.column.prefilled(self.route.upstream.worker_idx, self.tokens)
            self.tokens = 0

    def on_end(self, connection: UpstreamConnection, is_reusable: bool) -> None:
        """The answer is complete."""
        self.connection = None
        if is_reusable and self.keeps_alive:
            if self.client.is_write_paused and connection.transport is not None:
                connection.transport.resume_reading()  # it was paused for this client, not for the next
            connection.upstream.give_back(connection)
        else:
            connection.close()
        status = self.status
        if status < 400:
            outcome = _counters.W_OK
            self.shard.column.observe(self.ttft_us, int((monotonic() - self.started_s) * 1e6))
            # Nothing predicted and nothing found says nothing: every new prompt does that, whatever is wrong.
            if self.cached_tokens >= 0 and self.cached_tokens + self.predicted_tokens > 0 and self.route is not None:
                word = outcome_word(self.predicted_tokens, self.cached_tokens)
                self.shard.column.add_worker(self.route.upstream.worker_idx, word)
        elif status in (429, 503):
            outcome = _counters.W_BUSY
        elif status < 500:
            outcome = _counters.W_CLIENT_ERRORS
        else:
            outcome = _counters.W_ERRORS
        self._leave_worker(outcome)
        self._finish()
        self.client.on_exchange_end()

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
        self._leave_worker(_counters.W_ERRORS)
        if not self.has_answer:
            self._refuse(errors.UPSTREAM_CLOSED)
        else:
            self._cut(connection, errors.UPSTREAM_BODY_INCOMPLETE)

    def on_malformed(self, connection: UpstreamConnection) -> None:
        """The worker's bytes are no HTTP answer."""
        self.connection = None
        self._leave_worker(_counters.W_ERRORS)
        if self.has_answer:
            self._cut(connection, errors.UPSTREAM_BODY_INCOMPLETE)
        else:
            self._refuse(errors.UPSTREAM_BAD_RESPONSE)

    def tick(self, now_s: float) -> None:
        """From the shard's sweep: has the worker been silent for too long? A client that does not read stops this clock.

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
                self._leave_worker(_counters.W_ERRORS)
            if self.has_answer:
                self._cut(connection, errors.UPSTREAM_TIMEOUT)
            else:
                self._refuse(errors.UPSTREAM_TIMEOUT)

    def cancel(self) -> None:
        """The client went away: the worker learns it at once by the end of its connection."""
        if self.is_over:
            return
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()
        if self.route is not None:
            self._leave_worker(_counters.W_CANCELLED)
        self.shard.column.add(_counters.S_CLIENT_GONE)
        self._finish()

    # ---- ends ----

    def _leave_worker(self, outcome_word: int) -> None:
        route = self.route
        if route is not None:
            self.route = None
            self.shard.column.end(route.upstream.worker_idx, self.tokens, outcome_word, self.bytes_out)
            self.tokens = 0

    def _refuse(self, reason: errors.Reason) -> None:
        """No byte of an answer has gone to the client: send an error of our own."""
        self._finish()
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
        self._finish()
        client.close_after_write()

    def _finish(self) -> None:
        assert not self.is_over
        self.is_over = True
        self.client.exchange = None
