"""The owner of child processes: simulated workers and a router for a demo, a comparison or an end-to-end test.

Runs in: `sglfast demo`, `sglfast replay` without --url, tests.
Contract: a Stack is a context manager. Entered, the workers listen and the router's /readyz answers 200; left, in any way, every
    process it started has ended (SIGTERM, after a grace SIGKILL, each by its own pid). If the owner is killed the kernel kills the
    children. Children run in sessions of their own, so that Ctrl-C in a terminal reaches the owner alone. Their output goes to
    files without a name, so that a killed owner leaves none; a child that fails raises StackError with the end of its output.
    The kernel ties children to the thread that starts them: enter a Stack in the main thread, or in one that outlives it.
"""

import contextlib
import functools
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from sglfast.boot import die_with_parent
from sglfast.errors import ConfigError, SglfastError
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH

READY_TIMEOUT_S = 60.0
STOP_GRACE_S = 10.0
POLL_S = 0.05
LOG_TAIL_LINES = 20
SGLFAST = (sys.executable, "-m", "sglfast")


class StackError(SglfastError):
    """A child process that did not start, was not ready in time or ended by itself; the text has the end of its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimSettings:
    """What the simulated workers can do, each of them; None = the simulator's default. mode: null = regular workers."""

    workers: int = 4
    dp_size: int | None = None
    cache_tokens: int | None = None
    page_tokens: int | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    kv_events: bool = True
    replay: bool = True
    tokenizer_path: str = DEMO_TOKENIZER_PATH
    mx_server: str | None = None
    mx_role: Literal["seed", "target"] | None = None
    mx_model_bytes: int | None = None
    mx_bandwidth_bytes_per_s: float | None = None
    mode: Literal["null", "prefill", "decode"] = "null"

    def flags(self) -> list[str]:
        """The flags of `sglfast sim`, on free ports."""
        values = {
            "--dp-size": self.dp_size,
            "--cache-tokens": self.cache_tokens,
            "--page-size": self.page_tokens,
            "--prefill-tokens-per-s": self.prefill_tokens_per_s,
            "--decode-tokens-per-s-per-request": self.decode_tokens_per_s,
            "--mx-server": self.mx_server,
            "--mx-role": self.mx_role,
            "--mx-model-bytes": self.mx_model_bytes,
            "--mx-bandwidth-bytes-per-s": self.mx_bandwidth_bytes_per_s,
        }
        flags = ["--workers", str(self.workers), "--base-port", "0", "--tokenizer-path", self.tokenizer_path]
        if not self.kv_events:
            flags.append("--no-kv-events")
        if not self.replay:
            flags.append("--no-replay")
        if self.mode != "null":
            flags += ["--disaggregation-mode", self.mode]
        if self.mode == "prefill":
            flags += ["--disaggregation-bootstrap-port", "0"]
        for name, value in values.items():
            if value is not None:
                flags += [name, f"{value:g}" if isinstance(value, float) else str(value)]
        return flags


class Child:
    """One child process and its output. `pass_fds`: descriptors that it inherits under the same numbers. `stop` releases all."""

    def __init__(self, name: str, argv: Sequence[str], pass_fds: Sequence[int] = ()) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `stop` closes it
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
            )
        except BaseException:
            self._log.close()
            raise

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def check_alive(self) -> None:
        """Raise StackError if the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise StackError(f"the {self.name} ended by itself (exit code {code}); its last lines:\n{self.log_tail()}")

    def output(self) -> str:
        """All of its output so far."""
        return read_all(self._log.fileno()).decode(errors="replace")

    def log_tail(self) -> str:
        """The last lines of its output."""
        lines = self.output().splitlines()
        return "\n".join(f"  | {line}" for line in lines[-LOG_TAIL_LINES:]) or "  | (no output)"

    def signal_stop(self) -> None:
        """Ask it to end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Ask it to end, kill it after the grace, and wait until it is gone."""
        self.signal_stop()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Stack:
    """Simulated workers with a router in front. url: the router's; worker_urls: the workers', in order.

    port: the router's, 0 = a free one. policy: of `sglfast serve`; serve_flags: more flags for it; has_tokenizer: whether it
    gets the workers' tokenizer; more: further workers, each kind in a process of its own, such as decode workers beside prefill workers.
    """

    def __init__(
        self,
        sim: SimSettings,
        *,
        policy: str = "auto",
        host: str = "127.0.0.1",
        port: int = 0,
        serve_flags: Sequence[str] = (),
        has_tokenizer: bool = True,
        more: Sequence[SimSettings] = (),
    ) -> None:
        self._sim = sim
        self._more = list(more)
        self._flag_of: dict[str, str] = {}  # of the workers that are not --worker-urls
        self._has_tokenizer = has_tokenizer
        self._policy = policy
        self._host = host
        self._port = port
        self._serve_flags = list(serve_flags)
        self.children: list[Child] = []
        self.worker_urls: list[str] = []
        self.url = ""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _start(self) -> None:
        if self._port:
            check_port(self._host, self._port)
        for sim in (self._sim, *self._more):
            urls = self.start_workers("simulator" if sim.mode == "null" else f"{sim.mode} simulator", sim)
            self.worker_urls += urls
            if sim.mode != "null":
                self._flag_of |= dict.fromkeys(urls, f"--{sim.mode}")
        self._start_router()

    def start_workers(self, name: str, sim: SimSettings, *, each_poll: Callable[[Child], None] = lambda child: None) -> list[str]:
        """Start simulated workers and wait until they listen; returns their URLs. each_poll: called again and again meanwhile."""
        with tempfile.TemporaryFile() as announce:
            fd = announce.fileno()
            child = self._run(name, [*SGLFAST, "sim", *sim.flags(), "--announce-fd", str(fd)], [fd])
            return wait_announced(fd, child, each_poll=each_poll)

    def _start_router(self) -> None:
        regular = [url for url in self.worker_urls if url not in self._flag_of]
        serve = [*SGLFAST, "serve", "--worker-urls", *regular, "--host", self._host, "--port", str(self._port)]
        serve += [word for url, flag in self._flag_of.items() for word in (flag, url)]
        serve += ["--policy", self._policy]
        if self._has_tokenizer:
            serve += ["--tokenizer-path", self._sim.tokenizer_path]
        serve += self._serve_flags
        router = self._run("router", serve)
        # Port 0: the router itself takes a free one; a port that was free a moment ago may be anybody's by now.
        port = self._port or wait_listening(router)
        self.url = f"http://[{self._host}]:{port}" if ":" in self._host else f"http://{self._host}:{port}"
        wait_ready(self._host, port, router)

    def _run(self, name: str, argv: Sequence[str], pass_fds: Sequence[int] = ()) -> Child:
        child = Child(name, argv, pass_fds)
        self.children.append(child)
        return child

    def check_alive(self) -> None:
        """Raise StackError if one of the processes has ended."""
        for child in self.children:
            child.check_alive()

    def stop(self) -> None:
        """End all processes: the router first, it drains better while its workers live. May be called twice."""
        for child in reversed(self.children):
            child.stop()
        self.children.clear()


def read_all(fd: int) -> bytes:
    """What a file holds, wherever the writer that shares its offset stands."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


def wait_announced(
    fd: int, child: Child, timeout_s: float = READY_TIMEOUT_S, each_poll: Callable[[Child], None] = lambda child: None
) -> list[str]:
    """Wait until a file has the simulator's line {"workers": [{"url": ...}, ...]}; returns the URLs. Raises StackError."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        each_poll(child)
        line, end, _ = read_all(fd).partition(b"\n")
        if end:
            return [worker["url"] for worker in json.loads(line)["workers"]]
        child.check_alive()
        time.sleep(POLL_S)
    raise StackError(f"the {child.name} was not ready within {timeout_s:.0f} s; its last lines:\n{child.log_tail()}")


def wait_listening(child: Child, pattern: str = r"^listening on http://\S+:(\d+)\b", timeout_s: float = READY_TIMEOUT_S) -> int:
    """Wait for the line in which a child, the router unless told otherwise, says its port; returns it. Raises StackError."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        found = re.search(pattern, child.output(), re.MULTILINE)
        if found is not None:
            return int(found[1])
        child.check_alive()
        time.sleep(POLL_S)
    raise StackError(f"the {child.name} did not listen within {timeout_s:.0f} s; its last lines:\n{child.log_tail()}")


def wait_ready(host: str, port: int, child: Child, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Wait until GET /readyz answers 200. Raises StackError."""
    end_s = time.monotonic() + timeout_s
    last = "nothing listens"
    while time.monotonic() < end_s:
        child.check_alive()
        connection = http.client.HTTPConnection(host, port, timeout=2.0)
        try:
            connection.request("GET", "/readyz")
            status = connection.getresponse().status
            if status == 200:
                return
            last = f"/readyz answers {status}"
        except (OSError, http.client.HTTPException) as error:
            last = f"/readyz: {error or type(error).__name__}"
        finally:
            connection.close()
        time.sleep(POLL_S)
    raise StackError(f"the {child.name} was not ready within {timeout_s:.0f} s ({last}); its last lines:\n{child.log_tail()}")


def check_port(host: str, port: int) -> None:
    """Raise ConfigError, with another port to try, if the router could not listen there."""
    try:
        _bound(host, port).close()
        return
    except OSError as error:
        reason = error.strerror or str(error)
    for other in range(port + 1, min(port + 100, 65536)):
        with contextlib.suppress(OSError):
            _bound(host, other).close()
            raise ConfigError(f"port {port} on {host} cannot be used ({reason}); try --port {other}")
    raise ConfigError(f"port {port} on {host} cannot be used ({reason})")


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    probe = socket.socket(family, socket.SOCK_STREAM)
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the router does: only listeners count
        probe.bind((host, port))
        probe.listen(1)
    except BaseException:
        probe.close()
        raise
    return probe
