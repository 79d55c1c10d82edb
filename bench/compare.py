"""CPU time per request of the router beside nginx and HAProxy, as ratios, in one run on one machine.

    .venv/bin/python bench/compare.py                       nginx, haproxy (if installed) and sglfast
    .venv/bin/python bench/compare.py --max-ratio 2.0       exit code 1 if sglfast costs more than 2 x nginx
    .venv/bin/python bench/compare.py --body-bytes 32768 --rounds 7 --seconds 5 --json

An nginx plays four workers that answer at once. Every router is pinned to one core, the workers and wrk to another; the rounds
alternate between the routers, so that what the machine does meanwhile meets all of them. What counts is CPU time of the
router's process tree (bench/processes.py) per answered request; requests per second are printed but say more about wrk. The
numbers of one machine and day are good for ratios only.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, WORKERS, Router, Setting, free_ports, start_router, start_workers
from drawing import Bars, add_plot, draw_bars
from load import Workload, chat, run_wrk
from processes import BenchError, require

WARM_UP_S = 1


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        report = compare(options)
    except BenchError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=1) if options.json else table(report))
    if options.plot:
        draw_bars(options.plot, report["workload"], [bars(report, "CPU time a request, microseconds")])
    ratio = report["medians"].get("sglfast", {}).get("ratio")
    if options.max_ratio is not None and (ratio is None or ratio > options.max_ratio):
        print(f"compare: sglfast at {ratio} x {report['base']}, allowed are {options.max_ratio}", file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU time per request beside nginx and HAProxy, as ratios to the first.")
    parser.add_argument("--contenders", help=f"comma-separated, the first is the base: {', '.join(CONTENDERS)}")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each router (default: 5)")
    parser.add_argument("--seconds", type=int, default=4, help="length of a round (default: 4)")
    parser.add_argument("--connections", type=int, default=32, help="client connections (default: 32)")
    parser.add_argument("--body-bytes", type=int, default=2048, help="size of the request body (default: 2048)")
    parser.add_argument("--cores", help="ROUTER,LOAD: the two cores to use (default: the first two)")
    parser.add_argument("--max-ratio", type=float, help="exit code 1 if sglfast costs more than this times the base")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of a table")
    add_plot(parser)
    options = parser.parse_args(argv)
    if min(options.rounds, options.seconds, options.connections) < 1:
        parser.error("--rounds, --seconds and --connections are 1 or more")
    return options


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds; the report holds raw rounds, medians and ratios. Raises BenchError."""
    wrk = require("wrk", "wrk")
    require("nginx", "nginx-light")
    names = choose(options.contenders)
    router_core, load_core = cores(options.cores)
    workload = chat(options.body_bytes)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sglfast-compare-") as name, contextlib.ExitStack() as running:
        folder = Path(name)
        ports = tuple(free_ports(WORKERS))
        running.enter_context(start_workers(workload, load_core, ports, folder))
        setting = Setting(router_core, ports, folder)
        routers = []
        for contender in names:
            progress(f"starting {contender}")
            router = start_router(contender, setting)
            running.enter_context(router.process)
            verify(router, workload)
            routers.append(router)
        for number in range(options.rounds + 1):
            # Every second round runs backwards: a drift of the machine then favours nobody. Round 0 warms up.
            for router in routers if number % 2 else reversed(routers):
                seconds = options.seconds if number else WARM_UP_S
                cpu_before_s, started = router.process.cpu_s(), time.monotonic()
                try:
                    result = run_wrk(
                        wrk, workload, router.port,
                        connections=options.connections, seconds=seconds, core=load_core, folder=folder,
                    )  # fmt: skip
                except BenchError as error:
                    raise BenchError(f"{router.name}: {error}\n{router.process.log_tail()}") from error
                wall_s, cpu_s = time.monotonic() - started, router.process.cpu_s() - cpu_before_s
                if not number:
                    continue
                rounds.append({
                    "round": number,
                    "router": router.name,
                    "requests": result.requests,
                    "cpu_s": round(cpu_s, 3),
                    "us_per_request": round(cpu_s / result.requests * 1e6, 3),
                    "requests_per_s": round(result.requests / result.duration_us * 1e6),
                    "core_busy": round(cpu_s / wall_s, 3),
                    "p50_ms": result.p50_us / 1e3,
                    "p99_ms": result.p99_us / 1e3,
                    "rss_kb": router.process.memory_kb(),
                })  # fmt: skip
                progress("round {round}: {router:8} {us_per_request:7.2f} us/request".format(**rounds[-1]))
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "machine": machine(),
        "workload": workload.name,
        "connections": options.connections,
        "cores": {"router": router_core, "load": load_core},
        "base": names[0],
        "medians": summarize(rounds, names),
        "rounds": rounds,
    }


def choose(wanted: str | None) -> list[str]:
    if wanted is None:
        names = ["nginx", "sglfast"]
        with contextlib.suppress(BenchError):
            require("haproxy", "haproxy")
            names.insert(1, "haproxy")
        return names
    names = wanted.split(",")
    unknown = sorted(set(names) - set(CONTENDERS))
    if unknown or len(set(names)) != len(names):
        raise BenchError(f"--contenders {wanted}: name each of {', '.join(CONTENDERS)} at most once")
    return names


def cores(wanted: str | None) -> tuple[int, int]:
    allowed = sorted(os.sched_getaffinity(0))
    try:
        chosen = [int(core) for core in wanted.split(",")] if wanted else allowed[:2]
    except ValueError:
        chosen = []
    if len(set(chosen)) != 2 or not set(chosen) <= set(allowed):
        raise BenchError(f"two different cores are needed, one for the router and one for the load, of {allowed}")
    return chosen[0], chosen[1]


def verify(router: Router, workload: Workload) -> None:
    """One request by hand: the worker's answer must come through unchanged. Raises BenchError."""
    request = urllib.request.Request(f"http://127.0.0.1:{router.port}{workload.path}", workload.body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            status, body = answer.status, answer.read().decode()
    except OSError as error:
        raise BenchError(f"{router.name} does not relay a request: {error}\n{router.process.log_tail()}") from error
    if status != 200 or body != workload.worker_answer:
        raise BenchError(f"{router.name} answers {status} and {body[:200]!r} instead of the worker's answer")


def summarize(rounds: list[dict[str, Any]], names: list[str]) -> dict[str, dict[str, float]]:
    """Medians over the rounds; a ratio is taken inside each round, then its median."""
    base = {row["round"]: row["us_per_request"] for row in rounds if row["router"] == names[0]}
    medians = {}
    for name in names:
        mine = [row for row in rounds if row["router"] == name]
        ratios = [row["us_per_request"] / base[row["round"]] for row in mine]
        medians[name] = {
            "us_per_request": round(statistics.median(row["us_per_request"] for row in mine), 2),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
            "requests_per_s": statistics.median(row["requests_per_s"] for row in mine),
            "core_busy": round(statistics.median(row["core_busy"] for row in mine), 2),
            "rss_kb": statistics.median(row["rss_kb"] for row in mine),
        }
    return medians


def bars(report: dict[str, Any], title: str) -> Bars:
    """The medians as a panel of a picture, with the range of the rounds."""
    rounds = {name: [row["us_per_request"] for row in report["rounds"] if row["router"] == name] for name in report["medians"]}
    values = {name: row["us_per_request"] for name, row in report["medians"].items()}
    return Bars(title, values, {name: (min(times), max(times)) for name, times in rounds.items()}, form="{:.1f}")


def machine() -> str:
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in facts if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(report: dict[str, Any]) -> str:
    base = report["base"]
    lines = [
        "",
        f"{report['workload']}, {report['connections']} connections, {WORKERS} instant workers, round robin; {report['date']}",
        report["machine"],
        "",
        f"{'router':10}{'CPU us/request':>16}{'x ' + base:>12}{'(min-max)':>16}{'core busy':>12}{'requests/s':>12}{'RSS MB':>9}",
    ]
    for name, row in report["medians"].items():
        spread = f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}"
        lines.append(
            f"{name:10}{row['us_per_request']:16.2f}{row['ratio']:12.2f}{spread:>16}"
            f"{row['core_busy']:12.0%}{row['requests_per_s']:12.0f}{row['rss_kb'] / 1024:9.1f}"
        )
    lines += ["", "raw CPU us/request by round:"]
    for name in report["medians"]:
        values = "".join(f"{row['us_per_request']:9.2f}" for row in report["rounds"] if row["router"] == name)
        lines.append(f"  {name:8}{values}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
