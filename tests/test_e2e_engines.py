"""Engines that are not the simulator before the whole router: vLLM's events, LoRA adapters, two engines for one model, a killed index."""

import json
import os
import signal
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e import TIMEOUT_S, Prompts, explained, metric, process_of, samples, wait_until

from sglfast._counters import RANK_DEGRADED, RANK_EXACT, RANK_SYNCING
from sglfast.load.stack import SGLFAST, SimSettings, Stack, read_all, wait_announced, wait_listening, wait_ready
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH

STANDIN = str(Path(__file__).parent / "engine_standin.py")
VLLM, SGLANG = ["--kind", "vllm"], ["--kind", "sglang"]
# A worker whose number is lower than this may have just started, for all that one can know without replay.
LOW_SEQ = 64


class EngineStack(Stack):
    """A router before engines of other kinds, one list of flags each, and perhaps simulated workers beside them."""

    def __init__(self, *engines: Sequence[str], simulated: int = 0, flags: Sequence[str] = ()) -> None:
        super().__init__(SimSettings(workers=simulated, prefill_tokens_per_s=500_000.0), policy="cache_aware")
        self.engines = engines
        self.flags = flags

    def _start(self) -> None:
        endpoints = []
        for flags in self.engines:
            with tempfile.TemporaryFile() as announce:
                fd = announce.fileno()
                engine = self._run("engine", [sys.executable, STANDIN, *flags, "--announce-fd", str(fd)], [fd])
                self.worker_urls += wait_announced(fd, engine)
                told = json.loads(read_all(fd))["workers"][0]
            if "vllm" in flags:
                replay = f",replay={told['replay_port']}" if told["replay_port"] else ""
                endpoints.append(f"{told['url']}=tcp://*:{told['kv_port']}{replay}")
        if self._sim.workers:
            with tempfile.TemporaryFile() as announce:
                fd = announce.fileno()
                sim = self._run("simulator", [*SGLFAST, "sim", *self._sim.flags(), "--announce-fd", str(fd)], [fd])
                self.worker_urls += wait_announced(fd, sim)
        serve = [*SGLFAST, "serve", "--worker-urls", *self.worker_urls, "--port", "0", "--shards", "2", "--policy", "cache_aware"]
        serve += ["--tokenizer-path", DEMO_TOKENIZER_PATH, *self.flags]
        router = self._run("router", [*serve, "--kv-endpoint", *endpoints] if endpoints else serve)
        port = wait_listening(router)
        self.url = f"http://127.0.0.1:{port}"
        wait_ready("127.0.0.1", port, router)


@dataclass
class Reply:
    worker: str
    overlap_blocks: int
    prompt_blocks: int
    state: str
    cached_tokens: int


def ask(stack: Stack, prompt: str, **fields: Any) -> Reply:
    """A completion, and what the router believed of it."""
    body = {"model": "demo-model", "prompt": prompt, "max_tokens": 1} | fields
    headers = {"content-type": "application/json", "x-sglfast-kv": "1"}
    request = urllib.request.Request(f"{stack.url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        told = dict(part.strip().split("=", 1) for part in answer.headers["x-sglfast-kv"].split(";"))
        usage = json.loads(answer.read())["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Reply(told["worker"], int(told["overlap_blocks"]), int(told["prompt_blocks"]), told["state"], cached)


def wait_blocks(stack: Stack, n_blocks: float) -> None:
    wait_until(lambda: metric(stack, "sglfast_kv_rank_blocks") >= n_blocks, f"{n_blocks} blocks are known")


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts()


FORMS = [("array", "int"), ("array", "bytes"), ("map", "int"), ("map", "bytes")]


@pytest.fixture(params=FORMS, ids=["-".join(form) for form in FORMS])
def vllm(request: pytest.FixtureRequest) -> Iterator[EngineStack]:
    shape, hashes = request.param
    with EngineStack(*[[*VLLM, "--shape", shape, "--hashes", hashes]] * 3) as stack:
        yield stack


def test_requests_go_to_the_vllm_worker_that_owns_their_blocks(vllm: EngineStack, prompts: Prompts) -> None:
    texts = {seed: prompts.text(seed, 16 * 20 + 1) for seed in range(1, 21)}
    first = {seed: ask(vllm, text) for seed, text in texts.items()}
    assert {reply.overlap_blocks for reply in first.values()} == {0}
    assert len({reply.worker for reply in first.values()}) >= 2, "equal loads: one of three at random"
    wait_blocks(vllm, 20 * 20)
    for seed, text in texts.items():
        reply = ask(vllm, text + prompts.text(seed + 50, 16 * 5))
        assert (reply.worker, reply.overlap_blocks, reply.cached_tokens, reply.state) == (first[seed].worker, 20, 320, "EXACT")
        assert reply.prompt_blocks == 25
    wait_blocks(vllm, 20 * 25)
    owner = first[1].worker
    urllib.request.urlopen(urllib.request.Request(f"{owner}/reset_prefix_cache", b""), timeout=TIMEOUT_S).close()
    kept = 25 * sum(reply.worker != owner for reply in first.values())
    wait_until(lambda: metric(vllm, "sglfast_kv_rank_blocks") == kept, "the cleared worker's blocks are gone")
    assert ask(vllm, texts[1]).overlap_blocks == 0


def engine_says(worker: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Ask a worker itself, past the router."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(worker + path, data), timeout=TIMEOUT_S) as answer:
        return json.loads(answer.read() or b"null")


def is_another_index(stack: EngineStack) -> bool:
    return metric(stack, "sglfast_process_restarts_total") == 1 and metric(stack, "sglfast_process_up", process="index") == 1


def test_a_killed_index_learns_vllm_blocks_again(prompts: Prompts) -> None:
    """It replays what it may have missed, and only then says EXACT."""
    with EngineStack(VLLM, VLLM) as stack:
        texts = [prompts.text(seed, 16 * 30 + 1) for seed in range(10)]
        first = [ask(stack, text) for text in texts]
        wait_blocks(stack, 300)
        os.kill(process_of(stack, "sglfast.index.main"), signal.SIGKILL)

        def is_exact() -> bool:
            return is_another_index(stack) and samples(stack, "sglfast_kv_rank_state") == [RANK_EXACT] * 2

        wait_until(is_exact, "both streams are EXACT after the index was killed")
        assert metric(stack, "sglfast_kv_rank_blocks") == 300
        for text, before in zip(texts, first, strict=True):
            reply = ask(stack, text)
            assert (reply.worker, reply.overlap_blocks, reply.cached_tokens, reply.state) == (before.worker, 30, 480, "EXACT")


@pytest.mark.parametrize("has_missed", [False, True], ids=["whole", "missed"])
def test_a_killed_index_knows_blocks_without_replay(prompts: Prompts, has_missed: bool) -> None:
    """Its successor keeps them as hints, removes them by their engine's hashes, and trusts them when the next event shows no hole."""
    vllm = [*VLLM, "--no-replay"]
    with EngineStack(vllm, vllm) as stack:
        for worker in stack.worker_urls * LOW_SEQ:
            engine_says(worker, "/reset_prefix_cache", {})
        wait_until(lambda: samples(stack, "sglfast_kv_rank_state") == [RANK_EXACT] * 2, "both streams are EXACT")
        texts = [prompts.text(seed, 16 * 30 + 1) for seed in range(10)]
        first = [ask(stack, text) for text in texts]
        wait_blocks(stack, 300)
        os.kill(process_of(stack, "sglfast.index.main"), signal.SIGKILL)
        if has_missed:
            for worker in stack.worker_urls:
                engine_says(worker, "/v1/completions", {"model": "demo-model", "prompt": prompts.text(99, 40)})

        def is_followed() -> bool:
            return is_another_index(stack) and all(engine_says(worker, "/subscribers") == 1 for worker in stack.worker_urls)

        wait_until(is_followed, "the new index follows both workers")
        assert samples(stack, "sglfast_kv_rank_state") == [RANK_SYNCING] * 2
        assert metric(stack, "sglfast_kv_rank_blocks") == 300
        for text, before in zip(texts, first, strict=True):
            reply = ask(stack, text)
            assert (reply.worker, reply.overlap_blocks, reply.cached_tokens, reply.state) == (before.worker, 30, 480, "SYNCING")
        for worker in stack.worker_urls:  # an event of each
            engine_says(worker, "/v1/completions", {"model": "demo-model", "prompt": prompts.text(77, 16 * 5 + 1)})
        if has_missed:
            wait_until(lambda: samples(stack, "sglfast_kv_rank_state") == [RANK_DEGRADED] * 2, "neither stream is trusted")
            assert metric(stack, "sglfast_kv_rank_blocks") == 10
            assert {ask(stack, text).overlap_blocks for text in texts[:1]} == {0}
            return
        wait_until(lambda: samples(stack, "sglfast_kv_rank_state") == [RANK_EXACT] * 2, "both streams are EXACT again")
        assert metric(stack, "sglfast_kv_rank_blocks") == 310
        for seed, (text, before) in enumerate(zip(texts, first, strict=True)):
            reply = ask(stack, text + prompts.text(seed + 50, 16 * 2))
            assert (reply.worker, reply.overlap_blocks, reply.cached_tokens, reply.state) == (before.worker, 30, 480, "EXACT")
        wait_blocks(stack, 330)


@pytest.mark.parametrize(
    ("kind", "size", "named"),
    [(VLLM, 16, {"model": "ad-1"}), (SGLANG, 64, {"model": "demo-model:ad-1"}), (SGLANG, 64, {"lora_path": "ad-1"})],
    ids=["vllm", "sglang-colon", "sglang-path"],
)
def test_blocks_of_adapters_are_apart(kind: list[str], size: int, named: dict[str, str], prompts: Prompts) -> None:
    with EngineStack(kind, kind) as stack:
        texts = [prompts.text(seed, size * 10 + 1) for seed in range(6)]
        base = [ask(stack, text) for text in texts]
        wait_blocks(stack, 60)
        adapted = [ask(stack, text, **named) for text in texts]
        assert [(reply.overlap_blocks, reply.cached_tokens) for reply in adapted] == [(0, 0)] * 6
        wait_blocks(stack, 120)
        for text, on_base, on_adapter in zip(texts, base, adapted, strict=True):
            for reply, before in ((ask(stack, text), on_base), (ask(stack, text, **named), on_adapter)):
                assert (reply.worker, reply.overlap_blocks, reply.cached_tokens, reply.state) == (before.worker, 10, 10 * size, "EXACT")
        assert ask(stack, texts[0], **{key: value.replace("ad-1", "ad-2") for key, value in named.items()}).overlap_blocks == 0


def test_sglang_and_vllm_for_one_model(prompts: Prompts) -> None:
    """Blocks of 64 tokens by SHA, blocks of 16 by tokens: each prompt is found where it is, and explained so."""
    with EngineStack(VLLM, simulated=1) as stack:
        vllm, simulated = stack.worker_urls
        texts = [prompts.text(seed, 64 * 10 + 1) for seed in range(12)]
        first = [ask(stack, text) for text in texts]
        assert {reply.worker for reply in first} == {vllm, simulated}
        n_vllm = sum(reply.worker == vllm for reply in first)
        wait_blocks(stack, 40 * n_vllm + 10 * (12 - n_vllm))
        for text, before in zip(texts, first, strict=True):
            reply = ask(stack, text)
            assert (reply.worker, reply.cached_tokens, reply.state) == (before.worker, 640, "EXACT")
            assert reply.overlap_blocks == (40 if reply.worker == vllm else 10)
        found = explained(stack, "/v1/completions", {"model": "demo-model", "prompt": texts[0]})
        assert found["block_size"] == [16, 64]
        owner = next(row for row in found["candidates"] if row["overlap_blocks"])
        assert owner["worker"] == found["choice"]["worker"] == first[0].worker
