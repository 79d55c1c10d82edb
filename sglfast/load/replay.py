"""The command `sglfast replay`: sends a trace to a router in real HTTP and says how well the prefix cache was used and how long it took.

Runs in: a process of its own. Against a running router (--url), or it starts simulated workers and a router itself, once for each
    policy to compare. Contract: exit code 0 = every request was answered, 1 = some were not, 2 = a setting cannot work.
"""

import argparse
import asyncio
import gc
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sglfast.config import POLICIES
from sglfast.errors import ConfigError, SglfastError
from sglfast.load.client import LoadClient
from sglfast.load.interrupts import Interrupts
from sglfast.load.machine import read_cpu_ticks
from sglfast.load.openloop import OpenLoop, send_settled
from sglfast.load.plot import check_plot, draw
from sglfast.load.report import Summary, summarize, table
from sglfast.load.run import Run, load_run, save_run
from sglfast.load.stack import SimSettings, Stack
from sglfast.load.text import PATHS, PromptWriter, RequestWriter
from sglfast.load.trace import (
    SyntheticShape,
    TraceRequest,
    infinite_cache_hit_ratio,
    infinite_cache_token_ratio,
    read_trace,
    synthetic_trace,
)
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
from sglfast.wire.server_info import parse_models, parse_server_info

SHOW_INTERVAL_S = 0.5
PLAIN_SHOW_INTERVAL_S = 10.0
PLAIN_WIDTH = 200
# Longer than it takes an event to reach the index: the engine publishes after each prefill, the index applies at once.
SETTLE_S = 2.0
SETTLED_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """How a trace is sent. model: "" = ask the server; max_output_tokens: 0 = as the trace says.

    warmup: the first requests of the trace, sent but not counted; settled_checks: how many of the last requests are sent again, one
    by one, when all is quiet.
    """

    speed_up: float = 1.0
    warmup: int = 0
    endpoint: str = "completions"
    model: str = ""
    tokenizer_path: str = DEMO_TOKENIZER_PATH
    max_output_tokens: int = 0
    max_open: int = 4096
    timeout_s: float = 600.0
    settled_checks: int = 0


def replay(
    url: str,
    trace: Sequence[TraceRequest],
    trace_name: str,
    label: str,
    settings: ReplaySettings,
    console: Console,
    interrupts: Interrupts,
) -> Run:
    """Send a trace to the server at `url` and return what happened. Raises ConfigError if the server does not answer at all."""
    prompts = PromptWriter(load_tokenizer(settings.tokenizer_path))
    gc.collect()
    gc.freeze()  # a full collection over the tokenizer's objects would make requests late
    try:
        return interrupts.run(_replay(url, trace, trace_name, label, settings, prompts, console))
    finally:
        gc.unfreeze()


async def _replay(
    url: str,
    trace: Sequence[TraceRequest],
    trace_name: str,
    label: str,
    settings: ReplaySettings,
    prompts: PromptWriter,
    console: Console,
) -> Run:
    client = LoadClient(url)
    try:
        model = settings.model or await _ask_model(client, url)
        writer = RequestWriter(prompts, settings.endpoint, model, client.host, settings.max_output_tokens)
        loop = OpenLoop(client, writer, trace, speed_up=settings.speed_up, max_open=settings.max_open, timeout_s=settings.timeout_s)
        shown = asyncio.create_task(_show(loop, len(trace), label, console))
        ticks = read_cpu_ticks()
        try:
            wall_s = await loop.run()
        finally:
            shown.cancel()
            await asyncio.wait([shown])
        machine_busy = read_cpu_ticks().busy_since(ticks)
        settled = []
        if settings.settled_checks:
            await asyncio.sleep(SETTLE_S)
            short = RequestWriter(prompts, settings.endpoint, model, client.host, max_output_tokens=1)
            again = trace[-settings.settled_checks :]
            settled = await send_settled(client, short, again, pause_s=SETTLED_PAUSE_S, timeout_s=settings.timeout_s)
        samples = [sample for sample in loop.samples[settings.warmup :] if sample is not None]
        page_tokens = await _ask_page_tokens({sample.worker for sample in samples if sample.worker})
    finally:
        await client.close()
    return Run(
        label=label,
        trace=trace_name,
        endpoint=settings.endpoint,
        speed_up=settings.speed_up,
        warmup=settings.warmup,
        wall_s=round(wall_s, 3),
        infinite_blocks=infinite_cache_hit_ratio(trace, settings.warmup),
        infinite_tokens=infinite_cache_token_ratio(trace, page_tokens or 1, settings.warmup),
        delayed=loop.delayed,
        resends=client.resends,
        machine_busy=round(machine_busy, 3),
        page_tokens=page_tokens,
        error_texts=loop.error_texts,
        samples=samples,
        settled=settled,
    )


async def _ask_model(client: LoadClient, url: str) -> str:
    answer = await client.get("/v1/models")
    if answer.error:
        reason = answer.body.decode("utf-8", "replace") or answer.error
        raise ConfigError(f"{url}/v1/models does not answer ({reason}); is a router running there? Or name it: --model")
    model, _ = parse_models(answer.body)
    if model is None:
        raise ConfigError(f"{url}/v1/models names no model; name it: --model")
    return model


async def _ask_page_tokens(worker_urls: set[str]) -> int:
    """The workers' common KV block size, from their own /server_info; 0 when they cannot be asked or differ."""
    sizes = set()
    for url in worker_urls:
        try:
            client = LoadClient(url)
        except ConfigError:
            return 0
        try:
            facts = parse_server_info((await client.get("/server_info", timeout_s=5.0)).body, url)
        except SglfastError:
            return 0
        finally:
            await client.close()
        sizes.add(facts.kv.block_size if facts.kv is not None else facts.page_size or 0)
    return sizes.pop() if len(sizes) == 1 else 0


async def _show(loop: OpenLoop, total: int, label: str, console: Console) -> None:
    """Show progress until cancelled: a bar on a terminal, else a line now and then."""
    if not console.is_terminal:
        while True:
            await asyncio.sleep(PLAIN_SHOW_INTERVAL_S)
            print(f"{label}: {loop.done} of {total} answered, {_state(loop)}", flush=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        task = bar.add_task(label, total=total, state="")
        try:
            while True:
                bar.update(task, completed=loop.done, state=_state(loop), refresh=True)
                await asyncio.sleep(SHOW_INTERVAL_S)
        finally:
            bar.update(task, completed=loop.done, state=_state(loop), refresh=True)


def _state(loop: OpenLoop) -> str:
    hits = f"{100 * loop.cached_tokens / loop.prompt_tokens:.1f} %" if loop.prompt_tokens else "-"
    return f"{loop.sent - loop.done} open, {loop.errors} errors, prefix hits {hits} of tokens"


def compare(
    policies: Sequence[str],
    trace: Sequence[TraceRequest],
    trace_name: str,
    settings: ReplaySettings,
    sim: SimSettings,
    serve_flags: Sequence[str],
    console: Console,
    interrupts: Interrupts,
) -> Iterator[Run]:
    """Yield one run a policy, each on simulated workers and a router of its own."""
    for policy in policies:
        print(f"{policy}: starting {sim.workers} simulated workers and the router", flush=True)
        with Stack(sim, policy=policy, serve_flags=serve_flags) as stack:
            run = replay(stack.url, trace, trace_name, policy, settings, console, interrupts)
            stack.check_alive()
        yield run


# ---- the command line ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglfast replay",
        description="Replay a request trace in real HTTP. Without --url it starts simulated workers and a router itself.",
    )
    what = parser.add_argument_group("what to send")
    what.add_argument("--trace", metavar="FILE", help="trace in the Mooncake format; without it conversations are made up")
    what.add_argument("--requests", type=int, metavar="N", help="only the first N requests of the trace")
    what.add_argument("--warmup", type=int, default=0, metavar="N", help="send the first N of them, but do not count them")
    what.add_argument("--speed-up", type=float, default=1.0, metavar="F", help="play the timestamps F times faster (default: 1)")
    what.add_argument("--endpoint", choices=tuple(PATHS), default="completions", help="API to use (default: completions)")
    what.add_argument("--model", default="", help="model name to ask for (default: the first of /v1/models)")
    what.add_argument("--tokenizer-path", default=DEMO_TOKENIZER_PATH, metavar="PATH", help="the model's tokenizer (default: the demo's)")
    what.add_argument("--max-output-tokens", type=int, default=0, metavar="N", help="cap of a request's output (default: none)")
    what.add_argument("--max-open", type=int, default=4096, metavar="N", help="safety limit of open requests (default: 4096)")
    what.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="time for one request (default: 600)")
    what.add_argument(
        "--settled-checks", type=int, default=0, metavar="N", help="then send the last N again, one by one, to check predictions"
    )
    shape = SyntheticShape()
    made = parser.add_argument_group("the made-up trace, when there is no --trace")
    made.add_argument("--seed", type=int, default=1, metavar="N", help="the same seed makes the same trace (default: 1)")
    made.add_argument("--users", type=int, default=shape.users, metavar="N", help=f"conversations (default: {shape.users})")
    made.add_argument("--turns", type=float, default=shape.turns, metavar="X", help=f"mean turns of one (default: {shape.turns:g})")
    made.add_argument(
        "--arrivals-per-s", type=float, default=shape.arrivals_per_s, metavar="X",
        help=f"conversations that begin in a second (default: {shape.arrivals_per_s:g})",
    )  # fmt: skip
    made.add_argument(
        "--system-prompts", type=int, default=shape.system_prompts, metavar="N",
        help=f"different shared system prompts (default: {shape.system_prompts})",
    )  # fmt: skip
    where = parser.add_argument_group("where to send it")
    where.add_argument("--url", help="a running router, such as http://127.0.0.1:8000")
    where.add_argument("--compare", metavar="A,B,...", help=f"run once for each policy, on simulated workers: {', '.join(POLICIES)}")
    where.add_argument("--compare-files", metavar="A.json,B.json", help="send nothing; compare runs that --json saved")
    sim = parser.add_argument_group("simulated workers (rates are those at speed 1: --speed-up multiplies them too)")
    sim.add_argument("--sim-workers", type=int, default=4, metavar="N", help="how many (default: 4)")
    sim.add_argument("--sim-cache-tokens", type=int, default=500_000, metavar="N", help="KV cache of each (default: 500000)")
    sim.add_argument("--sim-page-size", type=int, default=64, metavar="N", help="tokens of a KV block (default: 64)")
    sim.add_argument("--sim-prefill-tokens-per-s", type=float, default=20_000.0, metavar="X", help="prefill rate of each (default: 20000)")
    sim.add_argument("--sim-decode-tokens-per-s", type=float, default=80.0, metavar="X", help="decode rate of each request (default: 80)")
    sim.add_argument("--serve-flags", default="", metavar="'...'", help="more flags for the routers, such as '--shards 1'")
    out = parser.add_argument_group("results")
    out.add_argument("--json", metavar="FILE", help="save the run; of several, each to FILE with its policy before the suffix")
    out.add_argument("--plot", metavar="FILE", help="draw the runs to a .png, .svg or .pdf (needs matplotlib: extra `plot`)")
    return parser


def _check(args: argparse.Namespace) -> None:
    if sum(value is not None for value in (args.url, args.compare, args.compare_files)) > 1:
        raise ConfigError("--url, --compare and --compare-files exclude one another")
    for name, low in (("requests", 1), ("warmup", 0), ("max_output_tokens", 0), ("max_open", 1), ("settled_checks", 0),
                      ("users", 1), ("turns", 1), ("system_prompts", 1), ("sim_workers", 1), ("sim_page_size", 1)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {low}")
    for name in ("speed_up", "timeout_s", "arrivals_per_s", "sim_prefill_tokens_per_s", "sim_decode_tokens_per_s", "sim_cache_tokens"):
        if not getattr(args, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be more than 0")
    if args.plot:
        check_plot(args.plot)


def _trace(args: argparse.Namespace) -> tuple[list[TraceRequest], str]:
    if args.trace:
        trace, name = read_trace(args.trace, args.requests), Path(args.trace).name
    else:
        shape = replace(
            SyntheticShape(), users=args.users, turns=args.turns, arrivals_per_s=args.arrivals_per_s, system_prompts=args.system_prompts
        )
        trace, name = synthetic_trace(shape, args.seed)[: args.requests], f"made-up conversations (seed {args.seed})"
    if args.warmup >= len(trace):
        raise ConfigError(f"--warmup {args.warmup}: leaves nothing to count of {len(trace)} requests")
    return trace, name


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code. Raises SglfastError (ConfigError, StackError) for what cannot work."""
    args = _parser().parse_args(argv)
    _check(args)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)  # a file has no width to fold a table to
    if args.compare_files:
        runs = [load_run(path.strip()) for path in args.compare_files.split(",")]
        return _finish(runs, args, console)
    policies = [policy.strip() for policy in (args.compare or "auto").split(",")]
    for policy in policies:
        if policy not in POLICIES:
            raise ConfigError(f"--compare {policy}: there is no such policy; there are: {', '.join(POLICIES)}")
    trace, name = _trace(args)
    settings = ReplaySettings(
        speed_up=args.speed_up,
        warmup=args.warmup,
        endpoint=args.endpoint,
        model=args.model,
        tokenizer_path=args.tokenizer_path,
        max_output_tokens=args.max_output_tokens,
        max_open=args.max_open,
        timeout_s=args.timeout_s,
        settled_checks=args.settled_checks,
    )
    seconds = (trace[-1].timestamp - trace[0].timestamp) / 1000 / args.speed_up
    print(f"{name}: {len(trace)} requests, {sum(r.input_length for r in trace):,} prompt tokens, in about {seconds:.0f} s", flush=True)
    runs = []
    try:
        with Interrupts() as interrupts:
            if args.url:
                runs.append(replay(args.url, trace, name, args.url, settings, console, interrupts))
            else:
                sim = SimSettings(
                    workers=args.sim_workers,
                    cache_tokens=args.sim_cache_tokens,
                    page_tokens=args.sim_page_size,
                    prefill_tokens_per_s=args.sim_prefill_tokens_per_s * args.speed_up,
                    decode_tokens_per_s=args.sim_decode_tokens_per_s * args.speed_up,
                    tokenizer_path=args.tokenizer_path,
                )
                for run in compare(policies, trace, name, settings, sim, shlex.split(args.serve_flags), console, interrupts):
                    runs.append(run)
    except KeyboardInterrupt:
        print("interrupted" + (": only finished runs are shown" if runs else ""), file=sys.stderr)
        if runs:
            _finish(runs, args, console)
        return 130
    return _finish(runs, args, console)


def _finish(runs: list[Run], args: argparse.Namespace, console: Console) -> int:
    """Show, save and draw; returns the exit code."""
    summaries = [summarize(run) for run in runs]
    first = runs[0]
    print(f"{first.trace}: one worker with an infinite cache gets {100 * first.infinite_blocks:.1f} % of the block references.")
    if first.speed_up != 1:
        print(f"Played {first.speed_up:g} x faster; times are as measured.")
    console.print(table(summaries))
    for summary in summaries:
        for warning in summary.warnings:
            print(f"{summary.label}: {warning}")
    if args.json and not args.compare_files:
        _save(args.json, runs, summaries)
    if args.plot:
        draw(args.plot, runs, first.trace + (f", {first.speed_up:g} x faster" if first.speed_up != 1 else ""))
        print(f"drawn to {args.plot}")
    return 1 if any(summary.errors for summary in summaries) else 0


def _save(path: str, runs: Sequence[Run], summaries: Sequence[Summary]) -> None:
    for run, summary in zip(runs, summaries, strict=True):
        file = path if len(runs) == 1 else str(Path(path).with_stem(f"{Path(path).stem}-{run.label}"))
        save_run(file, run, summary.to_json())
        print(f"saved to {file}")
