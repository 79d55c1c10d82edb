"""What the end-to-end tests share: a whole router over simulated workers, its processes, its metrics, load on it."""

import asyncio
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson

from sglfast.load.client import Answer, LoadClient
from sglfast.load.stack import SimSettings, Stack
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer, single_token_words

TIMEOUT_S = 30.0


def small_stack(policy: str = "cache_aware", serve_flags: Sequence[str] = (), **sim: float) -> Stack:
    """Four fast workers and a router of two shards."""
    settings = {"prefill_tokens_per_s": 500_000.0, "decode_tokens_per_s": 2_000.0, "cache_tokens": 500_000} | sim
    return Stack(SimSettings(**settings), policy=policy, serve_flags=["--shards", "2", *serve_flags])  # type: ignore[arg-type]


def process_of(stack: Stack, module: str, number: int = 0) -> int:
    """Pid of a child process of the stack's router: `sglfast.index.main`, or the `number`-th `sglfast.edge.main`."""
    router = stack.children[-1].pid
    children = Path(f"/proc/{router}/task/{router}/children").read_text().split()
    found = [int(pid) for pid in children if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return sorted(found)[number]


def get(url: str) -> bytes:
    """Body of a GET that answers 200."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        body: bytes = answer.read()
        return body


def post(url: str, body: dict[str, object]) -> bytes:
    """Body of a JSON POST that answers 200."""
    request = urllib.request.Request(url, data=orjson.dumps(body), headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        data: bytes = answer.read()
        return data


def explained(stack: Stack, path: str, body: dict[str, object]) -> dict[str, Any]:
    """What the router says it would do with a request."""
    found: dict[str, Any] = orjson.loads(post(f"{stack.url}/explain{path}", body))
    return found


def samples(stack: Stack, name: str, **labels: str) -> list[float]:
    """A metric's samples that carry the given labels."""
    found = []
    for line in get(f"{stack.url}/metrics").decode().splitlines():
        match = re.match(rf"{name}(?:\{{(.*)\}})? (\S+)$", line)
        if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
            found.append(float(match[2]))
    return found


def metric(stack: Stack, name: str, **labels: str) -> float:
    """Sum of those samples."""
    return sum(samples(stack, name, **labels))


def wait_until(is_true: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Poll until a condition holds; fails with `what` when it does not in time."""
    end_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.05)


def wait_events(stack: Stack, names: Sequence[str] = ()) -> None:
    """Until the index has applied all KV events that the workers have published by now; they publish before they answer.

    names: what the router calls the workers, in their order, where it reaches them by other URLs. Only while no index was killed: its
    successor counts anew.
    """
    published: dict[tuple[str, str], int] = {}
    for url, name in zip(stack.worker_urls, names or stack.worker_urls, strict=True):
        for rank, row in enumerate(orjson.loads(get(f"{url}/sim/stats"))["ranks"]):
            published[name, str(rank)] = row["next_sequence"]

    def are_applied() -> bool:
        applied: dict[tuple[str, str], float] = {}
        text = get(f"{stack.url}/metrics").decode()
        for labels, count in re.findall(r"^sglfast_kv_event_batches_total\{(.*)\} (\S+)$", text, re.MULTILINE):
            found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            applied[found["worker"], found["rank"]] = float(count)
        # Decode workers publish for nobody: the router does not follow them.
        return bool(applied) and all(published[place] <= count for place, count in applied.items())

    wait_until(are_applied, "the index has applied all events")


class Prompts:
    """Prompts of an exact number of tokens, the same for the same seed."""

    def __init__(self) -> None:
        self._words = single_token_words(load_tokenizer(DEMO_TOKENIZER_PATH))

    def text(self, seed: int, tokens: int) -> str:
        start = seed * 7919
        step = 1 + seed % 97
        return "".join(" " + self._words[(start + i * step) % len(self._words)] for i in range(tokens))


def completion(prompt: str, host: str, *, max_tokens: int = 4, stream: bool = True) -> bytes:
    """A whole HTTP request for a completion that also asks what the router believes of the KV cache."""
    body: dict[str, object] = {"model": "demo-model", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    data = orjson.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nx-sglfast-kv: 1\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n%b" % (len(data), data)


def send_all(
    url: str, prompts: Iterable[str], connections: int, max_tokens: int = 4, during: Callable[[], None] | None = None
) -> list[Answer]:
    """Send prompts over a number of connections at once; `during` runs in a thread beside it."""

    async def run() -> list[Answer]:
        client = LoadClient(url)
        queue = list(prompts)[::-1]
        answers: list[Answer] = []

        async def one() -> None:
            while queue:
                request = completion(queue.pop(), client.host, max_tokens=max_tokens)
                answers.append(await client.send(request, timeout_s=TIMEOUT_S))

        beside = asyncio.to_thread(during) if during is not None else asyncio.sleep(0)
        await asyncio.gather(beside, *(one() for _ in range(connections)))
        await client.close()
        return answers

    return asyncio.run(run())


def overlap_of(answer: Answer) -> tuple[int, int, str]:
    """(overlap_blocks that the router predicted, cached blocks of 64 tokens that the worker reported, state)."""
    fields = dict(part.strip().split("=", 1) for part in answer.kv.split(";"))
    return int(fields["overlap_blocks"]), answer.usage.cached_tokens // 64, fields["state"]


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    """Open descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))
