"""Prefill and decode apart: `sglfast serve` with two shards before simulated workers of both kinds, all in processes of their own."""

import http.client
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest
from e2e import TIMEOUT_S, Prompts, completion, explained, get, metric, send_all, wait_events, wait_until

from sglfast.load.stack import SimSettings, Stack

CHAT: dict[str, Any] = {
    "model": "demo-model",
    "messages": [{"role": "user", "content": "hello there"}],
    "max_tokens": 5,
    "ignore_eos": True,
}
FAST: dict[str, Any] = {"prefill_tokens_per_s": 500_000.0, "decode_tokens_per_s": 2_000.0, "cache_tokens": 500_000}
# Far below the 30 s that workers wait for each other, with room for a busy machine.
QUICK_S = 15.0


def stack_of(*kinds: SimSettings, flags: tuple[str, ...] = ()) -> Stack:
    first, *more = kinds
    checks = ("--health-check-interval-secs", "0.5", "--health-failure-threshold", "2")
    return Stack(first, policy="cache_aware", more=more, serve_flags=["--shards", "2", *checks, *flags])


def sim(mode: Any, workers: int = 1, **changes: Any) -> SimSettings:
    return SimSettings(workers=workers, mode=mode, **FAST | changes)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with stack_of(sim("prefill", 2), sim("decode", 2)) as stack:
        yield stack


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts()


def ask(stack: Stack, path: str, body: Any, method: str = "POST") -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) on a connection of its own."""
    data = None if body is None else orjson.dumps(body)
    request = urllib.request.Request(stack.url + path, data, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {name.lower(): value for name, value in error.headers.items()}, error.read()


def stats(url: str) -> Any:
    return orjson.loads(get(f"{url}/sim/stats"))


def wait_at_rest(urls: list[str]) -> None:
    """No worker holds anything of any request."""

    def is_at_rest() -> bool:
        for url in urls:
            row = stats(url)
            if row["running"] or row["waiting"] or (row["rooms"] or {}).get("kept") or (row["rooms"] and row["cache_locked_blocks"]):
                return False
        return True

    wait_until(is_at_rest, "all workers are at rest")


def test_a_request_is_served_by_one_of_each(stack: Stack) -> None:
    status, headers, body = ask(stack, "/v1/chat/completions", CHAT)
    assert status == 200, body
    answer = orjson.loads(body)
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (5, "length")
    prefill, decode = stack.worker_urls[:2], stack.worker_urls[2:]
    assert headers["x-sgl-decode-url"] in decode
    for urls in (prefill, decode):
        assert sum(stats(url)["requests"] for url in urls) == 1
    assert sum(stats(url)["rooms"]["transferred"] for url in prefill) == 1
    for mode in ("prefill", "decode"):
        wait_until(lambda mode=mode: metric(stack, "sglfast_worker_requests_total", mode=mode, outcome="ok") == 1, f"{mode} is counted")  # type: ignore[misc]
    assert (
        metric(stack, "sglfast_workers", state="ready", mode="prefill")
        == metric(stack, "sglfast_workers", state="ready", mode="decode")
        == 2
    )
    # All are on one host.
    assert metric(stack, "sglfast_decode_affinity_total", outcome="same_host_picked") == 1
    wait_at_rest(stack.worker_urls)


def test_workers_are_shown_as_what_they_are(stack: Stack) -> None:
    found = orjson.loads(get(f"{stack.url}/workers"))
    assert found["stats"] == {"prefill_count": 2, "decode_count": 2, "regular_count": 0}
    assert [row["worker_type"] for row in found["workers"]] == ["prefill", "prefill", "decode", "decode"]
    infos = [orjson.loads(get(f"{url}/server_info")) for url in stack.worker_urls]
    ports = [info["disaggregation_bootstrap_port"] for info in infos[:2]]
    assert [row.get("bootstrap_port") for row in found["workers"]] == [*ports, None, None]
    assert ask(stack, "/readyz", None, "GET")[0] == 200
    assert ask(stack, "/flush_cache", {})[0] == 200


def test_streams(stack: Stack, prompts: Prompts) -> None:
    answers = send_all(stack.url, [prompts.text(seed, 300) for seed in range(40)], connections=8, max_tokens=20)
    assert [answer.error for answer in answers] == [""] * 40
    assert {answer.usage.output_tokens for answer in answers} == {20}
    wait_at_rest(stack.worker_urls)
    wait_until(lambda: metric(stack, "sglfast_worker_inflight_requests") == 0, "nothing is counted as in flight")
    assert metric(stack, "sglfast_worker_inflight_tokens") == 0


def test_prefixes_stay_with_their_prefill_worker(stack: Stack, prompts: Prompts) -> None:
    texts = [prompts.text(seed, 1000) for seed in range(100, 112)]
    send_all(stack.url, texts, connections=2)
    wait_until(lambda: explained(stack, "/v1/completions", {"model": "demo-model", "prompt": texts[-1]}) is not None, "explained")
    wait_events(stack)
    again = send_all(stack.url, texts, connections=2)
    assert [answer.usage.cached_tokens for answer in again] == [15 * 64] * 12


def test_batches(stack: Stack) -> None:
    body = {"input_ids": [[1, 2, 3], [4, 5, 6, 7]], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}
    status, _, data = ask(stack, "/generate", body)
    assert status == 200, data
    assert [part["meta_info"]["completion_tokens"] for part in orjson.loads(data)] == [3, 3]
    status, _, data = ask(stack, "/v1/chat/completions", {**CHAT, "n": 3})
    assert (status, len(orjson.loads(data)["choices"])) == (200, 3)
    wait_at_rest(stack.worker_urls)


def test_what_the_prefill_worker_refuses_is_the_clients_answer(stack: Stack) -> None:
    status, _, data = ask(stack, "/v1/chat/completions", {**CHAT, "messages": []})
    assert (status, "Messages cannot be empty" in data.decode()) == (400, True)
    wait_at_rest(stack.worker_urls)


def test_who_leaves_a_stream_leaves_both_workers(stack: Stack) -> None:
    host, port = stack.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as client:
        client.sendall(completion("hello there", host, max_tokens=60_000))
        assert client.recv(64).startswith(b"HTTP/1.1 200")
    wait_at_rest(stack.worker_urls)
    # By its own name of the request; the prefill worker, too, if its answer had not quite ended.
    wait_until(lambda: sum(stats(url)["abort_calls_known"] for url in stack.worker_urls[2:]) == 1, "the decode worker was told")
    assert sum(stats(url)["abort_calls_known"] for url in stack.worker_urls[:2]) <= 1
    wait_until(lambda: metric(stack, "sglfast_worker_inflight_requests") == 0, "nothing is counted as in flight")


def test_regular_workers_beside_a_pair() -> None:
    prompts = Prompts()
    with stack_of(sim("null"), sim("prefill"), sim("decode")) as stack:
        answers = send_all(stack.url, [prompts.text(seed, 200) for seed in range(120)], connections=12, max_tokens=30)
        assert [answer.error for answer in answers] == [""] * 120
        regular, prefill, decode = (stats(url)["requests"] for url in stack.worker_urls)
        assert regular + prefill == 120
        assert prefill == decode
        assert min(regular, prefill) >= 20, "both are used"
        wait_at_rest(stack.worker_urls)


def meanwhile(request: Callable[[], Any], then: Callable[[], None]) -> tuple[Any, float]:
    """Do something when a request is under way; (its result, seconds from there to it)."""
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(request)
        then()
        begun_s = time.monotonic()
        return asking.result(), time.monotonic() - begun_s


def test_a_killed_prefill_process_is_told_at_once_and_replaced() -> None:
    prompt = Prompts().text(5, 1000)
    # A prompt takes twenty seconds.
    slow = sim("prefill", prefill_tokens_per_s=50.0)
    with stack_of(slow, sim("decode"), flags=("--disable-retries",)) as stack:
        prefill, decode = stack.worker_urls

        def kill() -> None:
            wait_until(lambda: stats(prefill)["running"] == 1 and metric(stack, "sglfast_inflight_requests") >= 1, "it is under way")
            os.kill(stack.children[0].pid, signal.SIGKILL)

        body = {"model": "demo-model", "prompt": prompt, "max_tokens": 3}
        (status, headers, data), took_s = meanwhile(lambda: ask(stack, "/v1/completions", body), kill)
        assert (status, headers["x-router-error-code"]) == (502, "prefill_failed"), data
        assert took_s < QUICK_S
        wait_until(lambda: stats(decode)["running"] == stats(decode)["waiting"] == 0, "the decode worker was let go")
        wait_until(lambda: ask(stack, "/readyz", None, "GET")[0] == 503, "half a pair is not ready")
        status, headers, _ = ask(stack, "/v1/chat/completions", CHAT)
        assert (status, headers["x-router-error-code"]) == (503, "no_prefill_workers_available")
        (url,) = stack.start_workers("second prefill simulator", sim("prefill"))
        status, _, data = ask(stack, "/workers", {"url": url, "worker_type": "prefill"})
        assert status == 202, data
        wait_until(lambda: ask(stack, "/readyz", None, "GET")[0] == 200, "ready again")
        status, headers, data = ask(stack, "/v1/chat/completions", CHAT)
        assert (status, headers["x-sgl-decode-url"]) == (200, decode), data
        assert stats(url)["rooms"]["transferred"] == 1


def test_a_killed_prefill_process_in_a_stream() -> None:
    slow = sim("prefill", prefill_tokens_per_s=50.0)
    with stack_of(slow, sim("decode")) as stack:
        host, port = stack.url.removeprefix("http://").split(":")

        def stream() -> tuple[int, bytes]:
            connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
            try:
                body = {"model": "demo-model", "prompt": Prompts().text(6, 1000), "max_tokens": 3, "stream": True}
                connection.request("POST", "/v1/completions", orjson.dumps(body), {"content-type": "application/json"})
                answer = connection.getresponse()
                return answer.status, answer.read()
            finally:
                connection.close()

        def kill() -> None:
            wait_until(lambda: stats(stack.worker_urls[0])["running"] == 1, "it is under way")
            os.kill(stack.children[0].pid, signal.SIGKILL)

        (status, data), took_s = meanwhile(stream, kill)
        assert (status, took_s < QUICK_S) == (502, True), data
        wait_until(lambda: stats(stack.worker_urls[1])["running"] == 0, "the decode worker was let go")
