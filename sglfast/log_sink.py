"""Log lines on their way out: a thread writes them, so that a loop never waits for whoever reads the log.

Runs in: control (its own lines and its children's), shards (request lines). Contract: `put` never waits. While the reader is slow, lines
    wait in memory up to a bound; what does not fit, and what can no longer be written, is lost, counted in `lost_lines`, and told in a
    line of its own as soon as there is room. Several processes may write to one pipe: pieces end at the end of a line and are no
    longer than PIPE_BUF, which the kernel does not mix (pipe(7)); only a longer line can be torn.
"""

from __future__ import annotations

import os
import select
import stat
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

_WAITING_BYTES = 4 << 20
_CLOSE_S = 1.0
_FILE_PIECE_BYTES = 1 << 20  # a file takes any piece whole


class LineSink:
    """One way out for lines. write: takes whole lines and may wait; raises OSError when they are lost. loss: (lines lost) -> the line
    that tells it."""

    def __init__(self, write: Callable[[bytes], None], loss: Callable[[int], bytes]) -> None:
        self._write = write
        self._loss = loss
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        # One writer each: the caller's thread ...
        self._put_bytes = 0
        self._refused_lines = 0
        self._told_lines = 0
        # ... and ours.
        self._done_bytes = 0
        self._failed_lines = 0

    @property
    def lost_lines(self) -> int:
        """Lines that nobody will read."""
        return self._refused_lines + self._failed_lines

    @property
    def waiting_bytes(self) -> int:
        """Bytes that are not written yet."""
        return self._put_bytes - self._done_bytes

    def put(self, lines: bytes) -> None:
        """Take whole lines. From one thread only."""
        if self.waiting_bytes + len(lines) > _WAITING_BYTES:
            self._refused_lines += lines.count(b"\n")
            return
        if self._told_lines != self._refused_lines:
            lines = self._loss(self._refused_lines - self._told_lines) + lines
            self._told_lines = self._refused_lines
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()
        self._put_bytes += len(lines)
        self._queue.put(lines)

    def write(self, text: str) -> None:
        """Take a line as text; with `flush`, what a logging handler needs."""
        self.put(text.encode(errors="replace"))

    def flush(self) -> None:
        """Nothing is held back."""

    def retire(self) -> None:
        """Take no more; what waits is written, and nobody waits for that."""
        self._queue.put(None)

    def close(self, within_s: float = _CLOSE_S) -> None:
        """Take no more, and give what waits this long to be written."""
        self.retire()
        if self._thread is not None:
            self._thread.join(within_s)

    def _run(self) -> None:
        while (lines := self._queue.get()) is not None:
            try:
                self._write(lines)
            except OSError:  # nobody reads the log any more; that is no reason to end
                self._failed_lines += lines.count(b"\n")
            self._done_bytes += len(lines)


def loss_line(process: str, log_format: str) -> Callable[[int], bytes]:
    """How a process tells that lines were lost. log_format: text|json."""

    def line(count: int) -> bytes:
        now_s = time.time()
        why = "log lines were dropped, the log is read too slowly"
        if log_format == "json":
            return f'{{"ts":{now_s:.6f},"level":"warning","process":"{process}","message":"{why}","lines":{count}}}\n'.encode()
        stamp = time.strftime("%H:%M:%S", time.localtime(now_s))
        return f"{stamp}.{int(now_s % 1 * 1000):03d} WARNING {process}: {why} lines={count}\n".encode()

    return line


def descriptor_writer(fd: int) -> Callable[[bytes], None]:
    """What writes lines to a descriptor that other processes write to as well."""
    limit_bytes = _FILE_PIECE_BYTES if stat.S_ISREG(os.fstat(fd).st_mode) else select.PIPE_BUF

    def write(lines: bytes) -> None:
        view, size, start = memoryview(lines), len(lines), 0
        while start < size:
            end = size
            if size - start > limit_bytes:
                end = lines.rfind(b"\n", start, start + limit_bytes) + 1 or lines.find(b"\n", start) + 1 or size
            try:
                start += os.write(fd, view[start:end])
            except BlockingIOError:  # somebody who shares the descriptor has made it so
                poll = select.poll()
                poll.register(fd, select.POLLOUT)
                poll.poll()

    return write
