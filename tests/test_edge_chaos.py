"""Clients and workers that do everything wrong at once, at one real shard.

Law: an answer that is complete is the worker's own for this very request, or an error of ours; the shard lives, logs nothing, and
keeps no connection and no count. What each fault does alone is in tests/test_edge_exchange_failures.py.
"""

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import SeededRandom
from edge_harness import Edge, wait_until
from raw_client import Client, chunk, chunked, post, request
from scripted_worker import SSE_HEAD, Call, RefusingPort, Worker, answer, answer_head

from sglfast.shm import Role

CODES = ("upstream_closed", "upstream_bad_response", "upstream_unreachable", "breaker_open", "prefill_failed")
THREADS = 8
TURNS = 60


class Wild:
    """Answers in one of many ways, mostly well, and in another way to another attempt; always with the request's own body."""

    def __init__(self) -> None:
        self.attempts = Counter[bytes]()

    def __call__(self, call: Call) -> None:
        self.attempts[call.body] += 1
        misbehave(call, random.Random(b"%d %b" % (self.attempts[call.body], call.body)))


def misbehave(call: Call, rng: random.Random) -> None:
    body = call.body * rng.choice((1, 1, 1, 50, 3000))
    sizes = [rng.randrange(1, 5000) for _ in range(5)]
    if rng.random() < 0.5:
        data = answer(body, *rng.choice(((), ("connection: close",))))
    else:
        data = (SSE_HEAD if rng.random() < 0.5 else answer_head("transfer-encoding: chunked")) + chunked(body, *sizes)
    if rng.random() < 0.1:
        data = answer_head(status="103 Early Hints") + data
    match rng.randrange(12):
        case 0:
            data = data[: rng.randrange(len(data))]
            call.send(data)
            call.close() if rng.random() < 0.5 else call.reset()
        case 1:
            call.close() if rng.random() < 0.5 else call.reset()
        case 2:
            call.send(data + b"surplus")
        case 3:
            call.send(data.replace(b"\r\n", b"\n", 1))
        case 4:
            call.send(data[:50])
            time.sleep(0.02)
            call.send(data[50:])
        case 5:
            call.send(answer_head("content-type: text/event-stream") + body)
            call.close()
        case _:
            call.send(data)


def one_client(port: int, rng: random.Random, name: str, seen: Counter[str]) -> None:
    """A connection with some requests, honest or not."""
    sent: list[bytes] = []
    with Client(port, rcvbuf_bytes=rng.choice((0, 0, 4096))) as client:
        data = b""
        for number in range(rng.choice((1, 1, 2, 5))):
            body = f"{name}.{number};".encode() * rng.choice((1, 20))
            sent.append(body)
            if rng.random() < 0.5:
                data += post(body, *rng.choice(((), ("connection: keep-alive",))))
            else:
                data += request("POST", "/generate", "transfer-encoding: chunked") + chunk(body) + chunk(b"")
        if rng.random() < 0.2:
            data += b"GET / HTTP/1.1\r\nhost : x\r\n\r\n"
        step = rng.choice((1 << 20, 1 << 20, 100, 7))
        for at in range(0, len(data), step):
            client.send_what_fits(data[at : at + step])
        manner = rng.random()
        if manner < 0.1:
            client.reset()
        elif manner < 0.2:
            with contextlib.suppress(OSError):  # the shard may have closed before
                client.half_close()
        elif manner < 0.3:
            with contextlib.suppress(ConnectionError):
                client.sock.recv(rng.randrange(1, 300))
        else:
            with contextlib.suppress(EOFError, ConnectionError, ValueError):
                for body in sent:
                    found = client.read_answer()
                    if found.code is None:
                        whole = found.body.replace(body, b"")
                        is_cut = found.closes and not found.header("content-length")  # ended by the end of the connection
                        assert whole == b"" or b"upstream_" in whole or b"prefill_failed" in whole or is_cut, (body, whole[:200])
                        seen["answered"] += 1
                    else:
                        assert found.code in CODES, found.body
                        seen[found.code] += 1
                    if found.closes:
                        break


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    workers = [Worker("first"), Worker("second")]
    yield workers
    for worker in workers:
        worker.close()


ALL_ON: dict[str, Any] = {
    "disable_retries": False, "retry_initial_backoff_ms": 1, "retry_max_backoff_ms": 5, "disable_circuit_breaker": False,
    "cb_failure_threshold": 3, "cb_success_threshold": 1, "cb_timeout_duration_secs": 0.1, "takes_rid": True,
}  # fmt: skip


@pytest.mark.parametrize("roles", [(), ("prefill", "decode", "prefill"), ("decode", "prefill", "regular")], ids=["alone", "pairs", "both"])
@pytest.mark.parametrize(
    "settings",
    [{}, ALL_ON, ALL_ON | {"dp_aware": True, "dp_size": 4, "rank_ways": "hhr"}],
    ids=["one attempt", "retries and breakers", "and ranks"],
)
def test_chaos(settings: dict[str, Any], roles: tuple[Role, ...], workers: list[Worker], rng: SeededRandom) -> None:
    refusing = RefusingPort()
    seeds = [rng.getrandbits(32) for _ in range(THREADS)]
    seen: Counter[str] = Counter()
    failures: list[str] = []

    def play(seed: int) -> None:
        own = random.Random(seed)
        try:
            for turn in range(TURNS):
                one_client(edge.port, own, f"{seed}.{turn}", seen)
        except Exception as error:  # shown below
            failures.append(f"{seed}: {error!r}")

    wild = Wild()
    for worker in workers:
        worker.plan(wild)
    with (
        contextlib.closing(refusing),
        Edge([*workers, refusing], policy="random", upstream_keepalive_secs=0.5, roles=roles, **settings) as edge,
    ):
        edge.allowed_log = ("worker cannot be reached", "circuit is")
        threads = [threading.Thread(target=play, args=(seed,)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures, failures
        wait_until(lambda: not edge.gauges(), lambda: f"all is given back: {edge.gauges()}")
        edge.settle()
        wait_until(lambda: edge.ask(post(b"after")).body == b"after", "workers that are well again are found")
        edge.settle()
    if settings:  # workers that fail this often are out nearly all the time, and what is left is tried again
        return
    assert seen["answered"] > 0
    if roles:
        assert seen["prefill_failed"] > 0
    else:
        assert seen["answered"] > THREADS * TURNS / 4
        assert seen["upstream_closed"] > 0
        assert seen["upstream_bad_response"] > 0
