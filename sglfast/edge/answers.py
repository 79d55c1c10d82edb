"""Answers that the router makes itself: errors, health, models.

Runs in: shards, event loop. Contract: errors are OpenAI error objects with the header `x-router-error-code` (errors.REASONS); all bytes
    that do not change are made once, at import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

import orjson

from sglfast import _segment, errors

if TYPE_CHECKING:
    from sglfast.edge.shard import Shard

JSON, TEXT = b"application/json", b"text/plain; charset=utf-8"
_STATUS_LINES = {
    status: f"HTTP/1.1 {status} {phrase}\r\n".encode()
    for status, phrase in {
        200: "OK",
        204: "No Content",
        400: "Bad Request",
        401: "Unauthorized",
        403: "Forbidden",
        404: "Not Found",
        405: "Method Not Allowed",
        408: "Request Timeout",
        413: "Content Too Large",
        414: "URI Too Long",
        415: "Unsupported Media Type",
        417: "Expectation Failed",
        422: "Unprocessable Content",
        429: "Too Many Requests",
        431: "Request Header Fields Too Large",
        500: "Internal Server Error",
        502: "Bad Gateway",
        503: "Service Unavailable",
        504: "Gateway Timeout",
    }.items()
}


def error_body(reason: errors.Reason, message: str | None = None) -> bytes:
    """The OpenAI error object of a reason."""
    return orjson.dumps({"error": {"message": message or reason.message, "type": reason.error_type, "param": None, "code": reason.code}})


_ERROR_BODIES = {reason.code: error_body(reason) for reason in errors.REASONS}


def error_event(reason: errors.Reason) -> bytes:
    """The same as an SSE event: the last thing that the reader of a broken stream gets.

    The empty line before it ends an event that was cut in the middle; without one it says nothing.
    """
    return b"\n\ndata: " + _ERROR_BODIES[reason.code] + b"\n\n"


def head(status: int, content_type: bytes, size: int, extra: bytes = b"") -> bytes:
    """Status line and headers of an own answer, without the lines that end the head."""
    return b"%bcontent-type: %b\r\ncontent-length: %d\r\n%b" % (_STATUS_LINES[status], content_type, size, extra)


def error_answer(reason: errors.Reason, message: str | None = None) -> tuple[bytes, bytes]:
    """(open head, body) of an error."""
    body = error_body(reason, message) if message else _ERROR_BODIES[reason.code]
    extra = b"x-router-error-code: %b\r\n" % reason.code.encode()
    if reason.status == 401:
        extra += b"www-authenticate: Bearer\r\n"
    if reason.status in (429, 503):
        extra += b"retry-after: 1\r\n"
    if reason is errors.METHOD_NOT_ALLOWED and message:
        # "this path takes only GET, POST"
        extra += b"allow: %b\r\n" % message.rpartition(" only ")[2].replace("GET", "GET, HEAD").encode()
    return head(reason.status, JSON, len(body), extra), body


def alive(shard: Shard) -> tuple[int, bytes, bytes]:
    """GET /health, /healthz, /liveness: the process serves; says nothing of workers."""
    return 200, TEXT, b"OK"


def ready(shard: Shard) -> tuple[int, bytes, bytes]:
    """GET /readyz, /readiness: requests will find a worker. 503 while starting, draining or without a healthy worker."""
    shard.router.refresh()
    healthy = shard.router.ready_workers  # an open circuit is no reason to send clients away: it closes again
    state = shard.segment.state
    if state == _segment.SERVING and healthy:
        return 200, JSON, b'{"status":"ready","healthy_workers":%d,"total_workers":%d}' % (healthy, shard.router.worker_count)
    why = {_segment.STARTING: "starting", _segment.DRAINING: "draining", _segment.STOPPED: "draining"}.get(state)
    body = {
        "status": "not ready",
        "reason": why or "insufficient healthy workers",
        "healthy_workers": healthy,
        "total_workers": shard.router.worker_count,
    }
    return 503, JSON, orjson.dumps(body)


def models(shard: Shard) -> tuple[int, bytes, bytes]:
    """GET /v1/models: the models of the workers, also of those that are down at present, and the adapters that are asked for like these."""
    shard.router.refresh()
    rows = [_row(shard, model) for model in (*shard.router.models, *sorted(shard.router.adapters))]
    return 200, JSON, orjson.dumps({"object": "list", "data": rows})


def one_model(shard: Shard, path: bytes) -> tuple[int, bytes, bytes] | None:
    """GET /v1/models/NAME: the same of one model, None when no worker has it. A name may hold slashes."""
    shard.router.refresh()
    name = unquote_to_bytes(path.removeprefix(MODELS_UNDER)).decode(errors="replace")
    return (200, JSON, orjson.dumps(_row(shard, name))) if name in shard.router.models or name in shard.router.adapters else None


def _row(shard: Shard, model: str) -> dict[str, object]:
    row = {"id": model, "object": "model", "created": shard.started_s, "owned_by": "sglang", "root": model}
    base = shard.router.adapters.get(model)
    return row if base is None else {**row, "parent": base}


MODELS_UNDER = b"/v1/models/"


LOCAL = {
    b"/health": alive,
    b"/healthz": alive,
    b"/liveness": alive,
    b"/readyz": ready,
    b"/readiness": ready,
    b"/v1/models": models,
}
