"""CPU time per streamed event of the router beside nginx and HAProxy, as ratios, in one run on one machine.

    .venv/bin/python bench/streams.py                       nginx, haproxy (if installed) and sglfast
    .venv/bin/python bench/streams.py --max-ratio 1.2       exit code 1 if sglfast costs more than 1.2 x nginx
    .venv/bin/python bench/streams.py --streams 256 --rounds 5 --seconds 4 --json

Every stream sends one event each 20 ms, so that a router sees them one by one, as tokens come. Each router is pinned to one core,
both ends of the streams to another; rounds alternate. What counts is CPU time of the router's process tree per event.
nginx runs with proxy_buffering off: with it, events wait.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compare import bars, choose, cores, machine, progress, summarize, table
from contenders import WORKERS, Router, Setting, free_ports, start_router
from drawing import add_plot, draw_bars
from processes import BenchError, PinnedProcess, require

_PEERS = Path(__file__).parent / "stream_peers.py"


def main() -> int:
    parser = argparse.ArgumentParser(description="CPU time per streamed event beside nginx and HAProxy, as ratios to the first.")
    parser.add_argument("--contenders", help="comma-separated, the first is the base")
    parser.add_argument("--streams", type=int, default=256, help="streams at once (default: 256)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each router (default: 5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a round (default: 4)")
    parser.add_argument("--cores", help="ROUTER,LOAD: the two cores to use (default: the first two)")
    parser.add_argument("--max-ratio", type=float, help="exit code 1 if sglfast costs more than this times the base")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of a table")
    add_plot(parser)
    options = parser.parse_args()
    try:
        report = compare_streams(options)
    except BenchError as error:
        print(f"streams: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=1) if options.json else table(report))
    if options.plot:
        draw_bars(options.plot, report["workload"], [bars(report, "CPU time an event, microseconds")])
    ratio = report["medians"].get("sglfast", {}).get("ratio")
    return int(options.max_ratio is not None and (ratio is None or ratio > options.max_ratio))


def compare_streams(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds. Raises BenchError."""
    require("nginx", "nginx-light")
    names = choose(options.contenders)
    router_core, load_core = cores(options.cores)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sglfast-streams-") as name, contextlib.ExitStack() as running:
        folder = Path(name)
        ports = tuple(free_ports(WORKERS))
        workers = PinnedProcess("workers", [sys.executable, str(_PEERS), "workers", *map(str, ports)], load_core, folder / "workers.log")
        running.enter_context(workers)
        workers.wait_until_ready(f"http://127.0.0.1:{ports[-1]}/health")
        setting = Setting(router_core, ports, folder, is_streamed=True)
        routers = []
        for contender in names:
            progress(f"starting {contender}")
            routers.append(start_router(contender, setting))
            running.enter_context(routers[-1].process)
        for number in range(1, options.rounds + 1):
            for router in routers if number % 2 else reversed(routers):
                rounds.append({"round": number, "router": router.name} | one_round(router, options, load_core))
                progress("round {round}: {router:8} {us_per_request:7.2f} us/event".format(**rounds[-1]))
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "machine": machine(),
        "workload": f"{options.streams} SSE streams, an event each 20 ms",
        "connections": options.streams,
        "base": names[0],
        "medians": summarize(rounds, names),
        "rounds": rounds,
    }


def one_round(router: Router, options: argparse.Namespace, load_core: int) -> dict[str, Any]:
    """Streams through one router for a while; the row of the report. Raises BenchError."""
    arguments = [sys.executable, str(_PEERS), "clients", str(router.port), str(options.streams), str(options.seconds)]
    command = ["taskset", "-c", str(load_core), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as clients:
        assert clients.stdin is not None
        assert clients.stdout is not None
        clients.stdout.readline()
        cpu_before_s = router.process.cpu_s()
        clients.stdin.write("\n")
        clients.stdin.flush()
        line = clients.stdout.readline()
        cpu_s = router.process.cpu_s() - cpu_before_s
    if not line:
        raise BenchError(f"{router.name}: the clients ended without a result")
    seen = json.loads(line)
    expected = options.streams * seen["seconds"] * 50
    if not 0.8 * expected < seen["chunks"] < 1.2 * expected:
        raise BenchError(f"{router.name}: {seen['chunks']:.0f} events arrived, {expected:.0f} were due\n{router.process.log_tail()}")
    return {
        "requests": round(seen["chunks"]),
        "us_per_request": round(cpu_s / seen["chunks"] * 1e6, 3),
        "requests_per_s": round(seen["chunks"] / seen["seconds"]),
        "core_busy": round(cpu_s / seen["seconds"], 3),
        "rss_kb": router.process.memory_kb(),
    }


if __name__ == "__main__":
    sys.exit(main())
