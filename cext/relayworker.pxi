# The connections to one worker: see sglfast/edge/upstream.py. Part of relay.pyx.

# Framing of the answer that a connection is reading.
IDLE, ANSWER_HEAD, LENGTH, ANSWER_CHUNKED, UNTIL_CLOSE = range(5)

cdef enum:
    c_IDLE = 0
    c_ANSWER_HEAD = 1
    c_LENGTH = 2
    c_ANSWER_CHUNKED = 3
    c_UNTIL_CLOSE = 4


cdef class WorkerConnectionBase:
    """See sglfast/edge/upstream.py."""

    cdef public UpstreamBase upstream
    cdef public object transport
    cdef public ExchangeBase exchange
    cdef public Chunks chunks
    cdef public bytes partial
    cdef public int state
    cdef public long long left
    cdef public long long uses
    cdef public bint has_spoken  # a byte came since the present request was sent
    cdef public double idle_since_s

    def __init__(self, UpstreamBase upstream not None):
        self.upstream = upstream
        self.partial = b""

    cdef take(self, ExchangeBase exchange):
        # A request is about to be written.
        self.exchange = exchange
        self.state = c_ANSWER_HEAD
        self.has_spoken = False
        self.uses += 1

    def data_received(self, bytes data not None):
        """The transport's call: bytes of the worker."""
        cdef ExchangeBase exchange = self.exchange
        if exchange is None:
            self.close()  # a worker that speaks out of turn
            return
        exchange.was_active = True
        try:
            self.receive(exchange, data)
        except Exception as error:
            exchange.on_mishap(error)

    cdef receive(self, ExchangeBase exchange, bytes data):
        if self.state == c_ANSWER_CHUNKED:
            self.read_chunked(exchange, data)
        elif self.state == c_LENGTH:
            self.read_length(exchange, data)
        elif self.state == c_ANSWER_HEAD:
            self.read_head(exchange, data)
        else:
            exchange.on_body(data)

    cdef read_head(self, ExchangeBase exchange, bytes data):
        cdef object found
        cdef ResponseHead head
        cdef bytes payload
        cdef Py_ssize_t end
        cdef long long left
        self.has_spoken = True
        if PyBytes_GET_SIZE(self.partial):
            data = self.partial + data
            self.partial = b""
        while True:
            found = scan_response(data, self.upstream.shard.max_header_bytes)
            if type(found) is not ResponseHead:
                if found == 0:
                    self.partial = data
                else:
                    self.fail(exchange)
                return
            head = <ResponseHead>found
            if head.status >= 200:
                break
            if head.status == 101:
                self.fail(exchange)
                return
            # 100 and 103 are between the worker and us; the client's own 100 was ours
            data = data[head.head_bytes:]
        payload = PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + head.head_bytes, PyBytes_GET_SIZE(data) - head.head_bytes)
        left = head.content_length
        if head.status == 204 or head.status == 304:
            left = 0
        elif head.is_chunked:
            self.chunks = Chunks.__new__(Chunks)
            self.state = c_ANSWER_CHUNKED
            if exchange.head.is_http10:
                if exchange.on_head(self, head, b"") and PyBytes_GET_SIZE(payload):
                    self.read_chunked(exchange, payload)
                return
            end = self.chunks.follow(payload)
            if end == -2:
                self.fail(exchange)
            elif exchange.on_head(self, head, payload if end < 0 else payload[:end]) and end >= 0:
                self.end(exchange, end == PyBytes_GET_SIZE(payload))
            return
        elif left < 0:
            self.state = c_UNTIL_CLOSE
            exchange.on_head(self, head, payload)
            return
        self.state = c_LENGTH
        self.left = left - PyBytes_GET_SIZE(payload)
        if self.left > 0:
            exchange.on_head(self, head, payload)
            return
        # The whole answer came at once: one write to the client.
        if exchange.on_head(self, head, payload if self.left == 0 else payload[: PyBytes_GET_SIZE(payload) + self.left]):
            self.end(exchange, self.left == 0)

    cdef read_length(self, ExchangeBase exchange, bytes data):
        self.left -= PyBytes_GET_SIZE(data)
        if self.left > 0:
            exchange.on_body(data)
            return
        exchange.on_body(data if self.left == 0 else data[: PyBytes_GET_SIZE(data) + self.left])
        self.end(exchange, self.left == 0)

    cdef read_chunked(self, ExchangeBase exchange, bytes data):
        cdef Py_ssize_t end
        cdef bytes payload
        if exchange.decodes_chunks:
            pieces = []
            end = self.chunks.decode(data, 0, pieces)
            payload = b"".join(pieces)
        else:
            end = self.chunks.follow(data)
            payload = data if end < 0 or end == PyBytes_GET_SIZE(data) else data[:end]
        if end == -2:
            self.fail(exchange)
            return
        if PyBytes_GET_SIZE(payload):
            exchange.on_body(payload)
        if end >= 0:
            self.end(exchange, end == PyBytes_GET_SIZE(data))

    cdef end(self, ExchangeBase exchange, bint is_reusable):
        if self.exchange is not exchange:
            return  # the client left while the last bytes were relayed
        self.exchange = None
        self.state = c_IDLE
        self.chunks = None
        exchange.on_end(self, is_reusable)

    def end_at_close(self, ExchangeBase exchange not None):
        """The worker closed, and that is the end of its answer."""
        exchange.on_end(self, False)

    cpdef close(self):
        """Close at once; what was not yet sent is dropped. Never calls back into an exchange."""
        self.exchange = None
        if self.transport is not None:
            self.transport.abort()


cdef class UpstreamBase:
    """See sglfast/edge/upstream.py."""

    cdef public ShardBase shard
    cdef public unsigned int worker_idx
    cdef public bytes host_header
    cdef public bytes key_line   # what the worker is shown instead of the client's authorization; None = that
    cdef public bytes log_label  # what the request log says of the worker
    cdef public list idle  # oldest first; the newest is taken first
    cdef public bint is_removed
    cdef public bint needs_probe  # its breaker is half-open: a request has to claim the probe
    cdef public bint takes_rid    # it ends a request whose `rid` it is told
    cdef public bytes rank_ways   # how it is told which of its ranks is to serve a request; None = requests are not steered

    cpdef WorkerConnectionBase take_idle(self):
        """The most recently used idle connection that is still open, or None."""
        cdef WorkerConnectionBase connection
        while self.idle:
            connection = self.idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        return None

    cpdef give_back(self, WorkerConnectionBase connection):
        """Keep a connection for the next request, or close it when it cannot serve one."""
        transport = connection.transport
        if transport is None:
            return
        # Unsent request bytes: the worker answered before it had read all; it may close at any moment.
        if self.is_removed or transport.get_write_buffer_size() or transport.is_closing():
            connection.close()
            return
        connection.idle_since_s = self.shard.now_s
        self.idle.append(connection)
