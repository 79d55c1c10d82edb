"""DESIGN.md 8, "When things fail", row by row: real router processes, simulated workers, and a proxy between them that does the harm.

Elsewhere: a shard, index or control that is killed, and shutdown, are in test_e2e.py; overload belongs to admission; prefill and decode
pairs are in test_fault_table_pairs.py.
"""

import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence

import orjson
import pytest
from e2e import Prompts, completion, metric, overlap_of, post, process_of, samples, send_all, wait_until
from fault_proxy import FaultProxy
from raw_client import Client

from sglfast._breaker import CLOSED, HALF_OPEN, OPEN
from sglfast._counters import RANK_EXACT
from sglfast.load.client import Answer
from sglfast.load.stack import Child, SimSettings, Stack

FLAGS = ["--shards", "2", "--health-check-interval-secs", "0.5", "--health-check-timeout-secs", "0.5", "--health-failure-threshold", "2",
         "--retry-initial-backoff-ms", "10", "--request-timeout-secs", "20"]  # fmt: skip


class ProxiedStack(Stack):
    """A stack whose router reaches each worker through a proxy of its own."""

    def __init__(self, flags: Sequence[str] = (), *, policy: str = "round_robin", workers: int = 3, decode_tokens_per_s: float = 2000.0):
        sim = SimSettings(
            workers=workers, prefill_tokens_per_s=500_000.0, decode_tokens_per_s=decode_tokens_per_s, cache_tokens=500_000
        )  # fmt: skip
        super().__init__(sim, policy=policy, serve_flags=[*FLAGS, *flags])
        self.proxies: list[FaultProxy] = []

    def _run(self, name: str, argv: Sequence[str], pass_fds: Sequence[int] = ()) -> Child:
        if name == "router":
            self.proxies = [FaultProxy(url) for url in self.worker_urls]
            by_url = {url: proxy.url for url, proxy in zip(self.worker_urls, self.proxies, strict=True)}
            argv = [by_url.get(word, word) for word in argv]
        return super()._run(name, argv, pass_fds)

    def stop(self) -> None:
        super().stop()
        for proxy in self.proxies:
            proxy.close()
        self.proxies = []

    def sim(self, worker: int, path: str, body: dict[str, object] | None = None) -> dict[str, object]:
        """Ask the simulator of a worker, past the proxy."""
        if body is None:
            with urllib.request.urlopen(f"{self.worker_urls[worker]}{path}", timeout=30) as answer:
                return orjson.loads(answer.read())
        return orjson.loads(post(f"{self.worker_urls[worker]}{path}", body))

    def breaker(self, worker: int) -> float:
        return metric(self, "sglfast_breaker_state", worker=self.proxies[worker].url)

    def outcome(self, worker: int, outcome: str) -> float:
        return metric(self, "sglfast_worker_requests_total", worker=self.proxies[worker].url, outcome=outcome)

    def client(self) -> Client:
        return Client(int(self.url.rpartition(":")[2]))


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts()


@pytest.fixture
def stack() -> Iterator[ProxiedStack]:
    with ProxiedStack() as running:
        yield running


def texts(prompts: Prompts, count: int, tokens: int = 20) -> list[str]:
    return [prompts.text(seed, tokens) for seed in range(count)]


def outcomes(answers: Sequence[Answer]) -> Counter[tuple[int, str]]:
    return Counter((answer.status, answer.error) for answer in answers)


def nothing_left(stack: Stack) -> None:
    """All load is given back."""
    wait_until(lambda: metric(stack, "sglfast_inflight_requests") == 0, "nothing is in flight")
    assert metric(stack, "sglfast_worker_inflight_requests") == 0
    assert metric(stack, "sglfast_worker_inflight_tokens") == 0


# ---- worker refuses or resets before a byte reached the client: next choice, failed one excluded, within the retry budget ----


@pytest.mark.parametrize("mode", ["refuse", "reset", "cut_header"])
def test_a_worker_that_fails_before_a_byte_costs_no_request(mode: str, stack: ProxiedStack, prompts: Prompts) -> None:
    stack.proxies[1].mode = mode
    assert outcomes(send_all(stack.url, texts(prompts, 100), connections=8)) == {(200, ""): 100}
    assert metric(stack, "sglfast_retries_total") >= 10
    assert metric(stack, "sglfast_retries_exhausted_total") == 0
    assert stack.breaker(1) == OPEN, "and it is asked no more"
    stack.proxies[1].mode = "pass"
    assert outcomes(send_all(stack.url, texts(prompts, 20), connections=4)) == {(200, ""): 20}
    nothing_left(stack)


def test_when_all_fail_the_client_is_told_within_the_budget(stack: ProxiedStack, prompts: Prompts) -> None:
    for proxy in stack.proxies:
        proxy.mode = "reset"
    assert outcomes(send_all(stack.url, texts(prompts, 1), connections=1)) == {(502, "http_502 upstream_closed"): 1}
    assert sum(proxy.hits for proxy in stack.proxies) == 5
    assert metric(stack, "sglfast_router_errors_total", code="upstream_closed") == 1
    assert metric(stack, "sglfast_retries_exhausted_total") == 1


def test_a_slow_head_is_no_failure(stack: ProxiedStack, prompts: Prompts) -> None:
    stack.proxies[0].mode = "slow"
    assert outcomes(send_all(stack.url, texts(prompts, 9), connections=3)) == {(200, ""): 9}
    assert metric(stack, "sglfast_retries_total") == 0


# ---- worker dies mid-stream: a well-formed SSE error event, then close; counted; breaker charged ----


def streamed(stack: ProxiedStack, *, version: bytes = b"1.1", stream: bool = True) -> bytes:
    """All bytes of an answer's body, until the router closes."""
    with stack.client() as client:
        client.send(completion("hello", "x", max_tokens=20, stream=stream).replace(b"HTTP/1.1", b"HTTP/" + version, 1))
        assert client.read_head().status == 200
        return client.read_to_end()


def test_a_stream_cut_between_chunks_ends_with_an_error_event() -> None:
    with ProxiedStack(["--cb-failure-threshold", "3"], workers=1) as stack:
        stack.proxies[0].mode = "cut_body"
        for _ in range(3):
            *_, size, event, last, end, rest = streamed(stack).split(b"\r\n")
            assert int(size, 16) == len(event)
            assert event.endswith(b"\n\n")
            assert orjson.loads(event.strip().removeprefix(b"data: "))["error"]["code"] == "upstream_body_incomplete"
            assert (last, end, rest) == (b"0", b"", b"")
        assert metric(stack, "sglfast_answers_cut_total") == 3
        assert stack.outcome(0, "error") == 3
        assert stack.breaker(0) == OPEN
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(f"{stack.url}/v1/completions", {"model": "demo-model", "prompt": "hello"})
        assert (refused.value.code, refused.value.headers["x-router-error-code"]) == (503, "breaker_open")
        refused.value.close()


def test_a_stream_cut_inside_a_chunk_ends_where_it_is(stack: ProxiedStack) -> None:
    for proxy in stack.proxies:
        proxy.mode = "cut_chunk"
    data = streamed(stack)
    assert b"error" not in data, "it would be taken for the rest of the chunk"
    assert not data.endswith(b"0\r\n\r\n"), "a client that counts sees that it is not whole"
    assert metric(stack, "sglfast_answers_cut_total") == 1


@pytest.mark.parametrize("mode", ["cut_body", "cut_chunk"])
def test_a_client_without_chunks_gets_the_event_too(mode: str, stack: ProxiedStack) -> None:
    for proxy in stack.proxies:
        proxy.mode = mode
    data = streamed(stack, version=b"1.0")
    last = data.rstrip().rpartition(b"\n\n")[2]
    assert orjson.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_body_incomplete"


def test_a_counted_answer_that_is_cut_is_short(stack: ProxiedStack) -> None:
    for proxy in stack.proxies:
        proxy.mode = "cut_body"
    with stack.client() as client:
        client.send(completion("hello", "x", max_tokens=20, stream=False))
        size = int(client.read_head().header("content-length")[0])
        assert 0 < len(client.read_to_end()) < size
    assert metric(stack, "sglfast_answers_cut_total") == 1
    assert metric(stack, "sglfast_retries_total") == 0, "never after a byte"


# ---- 429 / 503 from a worker: busy, not broken: next choice, breaker untouched ----


def test_a_busy_worker_is_passed_by(stack: ProxiedStack, prompts: Prompts) -> None:
    stack.sim(1, "/sim/fault", {"mode": "busy_503"})
    assert outcomes(send_all(stack.url, texts(prompts, 60), connections=6)) == {(200, ""): 60}
    assert stack.outcome(1, "busy") >= 15, "more than would open its circuit"
    assert (stack.breaker(1), stack.outcome(1, "error")) == (CLOSED, 0)


def test_when_all_are_busy_the_client_hears_it_from_them(stack: ProxiedStack, prompts: Prompts) -> None:
    for worker in range(3):
        stack.sim(worker, "/sim/fault", {"mode": "busy_503"})
    (answer,) = send_all(stack.url, texts(prompts, 1), connections=1)
    assert answer.status == 503
    assert b"The request queue is full." in answer.body, "the worker's own words"
    assert sum(stack.outcome(worker, "busy") for worker in range(3)) == 5


# ---- 4xx: the client's business: passed through, breaker untouched ----


def test_a_bad_request_is_the_client_s(stack: ProxiedStack) -> None:
    for _ in range(35):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(f"{stack.url}/v1/completions", {"model": "demo-model", "prompt": ""})
        assert refused.value.code == 400
        assert "x-router-error-code" not in refused.value.headers
        assert b"must not be empty" in refused.value.read(), "the worker's own words"
        refused.value.close()
    assert metric(stack, "sglfast_retries_total") == 0
    assert [stack.breaker(worker) for worker in range(3)] == [CLOSED] * 3
    assert sum(stack.outcome(worker, "client_error") for worker in range(3)) == 35


# ---- client goes away: upstream connection closed at once, and /abort_request where the engine has it ----


def test_a_client_that_leaves_frees_its_engine() -> None:
    with ProxiedStack(workers=1, decode_tokens_per_s=50.0) as stack:
        proxy, late_s = stack.proxies[0], []
        for stream in (True, False, True, False, True):
            with stack.client() as client:
                client.send(completion("hello", "x", max_tokens=5000, stream=stream))
                wait_until(lambda: stack.sim(0, "/sim/stats")["running"] == 1, "the engine works")
                left_s = time.monotonic()
            wait_until(lambda: bool(proxy.left_s), "the router has closed")
            late_s.append(proxy.left_s.pop() - left_s)
        assert min(late_s) < 0.05, f"closed after {late_s} s"
        wait_until(lambda: stack.sim(0, "/sim/stats")["abort_calls"] == 5, "the engine is told each time")
        assert stack.sim(0, "/sim/stats")["abort_calls_known"] == 5, "by the id that the request had"
        wait_until(lambda: stack.sim(0, "/sim/stats")["running"] == 0, "an engine drops the aborted when its step ends")
        assert metric(stack, "sglfast_abort_requests_total") == 5
        assert stack.outcome(0, "cancelled") == 5
        nothing_left(stack)


# ---- KV event gap: replay if offered; engine restart: that rank's blocks are cleared ----


def test_a_gap_in_the_events_is_replayed(prompts: Prompts) -> None:
    with ProxiedStack(policy="cache_aware", workers=1) as stack:
        send_all(stack.url, [prompts.text(1, 500)], connections=1)
        wait_until(lambda: samples(stack, "sglfast_kv_rank_state") == [RANK_EXACT], "the stream is followed")
        stack.sim(0, "/sim/drop_events", {"count": 1})
        send_all(stack.url, [prompts.text(2, 500), prompts.text(3, 500)], connections=1)
        wait_until(lambda: metric(stack, "sglfast_kv_gaps_total") == 1, "the hole is seen")
        wait_until(lambda: metric(stack, "sglfast_kv_replays_total") >= 1, "it is asked for")
        wait_until(lambda: samples(stack, "sglfast_kv_rank_state") == [RANK_EXACT], "and healed")
        for seed in (1, 2, 3):
            predicted, cached, state = overlap_of(send_all(stack.url, [prompts.text(seed, 500)], connections=1)[0])
            assert (predicted, cached, state) == (7, 7, "EXACT")


def test_an_engine_that_restarts_is_known_to_be_empty(prompts: Prompts) -> None:
    with ProxiedStack(policy="cache_aware", workers=1) as stack:
        text = prompts.text(1, 500)
        send_all(stack.url, [text], connections=1)
        wait_until(lambda: overlap_of(send_all(stack.url, [text], connections=1)[0])[0] == 7, "its cache is known")
        stack.sim(0, "/sim/restart", {"down_s": 1.5})
        wait_until(lambda: metric(stack, "sglfast_worker_up") == 1, "it is back")
        wait_until(lambda: metric(stack, "sglfast_kv_rank_blocks") == 0, "its blocks are forgotten")
        answer = send_all(stack.url, [text], connections=1)[0]
        assert (answer.status, overlap_of(answer)[:2]) == (200, (0, 0))


# ---- a worker that hangs ----


def test_a_connection_that_stalls_ends_in_time() -> None:
    with ProxiedStack(["--request-timeout-secs", "1", "--cb-failure-threshold", "2"], workers=1) as stack:
        stack.proxies[0].mode = "stall"
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(f"{stack.url}/v1/completions", {"model": "demo-model", "prompt": "hello"})
            assert (refused.value.code, refused.value.headers["x-router-error-code"]) == (504, "upstream_timeout")
            refused.value.close()
        assert stack.breaker(0) == OPEN
        assert len(stack.proxies[0].left_s) == 2, "the worker's connection is closed"
        nothing_left(stack)


def test_a_shard_that_is_killed_gives_its_probe_back() -> None:
    """The only shard has a worker's one probe when it is killed: its successor may send another."""
    flags = ["--shards", "1", "--cb-failure-threshold", "1", "--cb-success-threshold", "1", "--cb-timeout-duration-secs", "0.5"]
    with ProxiedStack(flags, workers=1) as stack:
        proxy = stack.proxies[0]
        proxy.mode = "reset"
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(f"{stack.url}/v1/completions", {"model": "demo-model", "prompt": "hello"})
        refused.value.close()
        proxy.mode = "stall"
        wait_until(lambda: stack.breaker(0) == HALF_OPEN, "its time is over")
        hits = proxy.hits
        with stack.client() as client:
            client.send(completion("hello", "x"))
            wait_until(lambda: proxy.hits == hits + 1, "the probe is at the worker")
            os.kill(process_of(stack, "sglfast.edge.main"), signal.SIGKILL)
            assert client.has_ended()
        proxy.mode = "pass"
        answer = post(f"{stack.url}/v1/completions", {"model": "demo-model", "prompt": "hello"})
        assert b"choices" in answer
        wait_until(lambda: stack.breaker(0) == CLOSED, "that was the probe")
        assert metric(stack, "sglfast_process_restarts_total", process="shard0") == 1


def test_two_that_fail_often_and_one_that_hangs_cost_nobody_anything(prompts: Prompts) -> None:
    """Four workers; two answer 500 to 30 % of their requests, the third stops to answer anything, its health checks included."""
    with ProxiedStack(workers=4) as stack:
        for worker in (1, 2):
            stack.sim(worker, "/sim/fault", {"mode": "error_500", "share": 0.3})
        is_out = []

        def hang() -> None:
            time.sleep(0.3)
            stack.sim(3, "/sim/fault", {"mode": "hang", "scope": "all"})
            start_s = time.monotonic()
            wait_until(lambda: metric(stack, "sglfast_worker_up", worker=stack.proxies[3].url) == 0, "the one that hangs is out")
            is_out.append(time.monotonic() - start_s)

        answers = send_all(stack.url, texts(prompts, 3000), connections=16, during=hang)
        good = sum(answer.status == 200 and not answer.error for answer in answers)
        assert good / len(answers) >= 0.999, outcomes(answers)
        # Two checks of 0.5 s, half a second apart; the bound allows for a machine that is busy.
        assert is_out[0] < 10
        assert min(stack.outcome(worker, "error") for worker in (1, 2)) >= 50, "they did fail"
        assert stack.outcome(3, "error") >= 1, "and some had waited there"
        assert metric(stack, "sglfast_retries_exhausted_total") <= 3
        nothing_left(stack)


def test_the_proxy_refuses_as_a_dead_host_does() -> None:
    """The tool itself: nothing listens while it refuses, and it listens again."""
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = FaultProxy(f"http://127.0.0.1:{listener.getsockname()[1]}")
    address = ("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    for _ in range(2):
        socket.create_connection(address, timeout=5).close()
        proxy.mode = "refuse"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=5)
        proxy.mode = "pass"
    proxy.close()
    listener.close()
