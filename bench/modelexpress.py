"""A fleet of seeds on one metadata service: heartbeats and listings at fixed rates, how long they take, what memory does.

    .venv/bin/python bench/modelexpress.py                          1,000 seeds x 8 ranks, a heartbeat every 30 s, 100 lists/s, 60 s
    .venv/bin/python bench/modelexpress.py --models 1               all seeds hold one model: each list is 8,000 lines
    .venv/bin/python bench/modelexpress.py --storage redis://...    another storage than SQLite in a temporary file
    .venv/bin/python bench/modelexpress.py --duration-secs 600 --max-p99-ms 20

The service runs in a process of its own. Calls are sent when they are due, whether or not earlier ones were answered, and their time
counts from when they were due: a service that falls behind shows it. Every listing is counted line by line (its bytes, not
decoded); an answer that is not whole is a failure. Memory is the service's resident set.
"""

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from sglfast.modelexpress.schema import P2P_SERVICE, p2p

ROOT = Path(__file__).parent.parent
CHANNELS = 8
CALL_TIMEOUT_S = 30.0
WARM_UP_S = 5.0
PUBLISHES_AT_ONCE = 64


@dataclass
class Fleet:
    """How much there is. Rates are per second of real time: the heartbeat interval is that of every single rank."""

    seeds: int = 1000
    ranks: int = 8
    models: int = 10
    tensors: int = 40
    lists_per_s: float = 100.0
    interval_s: float = 30.0
    duration_s: float = 60.0

    @property
    def records(self) -> int:
        """Ranks of all seeds."""
        return self.seeds * self.ranks

    @property
    def listed(self) -> int:
        """Lines of each listing."""
        return self.seeds // self.models * self.ranks


@dataclass
class Result:
    """Milliseconds of every call, and resident bytes of the service, sampled once a second after the warm-up."""

    list_ms: list[float] = field(default_factory=list)
    update_ms: list[float] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)
    cpu_share: float = 0.0
    failures: list[str] = field(default_factory=list)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that is not below `share` of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Service:
    """`sglfast modelexpress serve` as a process; a context manager."""

    def __init__(self, storage: str, log: Path) -> None:
        command = [sys.executable, "-m", "sglfast", "modelexpress", "serve", "--port", "0", "--metrics-port", "-1", "--storage", storage]
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert self._process.stdout is not None
        found = re.search(r"serving 127\.0\.0\.1:(\d+)", self._process.stdout.readline())
        if found is None:
            self.__exit__()
            raise SystemExit(f"the service did not start:\n{log.read_text()}")
        self.address = f"127.0.0.1:{found[1]}"

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def resident_bytes(self) -> int:
        """Resident set of the process."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) * 1024

    def cpu_s(self) -> float:
        """User plus system time so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100


class Load:
    """The seeds and the targets of a fleet."""

    def __init__(self, fleet: Fleet, service: Service, say: Callable[[str], None]) -> None:
        self._fleet, self._service, self._say = fleet, service, say
        self.result = Result()

    async def run(self) -> Result:
        """Publish everything, then heartbeats and listings for the fleet's duration."""
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(self._service.address, options=options) for _ in range(CHANNELS)]
        try:
            self._channels = channels
            begun_s = time.perf_counter()
            await self._announce()
            self._say(f"{self._fleet.records} records published in {time.perf_counter() - begun_s:.1f} s")
            await self._work()
        finally:
            for channel in channels:
                await channel.close()
        return self.result

    async def _call(self, method: str, n: int, request: bytes) -> bytes:
        call: Any = self._channels[n % CHANNELS].unary_unary(f"/{P2P_SERVICE}/{method}")
        answer: bytes = await call(request, timeout=CALL_TIMEOUT_S)
        return answer

    async def _announce(self) -> None:
        gate = asyncio.Semaphore(PUBLISHES_AT_ONCE)
        tensors = [
            p2p.TensorDescriptor(name=f"model.layers.{i}.weight", addr=1 << 40 | i, size=1 << 24) for i in range(self._fleet.tensors)
        ]
        self._updates: list[bytes] = []
        self._requests = [
            p2p.ListSourcesRequest(identity=self._identity(model), status_filter=p2p.SOURCE_STATUS_READY).SerializeToString()
            for model in range(self._fleet.models)
        ]

        async def seed(n: int) -> None:
            for rank in range(self._fleet.ranks):
                worker_id = f"{n:06d}-{rank}"
                worker = p2p.WorkerMetadata(worker_rank=rank, transfer_engine_session_id=f"10.{n >> 8}.{n & 255}.1:1", tensors=tensors)
                request = p2p.PublishMetadataRequest(identity=self._identity(n % self._fleet.models), worker_id=worker_id, worker=worker)
                async with gate:
                    data = await self._call("PublishMetadata", n, request.SerializeToString())
                    source_id = p2p.PublishMetadataResponse.FromString(data).mx_source_id
                    update = p2p.UpdateStatusRequest(mx_source_id=source_id, worker_id=worker_id, worker_rank=rank)
                    update.status = p2p.SOURCE_STATUS_READY
                    self._updates.append(update.SerializeToString())
                    await self._beat(self._updates[-1], time.perf_counter(), n)

        await asyncio.gather(*map(seed, range(self._fleet.seeds)))
        self.result.update_ms.clear()

    def _identity(self, model: int) -> p2p.SourceIdentity:
        return p2p.SourceIdentity(
            model_name=f"org/model-{model}", backend_framework=p2p.BACKEND_FRAMEWORK_SGLANG, tensor_parallel_size=self._fleet.ranks,
            pipeline_parallel_size=1, expert_parallel_size=1, dtype="bfloat16",
        )  # fmt: skip

    async def _work(self) -> None:
        fleet = self._fleet
        updates, lists = self._updates, self._requests
        duration_s = fleet.duration_s + WARM_UP_S
        beats = self._at_rate(fleet.records / fleet.interval_s, duration_s, lambda i, due: self._beat(updates[i % len(updates)], due, i))
        listings = self._at_rate(fleet.lists_per_s, duration_s, lambda i, due: self._look(lists[i % len(lists)], due, i))
        await asyncio.gather(beats, listings, self._sample(duration_s))

    async def _at_rate(self, rate_per_s: float, duration_s: float, call: Callable[[int, float], Awaitable[None]]) -> None:
        """Begin a call at each of its times; end when all are answered."""
        begun_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for i in range(round(rate_per_s * duration_s)):
                due_s = begun_s + i / rate_per_s
                if (wait_s := due_s - time.perf_counter()) > 0:
                    await asyncio.sleep(wait_s)
                if i == round(rate_per_s * WARM_UP_S):
                    self.result.list_ms.clear()
                    self.result.update_ms.clear()
                tasks.create_task(_finish(call(i, due_s)))

    async def _beat(self, request: bytes, due_s: float, n: int) -> None:
        answer = p2p.UpdateStatusResponse.FromString(await self._call("UpdateStatus", n, request))
        self.result.update_ms.append((time.perf_counter() - due_s) * 1000)
        if not answer.success:
            self.result.failures.append(answer.message)

    async def _look(self, request: bytes, due_s: float, n: int) -> None:
        answer = await self._call("ListSources", n, request)
        self.result.list_ms.append((time.perf_counter() - due_s) * 1000)
        if (lines := answer.count(b"org/model-")) != self._fleet.listed:
            self.result.failures.append(f"a listing of {lines} lines instead of {self._fleet.listed}")

    async def _sample(self, duration_s: float) -> None:
        await asyncio.sleep(WARM_UP_S)
        begun_s, begun_cpu_s = time.perf_counter(), self._service.cpu_s()
        while (passed_s := time.perf_counter() - begun_s) < duration_s - WARM_UP_S:
            self.result.resident_bytes.append(self._service.resident_bytes())
            await asyncio.sleep(1.0)
        self.result.cpu_share = (self._service.cpu_s() - begun_cpu_s) / passed_s


async def _finish(call: Awaitable[None]) -> None:
    await call


def table(fleet: Fleet, result: Result) -> Table:
    """What was measured."""
    found = Table(title=f"{fleet.seeds} seeds x {fleet.ranks} ranks, {fleet.models} models, {fleet.duration_s:g} s")
    for name in ("call", "calls/s", "p50 ms", "p99 ms", "max ms"):
        found.add_column(name, justify="left" if name == "call" else "right")
    for name, values in ((f"list of {fleet.listed}", result.list_ms), ("heartbeat", result.update_ms)):
        row = [f"{value:.1f}" for value in (percentile(values, 0.5), percentile(values, 0.99), max(values))]
        found.add_row(name, f"{len(values) / fleet.duration_s:.0f}", *row)
    return found


def main() -> int:
    """Run; exit code 1 when calls failed or the p99 of listings is above --max-p99-ms."""
    parser = argparse.ArgumentParser(description="Heartbeats and listings of a fleet against one ModelExpress metadata service.")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--models", type=int, default=10, help="seeds are spread over this many; a listing has the lines of one")
    parser.add_argument("--lists-per-s", type=float, default=100.0)
    parser.add_argument("--interval-secs", type=float, default=30.0, help="time between heartbeats of a rank")
    parser.add_argument("--duration-secs", type=float, default=60.0)
    parser.add_argument("--storage", help="default: SQLite in a temporary folder")
    parser.add_argument("--max-p99-ms", type=float, help="fail when the p99 of listings is above")
    options = parser.parse_args()
    fleet = Fleet(
        seeds=options.seeds, ranks=options.ranks, models=options.models, lists_per_s=options.lists_per_s,
        interval_s=options.interval_secs, duration_s=options.duration_secs,
    )  # fmt: skip
    console = Console()
    with tempfile.TemporaryDirectory() as folder, Service(options.storage or f"{folder}/db", Path(folder, "log")) as service:
        result = asyncio.run(Load(fleet, service, console.print).run())
    console.print(table(fleet, result))
    memory = [size / 2**20 for size in result.resident_bytes]
    first, last, most = (f"{value:.0f}" for value in (memory[0], memory[-1], max(memory)))
    console.print(f"service: {result.cpu_share:.0%} of a core; memory {first} MiB at first, {last} at the end, {most} at most")
    if result.failures:
        console.print(f"{len(result.failures)} calls failed, the first: {result.failures[0]}")
        return 1
    p99_ms = percentile(result.list_ms, 0.99)
    return int(options.max_p99_ms is not None and p99_ms > options.max_p99_ms)


if __name__ == "__main__":
    sys.exit(main())
