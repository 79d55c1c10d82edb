"""One shard with 10,000 idle connections and 2,000 slow clients beside normal traffic: what that does to the normal traffic and to memory.

    .venv/bin/python bench/connections.py                     prints a table
    .venv/bin/python bench/connections.py --check             exit code 1 unless all limits hold
    .venv/bin/python bench/connections.py --idle 10000 --slow 2000 --rate 1000 --seconds 10 --json

Phases: the normal load alone; idle connections open (memory, CPU of keeping them); slow clients come; the normal load beside both; all
leave (descriptors); the normal load alone again; the idle ones once more (memory must not grow a second time).
The router is on one core, all peers on another. Limits of --check: p99 of the normal load at most 2 x, under 10 KB of memory for
an idle connection, every normal request answered, no descriptor left behind.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compare import cores, machine
from contenders import Setting, free_ports, start_router
from processes import TICKS_PER_S, BenchError, PinnedProcess, tree

_PEERS = Path(__file__).parent / "connection_peers.py"
MAX_RATIO = 2.0
MAX_IDLE_BYTES = 10_000
_SETTLE_TIMEOUT_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Normal traffic of one shard beside idle connections and slow clients.")
    parser.add_argument("--idle", type=int, default=10_000, help="idle connections (default: 10000)")
    parser.add_argument("--slow", type=int, default=2_000, help="slow clients (default: 2000)")
    parser.add_argument("--rate", type=float, default=1000.0, help="normal requests a second (default: 1000)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement (default: 10)")
    parser.add_argument("--cores", help="ROUTER,PEERS: the two cores to use (default: the first two)")
    parser.add_argument("--check", action="store_true", help="exit code 1 unless all limits hold")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of a table")
    options = parser.parse_args()
    try:
        report = measure(options)
    except BenchError as error:
        print(f"connections: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=1) if options.json else table(report))
    missed = misses(report)
    for line in missed if options.check else ():
        print(f"MISSED: {line}", file=sys.stderr)
    return int(options.check and bool(missed))


class Shard:
    """What /proc says of the router's serving process."""

    def __init__(self, router: PinnedProcess) -> None:
        self.pid = next(pid for pid in tree(router.pid) if b"sglfast.edge.main" in Path(f"/proc/{pid}/cmdline").read_bytes())

    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def cpu_share(self, seconds: float) -> float:
        """CPU time of the next `seconds` as a share of them."""
        begun_s, before_s = time.monotonic(), self.cpu_s()
        time.sleep(seconds)
        return (self.cpu_s() - before_s) / (time.monotonic() - begun_s)


class Peers:
    """A process of connection_peers.py that is told what to do by lines. Use as a context manager."""

    def __init__(self, core: int, *arguments: object) -> None:
        command = [sys.executable, str(_PEERS), *map(str, arguments)]
        self.name = str(arguments[0])
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, {core})
        )

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def hear(self) -> dict[str, Any]:
        """The next line that it says. Raises BenchError when it ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"the {self.name} clients ended without a result")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, line: object = "") -> dict[str, Any]:
        """Say a line and hear the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self.hear()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All phases. Raises BenchError."""
    router_core, peer_core = cores(options.cores)
    with tempfile.TemporaryDirectory(prefix="sglfast-connections-") as name, contextlib.ExitStack() as running:
        folder = Path(name)
        (port,) = free_ports(1)
        worker = PinnedProcess("worker", [sys.executable, str(_PEERS), "worker", str(port)], peer_core, folder / "worker.log")
        running.enter_context(worker)
        worker.wait_until_ready(f"http://127.0.0.1:{port}/health")
        router = start_router("sglfast", Setting(router_core, (port,), folder))
        running.enter_context(router.process)
        shard = Shard(router.process)
        normal = running.enter_context(Peers(peer_core, "normal", router.port, options.rate))
        normal.hear()
        report: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "machine": machine(),
            "idle": options.idle,
            "slow": options.slow,
            "rate": options.rate,
        }

        def load() -> dict[str, Any]:
            before_s = shard.cpu_s()
            found = normal.ask(options.seconds)
            return {**found, "core_busy": round((shard.cpu_s() - before_s) / options.seconds, 3)}

        progress("normal load alone")
        normal.ask(2)
        report["alone_before"] = load()
        report["files_before"], report["rss_before"] = shard.files(), shard.rss_bytes()
        report["resting_share"] = round(shard.cpu_share(5.0), 4)
        with idle_clients(peer_core, router.port, options.idle) as (idle, opened):
            progress(f"idle connections: {opened}")
            report["idle_opened"] = opened
            report["idle_files"] = shard.files() - report["files_before"]
            report["idle_bytes"] = round((shard.rss_bytes() - report["rss_before"]) / options.idle)
            report["idle_share"] = round(shard.cpu_share(5.0), 4)
            report["beside_idle"] = load()
            with Peers(peer_core, "slow", router.port, options.slow) as slow:
                progress(f"slow clients: {slow.hear()}")
                time.sleep(3.0)  # buffers of the slow readers fill
                report["slow_rss_bytes"] = shard.rss_bytes() - report["rss_before"]
                report["slow_share"] = round(shard.cpu_share(5.0), 4)
                report["beside_all"] = load()
                report["slow_at_end"] = slow.ask()
            report["idle_at_end"] = idle.ask()
        progress("all have left")
        report["files_after"] = settled(shard, report["files_before"])
        report["alone_after"] = load()
        report["files_after"] = settled(shard, report["files_before"])
        rss_before = shard.rss_bytes()
        with idle_clients(peer_core, router.port, options.idle):
            report["idle_bytes_again"] = round((shard.rss_bytes() - rss_before) / options.idle)
        settled(shard, report["files_before"])
    alone = (report["alone_before"]["p99_us"] + report["alone_after"]["p99_us"]) / 2
    report["p99_ratio"] = round(report["beside_all"]["p99_us"] / alone, 2)
    return report


@contextlib.contextmanager
def idle_clients(core: int, port: int, count: int) -> Iterator[tuple[Peers, dict[str, Any]]]:
    with Peers(core, "idle", port, count) as idle:
        yield idle, idle.hear()


def settled(shard: Shard, files: int) -> int:
    """Descriptors of the shard when they are back at `files`, or when waiting for that was in vain."""
    end_s = time.monotonic() + _SETTLE_TIMEOUT_S
    while (found := shard.files()) > files and time.monotonic() < end_s:
        time.sleep(0.1)
    return found


def misses(report: dict[str, Any]) -> list[str]:
    """Sentences on the limits that do not hold."""
    failures = sum(report[phase]["failures"] for phase in ("alone_before", "beside_idle", "beside_all", "alone_after"))
    held = {
        f"p99 of the normal load is {report['p99_ratio']} x, over {MAX_RATIO}": report["p99_ratio"] <= MAX_RATIO,
        f"an idle connection takes {report['idle_bytes']} bytes, over {MAX_IDLE_BYTES}": report["idle_bytes"] < MAX_IDLE_BYTES,
        f"{report['files_after'] - report['files_before']} descriptors are left": report["files_after"] <= report["files_before"],
        f"{failures} normal requests were not answered well": not failures,
        f"the router closed idle connections: {report['idle_at_end']}": report["idle_at_end"]["open_at_end"] == report["idle"],
    }
    return [sentence for sentence, is_held in held.items() if not is_held]


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'normal load':16}{'p50 us':>9}{'p99 us':>9}{'whole':>9}{'max':>9}{'answers':>9}{'failed':>8}{'core busy':>11}"]
    for phase in ("alone_before", "beside_idle", "beside_all", "alone_after"):
        row = report[phase]
        numbers = "".join(f"{row[name]:9}" for name in ("p50_us", "p99_us", "whole_p99_us", "max_us", "answered"))
        lines.append(f"{phase:16}{numbers}{row['failures']:8}{row['core_busy']:11}")
    mb = 1 << 20
    lines += [
        f"p99 beside all / alone: {report['p99_ratio']}",
        f"user-space memory of an idle connection: {report['idle_bytes']} bytes ({report['idle_bytes_again']} the second time); "
        "the kernel's socket is not in it",
        f"memory of the shard: {report['rss_before'] / mb:.1f} MB before, + {report['slow_rss_bytes'] / mb:.1f} MB with all clients",
        f"CPU of the shard: {report['resting_share']:.2%} of a core at rest, {report['idle_share']:.2%} with idle connections, "
        f"{report['slow_share']:.2%} with slow clients too",
        f"descriptors: {report['files_before']} before, + {report['idle_files']} idle, {report['files_after']} after",
        f"opened: {report['idle_opened']}; slow clients: {report['slow_at_end']}",
    ]
    return "\n".join(lines)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
