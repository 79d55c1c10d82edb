"""`sglfast demo --scale-out`: a second worker copies its weights from the first one, joins the router and takes traffic.

Runs in: the process of `sglfast demo`, which owns a metadata service, two simulated workers and the router. Contract: every step is real,
    between real processes: gRPC to the service, the bytes over a socket, POST /workers, requests. A step that does not come to its
    end raises StackError with what was seen. What follows, the live view, is in demo.py.
"""

import asyncio
import json
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from sglfast.load.client import LoadClient
from sglfast.load.stack import POLL_S, READY_TIMEOUT_S, SGLFAST, Child, SimSettings, Stack, StackError, wait_listening

MODEL_BYTES = 64 << 20
BANDWIDTH_BYTES_PER_S = 16 << 20  # four seconds: long enough to see, short enough to wait for
REQUESTS = 24
REQUEST_OUTPUT_TOKENS = 8
SERVICE_PORT = r"serving \S+:(\d+)[,.]"
_PROGRESS = re.compile(r"^weights: \d+ %, (\d+) of (\d+) bytes from (\S+)$", re.MULTILINE)


class ScaleOut(Stack):
    """A Stack whose one worker is a seed of its weights in a metadata service of its own. Entered, both run, and the router."""

    def __init__(
        self, page_tokens: int, tokenizer_path: str, *, host: str, port: int, model_bytes: int, bandwidth_bytes_per_s: float
    ) -> None:
        self._settings: dict[str, Any] = {
            "workers": 1,
            "page_tokens": page_tokens,
            "tokenizer_path": tokenizer_path,
            "mx_model_bytes": model_bytes,
            "mx_bandwidth_bytes_per_s": bandwidth_bytes_per_s,
        }
        self.service = ""  # host:port of the metadata service
        self._folder = tempfile.TemporaryDirectory(prefix="sglfast-demo-")  # of the service's records; `stop` removes it
        # least_load: with few short requests on idle workers cache_aware would rightly keep to one of them.
        super().__init__(SimSettings(**self._settings), policy="least_load", host=host, port=port)

    def _start(self) -> None:
        where = ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "-1", "--storage", f"{self._folder.name}/records.sqlite3"]
        service = self._run("metadata service", [*SGLFAST, "modelexpress", "serve", *where])
        self.service = f"127.0.0.1:{wait_listening(service, SERVICE_PORT)}"
        self._sim = SimSettings(**self._settings, mx_server=self.service, mx_role="seed")
        super()._start()

    def stop(self) -> None:
        """End all processes and remove the records."""
        super().stop()
        self._folder.cleanup()

    def start_target(self, each_poll: Callable[[Child], None]) -> str:
        """Start the second worker; returns its URL once it has its weights and listens. each_poll: for its progress."""
        target = SimSettings(**self._settings, mx_server=self.service, mx_role="target")
        (url,) = self.start_workers("second worker", target, each_poll=each_poll)
        self.worker_urls.append(url)
        return url


def last_progress(output: str) -> tuple[int, int, str] | None:
    """(bytes copied, all bytes, peer) of the last such line that a simulated target wrote, None before the first."""
    found = _PROGRESS.findall(output)
    return (int(found[-1][0]), int(found[-1][1]), found[-1][2]) if found else None


def show_load(stack: ScaleOut, console: Console) -> str:
    """Start the second worker and show how its weights come; returns its URL."""
    if not console.is_terminal:
        shown = -1

        def print_quarters(child: Child) -> None:
            nonlocal shown
            progress = last_progress(child.output())
            if progress is not None and (quarter := 4 * progress[0] // progress[1]) > shown:
                shown = quarter
                print(f"  weights: {progress[0] >> 20} of {progress[1] >> 20} MiB from {progress[2]}", flush=True)

        return stack.start_target(print_quarters)
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("weights", total=None)

        def move(child: Child) -> None:
            progress = last_progress(child.output())
            if progress is not None:
                bar.update(task, completed=progress[0], total=progress[1], description=f"weights from {progress[2]}")

        url = stack.start_target(move)
        bar.update(task, completed=bar.tasks[task].total)
        return url


def add_worker(router_url: str, worker_url: str, timeout_s: float = READY_TIMEOUT_S) -> None:
    """POST /workers, then wait until GET /workers tells that the router may send to it. Raises StackError."""
    status, body = _exchange("POST", f"{router_url}/workers", {"url": worker_url})
    if status != 202:
        raise StackError(f"POST /workers answers {status}, not 202: {body.decode(errors='replace')[:500]}")
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        status, body = _exchange("GET", f"{router_url}/workers")
        workers = json.loads(body).get("workers", []) if status == 200 else []
        if any(worker.get("url") == worker_url and worker.get("is_healthy") is True for worker in workers):
            return
        time.sleep(POLL_S)
    raise StackError(
        f"the router did not take {worker_url} within {timeout_s:.0f} s; GET /workers: {status} {body.decode(errors='replace')[:500]}"
    )


def requests_of(worker_url: str) -> int:
    """How many requests a simulated worker had. Raises StackError."""
    status, body = _exchange("GET", f"{worker_url}/sim/stats")
    if status != 200:
        raise StackError(f"{worker_url}/sim/stats answers {status}")
    return int(json.loads(body)["requests"])


async def send_requests(url: str, model: str, count: int) -> None:
    """Send so many short completions at once. Raises StackError for the first that fails."""
    client = LoadClient(url)
    try:

        async def one(number: int) -> None:
            body = {"model": model, "prompt": f"Request {number} of the scale-out demo.", "max_tokens": REQUEST_OUTPUT_TOKENS}
            data = orjson.dumps(body)
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {client.host}\r\ncontent-type: application/json\r\n"
            request = head.encode() + b"content-length: %d\r\n\r\n%b" % (len(data), data)
            answer = await client.send(request, timeout_s=READY_TIMEOUT_S, is_stream=False)
            if answer.error:
                raise StackError(f"request {number} of the demo failed: {answer.error}")

        await asyncio.gather(*(one(number) for number in range(count)))
    finally:
        await client.close()


def play(stack: ScaleOut, model: str, console: Console, run: Callable[[Any], object]) -> None:
    """Show every step. run: runs a coroutine to its end. Raises StackError for a step that fails."""
    print(
        f"The metadata service listens on {stack.service}, the first worker on {stack.worker_urls[0]}; it offers its weights.", flush=True
    )
    print("A second worker starts and asks the service who has them:", flush=True)
    start_s = time.monotonic()
    url = show_load(stack, console)
    print(f"It has them after {time.monotonic() - start_s:.1f} s, listens on {url}, and offers them too.", flush=True)
    add_worker(stack.url, url)
    print(f'POST {stack.url}/workers {{"url": "{url}"}}: the router sends to it from now on.', flush=True)
    before = [requests_of(worker) for worker in stack.worker_urls]
    run(send_requests(stack.url, model, REQUESTS))
    shares = [requests_of(worker) - count for worker, count in zip(stack.worker_urls, before, strict=True)]
    print(f"{REQUESTS} requests: {' and '.join(map(str, shares))} of them on the two workers.\n", flush=True)
    if not all(shares):
        raise StackError(f"one worker got no request: {shares}")


def _exchange(method: str, url: str, body: dict[str, str] | None = None) -> tuple[int, bytes]:
    """(status, body) of one HTTP call with JSON. Raises StackError when nobody answers."""
    data = None if body is None else orjson.dumps(body)
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=READY_TIMEOUT_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except OSError as error:
        raise StackError(f"{method} {url}: {error}") from error
