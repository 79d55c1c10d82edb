"""DESIGN.md 8, "one PD leg fails": the other is cancelled, the client gets the cause. Real processes, a proxy before each worker."""

import time
import urllib.error
from collections.abc import Iterator

import pytest
from e2e import Prompts, completion, metric, samples, send_all, wait_events, wait_until
from e2e import post as ask
from test_fault_table import ProxiedStack, nothing_left, outcomes, streamed, texts

from sglfast._breaker import CLOSED, OPEN
from sglfast.load.stack import SimSettings

PREFILL, DECODE = (0, 1), (2, 3)
BOOTSTRAP_TIMEOUT_S = 30.0  # how long either worker would wait for the other by itself


class PairStack(ProxiedStack):
    """Two prefill workers, then two decode workers (`each` of them), behind proxies."""

    def __init__(self, *flags: str, each: int = 2, prefill_tokens_per_s: float = 500_000.0, policy: str = "cache_aware") -> None:
        super().__init__(flags, policy=policy)
        rates = {"decode_tokens_per_s": 2000.0, "cache_tokens": 500_000}
        self._sim = SimSettings(mode="prefill", workers=each, prefill_tokens_per_s=prefill_tokens_per_s, **rates)  # type: ignore[arg-type]
        self._more = [SimSettings(mode="decode", workers=each, **rates)]  # type: ignore[arg-type]

    def at_rest(self) -> None:
        """Neither the router nor a worker holds anything of a request."""
        wait_until(lambda: metric(self, "sglfast_inflight_requests") == 0, "nothing is in flight")
        nothing_left(self)
        for worker in range(len(self.worker_urls)):
            wait_until(lambda worker=worker: not any(self.sim(worker, "/sim/stats")[name] for name in ("running", "waiting")), "at rest")  # type: ignore[misc]


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts()


@pytest.fixture
def stack() -> Iterator[PairStack]:
    with PairStack() as running:
        yield running


@pytest.mark.parametrize(
    ("worker", "mode"),
    [(PREFILL[1], "refuse"), (PREFILL[1], "reset"), (DECODE[1], "refuse"), (DECODE[1], "reset"), (DECODE[1], "cut_header")],
)
def test_half_of_a_pair_that_fails_before_a_byte_costs_no_request(worker: int, mode: str, stack: PairStack, prompts: Prompts) -> None:
    stack.proxies[worker].mode = mode
    start_s = time.monotonic()
    assert outcomes(send_all(stack.url, texts(prompts, 60), connections=6)) == {(200, ""): 60}
    assert time.monotonic() - start_s < BOOTSTRAP_TIMEOUT_S, "nobody waited for a half that would never come"
    assert stack.breaker(worker) == OPEN, "and it is asked no more"
    others = [other for other in (*PREFILL, *DECODE) if other != worker]
    assert [stack.breaker(other) for other in others] == [CLOSED] * 3, "the other half is not to blame"
    assert sum(stack.outcome(other, "error") for other in others) == 0
    if mode != "cut_header":  # else the other half may be done by then
        assert sum(stack.outcome(other, "cancelled") for other in (DECODE if worker in PREFILL else PREFILL)) >= 10
    stack.at_rest()


@pytest.mark.parametrize("mode", ["cut_header", "cut_body", "cut_chunk"])
def test_a_prefill_answer_that_is_cut_ends_what_has_begun(mode: str, stack: PairStack, prompts: Prompts) -> None:
    """It may come after the first byte of the stream, which then ends with an error event; no client is left hanging."""
    stack.proxies[PREFILL[1]].mode = mode
    found = outcomes(send_all(stack.url, texts(prompts, 60), connections=6))
    assert set(found) <= {(200, ""), (200, "stream_error")}
    assert found[200, ""] >= 45
    assert metric(stack, "sglfast_answers_cut_total") == found[200, "stream_error"]
    assert [stack.breaker(other) for other in (PREFILL[0], *DECODE)] == [CLOSED] * 3
    stack.at_rest()


@pytest.mark.parametrize(("worker", "code"), [(0, "prefill_failed"), (1, "upstream_closed")])
def test_when_no_other_pair_is_left_the_client_gets_the_cause(worker: int, code: str, prompts: Prompts) -> None:
    with PairStack("--disable-retries", each=1) as stack:
        stack.proxies[worker].mode = "reset"
        start_s = time.monotonic()
        assert outcomes(send_all(stack.url, texts(prompts, 3), connections=1)) == {(502, f"http_502 {code}"): 3}
        assert time.monotonic() - start_s < BOOTSTRAP_TIMEOUT_S / 2
        assert stack.outcome(worker, "error") == 3
        assert (stack.outcome(1 - worker, "error"), stack.outcome(1 - worker, "cancelled")) == (0, 3)
        stack.at_rest()
        stack.proxies[worker].mode = "pass"
        assert outcomes(send_all(stack.url, texts(prompts, 3), connections=1)) == {(200, ""): 3}


@pytest.mark.parametrize("fault", ["busy_503", "error_500"])
def test_a_prefill_worker_that_answers_so_is_passed_by(fault: str, stack: PairStack, prompts: Prompts) -> None:
    stack.sim(0, "/sim/fault", {"mode": fault})
    assert outcomes(send_all(stack.url, texts(prompts, 40), connections=4)) == {(200, ""): 40}
    assert stack.breaker(0) == (OPEN if fault == "error_500" else CLOSED)
    assert [stack.breaker(other) for other in (1, *DECODE)] == [CLOSED] * 3
    stack.at_rest()


def test_a_decode_worker_that_dies_in_its_stream_ends_it_with_an_event(prompts: Prompts) -> None:
    with PairStack(each=1) as stack:
        stack.proxies[1].mode = "cut_body"
        assert b"upstream_body_incomplete" in streamed(stack)
        assert metric(stack, "sglfast_answers_cut_total") == 1
        assert stack.outcome(0, "error") == 0
        stack.at_rest()


def test_a_prefill_half_that_hangs_ends_in_time(prompts: Prompts) -> None:
    with PairStack("--request-timeout-secs", "1", each=1) as stack:
        stack.sim(0, "/sim/fault", {"mode": "hang"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(f"{stack.url}/v1/completions", {"model": "demo-model", "prompt": prompts.text(1, 200)})
        assert (refused.value.code, refused.value.headers["x-router-error-code"]) == (504, "upstream_timeout")
        refused.value.close()
        for worker in (0, 1):
            wait_until(lambda worker=worker: len(stack.proxies[worker].left_s) == 1, "each connection is closed")  # type: ignore[misc]
        assert [stack.outcome(worker, outcome) for worker, outcome in ((0, "error"), (1, "cancelled"))] == [1, 1]
        nothing_left(stack)


def test_a_prefill_worker_that_fails_its_health_checks_loses_what_waits_there(prompts: Prompts) -> None:
    """It computes a prompt for a minute, then hangs: the request goes on at another pair."""
    with PairStack(policy="round_robin", prefill_tokens_per_s=100.0) as stack:

        def hang() -> None:
            wait_until(lambda: any(stack.sim(worker, "/sim/stats")["running"] for worker in PREFILL), "one of them computes")
            (worker,) = (worker for worker in PREFILL if stack.sim(worker, "/sim/stats")["running"])
            stack.sim(worker, "/sim/fault", {"mode": "hang", "scope": "all"})

        answers = send_all(stack.url, [prompts.text(7, 600)], connections=1, during=hang)
        assert outcomes(answers) == {(200, ""): 1}
        assert metric(stack, "sglfast_retries_total") == 1


def test_a_client_that_leaves_frees_both_engines() -> None:
    with PairStack(each=1, prefill_tokens_per_s=200.0) as stack:  # a step of 3 s, which nothing interrupts
        with stack.client() as client:
            client.send(completion("hello " * 300, "x", max_tokens=20))
            wait_until(lambda: stack.sim(0, "/sim/stats")["running"] == 1, "it computes the prompt")
            left_s = time.monotonic()
        for worker in (0, 1):
            wait_until(lambda worker=worker: stack.sim(worker, "/sim/stats")["abort_calls"] == 1, "each is told")  # type: ignore[misc]
        stack.at_rest()
        assert time.monotonic() - left_s < BOOTSTRAP_TIMEOUT_S / 3
        assert [stack.outcome(worker, "cancelled") for worker in (0, 1)] == [1, 1]


def test_prefill_workers_stay_trusted(stack: PairStack, prompts: Prompts) -> None:
    """What a pair's cache held is what its prefill worker says of its own half."""
    asked = texts(prompts, 10, 500)
    send_all(stack.url, asked, connections=1)
    wait_events(stack, [proxy.url for proxy in stack.proxies])
    send_all(stack.url, asked * 3, connections=1)
    wait_until(lambda: metric(stack, "sglfast_worker_kv_predictions_total", result="exact") >= 10, "answers are compared")
    assert metric(stack, "sglfast_worker_kv_predictions_total", result="too_high") == 0
    assert metric(stack, "sglfast_worker_kv_predictions_total", result="too_low") == 0
    assert samples(stack, "sglfast_worker_up") == [1.0] * 4
