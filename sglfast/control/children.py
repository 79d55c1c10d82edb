"""One child process of control: its start, its end, its last words.

Runs in: control, main thread (the kernel kills a child when the thread that started it ends, see boot.py). Contract: a child inherits
    exactly the descriptors named on its command line. Its standard error comes through a pipe: whole lines are handed on, and the last
    one is kept for the message about its death. Request lines take another way (log_fd): there are too many of them to come
    through here. It is in a process group of its own: Ctrl-C in a terminal reaches control alone. All descriptors are
    closed when the child has ended.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglfast.boot import SETTINGS, STOP, UNUSABLE_SETTINGS
from sglfast.config.sources import without_settings

_LINE_LIMIT_BYTES = 64 << 10
_WORDS_LIMIT = 500  # characters of the last line in a message


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What every child gets. shm_fd: the segment; config_fd: memfd with the settings; control_address: `@name` of the admin socket;
    log_fd: our standard error, for shards; take_lines: gets the lines that a child writes to its own, and must not wait; maps_fd: the
    file of the token route's maps, for index."""

    shm_fd: int
    config_fd: int
    control_address: str
    log_fd: int
    take_lines: Callable[[bytes], None]
    maps_fd: int | None = None


class Child:
    """A running child. on_exit is called once, in the loop, when it has ended and was waited for.

    command: what to run, without the arguments of boot.py. Raises OSError when it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        inheritance: Inheritance,
        shard: int,
        listener: socket.socket | None,
        on_exit: Callable[["Child"], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_exit = on_exit
        self._take_lines = inheritance.take_lines
        self._line = b""
        self.last_line = ""
        self.started_s = self._loop.time()
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            mine, its = socket.socketpair()
            self._control = ours.enter_context(mine)
            theirs.enter_context(its)
            self._stderr_fd, its_stderr_fd = os.pipe()
            ours.callback(os.close, self._stderr_fd)
            theirs.callback(os.close, its_stderr_fd)
            mine.setblocking(False)
            os.set_blocking(self._stderr_fd, False)
            fds = {"--shm-fd": inheritance.shm_fd, "--config-fd": inheritance.config_fd, "--control-fd": its.fileno()}
            argv = [*command, "--parent-pid", str(os.getpid())]
            if listener is not None:
                fds |= {"--listen-fd": listener.fileno(), "--log-fd": inheritance.log_fd}
                argv += ["--shard", str(shard), "--control-address", inheritance.control_address]
            elif inheritance.maps_fd is not None:
                fds["--maps-fd"] = inheritance.maps_fd
            for flag, fd in fds.items():
                argv += [flag, str(fd)]
            self._process = subprocess.Popen(
                argv, env=without_settings(os.environ), stdin=subprocess.DEVNULL, stderr=its_stderr_fd, pass_fds=tuple(fds.values()),
                process_group=0,
            )  # fmt: skip
            try:
                self._pid_fd = os.pidfd_open(self._process.pid)
            except OSError:
                self._process.kill()
                self._process.wait()
                raise
            ours.callback(os.close, self._pid_fd)
            self._ours = ours.pop_all()
        self._loop.add_reader(self._stderr_fd, self._read_stderr)
        self._loop.add_reader(self._pid_fd, self._exited)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def cannot_work(self) -> bool:
        """Whether it has ended because its settings cannot work: its last line says why."""
        return self._process.returncode == UNUSABLE_SETTINGS

    @property
    def was_killed(self) -> bool:
        """Whether it has ended by a signal that somebody sends; what a process does wrong raises others."""
        return self._process.returncode in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)

    def describe_end(self) -> str:
        """How it ended, with its last line on standard error: `exit code 1: ValueError: ...`."""
        code = self._process.returncode
        if code is None:
            return "still running"
        if code < 0:
            with contextlib.suppress(ValueError):
                return _with_words(f"killed by {signal.Signals(-code).name}", self.last_line)
        return _with_words(f"exit code {code}", self.last_line)

    def tell_to_stop(self) -> None:
        """Send the byte that ends a shard."""
        with contextlib.suppress(OSError):
            self._control.send(STOP)

    def tell_settings(self, config_fd: int) -> None:
        """Hand it a memfd with new settings; a child that has just started takes them after those it was started with."""
        with contextlib.suppress(OSError):
            socket.send_fds(self._control, [SETTINGS], [config_fd])

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the process, and no other that may get its pid later."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pid_fd, number)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pid_fd)
        self._process.wait()
        self._read_stderr()  # its last words may still be in the pipe
        self._loop.remove_reader(self._stderr_fd)
        self._forward(self._line)
        self._ours.close()
        self._on_exit(self)

    def _read_stderr(self) -> None:
        """Take what there is. A grandchild may keep the pipe open, so its end is not waited for."""
        while True:
            try:
                data = os.read(self._stderr_fd, _LINE_LIMIT_BYTES)
            except BlockingIOError:
                return
            if not data:
                self._loop.remove_reader(self._stderr_fd)
                return
            whole, newline, rest = (self._line + data).rpartition(b"\n")
            if len(rest) > _LINE_LIMIT_BYTES:
                whole, newline, rest = whole + newline + rest, b"", b""
            self._line = rest
            self._forward(whole + newline)

    def _forward(self, lines: bytes) -> None:
        words = next((line for line in reversed(lines.splitlines()) if line.strip()), b"")
        if words:
            self.last_line = words.decode(errors="replace").strip()[-_WORDS_LIMIT:]
        if lines:
            self._take_lines(lines)


def _with_words(end: str, words: str) -> str:
    return f"{end}: {words}" if words else end
