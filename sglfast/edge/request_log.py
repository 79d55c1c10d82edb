"""One line for each request: who got it and why, what came of it, how long it took. No prompt, no header but the request's id.

Runs in: shards. Lines are made on the loop when a request ends (cext/relaylog.pxi), and written many at a time by a thread of this
    object's own. Contract: the loop never waits for whoever reads the log. While the reader is slow, lines wait in memory up to a
    bound (4 MiB); what does not fit is dropped and counted in a line of its own.
Fields: request_id, path, model, worker, decision (of the policy), overlap_blocks and prompt_blocks where the prompt was looked up, status,
    bytes_in, bytes_out, ttft_ms (to the first body byte), latency_ms, tried (workers that failed before), outcome: ok, client_error,
    busy, error, cancelled (the client left), cut (the worker ended it in the middle), refused (by the router itself).
"""

from __future__ import annotations

import os
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING

import orjson

from sglfast._relay import RequestLogBase
from sglfast.shm import DECISIONS

if TYPE_CHECKING:
    from sglfast.config import ServeConfig
    from sglfast.edge.exchange import Exchange

_CLOSE_S = 1.0


class RequestLog(RequestLogBase):
    """The request lines of one shard. process: its name in the log; fd: where they go (standard error)."""

    def __init__(self, config: ServeConfig, process: str, fd: int = 2) -> None:
        is_json = config.log_format == "json"
        of_json = b',"level":"info","process":"%b","message":"request","request_id":"' % process.encode()
        super().__init__(
            is_json=is_json,
            only_errors=config.request_log == "errors",
            opening=of_json if is_json else b" INFO    %b: request request_id=" % process.encode(),
            decisions=tuple(name.encode() for name in DECISIONS),
        )
        self._process = process
        self._fd = fd
        self._batches: SimpleQueue[bytes | None] = SimpleQueue()
        self._is_writing = False
        self._thread: threading.Thread | None = None

    def label(self, model: str | None, url: str) -> bytes:
        """What every line says of a worker: the end of the path's field, model and worker."""
        if self.is_json:
            return b',"model":%b,"worker":"%b"' % (orjson.dumps(model), url.encode())
        return f" model={_plain(model or '-')} worker={url}".encode()

    def time_of(self, second: int) -> bytes:
        """The local time of a second, HH:MM:SS."""
        return time.strftime("%H:%M:%S", time.localtime(second)).encode()

    def slow_line(self, exchange: Exchange, outcome: bytes) -> bytes:
        """The line of a request whose id or path needs quotes or is very long. Latin-1 never fails: a client may send any byte."""
        now_s = time.time()
        fields = {
            "request_id": exchange.request_id[:1024].decode("latin-1"),
            "path": exchange.endpoint.path[:1024].decode("latin-1"),
            "worker": exchange.last_route.upstream.url if exchange.last_route is not None else None,
            "status": exchange.status,
            "bytes_in": exchange.bytes_in,
            "bytes_out": exchange.bytes_out,
            "ttft_ms": exchange.ttft_us / 1000,
            "latency_ms": int((time.monotonic() - exchange.started_s) * 1e6) / 1000,
            "outcome": outcome.decode(),
        }
        if self.is_json:
            line = {"ts": round(now_s, 6), "level": "info", "process": self._process, "message": "request", **fields}
            return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        opening = f"{self.time_of(int(now_s)).decode()}.{int(now_s % 1 * 1000):03d} INFO    {self._process}: request"
        return (opening + "".join(f" {name}={_plain(str(value))}" for name, value in fields.items()) + "\n").encode()

    def flush(self) -> None:
        """Hand the lines to the thread, unless it still writes."""
        if self._is_writing or not (self.lines or self.dropped):
            return
        if self.dropped:
            self.lines.append(self._loss())
            self.dropped = 0
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="request-log", daemon=True)
            self._thread.start()
        self._is_writing = True
        self._batches.put(b"".join(self.lines))
        self.lines.clear()
        self.size_bytes = 0

    def close(self) -> None:
        """Write what waits, within a bounded time."""
        end_s = time.monotonic() + _CLOSE_S
        while self._is_writing and time.monotonic() < end_s:
            time.sleep(0.005)
        self.flush()
        if self._thread is not None:
            self._batches.put(None)
            self._thread.join(max(0.0, end_s - time.monotonic()))

    def _write(self) -> None:
        while (batch := self._batches.get()) is not None:
            view = memoryview(batch)
            try:
                while view:
                    view = view[os.write(self._fd, view) :]
            except OSError:
                pass  # nobody reads the log any more; requests go on
            self._is_writing = False

    def _loss(self) -> bytes:
        why = "request lines were dropped, the log is read too slowly"
        if self.is_json:
            line = {"ts": round(time.time(), 6), "level": "warning", "process": self._process, "message": why, "lines": self.dropped}
            return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        return f"{self.time_of(int(time.time())).decode()}.000 WARNING {self._process}: {why} lines={self.dropped}\n".encode()


def _plain(text: str) -> str:
    return text if text.isascii() and text.isprintable() and not set(text) & set(' "\\') and text else orjson.dumps(text).decode()
