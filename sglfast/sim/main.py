"""`sglfast sim`: flags, announcement, signals.

Runs in: the process of `sglfast sim`. Contract: exit code 0 after a signal or --max-seconds, 2 with a message for settings that
    cannot work. The announcement is written once, as one line of JSON, when every worker listens: whoever started this
    process waits for it and needs no polling.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import uvloop

from sglfast import open_files
from sglfast.errors import ConfigError, SglfastError
from sglfast.logs import setup_logs
from sglfast.sim.settings import SimSettings
from sglfast.sim.simulator import Simulator
from sglfast.sim.weights import WeightDirectory

DESCRIPTION = """\
Play N SGLang workers in one process: HTTP, KV events over ZMQ, a radix cache, chunked prefill and continuous batching at
the rates you choose. No GPU, no model; the answers are words.

  sglfast sim                                    4 workers at http://127.0.0.1:30001 .. 30004
  sglfast sim --workers 2 --base-port 0          2 workers at free ports, printed at start
  sglfast sim --prefill-tokens-per-s 1e12 --decode-tokens-per-s-per-request 1e9
                                                 the whole engine, as fast as it can
  sglfast sim --instant                          no engine at all: HTTP answers only, for measuring a router
"""

EPILOG = """\
prefill and decode apart
  sglfast sim --workers 2 --disaggregation-mode prefill
  sglfast sim --workers 2 --base-port 30011 --disaggregation-mode decode
      each request goes to one of either, with bootstrap_host, bootstrap_port and bootstrap_room in its body, by a router:
      sglfast serve --pd-disaggregation --prefill http://127.0.0.1:30001 8998 --decode http://127.0.0.1:30011

weights, with a metadata service (sglfast modelexpress serve)
  sglfast sim --workers 1 --mx-server 127.0.0.1:8001
      offers 64 MiB of made-up weights to peers
  sglfast sim --workers 1 --base-port 0 --mx-server 127.0.0.1:8001 --mx-role target --mx-bandwidth-bytes-per-s 16e6
      copies them from the freshest peer, then listens and offers them too; real bytes over a socket, checked

what a request costs
  Prompt tokens that are not cached take 1/--prefill-tokens-per-s each, first come first served, at most
  --chunked-prefill-tokens a step; then every token takes 1/--decode-tokens-per-s-per-request, whatever the batch, while a
  prefill in the same step delays all. usage.prompt_tokens_details.cached_tokens tells what was cached.
  An answer ends by itself after 128 to 256 tokens (finish_reason stop); give max_tokens to end it earlier, and
  "ignore_eos": true to get exactly max_tokens. It depends on the prompt and --seed alone.

control, by HTTP on a worker's own port
  curl -X POST URL/sim/fault -d '{"mode": "error_500", "count": 3}'
      refuse, hang, error_500, busy_503, cut_headers, cut_body (both: "after_bytes"), slow_headers, none; for the next
      "count" requests (null = until "none"); "scope": "inference" (default) or "all" to hit /health and the rest too
  curl -X POST URL/sim/restart -d '{"down_s": 0.5}'
      as a killed engine that comes back: connections reset, cache empty, event sequence at 0, another startup_time
  curl -X POST URL/sim/drop_events -d '{"count": 2}'
      the next 2 event batches get their numbers but are not sent (a replay has them)
  curl -X POST URL/sim/keep_back_stores -d '{"share": 0.5}'
      half of the BlockStored events are never published, and leave no gap; "unit": "block": the second half of the blocks of
      each; "share": 0 ends it
  curl URL/sim/stats        counters; URL/sim/stats?keys=1 lists the cached block keys too
"""

_TEXTS = {
    "workers": "workers to play",
    "host": "address to listen on",
    "base_port": "worker i listens on this port + i; 0 = free ports",
    "model": "served model name",
    "tokenizer_path": "folder with tokenizer.json and tokenizer_config.json (default: the demo tokenizer)",
    "page_size": "tokens a KV block",
    "cache_tokens": "KV cache of a rank in tokens; also the longest prompt",
    "prefill_tokens_per_s": "prefill rate of a rank",
    "decode_tokens_per_s_per_request": "decode rate of each running request",
    "max_running_requests": "requests in prefill or decode on a rank; more wait",
    "chunked_prefill_tokens": "prompt tokens of one step",
    "kv_base_port": "first port for KV events: 2 x dp-size ports a worker, live ones, then replay; 0 = free ports",
    "dp_size": "data-parallel ranks of a worker, each with its own cache and event ports",
    "seed": "chooses the text of the answers",
    "disaggregation_bootstrap_port": "a prefill worker gives its prompts out on this port + its number; 0 = free ports",
    "disaggregation_bootstrap_timeout": "longest wait of a prefill or decode worker for the other, in seconds",
    "mx_server": "HOST:PORT of a ModelExpress metadata service: play weights (default: no weights)",
    "mx_model_bytes": "bytes of the model's weights",
    "mx_bandwidth_bytes_per_s": "most that a target copies in a second",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every field of SimSettings is a flag."""
    parser = argparse.ArgumentParser(
        prog="sglfast sim",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = {field.name: field.default for field in dataclasses.fields(SimSettings)}
    for name, text in _TEXTS.items():
        default = defaults[name]
        shown = (
            ""
            if name in ("tokenizer_path", "mx_server")
            else f" (default: {default:g})"
            if isinstance(default, float)
            else f" (default: {default})"
        )
        kind = type(default)
        metavar = "S" if name.endswith("_timeout") else {int: "N", float: "RATE", str: "TEXT"}[kind]
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default, metavar=metavar, help=text + shown)
    parser.add_argument(
        "--kv-events", action=argparse.BooleanOptionalAction, default=True, help="say in /server_info where KV events are (default: yes)"
    )
    parser.add_argument("--replay", action=argparse.BooleanOptionalAction, default=True, help="answer KV event replays (default: yes)")
    parser.add_argument("--event-shape", choices=("map", "array"), default="map", help="events as sglang 0.5.20+ or 0.5.18 (default: map)")
    parser.add_argument(
        "--mx-role", choices=("seed", "target"), default="seed", help="have the weights, or copy them from a peer first (default: seed)"
    )
    parser.add_argument(
        "--disaggregation-mode",
        choices=("null", "prefill", "decode"),
        default="null",
        help="play prefill or decode workers (default: null, regular ones)",
    )
    parser.add_argument("--instant", action="store_true", help="answer at once: no tokenizer run, no engine, no cache, no events")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="stop after this time")
    parser.add_argument("--announce", type=Path, metavar="FILE", help="write the announcement to this file")
    parser.add_argument("--announce-fd", type=int, metavar="FD", help="write the announcement to this inherited descriptor and close it")
    return parser


def main(argv: list[str], open_directory: Callable[[SimSettings], WeightDirectory] | None = None) -> int:
    """Run until a signal or --max-seconds; return the exit code.

    open_directory: called in the loop when --mx-server is given; its type is what a caller above this room must bring.
    """
    arguments = vars(build_parser().parse_args(argv))
    max_seconds, file, descriptor = (arguments.pop(name) for name in ("max_seconds", "announce", "announce_fd"))
    setup_logs("sim", "info", "text")
    open_files.raise_limit()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(SimSettings(**arguments), open_directory, max_seconds, file, descriptor))
    except SglfastError as error:
        print(f"sglfast sim: {error}", file=sys.stderr)
        return 2
    return 0


async def _run(
    settings: SimSettings,
    open_directory: Callable[[SimSettings], WeightDirectory] | None,
    max_seconds: float | None,
    file: Path | None,
    descriptor: int | None,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    directory = open_directory(settings) if open_directory is not None and settings.mx_server else None
    async with contextlib.AsyncExitStack() as owned:
        simulator = Simulator(settings, directory, _ProgressLines())
        opening = loop.create_task(owned.enter_async_context(simulator))

        def end() -> None:
            stop.set()
            opening.cancel()  # a target may be in the middle of its weights

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)
        with contextlib.suppress(asyncio.CancelledError):
            await opening
        if stop.is_set():
            return
        # What is loaded by now stays; the collector need not look at it again.
        gc.collect()
        gc.freeze()
        print(_summary(simulator), flush=True)
        _announce(orjson.dumps(simulator.announcement()) + b"\n", file, descriptor)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max_seconds):
                await stop.wait()


class _ProgressLines:
    """A line of text for every further percent of the weights."""

    def __init__(self) -> None:
        self._percent = -1

    def __call__(self, done_bytes: int, size_bytes: int, source: str) -> None:
        percent = 100 * done_bytes // size_bytes
        if percent > self._percent:
            print(f"weights: {percent} %, {done_bytes} of {size_bytes} bytes from {source}", flush=True)
        self._percent = percent


def _announce(line: bytes, file: Path | None, descriptor: int | None) -> None:
    """Write the announcement; a file appears whole. Raises ConfigError when it cannot be written."""
    try:
        if file is not None:
            draft = file.with_name(f"{file.name}.{os.getpid()}.draft")
            draft.write_bytes(line)
            draft.replace(file)
        if descriptor is not None:
            with open(descriptor, "wb") as pipe:
                pipe.write(line)
    except OSError as error:
        raise ConfigError(f"the announcement cannot be written: {error}") from error


def _summary(simulator: Simulator) -> str:
    settings, workers = simulator.settings, simulator.workers
    urls = [worker.url for worker in workers]
    where = ", ".join(urls) if len(urls) <= 4 else f"{urls[0]} .. {urls[-1]}"
    speed = (
        "instant answers"
        if settings.instant
        else f"prefill {settings.prefill_tokens_per_s:g} tokens/s, decode "
        f"{settings.decode_tokens_per_s_per_request:g} tokens/s a request, cache {settings.cache_tokens} tokens"
    )
    return f"sglfast sim: {len(urls)} worker{'s'[: len(urls) > 1]} of {settings.model} at {where}; {speed}. Ctrl-C ends it."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
