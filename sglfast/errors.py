"""Every error of sglfast: the exceptions, and the table of answers that the router makes itself.

Contract: `REASONS` is the single source of status, error type and retry advice of a router-made answer; its codes are
    stable for ever (clients match on the header `x-router-error-code`), its order is the order of the counters in shared
    memory, so new rows go to the end. Statuses follow spec "error envelope" of sgl-router where it has the case.
    Messages never carry a worker's URL or an inner error's text: those go to the log.

SglfastError
 +- ConfigError       a flag, file or environment value that cannot work; ends the program with exit code 2
 +- ShmLayoutError    a shared-memory segment of another layout version or size
 +- KvEventError      bytes from a KV event socket that are no event batch
 +- WorkerInfoError   a worker's self-description that cannot be read
 +- PromptError       a prompt that cannot be rendered or tokenized
"""

from dataclasses import dataclass
from typing import Literal


class SglfastError(Exception):
    """Base of all errors that sglfast raises on purpose."""


class ConfigError(SglfastError):
    """A setting that cannot work; the text names the setting, the value and what would be right."""


class ShmLayoutError(SglfastError):
    """A shared-memory segment that this build cannot use."""


class KvEventError(SglfastError):
    """Bytes from a KV event or replay socket that do not have the shape of spec/kv_events.md 1.2, 1.3 or 1.6."""


class WorkerInfoError(SglfastError):
    """A `/server_info` answer that is no JSON object."""


class PromptError(SglfastError):
    """A prompt that the chat template or the tokenizer refuses."""


Side = Literal["client", "worker", "router"]


@dataclass(frozen=True, slots=True)
class Reason:
    """One kind of router-made answer.

    code: value of `x-router-error-code`, of `error.code` and of the metric label; status: HTTP status; side: whose fault;
    message: the text for the client; is_retryable: the same request may succeed later or elsewhere.
    """

    code: str
    status: int
    side: Side
    message: str
    is_retryable: bool = False

    @property
    def error_type(self) -> str:
        """OpenAI's `error.type`."""
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"


BAD_REQUEST = Reason("bad_request", 400, "client", "malformed HTTP request")
NOT_FOUND = Reason("not_found", 404, "client", "no such path")
METHOD_NOT_ALLOWED = Reason("method_not_allowed", 405, "client", "this path does not take this method")
REQUEST_TIMEOUT = Reason("request_timeout", 408, "client", "the request did not arrive in time", True)
PAYLOAD_TOO_LARGE = Reason("payload_too_large", 413, "client", "the request body is larger than the limit")
HEADERS_TOO_LARGE = Reason("headers_too_large", 431, "client", "the request head is larger than the limit, or has more than 128 lines")
MODEL_NOT_FOUND = Reason("model_not_found", 404, "client", "no worker serves the requested model")
UPSTREAM_UNREACHABLE = Reason("upstream_unreachable", 502, "worker", "upstream unavailable", True)
UPSTREAM_BAD_RESPONSE = Reason("upstream_bad_response", 502, "worker", "upstream answered with malformed HTTP", True)
UPSTREAM_CLOSED = Reason("upstream_closed", 502, "worker", "upstream closed the connection before it answered", True)
UPSTREAM_TIMEOUT = Reason("upstream_timeout", 504, "worker", "upstream request timed out", True)
NO_HEALTHY_WORKERS = Reason("no_healthy_workers", 503, "router", "no healthy workers for the requested model", True)
SHUTTING_DOWN = Reason("shutting_down", 503, "router", "the router is shutting down", True)
CONTROL_UNAVAILABLE = Reason("control_unavailable", 503, "router", "the control process does not answer", True)
INTERNAL_ERROR = Reason("internal_error", 500, "router", "internal error")
EXPECTATION_FAILED = Reason("expectation_failed", 417, "client", "only `Expect: 100-continue` is understood")
URI_TOO_LONG = Reason("uri_too_long", 414, "client", "the request target is longer than the limit")
UPSTREAM_BODY_INCOMPLETE = Reason("upstream_body_incomplete", 502, "worker", "upstream stopped in the middle of its answer", True)
UNSUPPORTED_MEDIA_TYPE = Reason("unsupported_media_type", 415, "client", "the body must be sent with `content-type: application/json`")
UNPROCESSABLE = Reason("unprocessable", 422, "client", "the body does not have the fields of this path")
SERVICE_OVERLOADED = Reason("service_overloaded", 503, "router", "too much waits for the tokenizer", True)
QUEUE_FULL = Reason("queue_full", 429, "client", "too many requests: the router and its queue are full, try again later", True)
QUEUE_TIMEOUT = Reason("queue_timeout", 408, "client", "the request waited too long for its turn", True)
INVALID_API_KEY = Reason("invalid_api_key", 401, "client", "a valid API key is needed: `authorization: Bearer KEY`")
TOO_MANY_CONNECTIONS = Reason("too_many_connections", 503, "router", "too many connections, try again later", True)
BREAKER_OPEN = Reason("breaker_open", 503, "worker", "every worker of the requested model has failed lately", True)
STALE_REQUEST_EXPIRED = Reason("stale_request_expired", 504, "router", "request expired before completion", True)
MISSING_MODEL = Reason(
    "missing_model", 400, "client", "the workers serve several models: the JSON body must have a `model`, one of those of /v1/models"
)
ORIGIN_NOT_ALLOWED = Reason(
    "origin_not_allowed", 403, "client", "a page of this origin may not administer: --cors-allowed-origins names those that may"
)
NO_PREFILL_WORKERS_AVAILABLE = Reason(
    "no_prefill_workers_available", 503, "router", "no healthy prefill workers for the requested model", True
)
NO_DECODE_WORKERS_AVAILABLE = Reason(
    "no_decode_workers_available", 503, "router", "no healthy decode workers for the requested model", True
)
PREFILL_FAILED = Reason("prefill_failed", 502, "worker", "the prefill half of the request failed", True)
BODIES_FULL = Reason("bodies_full", 503, "router", "the router holds as many bytes of request bodies as it may, try again later", True)

# Position = word in each shard's column of shared memory: append only.
REASONS: tuple[Reason, ...] = (
    BAD_REQUEST,
    NOT_FOUND,
    METHOD_NOT_ALLOWED,
    REQUEST_TIMEOUT,
    PAYLOAD_TOO_LARGE,
    HEADERS_TOO_LARGE,
    MODEL_NOT_FOUND,
    UPSTREAM_UNREACHABLE,
    UPSTREAM_BAD_RESPONSE,
    UPSTREAM_CLOSED,
    UPSTREAM_TIMEOUT,
    NO_HEALTHY_WORKERS,
    SHUTTING_DOWN,
    CONTROL_UNAVAILABLE,
    INTERNAL_ERROR,
    EXPECTATION_FAILED,
    URI_TOO_LONG,
    UPSTREAM_BODY_INCOMPLETE,
    UNSUPPORTED_MEDIA_TYPE,
    UNPROCESSABLE,
    SERVICE_OVERLOADED,
    QUEUE_FULL,
    QUEUE_TIMEOUT,
    INVALID_API_KEY,
    TOO_MANY_CONNECTIONS,
    BREAKER_OPEN,
    STALE_REQUEST_EXPIRED,
    MISSING_MODEL,
    ORIGIN_NOT_ALLOWED,
    NO_PREFILL_WORKERS_AVAILABLE,
    NO_DECODE_WORKERS_AVAILABLE,
    PREFILL_FAILED,
    BODIES_FULL,
)
REASON_INDEX: dict[str, int] = {reason.code: position for position, reason in enumerate(REASONS)}
