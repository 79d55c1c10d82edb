"""The command `sglfast demo`: simulated workers and the router on this machine, what to try, and a live view of the workers.

Runs in: a process of its own, which owns the simulator and the router (load/stack.py). Contract: it runs until Ctrl-C, SIGTERM, --once or
    --seconds, then stops everything and returns 0; a child that dies ends it with the child's last lines.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import orjson
from rich.console import Console
from rich.live import Live
from rich.table import Table

from sglfast.errors import ConfigError
from sglfast.load.client import LoadClient
from sglfast.load.interrupts import Interrupts
from sglfast.load.openloop import OpenLoop
from sglfast.load.scale_out import BANDWIDTH_BYTES_PER_S, MODEL_BYTES, ScaleOut, play
from sglfast.load.stack import SimSettings, Stack, check_port
from sglfast.load.text import PromptWriter, RequestWriter
from sglfast.load.trace import SyntheticShape, synthetic_trace
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer

MODEL = "demo-model"
DEMO_PAGE_TOKENS = 4  # small, so that even the short prompts of the printed commands fill a block and are found again
# About two requests a second for ten minutes, then the next ten.
TRAFFIC = SyntheticShape(users=300, turns=5.0, arrivals_per_s=0.5, think_time_s=5.0, system_prompts=3, message_tokens=250)
TRAFFIC_OUTPUT_TOKENS = 60


def what_to_try(url: str) -> str:
    """The commands that a user can copy; each works with the demo's model."""
    chat = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 32})
    stream = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 64, "stream": True})
    post = f"{url}/v1/chat/completions -H 'content-type: application/json'"
    return (
        f"The router listens on {url}. Try in another terminal:\n\n"
        f"  a chat:\n    curl -s {post} -d '{chat}'\n\n"
        f"  streaming:\n    curl -sN {post} -d '{stream}'\n\n"
        f"  which worker, and how much of the prompt it has cached (say it twice; header x-sglfast-kv):\n"
        f"    curl -s -D - -o /dev/null -H 'x-sglfast-kv: 1' {post} -d '{chat}'\n\n"
        f"  metrics:\n    curl -s {url}/metrics\n\n"
        f"  load:\n    sglfast replay --url {url}\n"
    )


class WorkerView:
    """The last /sim/stats of one worker."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = LoadClient(url)
        self._stats: dict[str, Any] = {}
        self.is_up = False

    async def refresh(self) -> None:
        """Ask the worker; what does not answer is shown as down."""
        answer = await self._client.get("/sim/stats", timeout_s=2.0)
        with contextlib.suppress(orjson.JSONDecodeError):
            value = orjson.loads(answer.body) if not answer.error else None
            self.is_up = isinstance(value, dict)
            if isinstance(value, dict):
                self._stats = value

    async def close(self) -> None:
        """Drop the connection."""
        await self._client.close()

    def count(self, name: str) -> int:
        """A counter of /sim/stats; 0 when the worker has not said."""
        value = self._stats.get(name)
        return value if isinstance(value, int) else 0

    @property
    def in_flight(self) -> int:
        """Requests that run or wait in the worker."""
        return self.count("running") + self.count("waiting")


def hit_text(workers: Sequence[WorkerView]) -> str:
    """Share of the prompt tokens that the workers found in their caches, as text."""
    prompt = sum(worker.count("prompt_tokens_total") for worker in workers)
    return f"{100 * sum(worker.count('cached_tokens_total') for worker in workers) / prompt:.1f} %" if prompt else "-"


def live_table(workers: Sequence[WorkerView]) -> Table:
    """One row a worker and one for all."""
    table = Table(show_edge=False)
    table.add_column("worker")
    for name in ("requests", "in flight", "prompt tokens", "prefix hits"):
        table.add_column(name, justify="right")
    for name, part in [*((worker.url, [worker]) for worker in workers), ("all", list(workers))]:
        table.add_row(
            name if all(worker.is_up for worker in part) else f"{name} (down)",
            f"{sum(worker.count('requests') for worker in part):,}",
            str(sum(worker.in_flight for worker in part)),
            f"{sum(worker.count('prompt_tokens_total') for worker in part):,}",
            hit_text(part),
        )
    return table


def live_line(workers: Sequence[WorkerView], elapsed_s: float) -> str:
    """The same as one line of text."""
    requests = " / ".join(str(worker.count("requests")) if worker.is_up else "down" for worker in workers)
    in_flight = sum(worker.in_flight for worker in workers)
    return f"{elapsed_s:6.0f} s  requests per worker {requests}  in flight {in_flight}  prefix hits {hit_text(workers)} of tokens"


async def _send_traffic(url: str, tokenizer_path: str) -> None:
    client = LoadClient(url)
    writer = RequestWriter(
        PromptWriter(load_tokenizer(tokenizer_path), cache_bytes=8 << 20), "chat", MODEL, client.host, TRAFFIC_OUTPUT_TOKENS
    )
    seed = 0
    try:
        while True:
            await OpenLoop(client, writer, synthetic_trace(TRAFFIC, seed), max_open=64, timeout_s=60.0).run()
            seed += 1
    finally:
        await client.close()


async def _watch(stack: Stack, args: argparse.Namespace, console: Console) -> None:
    workers = [WorkerView(url) for url in stack.worker_urls]
    start_s = time.monotonic()
    end_s = start_s + args.seconds if args.seconds else None
    async with contextlib.AsyncExitStack() as owned:
        for worker in workers:
            owned.push_async_callback(worker.close)
        if args.traffic:
            traffic = asyncio.create_task(_send_traffic(stack.url, args.tokenizer_path))
            owned.push_async_callback(_cancel, traffic)
        # On a terminal the table is drawn in place; a pipe or a log file gets a line each time.
        live = owned.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        while True:
            stack.check_alive()
            await asyncio.gather(*(worker.refresh() for worker in workers))
            if live is not None:
                live.update(live_table(workers), refresh=True)
            else:
                print(live_line(workers, time.monotonic() - start_s), flush=True)
            if args.once or (end_s is not None and time.monotonic() >= end_s):
                return
            wait_s = args.interval if end_s is None else min(args.interval, max(0.0, end_s - time.monotonic()))
            await asyncio.sleep(wait_s)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglfast demo",
        description="Start simulated SGLang workers and the router on this machine, print what to try, and show what the workers do.",
    )
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="simulated workers (default: 4)")
    parser.add_argument(
        "--scale-out",
        action="store_true",
        help="one worker; a second one copies its weights from it (ModelExpress metadata service) and joins by POST /workers",
    )
    parser.add_argument(
        "--pd", action="store_true", help="half of the workers compute prompts, the others the answers (prefill and decode)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address the router listens on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=30000, metavar="P", help="port the router listens on, 0 = a free one (default: 30000)")
    parser.add_argument("--tokenizer-path", default=DEMO_TOKENIZER_PATH, metavar="PATH", help="tokenizer (default: the demo's own)")
    parser.add_argument("--traffic", action="store_true", help="send gentle made-up conversations, so that the view moves")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between two views (default: 1)")
    parser.add_argument("--seconds", type=float, default=0.0, metavar="S", help="stop after this time (default: at Ctrl-C)")
    parser.add_argument("--once", action="store_true", help="show the view once and stop")
    return parser


def _stack(args: argparse.Namespace) -> Stack:
    if args.scale_out:
        rates = {"model_bytes": MODEL_BYTES, "bandwidth_bytes_per_s": BANDWIDTH_BYTES_PER_S}
        return ScaleOut(DEMO_PAGE_TOKENS, args.tokenizer_path, host=args.host, port=args.port, **rates)
    sim = SimSettings(page_tokens=DEMO_PAGE_TOKENS, workers=args.workers, tokenizer_path=args.tokenizer_path)
    if not args.pd:
        return Stack(sim, host=args.host, port=args.port)
    prefill = dataclasses.replace(sim, mode="prefill", workers=args.workers // 2)
    decode = dataclasses.replace(sim, mode="decode", workers=args.workers - args.workers // 2)
    return Stack(prefill, host=args.host, port=args.port, more=[decode])


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code. Raises SglfastError (ConfigError, StackError) for what cannot work."""
    args = _parser().parse_args(argv)
    for name, low in (("workers", 1), ("interval", 0.1), ("seconds", 0), ("port", 0)):
        if getattr(args, name) < low:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least {low}")
    if args.pd and args.scale_out:
        raise ConfigError("--pd and --scale-out: give one of them")
    if args.pd and args.workers < 2:
        raise ConfigError(f"--workers {args.workers}: --pd needs at least 2, one for prompts and one for answers")
    if args.port:
        check_port(args.host, args.port)
    console = Console(highlight=False)
    parts = "a metadata service, a simulated worker" if args.scale_out else f"{args.workers} simulated workers"
    if args.pd:
        parts += f" ({args.workers // 2} for prefill, the others for decode)"
    print(f"Starting {parts} and the router ...", flush=True)
    try:
        with Interrupts() as interrupts, _stack(args) as stack:
            try:
                if isinstance(stack, ScaleOut):
                    play(stack, MODEL, console, interrupts.run)
                print(what_to_try(stack.url), flush=True)
                if isinstance(stack, ScaleOut):
                    print(f"  who has which weights:\n    sglfast modelexpress sources --url {stack.service}\n", flush=True)
                if not args.seconds and not args.once:
                    print("Ctrl-C stops everything.\n", flush=True)
                interrupts.run(_watch(stack, args, console))
            finally:
                print("Stopping.", flush=True)
    except KeyboardInterrupt:
        pass
    return 0
