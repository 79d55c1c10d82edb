"""Logs of every process: one line an event on standard error, as text or JSON.

Runs in: all processes; control writes through a thread (log_sink), its children to pipes that control reads. Contract: fields after the
    message are given as `extra={"fields": {...}}`; no prompt text and no secret ever goes into a log line. On the request path
    nothing is logged above DEBUG, and DEBUG behind a check.
"""

import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields: dict[str, Any] = getattr(record, "fields", {})
        tail = "".join(f" {key}={_plain(value)}" for key, value in fields.items())
        text = f"{stamp}.{int(record.msecs):03d} {record.levelname:<7} {record.name}: {record.getMessage()}{tail}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": round(record.created, 6),
            "level": record.levelname.lower(),
            "process": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _plain(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() and text and not set(text) & set(' "') else json.dumps(text)


def setup_logs(process: str, level: str, log_format: str, stream: "SupportsWrite[str] | None" = None) -> logging.Logger:
    """Configure this process's only logger and return it. level: debug|info|warning|error; log_format: text|json; stream: where to write
    instead of standard error."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)
    for chatty in ("asyncio", "aiohttp.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return logging.getLogger(process)


def copy_logs_to(stream: "SupportsWrite[str]") -> None:
    """Write what this process logs to `stream` too, in the same form."""
    root = logging.getLogger()
    copy = logging.StreamHandler(stream)
    copy.setFormatter(root.handlers[0].formatter)
    root.addHandler(copy)


def set_level(level: str) -> None:
    """Change what this process logs from now on. level: debug|info|warning|error."""
    logging.getLogger().setLevel(level.upper())
