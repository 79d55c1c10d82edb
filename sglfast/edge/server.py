"""A client's connection: heads and bodies in, one exchange at a time, answers out in order.

Runs in: shards, event loop. States: HEAD -> (BODY | CHUNKED) -> BUSY -> HEAD ...; UNUSUAL hands the bytes to llhttp. Pipelined bytes wait
    while an exchange runs; above a limit the connection is not read any more. A client that goes away (also one that only closes
    its sending side) ends its exchange at once. Timeouts are kept by the shard's sweep, so a request costs no timer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from sglfast import _counters, errors
from sglfast._httphead import MORE, TOO_LARGE, Chunks, RequestHead
from sglfast._relay import BODY, BUSY, CHUNKED, CLOSED, HEAD, UNUSUAL, ClientBase, retarget
from sglfast.edge import answers
from sglfast.edge.exchange import Exchange
from sglfast.edge.later import LATER, Handler
from sglfast.edge.mishap import report
from sglfast.edge.relay import relay, relayed
from sglfast.edge.request import ENDPOINTS, OTHER_KIND, Endpoint, is_under_v1
from sglfast.edge.unusual import UnusualRequest

if TYPE_CHECKING:
    from sglfast.edge.shard import Shard
    from sglfast.edge.tokenize import Answer

_SMALL_BYTES = 64 << 10  # bodies of all paths but those of the data plane
LINGERING = 64  # connections above the limit that get the time to read why they are refused
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ClientConnection(ClientBase, asyncio.Protocol):
    """One client. What every request does is compiled (cext/relayclient.pxi), the rest is here."""

    __slots__ = ()

    shard: Shard
    exchange: Exchange | None
    new_exchange = Exchange

    # ---- the transport's calls ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.shard.clients.add(self)
        above = len(self.shard.clients) - self.shard.max_clients
        if above > 0:
            self.shard.note_full(f"connections above {self.shard.max_clients} are refused")
            self._refuse(errors.TOO_MANY_CONNECTIONS, lingers=above <= LINGERING)
        self.shard.column.add(_counters.S_CONNECTIONS, 1)
        self.shard.column.add(_counters.S_CONNECTIONS_TOTAL, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.state = CLOSED
        self.pending = b""
        self.pieces = []
        self.let_go()
        self.shard.clients.discard(self)
        self.shard.column.add(_counters.S_CONNECTIONS, -1)
        if self.exchange is not None:
            self.exchange.cancel()
        if self.task is not None:
            self.task.cancel()

    def pause_writing(self) -> None:
        self.is_write_paused = True
        self.quiet_since_s = self.shard.now_s
        self.unsent_bytes = self.transport.get_write_buffer_size() if self.transport is not None else 0
        self._pace_worker()

    def resume_writing(self) -> None:
        self.is_write_paused = False
        self._pace_worker()

    def _pace_worker(self) -> None:
        """The worker is read only while the client takes its answer."""
        exchange = self.exchange
        if exchange is not None and exchange.connection is not None and exchange.connection.transport is not None:
            if self.is_write_paused:
                exchange.connection.transport.pause_reading()
            else:
                exchange.connection.transport.resume_reading()
                exchange.was_active = True  # the worker's clock has stood still and begins anew

    def on_broken(self, error: Exception) -> None:
        """Our own code has failed in the middle of this client's request."""
        report(self.shard.log, error)
        self.closes = True
        if self.exchange is not None:
            self.exchange.break_off(errors.INTERNAL_ERROR)
        elif self.state != BUSY:
            if self.state != CLOSED:
                self._refuse(errors.INTERNAL_ERROR)
        elif self.transport is not None:
            self.transport.abort()  # a part of an answer may have gone out already

    def stop(self) -> None:
        """The shard ends: whoever waits for an answer, or for the rest of one, is told so. Nobody is waited for."""
        self.closes = True
        try:
            if self.exchange is not None:
                self.exchange.break_off(errors.SHUTTING_DOWN)
            elif self.state == BUSY:  # the answer of the tokenizer, or of control, is written at once when it is there
                if self.task is not None:
                    self.task.cancel()
                self.answer_error(errors.SHUTTING_DOWN, None)
        except Exception as error:
            report(self.shard.log, error)
        self.close_after_write()

    # ---- reading requests ----

    def refuse_head(self, head: RequestHead) -> None:
        """A head that says more than we take."""
        if head.expects_other:
            self._refuse(errors.EXPECTATION_FAILED)
        elif head.content_length > self.shard.config.max_payload_size:
            self._refuse(errors.PAYLOAD_TOO_LARGE)
        elif len(head.target) > self.shard.config.max_url_bytes:
            self._refuse(errors.URI_TOO_LONG)
        else:
            self._refuse(errors.BODIES_FULL, head.request_id)

    def refuse_body(self) -> None:
        """The shard holds too many bytes of bodies."""
        self._refuse(errors.BODIES_FULL, self.head.request_id if self.head is not None else None)

    def read_no_head(self, code: int, data: bytes) -> None:
        """Bytes that hold no whole plain head. code: of _httphead.scan_request."""
        if code == MORE:
            self.pending = data
        elif code == TOO_LARGE:
            self._refuse(errors.HEADERS_TOO_LARGE)
        else:
            self.shard.column.add(_counters.S_UNUSUAL_HEADS)
            self.fresh_since_s = self.shard.now_s
            self.fresh_bytes = 0
            self.unusual = UnusualRequest(self.shard.config.max_header_bytes, self.shard.config.max_payload_size)
            self.state = UNUSUAL
            self.read_unusual(data)

    # These return what came behind the body, b"" while it goes on: reading on in a loop, a pipeline is no recursion.

    def begin_body(self, head: RequestHead, data: bytes) -> bytes:
        """A head whose body has not come at once."""
        if self._refuses_body(head):
            return b""
        self.head = head
        self.pieces = []
        self.fresh_since_s = self.shard.now_s
        self.fresh_bytes = 0
        if head.expects_continue and not data:
            self.write(_CONTINUE)
        if head.is_chunked:
            self.state = CHUNKED
            self.chunks = Chunks()
            self.body_size = 0
            return self.read_chunks(data) if data else b""
        self.state = BODY
        self.body_left = head.content_length
        return self.read_body(data) if data else b""

    def read_chunks(self, data: bytes) -> bytes:
        """Take bytes of a chunked body."""
        assert self.chunks is not None
        assert self.head is not None
        pieces: list[bytes] = []
        end = self.chunks.decode(data, 0, pieces)
        piece = b"".join(pieces)  # one object for many small chunks, else they cost many times their size
        if not self.keep(piece):
            return b""
        self.body_size += len(piece)
        if end == -2:
            self._refuse(errors.BAD_REQUEST)
        elif self.body_size > self._body_limit(self.head):
            self._refuse(errors.PAYLOAD_TOO_LARGE, self.head.request_id)
        elif end >= 0:
            self.end_body()
            return data[end:]
        return b""

    def read_unusual(self, data: bytes) -> None:
        """Bytes of a request that llhttp reads."""
        assert self.unusual is not None
        if not self.hold(len(data)):
            return
        found = self.unusual.feed(data)
        if isinstance(found, errors.Reason):
            self._refuse(found)
        elif found is not None:
            head, body = found
            self.closes = True  # what follows on this connection is not looked at
            self.unusual = None
            self.let_go()
            self.is_http10 = head.is_http10
            self.state = HEAD
            if head.expects_other:
                self._refuse(errors.EXPECTATION_FAILED)
            else:
                self.dispatch(head, body)
        elif self.unusual.has_head and self.head is None:
            head_found = self.unusual.head()
            if isinstance(head_found, errors.Reason):
                self._refuse(head_found)
            elif not self._refuses_body(head_found):
                self.head = head_found
                too_large = self.unusual.limit(self._body_limit(head_found))
                if too_large is not None:
                    self._refuse(too_large, head_found.request_id)
                elif self.unusual.wants_continue:
                    self.write(_CONTINUE)

    # What can be refused without the body is refused before it: nobody sends megabytes for nothing, or holds them here without a key.

    def _is_data_plane(self, head: RequestHead) -> bool:
        path = head.target.partition(b"?")[0]
        is_other = self.shard.config.passthrough and head.method == b"POST" and is_under_v1(path)
        return path in ENDPOINTS or path in LATER or is_other

    def _body_limit(self, head: RequestHead) -> int:
        limit_bytes: int = self.shard.config.max_payload_size
        return limit_bytes if self._is_data_plane(head) else min(limit_bytes, _SMALL_BYTES)

    def _refuses_body(self, head: RequestHead) -> bool:
        """Whether the request was refused by its head alone; the connection ends then, because the body may be on its way."""
        reason: errors.Reason | None = None
        if self._is_data_plane(head):
            if self.shard.guard and not self.shard.guard.lets_in(head):
                reason = errors.INVALID_API_KEY
        elif head.content_length > _SMALL_BYTES:
            path = head.target.partition(b"?")[0]
            reason = errors.PAYLOAD_TOO_LARGE if path in answers.LOCAL or relayed(path) else errors.NOT_FOUND
        if reason is None:
            return False
        if self.shard.cors:
            self.cors = self.shard.cors.lines_for(head)
        self._refuse(reason, head.request_id)
        return True

    # ---- answering ----

    def dispatch(self, head: RequestHead, body: bytes) -> None:
        """A whole request, whatever it asks for."""
        if self.shard.cors:
            self.cors = self.shard.cors.lines_for(head)
            lines = self.shard.cors.preflight(head)
            if lines is not None:
                self._answer(answers.head(204, answers.TEXT, 0, lines), b"", head.request_id)
                return
        target = head.target
        endpoint = ENDPOINTS.get(target)
        if endpoint is None:
            path = target.partition(b"?")[0]
            endpoint = ENDPOINTS.get(path)
            if endpoint is None and path not in LATER:
                if head.method != b"POST" or not self.shard.config.passthrough or not is_under_v1(path):
                    self._answer_locally(head, path, body)
                    return
                endpoint = Endpoint(path, OTHER_KIND)
        if self.shard.guard and not self.shard.guard.lets_in(head):
            self.answer_error(errors.INVALID_API_KEY, head.request_id, None, head.method == b"HEAD")
            return
        if head.method != b"POST":
            self.answer_error(errors.METHOD_NOT_ALLOWED, head.request_id, "this path takes only POST", head.method == b"HEAD")
            return
        self.state = BUSY
        if endpoint is None:
            self._ask_later(LATER[path], head, body)
            return
        if endpoint.worker_path:
            retarget(head, endpoint.worker_path + target.removeprefix(endpoint.path))
        exchange = self.exchange = Exchange(self, endpoint, head, body)
        if self.shard.has_own_ids:
            exchange.take_id(self.shard.id_in(head))
        exchange.start()

    def _answer_locally(self, head: RequestHead, path: bytes, body: bytes) -> None:
        is_head = head.method == b"HEAD"
        local = answers.LOCAL.get(path)
        from_control = relayed(path) if local is None else None
        if local is not None and (is_head or head.method == b"GET"):
            status, content_type, body = local(self.shard)
            self._answer(answers.head(status, content_type, len(body)), b"" if is_head else body, head.request_id)
        elif local is not None:
            self.answer_error(errors.METHOD_NOT_ALLOWED, head.request_id, "this path takes only GET")
        elif (is_head or head.method == b"GET") and path.startswith(answers.MODELS_UNDER):
            found = answers.one_model(self.shard, path)
            if found is None:
                self.answer_error(errors.MODEL_NOT_FOUND, head.request_id, None, is_head)
            else:
                self._answer(answers.head(found[0], found[1], len(found[2])), b"" if is_head else found[2], head.request_id)
        elif from_control is None or from_control.kind in self.shard.kinds_elsewhere:
            may_pass = head.method == b"POST" and is_under_v1(path) and not self.shard.config.passthrough
            hint = "no such path here; the router relays unknown paths under /v1/ when it is started with --passthrough"
            self.answer_error(errors.NOT_FOUND, head.request_id, hint if may_pass else None, is_head)
        elif not from_control.takes(head.method):
            methods = b", ".join(from_control.methods).decode()
            self.answer_error(errors.METHOD_NOT_ALLOWED, head.request_id, f"this path takes only {methods}")
        elif not is_head and head.method != b"GET" and head.origin is not None and not self.shard.cors.allows(head.origin):
            self.answer_error(errors.ORIGIN_NOT_ALLOWED, head.request_id)
        else:
            self.state = BUSY
            self.shard.column.hold_body(len(body))
            self.task = self.shard.loop.create_task(relay(self, from_control, head, body))
            self.task.add_done_callback(lambda _: self.shard.column.hold_body(-len(body)))

    def _ask_later(self, handler: Handler, head: RequestHead, body: bytes) -> None:
        """Whoever looks at the body holds it until there is an answer, also when the client is gone."""
        column, held_bytes = self.shard.column, len(body)
        column.hold_body(held_bytes)

        def let_go() -> None:
            nonlocal held_bytes
            column.hold_body(-held_bytes)
            held_bytes = 0

        def then(found: Answer) -> None:
            let_go()
            self._answer_later(found, head.request_id)

        try:
            handler(self.shard, head, body, then)
        except Exception:
            let_go()
            raise

    def _answer_later(self, found: Answer, request_id: bytes | None) -> None:
        if self.state != BUSY:
            return  # the client left while the tokenizer worked
        if isinstance(found, bytes):
            self._answer(answers.head(200, answers.JSON, len(found)), found, request_id)
        else:
            self.answer_error(found[0], request_id, found[1])
        self.on_exchange_end()

    def _refuse(self, reason: errors.Reason, request_id: bytes | None = None, *, lingers: bool = True) -> None:
        """The request cannot be read: answer and close, because nobody knows where the next one would begin.

        lingers: only our side is closed at first, because a client that is still sending would lose the answer to a reset (RFC 9112 9.6).
        """
        self.closes = True
        self.lingers = lingers
        self.pieces = []
        self.unusual = None
        self.let_go()
        self.answer_error(reason, request_id)
        self.close_after_write()

    def refuse_late(self) -> None:
        """The request has not come in time."""
        self._refuse(errors.REQUEST_TIMEOUT)

    def answer_error(self, reason: errors.Reason, request_id: bytes | None, message: str | None = None, is_head: bool = False) -> None:
        """Send an error of our own."""
        self.shard.count_error(reason)
        opening, body = answers.error_answer(reason, message)
        self._answer(opening, b"" if is_head else body, request_id)

    def _answer(self, opening: bytes, body: bytes, request_id: bytes | None) -> None:
        self.write_head(opening, request_id or self.shard.new_request_id(), b"", body)
        if self.closes and self.state != BUSY:
            self.close_after_write()

    def close_after_write(self) -> None:
        """Close when what was written has been sent."""
        if self.state == CLOSED:
            return
        self.state = CLOSED
        self.quiet_since_s = self.shard.now_s
        self.pending = b""
        if self.transport is None:
            return
        if self.lingers and self.transport.can_write_eof():  # TLS cannot
            self.transport.write_eof()
        else:
            self.transport.close()
