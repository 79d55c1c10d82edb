# What the relay reads of its shard and of its router: see sglfast/edge/shard.py and served.py. Part of relay.pyx.

cdef class ShardBase:
    """What the compiled relay reads of its shard.

    endpoints: path -> Endpoint of the data plane. is_gated: requests pass `ClientConnection.dispatch` one by one, because
    something must be asked before they may begin.
    """

    cdef public Column column
    cdef readonly object config
    cdef public RouterBase router
    cdef public object admission    # None: nothing is limited
    cdef public RequestLogBase request_log  # None: requests are not logged
    cdef public object loop
    cdef public dict endpoints
    cdef public double now_s
    cdef public bint is_draining
    cdef public bint is_gated
    # Copies of settings
    cdef long long max_header_bytes
    cdef long long max_payload_size
    cdef long long max_buffered_bytes
    cdef long long max_url_bytes
    cdef double request_timeout_secs
    cdef double stale_request_timeout_secs
    cdef double stream_idle_timeout_secs
    cdef double header_timeout_secs
    cdef double body_timeout_secs
    cdef double idle_timeout_secs
    cdef double send_timeout_secs
    cdef bytes id_prefix
    cdef uint64_t id_count

    def __cinit__(self, *args, **kwargs):
        self.id_prefix = os.urandom(8).hex().encode()

    def configure(self, config):
        """Take these settings from now on. config: ServeConfig."""
        self.config = config
        self.max_header_bytes = config.max_header_bytes
        self.max_payload_size = config.max_payload_size
        self.max_buffered_bytes = max(config.max_buffered_bytes, config.max_payload_size)  # else a large body is never taken
        self.max_url_bytes = config.max_url_bytes
        self.request_timeout_secs = config.request_timeout_secs
        self.stale_request_timeout_secs = config.stale_request_timeout_secs
        self.stream_idle_timeout_secs = config.stream_idle_timeout_secs
        self.header_timeout_secs = config.header_timeout_secs
        self.body_timeout_secs = config.body_timeout_secs
        self.idle_timeout_secs = config.idle_timeout_secs
        self.send_timeout_secs = config.send_timeout_secs

    cpdef bytes new_request_id(self):
        """An id for a request that came without one: 32 hex digits, unique over shards and restarts."""
        cdef bytes made = PyBytes_FromStringAndSize(NULL, 32)
        cdef char *end = put(PyBytes_AS_STRING(made), self.id_prefix)
        cdef uint64_t count
        cdef int i
        self.id_count += 1
        count = self.id_count
        for i in range(15, -1, -1):
            end[i] = b"0123456789abcdef"[count & 15]
            count >>= 4
        return made


cdef class RouterBase:
    """The choice that needs nothing of the request: see sglfast/edge/served.py, which fills this in `refresh`.

    seen_version: of the worker table and the breakers, as _breaker has it, that the fields follow. plain_routes: one per worker of the
    only pool, None when a request has to be looked at; plain_choose(plain_view, loads, no_prompt) is its policy; plain_rank(position)
    is the route where a rank of the worker is to be chosen too, None when no worker of the pool has that.
    """

    cdef sf_header_t *header
    cdef object segment
    cdef public uint64_t seen_version
    cdef public list plain_routes
    cdef public object plain_choose
    cdef public object plain_rank
    cdef public tuple plain_arguments

    def __init__(self, segment):
        self.segment = segment
        self.header = sf_header(<void *><uintptr_t>segment.address)
        self.seen_version = <uint64_t>-1

    cdef object plain_route(self):
        # A Route, or None.
        if sf_load(&self.header.workers_version) + sf_load(&self.header.breaker_epoch) != self.seen_version:
            self.refresh()
        if self.plain_routes is None:
            return None
        position, _ = self.plain_choose(*self.plain_arguments)
        return self.plain_routes[position] if self.plain_rank is None else self.plain_rank(position)
