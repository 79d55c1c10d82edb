# The prefill half of a request that two workers serve: see sglfast/edge/prefill_leg.py. Part of relay.pyx.

cdef extern from "sf_splice.h" nogil:
    int64_t sf_splice_place(const char *text, size_t length, int *is_empty) noexcept
    int sf_may_be_batch(const char *text, size_t length, int kind) noexcept


cdef class PrefillLegBase(ExchangeBase):
    """What a connection to a prefill worker tells of its answer; the exchange has the decode worker's.

    exchange: whose half this is, None when it has ended or nobody waits for it; heir: the exchange that has taken the answer over;
    first: the Route of the prefill worker; decode: the other half's worker; held: head of the decode worker's answer, that is kept
    from the client; plain_body, plain_kept: the exchange's body and header lines as they were.
    """

    cdef public ExchangeBase exchange
    cdef public ExchangeBase heir
    cdef public object first
    cdef public UpstreamBase decode
    cdef public ResponseHead held
    cdef public bytes plain_body
    cdef public bytes plain_kept

    def __init__(self, ExchangeBase exchange not None, route not None, bytes body not None, bytes kept not None):
        self.exchange = exchange
        self.shard = exchange.shard
        self.endpoint = exchange.endpoint
        self.head = exchange.head
        self.request_id = exchange.request_id
        self.makes_id = exchange.makes_id
        self.failed_attempts = exchange.failed_attempts
        self.started_s = exchange.started_s
        self.deadline_s = INFINITE
        self.plain_body = exchange.body
        self.plain_kept = exchange.kept
        self.body = body
        self.kept = kept
        self.first = route.prefill
        self.decode = route.upstream
        self.rank = self.dp_rank = -1
        self.predicted_tokens = self.first.predicted_tokens
        self.cached_tokens = -1

    cdef bint on_head(self, WorkerConnectionBase connection, ResponseHead head, bytes payload) except -1:
        cdef ExchangeBase heir
        cdef bint goes_on
        self.has_answer = True
        self.body = b""
        self.status = head.status
        self.keeps_alive = head.keeps_alive
        if head.status >= 400:
            self.on_refusal(connection)
        elif self.probe:
            self.probe_answered()
        heir = self.heir
        if heir is not None:
            goes_on = heir.on_head(connection, head, payload)
            self.decodes_chunks = heir.decodes_chunks
            return goes_on
        if PyBytes_GET_SIZE(payload):
            self.drop(payload)
        return not self.is_over

    cdef on_body(self, bytes data):
        cdef ExchangeBase heir = self.heir  # held here: it may end, and let go of this
        if heir is not None:
            heir.was_active = True
            heir.on_body(data)
        else:
            self.drop(data)

    cdef drop(self, bytes data):
        # A piece of an answer that nobody is to get: it tells that the prompt is computed.
        if not self.has_body:
            self.first_byte(data)
        if self.predicted_tokens >= 0:
            self.look_for_cached_tokens(data)

    cdef on_end(self, WorkerConnectionBase connection, bint is_reusable):
        cdef ExchangeBase heir = self.heir
        if heir is not None:
            heir.on_end(connection, is_reusable)
            return
        self.connection = None
        if is_reusable and self.keeps_alive:
            connection.upstream.give_back(connection)
        else:
            connection.close()
        self.on_complete()


def spliced(bytes body not None, bytes keys not None):
    """The JSON object of a body with `keys` (`"name":value,...`) at its end, where they win over equal ones; None for all else."""
    cdef int is_empty = 0
    cdef Py_ssize_t size = PyBytes_GET_SIZE(body)
    cdef int64_t place = sf_splice_place(PyBytes_AS_STRING(body), size, &is_empty)
    cdef bytes out
    cdef char *end
    if place < 0:
        return None
    out = PyBytes_FromStringAndSize(NULL, size + PyBytes_GET_SIZE(keys) + (not is_empty))
    end = PyBytes_AS_STRING(out)
    memcpy(end, PyBytes_AS_STRING(body), place)
    end += place
    if not is_empty:
        end[0] = c","
        end += 1
    memcpy(put(end, keys), PyBytes_AS_STRING(body) + place, size - place)
    return out


def may_be_batch(bytes body not None, int kind):
    """Whether a body may ask for several answers at once, so that somebody has to look; a no is certain. kind: as Endpoint has it."""
    return sf_may_be_batch(PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body), kind) != 0
