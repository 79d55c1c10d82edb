"""What the tests of control share: a worker that answers from a script, a log that remembers, the stand-in children's command lines."""

import asyncio
import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sglfast.control.supervisor import Commands

ROOT = Path(__file__).parent.parent
STANDIN = str(Path(__file__).parent / "control_standin.py")
WAIT_S = 20.0  # bound of every wait; only a failing test spends it
SECRET = "s3cr3t-of-the-worker"


def standin(role: str, *behaviour: str) -> tuple[str, ...]:
    """Command line of a stand-in child, see control_standin.py."""
    return (sys.executable, STANDIN, role, *behaviour)


def standins(*, index: Sequence[str] = ("serve",), shard: Sequence[str] = ("serve",)) -> Commands:
    """Stand-ins for both kinds of children, with the behaviour of each."""
    return Commands(index=standin("index", *index), shard=standin("shard", *shard))


def answer(body: Any = b"", status: int = 200, *, claims_bytes: int | None = None) -> bytes:
    """Raw HTTP answer; other than bytes the body becomes JSON. claims_bytes: content-length, when it is not to be true."""
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    size = len(data) if claims_bytes is None else claims_bytes
    return b"HTTP/1.1 %d Some\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, size, data)


def server_info(**fields: Any) -> bytes:
    """A good `/server_info` answer of an engine that publishes KV events, secrets included. fields: instead of, or besides."""
    kv = {
        "publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 5557, "topic": "kv", "block_size": 64, "dp_size": 2,
        "replay_endpoint_port_base": 5657,
    }  # fmt: skip
    secrets = {"api_key": SECRET, "admin_api_key": SECRET, "ssl_keyfile_password": SECRET, "launch_command": f"--api-key {SECRET}"}
    body = {"served_model_name": "m1", "version": "0.5.23", "startup_time": 1.5, "disaggregation_mode": "null", "kv_events": kv}
    return answer(secrets | body | fields)


NOT_THERE = answer({"detail": "Not Found"}, 404)
GOOD = answer(b"")
HANG = b""  # takes the request and never answers


async def close_server(server: asyncio.Server) -> None:
    """Close a server of asyncio's own loop, which loses the socket of a connection that it has accepted a moment ago."""
    loop = asyncio.get_running_loop()
    for listener in server.sockets:
        loop.remove_reader(listener.fileno())
    for _ in range(4):  # accepted, made a task of, made a transport of, given to the callback
        await asyncio.sleep(0)
    server.close()
    await server.wait_closed()


class ScriptedWorker:
    """An HTTP server whose answers are scripted for each path: raw bytes, one for each request, the last for all that follow."""

    def __init__(self, scripts: Mapping[str, Sequence[bytes]]) -> None:
        self.scripts = scripts
        self.hits: Counter[str] = Counter()
        self.url = ""
        self._port = 0
        self._server: asyncio.Server | None = None
        self._busy: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._is_open = False

    async def __aenter__(self) -> "ScriptedWorker":
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Listen, the second time on the same port."""
        self._is_open = True
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def close(self) -> None:
        """Refuse connections from now on and drop those that are there."""
        self._is_open = False
        if self._server is not None:
            await close_server(self._server)
        for task, writer in self._busy.items():
            task.cancel()
            writer.close()  # here, because a task that has not begun is cancelled without a word
        await asyncio.gather(*self._busy, return_exceptions=True)
        await asyncio.sleep(0)  # what was closed is let go of in the loop's next round

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._is_open:
            writer.close()
            return
        task = asyncio.create_task(self._answer(reader, writer), name="scripted worker")
        self._busy[task] = writer
        task.add_done_callback(self._busy.pop)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ")[1].decode()
            script = self.scripts.get(path, (NOT_THERE,))
            raw = script[min(self.hits[path], len(script) - 1)]
            self.hits[path] += 1
            if raw == HANG:
                await asyncio.sleep(WAIT_S)
            writer.write(raw)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has left
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class Remembered(logging.Handler):
    """Every log line with all that belongs to it, as text."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        self.lines.append(f"{record.levelname} {record.getMessage()} {getattr(record, 'fields', {})} {trace}".strip())

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def remembering_log() -> tuple[logging.Logger, Remembered]:
    """A logger of its own that keeps everything, of any level."""
    log, handler = logging.Logger("control", logging.DEBUG), Remembered()
    log.addHandler(handler)
    return log, handler


def is_there(pid: int) -> bool:
    """Whether there is a process with this pid, be it a zombie."""
    return Path(f"/proc/{pid}").exists()


async def until(is_true: Callable[[], object], what: str) -> None:
    """Wait until it is true; fails naming `what`."""
    end_s = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < end_s, f"waited {WAIT_S:g} s in vain: {what}"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def no_task_is_left() -> AsyncIterator[None]:
    """Fails when the block ends with a task that was not there before."""
    before = asyncio.all_tasks()
    yield
    await asyncio.sleep(0)
    left = {task for task in asyncio.all_tasks() - before if task.get_name() != "scripted worker"}
    assert not left
