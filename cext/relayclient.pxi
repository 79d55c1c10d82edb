# A client's connection: see sglfast/edge/server.py. Part of relay.pyx.

HEAD, BODY, CHUNKED, BUSY, UNUSUAL, CLOSED = range(6)

cdef enum:
    c_HEAD = 0
    c_BODY = 1
    c_CHUNKED = 2
    c_BUSY = 3
    c_UNUSUAL = 4
    c_CLOSED = 5

    PIPELINE_BYTES = 65536  # waiting bytes of further requests above which the connection is not read
    SMALL_BYTES = 1024      # pieces of a body below are put together
    SLOWEST_BYTES_PER_S = 100  # a body or an answer that moves slower than this over its timeout does not move
    LINGER_SECS = 2  # after a refusal, what the client still sends is read and dropped for so long


cdef class ClientBase:
    """See sglfast/edge/server.py."""

    cdef public ShardBase shard
    cdef public object transport
    cdef public ExchangeBase exchange
    cdef public RequestHead head
    cdef public Chunks chunks
    cdef public object unusual
    cdef public object task
    cdef public list pieces
    cdef public bytes pending
    cdef public int state
    cdef public long long body_left
    cdef public long long body_size
    cdef public long long held_bytes  # of a body that is not complete, as far as they are counted by the shard
    cdef public double quiet_since_s
    cdef public double fresh_since_s
    cdef public long long fresh_bytes   # of a body, since then
    cdef public long long unsent_bytes  # of answers, at quiet_since_s, while writing is paused
    cdef public bint was_active
    cdef public bint closes
    cdef public bint is_http10
    cdef public bint is_write_paused
    cdef public bint lingers
    cdef public bytes cors  # lines of the present answer for the browser
    cdef int part   # of Clients ...
    cdef int place  # ... and where in it; -1 = it is in none

    def __init__(self, ShardBase shard not None):
        self.shard = shard
        self.pending = b""
        self.quiet_since_s = shard.now_s
        self.place = -1

    def data_received(self, bytes data not None):
        """The transport's call: bytes of the client."""
        try:
            self.receive(data)
        except Exception as error:
            self.on_broken(error)

    cdef receive(self, bytes data):
        self.was_active = True
        if self.state == c_HEAD:
            if PyBytes_GET_SIZE(self.pending):
                self.pending += data  # what waits is older, also when its turn is only queued
                if memchr(PyBytes_AS_STRING(data), 10, PyBytes_GET_SIZE(data)) is NULL \
                        and PyBytes_GET_SIZE(self.pending) < self.shard.max_header_bytes:
                    return  # no line has ended: no need to look at all of it once more for each of its bytes
                data, self.pending = self.pending, b""
            else:
                self.quiet_since_s = self.shard.now_s  # a head begins
            self.read(data)
        elif self.state == c_BUSY:
            self.wait_with(data)
        else:
            self.fresh_bytes += PyBytes_GET_SIZE(data)
            if self.state == c_BODY:
                self.read_rest(self.read_body(data))
            elif self.state == c_CHUNKED:
                self.read_rest(self.read_chunks(data))
            elif self.state == c_UNUSUAL:
                self.read_unusual(data)

    # ---- reading requests ----

    cpdef read(self, bytes data):
        """Read requests from `data` until it is used up or an exchange has begun."""
        cdef long long limit_head_bytes = self.shard.max_header_bytes
        cdef long long limit_body_bytes = self.shard.max_payload_size
        cdef long long size, end
        cdef object found
        cdef RequestHead head
        while PyBytes_GET_SIZE(data):
            found = scan_request(data, limit_head_bytes)
            if type(found) is not RequestHead:
                if PyBytes_AS_STRING(data)[0] in b"\r\n":
                    data = data.lstrip(b"\r\n")  # empty lines before a request are ignored (RFC 9112 2.2)
                    continue
                self.read_no_head(found, data)
                return
            head = <RequestHead>found
            self.is_http10 = head.is_http10
            if not head.keeps_alive:
                self.closes = True
            size = head.content_length
            if size > limit_body_bytes or head.expects_other or PyBytes_GET_SIZE(head.target) > self.shard.max_url_bytes \
                    or (size > 0 and self.shard.column.hold_body(0) + size > self.shard.max_buffered_bytes):
                self.refuse_head(head)
                return
            end = head.head_bytes + (size if size > 0 else 0)
            if head.is_chunked or PyBytes_GET_SIZE(data) < end:
                data = self.begin_body(head, PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + head.head_bytes,
                                                                       PyBytes_GET_SIZE(data) - head.head_bytes))
            else:
                self.begin(head, PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + head.head_bytes, end - head.head_bytes))
                data = PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + end, PyBytes_GET_SIZE(data) - end)
            if self.state != c_HEAD:
                if PyBytes_GET_SIZE(data) and self.state == c_BUSY:
                    self.wait_with(data)
                return
            self.quiet_since_s = self.shard.now_s

    cdef read_rest(self, bytes data):
        # What came behind the body of a request.
        if PyBytes_GET_SIZE(data):
            if self.state == c_HEAD:
                self.read(data)
            elif self.state == c_BUSY:
                self.wait_with(data)

    cpdef bytes read_body(self, bytes data):
        """Take bytes of a body of known length. Returns what came behind it, b"" while it goes on."""
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef bytes rest = b""
        self.body_left -= size
        if self.body_left > 0:
            self.keep(data)
            return b""
        if self.body_left < 0:
            rest = PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + size + self.body_left, -self.body_left)
            data = PyBytes_FromStringAndSize(PyBytes_AS_STRING(data), size + self.body_left)
        self.pieces.append(data)
        self.end_body()
        return rest

    cpdef bint hold(self, long long n_bytes) except -1:
        """Count bytes of a body as held. False: the shard holds too many, and the request was refused."""
        self.held_bytes += n_bytes
        if self.shard.column.hold_body(n_bytes) <= self.shard.max_buffered_bytes:
            return True
        self.refuse_body()
        return False

    cpdef let_go(self):
        """The body has been handed on, or is dropped: who has it now counts it."""
        if self.held_bytes:
            self.shard.column.hold_body(-self.held_bytes)
            self.held_bytes = 0

    cpdef bint keep(self, bytes data) except -1:
        """Keep a piece of a body; False as by `hold`. Small ones are put together: each by itself would take many times its size."""
        cdef object last
        if not self.hold(PyBytes_GET_SIZE(data)):
            return False
        last = self.pieces[len(self.pieces) - 1] if self.pieces else None
        if PyBytes_GET_SIZE(data) >= SMALL_BYTES:
            self.pieces.append(data)
        elif type(last) is bytearray:
            last += data
        else:
            self.pieces.append(bytearray(data))
        return True

    cpdef end_body(self):
        """The body is complete: its request begins."""
        cdef RequestHead head = self.head
        cdef bytes body = self.pieces[0] if len(self.pieces) == 1 and type(self.pieces[0]) is bytes else b"".join(self.pieces)
        self.head = None
        self.chunks = None
        self.pieces = None
        self.let_go()
        self.state = c_HEAD
        self.begin(head, body)

    cdef wait_with(self, bytes data):
        # Bytes of further requests, while an exchange runs.
        self.pending += data
        if PyBytes_GET_SIZE(self.pending) > PIPELINE_BYTES and self.transport is not None:
            self.transport.pause_reading()

    cdef begin(self, RequestHead head, bytes body):
        cdef object endpoint, route
        cdef ExchangeBase exchange
        if not self.shard.is_gated and head.method == b"POST":
            endpoint = self.shard.endpoints.get(head.target)
            if endpoint is not None:
                self.state = c_BUSY
                exchange = self.exchange = self.new_exchange(self, endpoint, head, body)
                route = self.shard.router.plain_route()
                if route is not None:
                    exchange.dispatch(route)
                else:
                    exchange.start()
                return
        self.dispatch(head, body)

    # ---- answering ----

    cpdef write_head(self, bytes opening, bytes request_id, bytes extra, bytes body=b""):
        """Send the head of an answer: its lines, our x-request-id unless the worker set one, and how the connection goes on."""
        cdef ShardBase shard = self.shard
        cdef Py_ssize_t body_bytes = PyBytes_GET_SIZE(body)
        cdef Py_ssize_t copied_bytes = body_bytes if body_bytes < COPIED_BYTES else 0
        cdef bytes out
        cdef char *end
        if shard.is_draining:
            self.closes = True
        shard.column.answered(PyBytes_AS_STRING(opening)[9] - 48)
        if self.closes:
            extra += b"connection: close\r\n"
        elif self.is_http10:
            extra += b"connection: keep-alive\r\n"
        if self.cors is not None:
            extra += self.cors
        if self.transport is None:
            return
        out = PyBytes_FromStringAndSize(
            NULL,
            PyBytes_GET_SIZE(opening) + PyBytes_GET_SIZE(extra) + (0 if request_id is None else 16 + PyBytes_GET_SIZE(request_id))
            + 2 + copied_bytes,
        )
        end = put(put(PyBytes_AS_STRING(out), opening), extra)
        if request_id is not None:
            memcpy(end, b"x-request-id: ", 14)
            end = put(end + 14, request_id)
            memcpy(end, b"\r\n", 2)
            end += 2
        memcpy(end, b"\r\n", 2)
        memcpy(end + 2, PyBytes_AS_STRING(body), copied_bytes)
        if copied_bytes == body_bytes:
            self.transport.write(out)
        else:
            self.transport.writelines((out, body))

    def write(self, bytes data):
        """Send bytes to the client, unless it is gone."""
        if self.transport is not None:
            self.transport.write(data)

    cpdef on_exchange_end(self):
        """The answer is complete: read the next request, or close."""
        if self.state != c_BUSY:
            return
        if self.closes:
            self.close_after_write()
            return
        self.state = c_HEAD
        self.quiet_since_s = self.shard.now_s
        if PyBytes_GET_SIZE(self.pending):
            if self.transport is not None:
                self.transport.resume_reading()
            # From the loop, so that a long pipeline of quick answers is no recursion. Until then the bytes stay where they are:
            # more may be received before.
            self.shard.loop.call_soon(self.go_on)

    def go_on(self):
        """Read the requests that waited."""
        cdef bytes data
        if self.state == c_HEAD and PyBytes_GET_SIZE(self.pending):
            data, self.pending = self.pending, b""
            try:
                self.read(data)
            except Exception as error:
                self.on_broken(error)

    # ---- time ----

    cpdef tick(self, double now_s):
        """From the shard's sweep: cut clients that are too slow or idle for too long."""
        cdef ShardBase shard = self.shard
        cdef bint was_active = self.was_active
        cdef double quiet_secs
        self.was_active = False
        if self.exchange is not None and self.exchange.needs_tick(now_s):
            self.exchange.tick(now_s)
        quiet_secs = now_s - self.quiet_since_s
        if self.is_write_paused:
            if quiet_secs > shard.send_timeout_secs and self.transport is not None:
                self.look_at_unsent(now_s)
        elif self.state == c_HEAD and not PyBytes_GET_SIZE(self.pending):
            if was_active:
                self.quiet_since_s = now_s
            elif quiet_secs > shard.idle_timeout_secs or shard.is_draining:
                self.close_after_write()
        elif self.state == c_HEAD or (self.state == c_UNUSUAL and self.unusual is not None and not self.unusual.has_head):
            # The whole head counts, not the pause: a byte a second is no progress.
            if quiet_secs > shard.header_timeout_secs:
                self.refuse_late()
        elif self.state == c_BODY or self.state == c_CHUNKED or self.state == c_UNUSUAL:
            if was_active:
                self.quiet_since_s = now_s
            elif quiet_secs > shard.body_timeout_secs:
                self.refuse_late()
                return
            if now_s - self.fresh_since_s > shard.body_timeout_secs:
                if self.fresh_bytes < SLOWEST_BYTES_PER_S * shard.body_timeout_secs:
                    self.refuse_late()
                self.fresh_since_s = now_s
                self.fresh_bytes = 0
        elif self.state == c_CLOSED and self.transport is not None:
            is_sent = self.lingers and not self.transport.get_write_buffer_size()
            if quiet_secs > (LINGER_SECS if is_sent else shard.send_timeout_secs):
                self.transport.abort()

    cdef look_at_unsent(self, double now_s):
        # The time to send is over: it begins anew if enough was sent.
        cdef long long unsent_bytes = self.transport.get_write_buffer_size()
        if self.unsent_bytes - unsent_bytes < SLOWEST_BYTES_PER_S * self.shard.send_timeout_secs:
            self.transport.abort()
        self.unsent_bytes = unsent_bytes
        self.quiet_since_s = now_s


cdef enum:
    PARTS = 5  # a sweep is spread over so many ticks, so that none of them takes long
    CLOSED_AT_ONCE = 200  # by one tick; closing costs 15 us, and connections that came together become idle together


@cython.final
cdef class Clients:
    """The open connections of a shard, in PARTS parts of which each tick looks at one.

    add, discard, len and iteration as of a set. Iterating wants that none comes or goes meanwhile.
    """

    cdef list parts  # lists, because a set takes longer to walk than what there is to do
    cdef unsigned int added

    def __cinit__(self):
        self.parts = [[] for _ in range(PARTS)]

    def add(self, ClientBase client not None):
        """Take a connection in."""
        cdef list part
        if client.place < 0:
            self.added += 1
            client.part = self.added % PARTS
            part = self.parts[client.part]
            client.place = len(part)
            part.append(client)

    def discard(self, ClientBase client not None):
        """Leave a connection out, if it is in."""
        cdef list part
        cdef ClientBase last
        if client.place >= 0:
            part = self.parts[client.part]
            last = part.pop()
            if last is not client:  # it goes to the place that has become free
                part[client.place] = last
                last.place = client.place
            client.place = -1

    def __len__(self):
        cdef list part
        cdef Py_ssize_t found = 0
        for part in self.parts:
            found += len(part)
        return found

    def __iter__(self):
        return chain.from_iterable(self.parts)

    def sweep(self, unsigned int turn, double now_s):
        """Call `tick` of each connection in a part. turn: number of the sweep, each takes the next part."""
        cdef list part = self.parts[turn % PARTS]
        cdef Py_ssize_t i = len(part)
        cdef ClientBase client
        cdef int was, closed = 0
        while True:
            try:  # around the loop: it would cost as much as the look at an idle client
                while i > 0 and closed < CLOSED_AT_ONCE:  # the others when their turn comes again
                    i -= 1
                    if i >= len(part):
                        continue  # some have left meanwhile
                    client = <ClientBase>part[i]
                    was = client.state
                    client.tick(now_s)
                    closed += client.state == c_CLOSED and was != c_CLOSED
                return
            except Exception as error:
                client.on_broken(error)
