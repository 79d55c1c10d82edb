"""Scripts that start sglang-router 0.3.2, with only the program's name replaced, in front of simulated workers."""

import http.client
import json
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from router_process import WORKER, Router

from sglfast.load.stack import SGLFAST, Child, SimSettings, wait_announced

ROOT = Path(__file__).parent.parent
WAIT_S = 30.0

# What follows the program's name. {workers}, {folder}: filled in; --port 0 because tests take free ports.
PLAIN = "--worker-urls {workers} --policy cache_aware --host 127.0.0.1 --port 0"
FULL = """
  --host 127.0.0.1 --port 0 --worker-urls {workers} --policy power_of_two --cache-threshold 0.3 --balance-abs-threshold 64
  --balance-rel-threshold 1.5 --eviction-interval-secs 60 --max-tree-size 67108864 --max-payload-size 4096 --enable-igw
  --worker-startup-timeout-secs 600 --worker-startup-check-interval 10 --log-dir {folder} --log-level warn --prometheus-port 0
  --prometheus-host 127.0.0.1 --request-id-headers x-request-id x-trace-id --request-timeout-secs 600
  --shutdown-grace-period-secs 60 --cors-allowed-origins http://localhost:3000 https://example.com --max-concurrent-requests 256
  --queue-size 64 --queue-timeout-secs 10 --rate-limit-tokens-per-second 1000 --retry-max-retries 3 --retry-initial-backoff-ms 50
  --retry-max-backoff-ms 5000 --retry-backoff-multiplier 1.5 --retry-jitter-factor 0.2 --cb-failure-threshold 10
  --cb-success-threshold 3 --cb-timeout-duration-secs 60 --cb-window-duration-secs 120 --health-failure-threshold 3
  --health-success-threshold 2 --health-check-timeout-secs 5 --health-check-interval-secs 1 --health-check-endpoint /health
  --tokenizer-cache-enable-l0 --tokenizer-cache-l0-max-entries 10000 --tokenizer-cache-enable-l1
  --tokenizer-cache-l1-max-memory 52428800 --backend sglang --history-backend none
"""
QUIET = """
  --worker-urls {workers} --host 127.0.0.1 --port 0 --policy round_robin --disable-retries --disable-circuit-breaker
  --disable-health-check --max-concurrent-requests -1
"""


@pytest.fixture(scope="module")
def workers() -> Iterator[list[str]]:
    """Two simulated workers."""
    settings = SimSettings(workers=2, prefill_tokens_per_s=500_000.0, decode_tokens_per_s=2_000.0)
    with tempfile.TemporaryFile() as announce:
        sim = Child("simulator", [*SGLFAST, "sim", *settings.flags(), "--announce-fd", str(announce.fileno())], [announce.fileno()])
        try:
            yield wait_announced(announce.fileno(), sim)
        finally:
            sim.stop()


@contextmanager
def started(script: str, urls: list[str], tmp_path: Path) -> Iterator[Router]:
    words = [word.replace("{folder}", str(tmp_path / "logs")) for word in script.split()]
    at = words.index("{workers}")
    argv = [sys.executable, "-m", "sglfast", "serve", *words[:at], *urls, *words[at + 1 :]]
    err_path = tmp_path / "stderr.txt"
    with open(err_path, "w") as err:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err, cwd=ROOT, text=True)
    with process:
        router = Router(process, err_path)
        try:
            router.until_listening()
            yield router
        finally:
            process.kill()


def ask(router: Router, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    """(status, headers, body: parsed JSON or text)."""
    connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=WAIT_S)
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"content-type": "application/json", **headers} if data else headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, found, json.loads(text) if found.get("content-type", "").startswith("application/json") else text
    finally:
        connection.close()


def chat(content: str, **fields: object) -> dict[str, object]:
    return {"model": "demo-model", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}


@pytest.mark.parametrize("script", [PLAIN, FULL, QUIET], ids=["plain", "full", "quiet"])
def test_a_script_starts_and_its_clients_are_served(script: str, workers: list[str], tmp_path: Path) -> None:
    with started(script, workers, tmp_path) as router:
        router.until(lambda: ask(router, "GET", "/readiness")[0] == 200, "ready")
        router.until(lambda: ask(router, "GET", "/readiness")[2]["healthy_workers"] == 2, "both workers")
        assert ask(router, "GET", "/readiness")[2]["status"] == "ready"
        assert ask(router, "GET", "/health")[::2] == (200, "OK")
        assert ask(router, "GET", "/liveness")[::2] == (200, "OK")
        assert [model["id"] for model in ask(router, "GET", "/v1/models")[2]["data"]] == ["demo-model"]

        status, headers, answer = ask(router, "POST", "/v1/chat/completions", chat("hello"), **{"x-request-id": "mine-1"})
        assert (status, answer["object"], answer["usage"]["completion_tokens"]) == (200, "chat.completion", 4)
        assert headers["x-request-id"] == "mine-1"
        status, headers, text = ask(router, "POST", "/v1/chat/completions", chat("hello", stream=True))
        assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
        assert text.endswith("data: [DONE]\n\n")
        status, _, answer = ask(router, "POST", "/v1/completions", {"model": "demo-model", "prompt": "once", "max_tokens": 3})
        assert (status, answer["object"]) == (200, "text_completion")
        status, _, answer = ask(router, "POST", "/generate", {"text": "once", "sampling_params": {"max_new_tokens": 3}})
        assert status == 200
        assert "text" in answer

        status, _, answer = ask(router, "POST", "/v1/chat/completions", chat("x" * 5000))
        if script is FULL:
            assert (status, answer["error"]["type"]) == (413, "invalid_request_error")
        else:
            assert status == 200
        assert ask(router, "GET", "/no/such/path")[0] == 404
        assert ask(router, "GET", "/v1/chat/completions")[0] == 405
        router.signal(signal.SIGTERM)
        assert router.end() == 0
        if script is FULL:
            assert "--max-tree-size changes nothing" in router.err, "what has no meaning here is said"
            (log,) = (tmp_path / "logs").iterdir()
            assert sorted(log.read_text().splitlines()) == sorted(router.err.splitlines()), "processes write in any order"


def test_a_short_prompt_that_comes_again_stays_where_it_was(workers: list[str], tmp_path: Path) -> None:
    with started(PLAIN, workers, tmp_path) as router:
        router.until(lambda: ask(router, "GET", "/readiness")[2].get("healthy_workers") == 2, "both workers")
        body = {"model": "demo-model", "prompt": "repeated prompt for cache", "max_tokens": 1}
        told = [ask(router, "POST", "/v1/completions", body, **{"x-sglfast-kv": "1"})[1]["x-sglfast-kv"] for _ in range(12)]
        # Another process may choose for the next request before it knows of the first one's place.
        assert max(Counter(line.partition(";")[0] for line in told).values()) >= 10, told


def test_without_a_healthy_worker_it_answers_503(tmp_path: Path) -> None:
    with started(PLAIN, [WORKER], tmp_path) as router:
        status, _, answer = ask(router, "GET", "/readiness")
        assert (status, answer["status"], answer["reason"]) == (503, "not ready", "insufficient healthy workers")
        assert ask(router, "GET", "/health")[0] == 200
        assert ask(router, "POST", "/v1/chat/completions", chat("hello"))[0] == 503


def test_workers_are_added_and_taken_away_over_http(workers: list[str], tmp_path: Path) -> None:
    with started("--host 127.0.0.1 --port 0 --policy round_robin --worker-urls {workers}", [], tmp_path) as router:
        assert ask(router, "GET", "/readiness")[0] == 503
        status, headers, answer = ask(router, "POST", "/workers", {"url": workers[0]})
        assert (status, answer["status"], answer["url"]) == (202, "accepted", workers[0])
        assert headers["location"] == answer["location"] == f"/workers/{answer['worker_id']}"
        router.until(lambda: ask(router, "GET", "/readiness")[0] == 200, "ready")
        assert ask(router, "POST", "/v1/chat/completions", chat("hello"))[0] == 200
        assert [worker["url"] for worker in ask(router, "GET", "/workers")[2]["workers"]] == [workers[0]]
        assert ask(router, "DELETE", headers["location"])[0] == 202
        router.until(lambda: ask(router, "GET", "/workers")[2]["total"] == 0, "gone")
        assert ask(router, "GET", "/readiness")[0] == 503


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            "--pd-disaggregation --prefill http://p1:8000 9000 --decode http://d1:8001 --prefill-policy bucket",
            "--prefill-policy bucket: is not offered, ",
        ),
        (
            "--service-discovery --selector app=sglang role=worker --service-discovery-port 8000",
            "--service-discovery: service discovery is not ",
        ),
        ("--worker-urls grpc://w:1", "--worker-urls grpc://w:1: must look like http"),
        ("--backend openai --worker-urls http://w:1", "--backend: only workers that speak the OpenAI API themselves are served"),
        ("--worker-urls http://w:1 --policy manual", "--policy manual: is not offered, "),
    ],
)
def test_what_is_not_offered_ends_the_start_with_a_sentence(flags: str, text: str) -> None:
    done = subprocess.run([*SGLFAST, "serve", *flags.split()], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"sglfast serve: {text}")
    assert done.stderr.count("\n") == 1
