"""One line for each request: who got it and why, what came of it, how long it took. No prompt, no header but the request's id.

Runs in: shards. Lines are made on the loop when a request ends (cext/relaylog.pxi) and written many at a time by threads (log_sink), past
    control: straight to standard error and to the file of --log-dir. The loop never waits for whoever reads them.
Fields: request_id, path, model, worker (of a pair the prefill worker), decode_worker of a pair, rank (of the worker, where it was told
    one), decision (of the policy), overlap_blocks and prompt_blocks where the prompt was looked up, status, bytes_in, bytes_out, ttft_ms
    (to the first body byte), latency_ms, tried (workers that failed before), outcome: ok, client_error, busy, error, cancelled (the
    client left), cut (the worker ended it in the middle), refused (by the router itself).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import orjson

from sglfast._relay import RequestLogBase
from sglfast.log_file import LogFile
from sglfast.log_sink import LineSink, descriptor_writer, loss_line
from sglfast.shm import DECISIONS

if TYPE_CHECKING:
    from sglfast.config import ServeConfig
    from sglfast.edge.exchange import Exchange


class RequestLog(RequestLogBase):
    """The request lines of one shard. process: its name in the log; fd: where they go (standard error); ConfigError when the file of
    --log-dir cannot be written."""

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
        loss = loss_line(process, config.log_format)
        self._sinks = [LineSink(descriptor_writer(fd), loss)]
        if config.log_dir is not None:
            self._sinks.append(LineSink(LogFile(config.log_dir, config.log_files_kept).write_lines, loss))
        self._counted_lines = 0

    def label(self, model: str | None, url: str, role: str = "regular") -> bytes:
        """What every line says of a worker: the end of the path's field, model and worker; of a decode worker only itself."""
        if role == "decode":
            return (f',"decode_worker":"{url}"' if self.is_json else f" decode_worker={url}").encode()
        if self.is_json:
            return b',"model":%b,"worker":"%b"' % (orjson.dumps(model), url.encode())
        return f" model={_plain(model or '-')} worker={url}".encode()

    def time_of(self, second: int) -> bytes:
        """The local time of a second, HH:MM:SS."""
        return time.strftime("%H:%M:%S", time.localtime(second)).encode()

    def slow_line(self, exchange: Exchange, outcome: bytes) -> bytes:
        """The line of a request whose id or path needs quotes or is very long. Latin-1 never fails: a client may send any byte."""
        now_s = time.time()
        pair, route = exchange.pair, exchange.last_route
        if pair is not None:
            route = pair.first
        fields: dict[str, object] = {
            "request_id": exchange.request_id[:1024].decode("latin-1"),
            "path": exchange.endpoint.path[:1024].decode("latin-1"),
        }
        if route is not None:
            fields["model"] = route.pool.model if self.is_json else route.pool.model or "-"
            fields["worker"] = route.upstream.url
            if pair is not None:
                fields["decode_worker"] = pair.decode.url
            if exchange.dp_rank >= 0:
                fields["rank"] = exchange.dp_rank
            fields["decision"] = DECISIONS[route.decision]
            if route.prompt_blocks:
                fields |= {"overlap_blocks": route.overlap_blocks, "prompt_blocks": route.prompt_blocks}
        fields |= {"status": exchange.status, "bytes_in": exchange.bytes_in, "bytes_out": exchange.bytes_out}
        if exchange.has_body:
            fields["ttft_ms"] = exchange.ttft_us / 1000
        fields["latency_ms"] = int((time.monotonic() - exchange.started_s) * 1e6) / 1000
        if exchange.failed_attempts is not None:
            fields["tried"] = len(exchange.failed_attempts.tried)
        fields["outcome"] = outcome.decode()
        if self.is_json:
            line = {"ts": round(now_s, 6), "level": "info", "process": self._process, "message": "request", **fields}
            return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        opening = f"{self.time_of(int(now_s)).decode()}.{int(now_s % 1 * 1000):03d} INFO    {self._process}: request"
        return (opening + "".join(f" {name}={_plain(str(value))}" for name, value in fields.items()) + "\n").encode()

    def flush(self) -> None:
        """Hand the lines to the threads."""
        if not self.lines:
            return
        lines = b"".join(self.lines)
        self.lines.clear()
        self.size_bytes = 0
        for sink in self._sinks:
            sink.put(lines)

    def newly_lost(self) -> int:
        """Lines that were lost since the last call; one that two places lost counts twice."""
        before, self._counted_lines = self._counted_lines, sum(sink.lost_lines for sink in self._sinks)
        return self._counted_lines - before

    def retire(self) -> None:
        """Take no more; what there is is written, and nobody waits for that."""
        self.flush()
        for sink in self._sinks:
            sink.retire()

    def close(self) -> None:
        """Write what there is, within a bounded time."""
        self.flush()
        for sink in self._sinks:
            sink.close()


def _plain(text: str) -> str:
    return text if text.isascii() and text.isprintable() and not set(text) & set(' "\\') and text else orjson.dumps(text).decode()
