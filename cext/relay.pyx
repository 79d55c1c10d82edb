"""The common case of the relay: a request that is well formed goes to a worker that answers, all in one piece of machine code.

Runs in: shards, event loop, on the request path. Theory: what decides a relay's cost in Python is objects and calls per header and per
    chunk, not the bytes; so the classes here hold the state of a connection or exchange as C fields and take the steps that
    every request takes. The classes in sglfast/edge/{shard,server,exchange,upstream}.py inherit from them and add what is rare:
    refusals, failures, further attempts, timeouts, odd framing. A method that is called here on `self` but not defined here is theirs.
Contract: bodies are the same bytes on both sides, but for a `rid` in front (edge/abort.py). A request is one write, an answer that came
    at once is one write.

    client bytes -> ClientBase.data_received -> ExchangeBase.dispatch -> on_connected -> WorkerConnectionBase.data_received
        -> ExchangeBase.on_head, on_body, on_end -> ClientBase.write_head
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.string cimport memchr, memcpy, strlen
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec

cimport cython
from sf_shm cimport sf_header, sf_header_t, sf_load
from sglfast._counters cimport Column
from sglfast._httphead cimport Chunks, RequestHead, ResponseHead, scan_request, scan_response

import math
import os
from itertools import chain


cdef enum:
    # Words of sglfast._counters; test_relay.py holds them against it.
    c_W_CONNECTIONS = 2
    c_W_OK = 4
    c_W_CLIENT_ERRORS = 5
    c_W_BUSY = 6
    c_W_ERRORS = 7

    COPIED_BYTES = 16384  # bodies below ride with their head in one write; larger ones are not copied once more

cdef double INFINITE = math.inf


cdef inline double monotonic() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <double>now.tv_sec + 1e-9 * <double>now.tv_nsec


include "relayfields.pxi"
include "relayshard.pxi"


cdef class ExchangeBase:
    """See sglfast/edge/exchange.py."""

    cdef public ClientBase client
    cdef public ShardBase shard
    cdef public object endpoint
    cdef public RequestHead head
    cdef public bytes body
    cdef public bytes request_id
    cdef public bytes kept       # header lines for the worker
    cdef public bint makes_id    # x-request-id is ours to add to them
    cdef public object route
    cdef public WorkerConnectionBase connection
    cdef public double started_s
    cdef public double deadline_s
    cdef public long long tokens
    cdef public object failed_attempts
    cdef public PrefillLegBase pair  # the other half of a request that two workers serve
    cdef public int probe  # of edge/breaker.py
    cdef public int rank     # of the tree, to which it was steered and where it counts as load; -1 = to none
    cdef public int dp_rank  # the same as the worker counts it; stays when the request has left
    cdef char rank_way       # how the worker is told: one of shm.WorkerRecord.rank_ways; "-" = by the client, or not
    cdef public bytes rid  # by which the engine knows this attempt; None when it does not
    cdef public long long bytes_out
    cdef public long long predicted_tokens  # of the prompt, in the worker's cache; -1 = nobody looked
    cdef public long long cached_tokens     # as the worker reports it; -1 = it has not
    cdef public int status
    cdef public long long ttft_us
    cdef public bint has_answer
    cdef public bint has_body
    cdef public bint keeps_alive
    cdef public bint is_event_stream
    cdef public bint decodes_chunks
    cdef public bint is_resent
    cdef public bint is_over
    cdef public bint was_active
    cdef public bint holds_permit  # counts under the limit of requests in flight
    cdef public object ticket      # of the queue, while it waits for that
    cdef public object last_route  # of the worker that it has left
    cdef public long long bytes_in
    cdef public long long held_bytes  # of its body, as the shard counts them
    cdef public bint is_choosing  # its body is being looked at, maybe by the tokenizer's thread
    cdef public unsigned int outcome  # word of the worker that it has left; 0 = it was at none

    def __init__(self, ClientBase client not None, endpoint, RequestHead head not None, bytes body not None):
        self.client = client
        self.shard = client.shard
        self.endpoint = endpoint
        self.head = head
        self.body = body
        self.bytes_in = PyBytes_GET_SIZE(body)
        self.count_body(self.bytes_in)
        self.kept = head.kept
        self.makes_id = not head.has_request_id
        self.request_id = head.request_id if head.request_id is not None else client.shard.new_request_id()
        self.started_s = monotonic()
        self.deadline_s = INFINITE
        self.rank = -1
        self.dp_rank = -1
        self.predicted_tokens = -1
        self.cached_tokens = -1

    # ---- towards the worker ----

    @property
    def is_told_rank(self):
        """Whether the worker is told a rank of our choice."""
        return self.rank >= 0 and self.rank_way != c"-"

    cpdef dispatch(self, route):
        """Take a route: count the load, and send on an idle connection or open one."""
        cdef WorkerConnectionBase connection
        cdef UpstreamBase upstream = route.upstream
        if upstream.needs_probe and not self.may_probe(route):
            return
        self.predicted_tokens = route.predicted_tokens
        self.dp_rank = -1
        if upstream.rank_ways is not None:
            route = self.steer(route, upstream)
        self.route = route
        self.tokens = route.uncached_tokens
        self.shard.column.begin(upstream.worker_idx, self.tokens, route.decision, PyBytes_GET_SIZE(self.body))
        if self.rank >= 0:
            self.shard.column.begin_rank(self.rank, self.tokens)
        # Without a prompt there are no tokens; a decode worker has none, either.
        if (self.tokens or self.pair is not None) and route.prediction is not None:
            self.shard.router.note(route)
        self.deadline_s = self.started_s + self.shard.request_timeout_secs
        connection = upstream.take_idle()
        if connection is None:
            upstream.open(self)
        else:
            self.on_connected(connection)

    cdef object steer(self, route, UpstreamBase upstream):
        # Ask for the route's rank, unless the client asks for one itself, or the worker cannot be told. One that has failed this request
        # is asked again without: a rank that is ill is idle, and would be chosen each time. None is asked for when one was refused.
        # Returns the route as it is then: at the rank that the client asks for.
        cdef bytes ways = upstream.rank_ways
        cdef Py_ssize_t kind = self.endpoint.kind
        cdef const char *body = PyBytes_AS_STRING(self.body)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(self.body)
        cdef char way = PyBytes_AS_STRING(ways)[kind] if kind < PyBytes_GET_SIZE(ways) else c"-"
        self.rank_way = c"-"
        if way == c"-" or (way != c"h" and sf_front_place(body, size) < 0):
            self.predicted_tokens = -1  # nobody knows which rank gets it
        elif self.head.names_rank or sf_names_rank(body, size):
            return self.at_named_rank(route)
        elif self.failed_attempts is not None and self.failed_attempts.names_no_rank(route):
            self.predicted_tokens = -1
        else:
            self.rank_way = way
            self.dp_rank = route.dp_rank
            self.rank = route.rank
        return route

    cpdef on_connected(self, WorkerConnectionBase connection):
        """A connection to the chosen worker is ready: send."""
        cdef RequestHead head = self.head
        cdef bytes kept = self.kept if connection.upstream.key_line is None else self.kept_with_key(connection.upstream)
        cdef bytes made = b"x-request-id: " + self.request_id + b"\r\n" if self.makes_id else b""
        cdef bytes host = connection.upstream.host_header
        cdef bytes body = self.body
        cdef Py_ssize_t place = 0, rid_bytes = 0, field_bytes = 0, body_bytes, copied_bytes, length_bytes
        cdef char length[40]
        cdef char field[48]
        cdef bytes out
        cdef char *end
        self.connection = connection
        self.rid = None
        if connection.upstream.takes_rid and self.endpoint.takes_rid:
            place = sf_rid_place(PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body))
            if place < 0:
                place = 0
            else:
                self.rid = self.new_rid()
                rid_bytes = 10 + PyBytes_GET_SIZE(self.rid)  # {"rid":"...",
        if self.rank >= 0 and self.rank_way != c"-":
            if self.rank_way == c"h":
                made += b"x-data-parallel-rank: %d\r\n" % self.dp_rank
            else:
                # In front, where an equal key of the client's overrides it.
                place = sf_front_place(PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body))
                field_bytes = put_rank_field(field, self.rank_way, self.dp_rank, rid_bytes == 0)
        body_bytes = PyBytes_GET_SIZE(body) - place
        copied_bytes = body_bytes if body_bytes < COPIED_BYTES else 0
        length_bytes = put_length(length, rid_bytes + field_bytes + body_bytes)
        out = PyBytes_FromStringAndSize(
            NULL,
            PyBytes_GET_SIZE(head.method) + 1 + PyBytes_GET_SIZE(head.target) + 17 + PyBytes_GET_SIZE(host) + 2
            + PyBytes_GET_SIZE(kept) + PyBytes_GET_SIZE(made) + length_bytes + rid_bytes + field_bytes + copied_bytes,
        )
        end = PyBytes_AS_STRING(out)
        end = put(end, head.method)
        end[0] = c" "
        end = put(end + 1, head.target)
        memcpy(end, b" HTTP/1.1\r\nhost: ", 17)
        end = put(end + 17, host)
        memcpy(end, b"\r\n", 2)
        end = put(put(end + 2, kept), made)
        memcpy(end, length, length_bytes)
        end += length_bytes
        if rid_bytes:
            memcpy(end, b'{"rid":"', 8)
            end = put(end + 8, self.rid)
            memcpy(end, b'",', 2)
            end += 2
        if field_bytes:
            memcpy(end, field, field_bytes)
            end += field_bytes
        memcpy(end, PyBytes_AS_STRING(body) + place, copied_bytes)
        connection.take(self)
        if copied_bytes == body_bytes:
            connection.transport.write(out)
        else:
            connection.transport.writelines((out, memoryview(body)[place:] if place else body))
        if self.client is not None and self.client.is_write_paused and connection.transport is not None:
            connection.transport.pause_reading()

    cdef bytes new_rid(self):
        # Engines refuse a rid that they have. So it is never the client's own request id, and a further attempt has another.
        if self.head.request_id is None and self.failed_attempts is None and not self.is_resent:
            return self.request_id
        return self.shard.new_request_id()

    # ---- back to the client ----

    cdef bint on_head(self, WorkerConnectionBase connection, ResponseHead head, bytes payload) except -1:
        # The worker's answer begins: hand its head on, with the part of the body that came along. Returns whether the exchange goes on
        # (writing can end it, when the client turns out to be gone).
        if head.status >= 400:
            if self.holds(head, payload):
                return True
        else:
            if self.probe:
                self.probe_answered()
            if self.pair is not None and self.holds_head(head, payload):
                return True
        self.begin_answer(head, payload)
        return not self.is_over

    cpdef begin_answer(self, ResponseHead head, bytes payload):
        """Send the head of an answer to the client, and the first of its body: from here on there is no other attempt."""
        cdef bytes kept = head.kept
        cdef bytes extra = self.kv_header() if self.head.wants_kv else b""
        self.has_answer = True
        if self.pair is not None:
            extra += self.pair_header(head)
        self.drop_body()  # it is not sent again from here on; a stream may last long
        self.status = head.status
        self.keeps_alive = head.keeps_alive
        self.is_event_stream = head.is_event_stream
        self.deadline_s = INFINITE
        if head.is_chunked:
            if self.head.is_http10:
                kept = self.unchunked(kept)
        elif head.content_length < 0 and head.status != 204 and head.status != 304:
            self.client.closes = True  # the end of the connection is the end of the answer
        if PyBytes_GET_SIZE(payload):
            self.first_byte(payload)
            self.bytes_out = PyBytes_GET_SIZE(payload)
            if self.predicted_tokens >= 0:
                self.look_for_cached_tokens(payload)
        self.client.write_head(kept, None if head.has_request_id else self.request_id, extra, payload)

    cdef on_body(self, bytes data):
        # A piece of the answer's body, framing included.
        if not self.has_body:
            if not self.has_answer:
                self.hold_more(data)
                return
            self.first_byte(data)
        self.bytes_out += PyBytes_GET_SIZE(data)
        if self.predicted_tokens >= 0:
            self.look_for_cached_tokens(data)
        if self.client.transport is not None:
            self.client.transport.write(data)

    cdef first_byte(self, bytes piece):
        self.has_body = True
        if self.rank >= 0 and self.is_event_stream and self.rank_way != c"h" and self.rank_way != c"-":
            self.look_for_refused_rank(piece)
        self.ttft_us = <long long>((monotonic() - self.started_s) * 1e6)
        if self.tokens and self.route is not None:
            self.shard.column.prefilled(self.route.upstream.worker_idx, self.tokens)
            if self.rank >= 0:
                self.shard.column.prefilled_rank(self.rank, self.tokens)
            self.shard.router.settle(self.route)
            self.tokens = 0

    cdef on_end(self, WorkerConnectionBase connection, bint is_reusable):
        # The answer is complete.
        cdef ClientBase client = self.client
        cdef unsigned int outcome_word
        self.connection = None
        if is_reusable and self.keeps_alive:
            if client.is_write_paused and connection.transport is not None:
                connection.transport.resume_reading()  # it was paused for this client, not for the next
            connection.upstream.give_back(connection)
        else:
            connection.close()
        if self.status < 400:
            outcome_word = c_W_OK
            self.shard.column.observe(self.ttft_us, <unsigned long long>((monotonic() - self.started_s) * 1e6))
            # Nothing predicted and nothing found says nothing: every new prompt does that, whatever is wrong.
            if self.cached_tokens >= 0 and self.cached_tokens + self.predicted_tokens > 0 and self.route is not None:
                self.count_parity()
        elif self.status == 429 or self.status == 503:
            outcome_word = c_W_BUSY
        elif self.status < 500 or self.status == 501:  # 501: the worker does not do such things, which is no failure of its
            outcome_word = c_W_CLIENT_ERRORS
        else:
            outcome_word = c_W_ERRORS
        if not self.has_answer:
            self.end_held(outcome_word)
            return
        self.leave_worker(outcome_word)
        self.finish()
        client.on_exchange_end()

    # ---- time ----

    cdef bint needs_tick(self, double now_s):
        # Whether Exchange.tick must look. Not while an answer goes on: that only puts its deadline off.
        cdef ShardBase shard = self.shard
        if not self.has_answer or now_s - self.started_s > shard.stale_request_timeout_secs:
            return True
        if self.was_active or self.client.is_write_paused or self.deadline_s == INFINITE:
            self.was_active = False
            self.deadline_s = now_s + shard.stream_idle_timeout_secs
        return now_s > self.deadline_s

    # ---- ends ----

    cpdef leave_worker(self, unsigned int outcome_word):
        """Give the load counters of the worker back, once; its breaker hears of it when it has to."""
        cdef object route = self.route
        if route is not None:
            if self.tokens:
                self.shard.router.settle(route)
            self.last_route = route
            self.outcome = outcome_word
            self.route = None
            if self.rank >= 0:
                self.shard.column.end_rank(self.rank, self.tokens)
                self.rank = -1
            if self.shard.column.end(route.upstream.worker_idx, self.tokens, outcome_word, self.bytes_out):
                self.tell_breaker(route, outcome_word)
            self.tokens = 0
            if self.pair is not None:
                self.left_pair(outcome_word)

    cpdef drop_body(self):
        """The body is not needed any more."""
        self.body = b""
        self.count_body(0)

    cpdef count_body(self, long long n_bytes):
        """So many bytes of it are held from now on."""
        if n_bytes != self.held_bytes:
            self.shard.column.hold_body(n_bytes - self.held_bytes)
            self.held_bytes = n_bytes

    cpdef finish(self):
        """The exchange is over: its client reads on."""
        if self.is_over:
            raise RuntimeError("an exchange ends once")
        self.is_over = True
        if not self.is_choosing:
            self.drop_body()
        self.client.exchange = None
        if self.holds_permit or self.ticket is not None:
            self.shard.admission.leave(self)
        if self.shard.request_log is not None:
            self.shard.request_log.note(self)
        if self.failed_attempts is not None:
            self.failed_attempts.close()


include "relaypair.pxi"
include "relayclient.pxi"
include "relayworker.pxi"
include "relaylog.pxi"
