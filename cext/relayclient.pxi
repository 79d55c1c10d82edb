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
    cdef public double quiet_since_s
    cdef public bint was_active
    cdef public bint closes
    cdef public bint is_http10
    cdef public bint is_write_paused
    cdef public bint lingers

    def __init__(self, ShardBase shard not None):
        self.shard = shard
        self.pending = b""
        self.quiet_since_s = shard.now_s

    def data_received(self, bytes data not None):
        """The transport's call: bytes of the client."""
        self.was_active = True
        if self.state == c_HEAD:
            if PyBytes_GET_SIZE(self.pending):
                data = self.pending + data  # what waits is older, also when its turn is only queued
                self.pending = b""
            else:
                self.quiet_since_s = self.shard.now_s  # a head begins
            self.read(data)
        elif self.state == c_BODY:
            self.read_rest(self.read_body(data))
        elif self.state == c_CHUNKED:
            self.read_rest(self.read_chunks(data))
        elif self.state == c_BUSY:
            self.wait_with(data)
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
            if size > limit_body_bytes or head.expects_other:
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
            self.pieces.append(data)
            return b""
        if self.body_left < 0:
            rest = PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + size + self.body_left, -self.body_left)
            data = PyBytes_FromStringAndSize(PyBytes_AS_STRING(data), size + self.body_left)
        self.pieces.append(data)
        self.end_body()
        return rest

    cpdef end_body(self):
        """The body is complete: its request begins."""
        cdef RequestHead head = self.head
        cdef bytes body = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.head = None
        self.chunks = None
        self.pieces = None
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
            self.read(data)
