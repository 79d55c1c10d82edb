"""Shards for tests: a real one as a process beside scripted workers, and the same object inside a test's own event loop.

`Edge` does what control does for one shard: shared memory, worker table, listening socket, `python -m sglfast.edge.main`. After
every test `settle` asserts that the shard lives, has logged no error, holds no connection, and that every gauge is back at 0.
The fixtures here are every test file's that has none of the same name (conftest.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from array import array
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import pytest
import uvloop
from raw_client import WAIT_S, Answer, Client
from scripted_worker import Worker

from sglfast import _counters, _segment, _workers, shm
from sglfast._counters import Totals
from sglfast._workers import WorkerTable
from sglfast.boot import Boot
from sglfast.config import ServeConfig, check, to_json
from sglfast.edge.server import ClientConnection
from sglfast.edge.shard import Shard
from sglfast.edge.upstream import UpstreamConnection
from sglfast.shm import Role, WorkerRecord, WorkerView, put_worker

ROOT = Path(__file__).parent.parent
# One attempt and no memory of failures, unless a test asks for more: it is to see what the request path itself does.
PLAIN = {"policy": "round_robin", "request_log": "off", "disable_retries": True, "disable_circuit_breaker": True}
BOOTSTRAP_PORT = 8900
T = TypeVar("T")


class HasUrl(Protocol):
    url: str


def wait_until(is_true: Callable[[], T], what: str | Callable[[], str], within_s: float = WAIT_S) -> T:
    """The first true value of `is_true`."""
    deadline = time.monotonic() + within_s
    while not (found := is_true()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.005)
    return found


class Memory:
    """The shared memory of a program, with these workers in its table; worker i has rank i, and BOOTSTRAP_PORT + i if it is for prefill.

    dp_size: ranks of each worker, from i * dp_size on; rank_ways: as WorkerRecord has it.
    """

    def __init__(
        self, urls: Sequence[str], *, models: Sequence[str | None] = (), shards: int = 1, block_size: int = 0, prediction_blocks: int = 0,
        takes_rid: bool = False, roles: Sequence[Role] = (), dp_size: int = 1, rank_ways: str = "",
    ) -> None:  # fmt: skip
        self.takes_rid = takes_rid
        self.dp_size = dp_size
        self.rank_ways = rank_ways
        self.roles = list(roles) or ["regular"] * len(urls)
        self.urls = list(urls)
        self.models = list(models) or ["demo"] * len(urls)
        self.block_size = block_size
        sizes = {"max_workers": 64, "max_ranks": 64, "capacity_blocks": 1 << 12}
        self.fd, self.segment = shm.create(max_shards=shards, prediction_blocks=prediction_blocks, **sizes)
        self.close_fd = weakref.finalize(self, os.close, self.fd)  # tests make thousands of them
        self.table = WorkerTable(self.segment)
        self.totals = Totals(self.segment)
        for worker_idx in range(len(urls)):
            self.put(worker_idx)
        self.segment.state = _segment.SERVING

    def put(self, worker_idx: int, state: int = _workers.READY, *, is_new: bool = True, url: str = "", **fields: Any) -> None:
        """Write a worker's slot; is_new gives it a new generation, as another worker in this slot would have.

        fields: of WorkerView; rank i is worker i's unless rank_base says otherwise.
        """
        role = self.roles[worker_idx]
        port = BOOTSTRAP_PORT + worker_idx if role == "prefill" else None
        record = WorkerRecord(
            url=url or self.urls[worker_idx], model=self.models[worker_idx], takes_rid=self.takes_rid, role=role, bootstrap_port=port,
            rank_ways=self.rank_ways,
        )  # fmt: skip
        own = {"rank_base": worker_idx * self.dp_size, "dp_size": self.dp_size, "block_size": self.block_size, "bigram": False}
        given = own | fields
        put_worker(self.table, WorkerView(worker_idx=worker_idx, generation=0, state=state, record=record, **given), is_new=is_new)

    def put_record(self, worker_idx: int, **record: Any) -> None:
        """Change what the worker's record says."""
        old = next(view for view in shm.read_workers(self.table) if view.worker_idx == worker_idx)
        new = msgspec.structs.replace(old, record=msgspec.structs.replace(old.record, **record))
        put_worker(self.table, new, is_new=False)

    def word(self, word: int) -> int:
        """A word of the shards, summed."""
        return self.totals.shard()[word]

    def worker_word(self, worker_idx: int, word: int) -> int:
        return self.totals.worker(worker_idx)[word]

    def inflight(self) -> dict[str, int]:
        """What the workers count as load, where it is not 0."""
        return {name: value for name, value in self.gauges().items() if "INFLIGHT" in name}

    def gauges(self) -> dict[str, int]:
        """All gauges that are not 0."""
        names = {value: name for name, value in vars(_counters).items() if name.startswith("S_")}
        found = {names[word]: self.word(word) for word in _counters.GAUGES_SHARD}
        worker_names = {value: name for name, value in vars(_counters).items() if name.startswith("W_")}
        for worker_idx in range(len(self.urls)):
            row = self.totals.worker(worker_idx)
            found |= {f"{worker_names[word]} of worker {worker_idx}": row[word] for word in _counters.GAUGES_WORKER}
        for rank in range(self.segment.max_ranks):
            requests, tokens = self.totals.rank(rank)
            found |= {f"INFLIGHT_REQUESTS of rank {rank}": requests, f"INFLIGHT_TOKENS of rank {rank}": tokens}
        return {name: value for name, value in found.items() if value}


class Edge(Memory):
    """A running shard. `settings` are those of ServeConfig."""

    def __init__(
        self, workers: Sequence[HasUrl], *, models: Sequence[str | None] = (), shards: int = 1, block_size: int = 0,
        control_address: str = "", takes_rid: bool = False, roles: Sequence[Role] = (), dp_size: int = 1, rank_ways: str = "",
        **settings: Any,
    ) -> None:  # fmt: skip
        urls = [worker.url for worker in workers]
        super().__init__(
            urls, models=models, shards=shards, block_size=block_size, takes_rid=takes_rid, roles=roles, dp_size=dp_size,
            rank_ways=rank_ways,
        )  # fmt: skip
        self.workers = workers
        settings = {"worker_urls": tuple(self.urls), "shards": shards, **PLAIN, **settings}
        self.config = check(ServeConfig(**settings))
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = listener.getsockname()[1]
        self.control, control = socket.socketpair()
        config_fd = os.memfd_create("config")
        os.write(config_fd, to_json(self.config))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        inherited = {"--shm-fd": self.fd, "--config-fd": config_fd, "--control-fd": control.fileno(), "--listen-fd": listener.fileno()}
        arguments = {**inherited, "--parent-pid": os.getpid(), "--shard": 0, "--control-address": control_address}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sglfast.edge.main", *(str(item) for pair in arguments.items() for item in pair)],
            pass_fds=tuple(inherited.values()),
            stderr=self._log,
            cwd=ROOT,
        )
        os.close(config_fd)
        control.close()
        listener.close()
        self.allowed_log: tuple[str, ...] = ()
        try:
            wait_until(lambda: self.is_ready or self.process.poll() is not None, "the shard is ready")
            assert self.process.poll() is None, self.log()
        except BaseException:
            self.close()
            raise
        self._sockets_at_rest = self.open_sockets()

    def __enter__(self) -> Edge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the shard: control's end goes away."""
        self.control.close()
        try:
            self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the shard did not stop when control went away:\n{self.log()}") from None
        finally:
            self.close_fd()
            self._log.close()

    @property
    def is_ready(self) -> bool:
        return self.segment.process_info(1)[4]

    def client(self, rcvbuf_bytes: int = 0) -> Client:
        return Client(self.port, rcvbuf_bytes)

    def ask(self, data: bytes) -> Answer:
        """One request on a connection of its own."""
        with self.client() as client:
            return client.ask(data)

    def log(self) -> str:
        """All that the shard has logged."""
        self._log.seek(0)
        return self._log.read().decode()

    def open_sockets(self) -> int:
        """Sockets that the process holds."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        found = 0
        for entry in os.listdir(folder):
            try:
                found += os.readlink(folder / entry).startswith("socket:")
            except OSError:
                continue
        return found

    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def settle(self) -> None:
        """What must hold after every test, whatever it did."""
        for worker in self.workers:
            if isinstance(worker, Worker):
                worker.reset()
        wait_until(lambda: not self.gauges() or self.process.poll() is not None, lambda: f"gauges back to 0: {self.gauges()}")
        assert self.process.poll() is None, f"the shard died:\n{self.log()}"
        wait_until(lambda: self.open_sockets() <= self._sockets_at_rest, "the shard holds no connection")
        wrong = [line for line in self.log().splitlines() if not any(allowed in line for allowed in self.allowed_log)]
        assert not wrong, "the shard logged:\n" + "\n".join(wrong)
        for worker in self.workers:
            if isinstance(worker, Worker):
                errors, worker.errors = worker.errors, []
                assert not errors


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    """Three workers that do as a test tells them; `worker` is the first."""
    workers = [Worker("first"), Worker("second"), Worker("third")]
    yield workers
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def worker(workers: list[Worker]) -> Worker:
    return workers[0]


@pytest.fixture(scope="module")
def patient_shard(worker: Worker) -> Iterator[Edge]:
    """A shard before that worker, of default settings but for PLAIN; tests take it as `edge`."""
    with Edge([worker]) as edge:
        yield edge


@pytest.fixture
def edge(patient_shard: Edge) -> Iterator[Edge]:
    with settled(patient_shard):
        yield patient_shard


@contextmanager
def settled(edge: Edge) -> Iterator[Edge]:
    """For one test: the shard, and what must hold of it afterwards."""
    yield edge
    edge.settle()


# ---- the same in the test's own process ----


class StubTransport(asyncio.Transport):
    """A transport that keeps what was written; a test plays the network."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_paused = False
        self.is_closed = False
        self.is_aborted = False
        self.has_eof = False
        self.unsent_bytes = 0

    def write(self, data: Any) -> None:
        assert not self.is_closed, "written after close"
        self.written += data

    def writelines(self, pieces: Any) -> None:
        self.write(b"".join(pieces))

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_closed

    def write_eof(self) -> None:
        self.has_eof = True

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return self.unsent_bytes

    def take(self) -> bytes:
        """What was written since the last call."""
        out, self.written = self.written, b""
        return out


def shard_in_loop(memory: Memory, keyer: Any = None, shard: int = 0, **settings: Any) -> Shard:
    """A Shard of the running loop; nothing ticks unless the test calls `tick`."""
    config = check(ServeConfig(worker_urls=tuple(memory.urls), shards=1, **PLAIN | settings))
    boot = Boot(config, memory.segment, None, shard, None, "")  # type: ignore[arg-type]
    return Shard(boot, asyncio.get_running_loop(), keyer, logging.getLogger("test"))


def stub_client(shard: Shard) -> tuple[ClientConnection, StubTransport]:
    """A client connection whose network the test plays."""
    connection, transport = ClientConnection(shard), StubTransport()
    connection.connection_made(transport)
    return connection, transport


def stub_upstream(shard: Shard, position: int = 0) -> tuple[UpstreamConnection, StubTransport]:
    """An idle connection to a worker of the only pool; the next request to that worker takes it."""
    shard.router.refresh()
    assert shard.router.only is not None
    upstream = shard.router.only.upstreams[position]
    connection, transport = UpstreamConnection(upstream), StubTransport()
    connection.connection_made(transport)
    upstream.give_back(connection)
    return connection, transport


def run(test: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop, as a shard does, within the bound of a wait."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(test, WAIT_S))


def in_process(test: Any) -> None:
    """Run `test(shard, connection, transport)` on a connection whose network the test plays."""
    memory = Memory(["http://127.0.0.1:9"])

    async def wrapped() -> None:
        shard = shard_in_loop(memory)
        await test(shard, *stub_client(shard))

    run(wrapped())


def indexes(*worker_idxs: int) -> array[int]:
    return array("i", worker_idxs)
