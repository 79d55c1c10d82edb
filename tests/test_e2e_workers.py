"""Workers that come and go under traffic: `sglfast serve` with two shards before simulated workers, all in processes of their own."""

import asyncio
import itertools
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from e2e import TIMEOUT_S, Prompts, completion, explained, metric, open_files, process_of, samples, send_all, small_stack, wait_until

from sglfast.load.client import Answer, LoadClient
from sglfast.load.stack import SGLFAST, Child, Stack, wait_listening

INFLIGHT = "sglfast_worker_inflight_requests"


def call(stack: Stack, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """(status, JSON) of a request on a connection of its own: whichever shard takes it."""
    request = urllib.request.Request(stack.url + path, method=method, data=None if body is None else orjson.dumps(body))
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.status, orjson.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, orjson.loads(error.read() or b"null")


def by_url(url: str) -> str:
    return "/workers/" + quote(url, safe="")


def state_of(stack: Stack, url: str) -> str:
    status, row = call(stack, "GET", by_url(url))
    return str(row["state"]) if status == 200 else "gone"


def wait_state(stack: Stack, url: str, state: str) -> None:
    wait_until(lambda: state_of(stack, url) == state, f"{url} is {state}")


def add(stack: Stack, url: str) -> str:
    """POST a worker and wait until it is ready; returns its id."""
    status, body = call(stack, "POST", "/workers", {"url": url})
    assert status == 202, body
    wait_state(stack, url, "ready")
    return str(body["worker_id"])


def remove(stack: Stack, url: str) -> None:
    assert call(stack, "DELETE", by_url(url))[0] == 202
    wait_state(stack, url, "gone")


def requests_at(url: str) -> int:
    """Requests that a simulated worker has had."""
    with urllib.request.urlopen(f"{url}/sim/stats", timeout=TIMEOUT_S) as answer:
        return int(orjson.loads(answer.read())["requests"])


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts()


@pytest.fixture
def stack() -> Iterator[Stack]:
    with small_stack("round_robin") as running:
        yield running


class Traffic:
    """Requests over some connections until the block ends; `answers` then."""

    def __init__(self, stack: Stack, prompts: Prompts, *, connections: int = 8, max_tokens: int = 20) -> None:
        self.answers: list[Answer] = []
        self._stack = stack
        self._requests = [completion(prompts.text(seed, 100), "x", max_tokens=max_tokens) for seed in range(32)]
        self._connections = connections
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Traffic":
        self._thread.start()
        wait_until(lambda: len(self.answers) > 20 or not self._thread.is_alive(), "traffic flows")
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    async def _run(self) -> None:
        client = LoadClient(self._stack.url)
        turns = itertools.count()

        async def one() -> None:
            while not self._is_over.is_set():
                self.answers.append(await client.send(self._requests[next(turns) % 32], timeout_s=TIMEOUT_S))

        await asyncio.gather(*(one() for _ in range(self._connections)))
        await client.close()

    def assert_all_good(self) -> None:
        failed = [(answer.error, answer.status, answer.body[:200]) for answer in self.answers if answer.error or answer.status != 200]
        assert not failed, f"{len(failed)} of {len(self.answers)} failed: {failed[:3]}"


def test_workers_come_and_go_under_traffic_and_no_request_fails(stack: Stack, prompts: Prompts) -> None:
    url = stack.worker_urls[3]
    ids = set()
    with Traffic(stack, prompts) as traffic:
        for _ in range(3):
            remove(stack, url)
            done = requests_at(url)
            at = len(traffic.answers)
            wait_until(lambda at=at: len(traffic.answers) > at + 50, "traffic goes on")
            assert requests_at(url) == done, "a worker that is gone gets nothing"
            ids.add(add(stack, url))
            wait_until(lambda done=done: requests_at(url) > done, "the worker gets requests again")
    traffic.assert_all_good()
    assert len(ids) == 3
    assert metric(stack, INFLIGHT) == metric(stack, "sglfast_worker_inflight_tokens") == 0
    assert metric(stack, "sglfast_worker_removals_total", how="drained") == 3
    assert metric(stack, "sglfast_worker_registrations_total", result="success") == 7


def test_a_drain_finishes_what_it_has_and_takes_nothing_new(stack: Stack, prompts: Prompts) -> None:
    long = prompts.text(1, 100)
    answers: list[Answer] = []
    streams = threading.Thread(target=lambda: answers.extend(send_all(stack.url, [long] * 8, connections=8, max_tokens=6000)))
    streams.start()
    wait_until(lambda: metric(stack, INFLIGHT) == 8, "all streams have a worker")
    loads = {url: int(metric(stack, INFLIGHT, worker=url)) for url in stack.worker_urls}
    url = max(loads, key=lambda url: loads[url])
    status, _ = call(stack, "PUT", by_url(url), {"state": "draining"})
    assert status == 202
    had = requests_at(url)
    others = send_all(stack.url, [prompts.text(seed, 50) for seed in range(40)], connections=8)
    assert not [answer for answer in others if answer.error]
    assert requests_at(url) == had
    assert streams.is_alive(), "the streams are still there"
    row = call(stack, "GET", by_url(url))[1]
    assert (row["state"], row["is_healthy"]) == ("draining", True)
    assert row["load"] == loads[url] >= 2
    assert metric(stack, "sglfast_worker_state", worker=url, state="draining") == 1
    assert metric(stack, "sglfast_worker_up", worker=url) == 0
    told = explained(stack, "/v1/completions", {"model": "demo-model", "prompt": "x"})
    mine = next(found for found in told["candidates"] if found["worker"] == url)
    assert (mine["eligible"], mine["why"]) == (False, "is draining: it finishes its requests and takes no new ones")
    assert mine["load"]["requests"] == loads[url]
    streams.join(TIMEOUT_S)
    assert [(answer.error, answer.status) for answer in answers] == [("", 200)] * 8
    assert state_of(stack, url) == "draining", "maintenance is no removal"
    call(stack, "PUT", by_url(url), {"state": "ready"})
    send_all(stack.url, [prompts.text(seed, 50) for seed in range(40)], connections=8)
    assert requests_at(url) > had


def test_a_forced_removal_cuts_with_an_error_event(stack: Stack, prompts: Prompts) -> None:
    answers: list[Answer] = []
    texts, url = [prompts.text(1, 100)] * 8, stack.worker_urls[0]
    streams = threading.Thread(target=lambda: answers.extend(send_all(stack.url, texts, connections=8, max_tokens=3000)))
    streams.start()
    wait_until(lambda: metric(stack, INFLIGHT) == 8, "all streams have a worker")
    cut = int(metric(stack, INFLIGHT, worker=url))
    assert cut >= 1
    assert call(stack, "DELETE", by_url(url) + "?force=true")[0] == 202
    wait_state(stack, url, "gone")
    streams.join(TIMEOUT_S)
    assert sum(b"upstream_body_incomplete" in answer.body or answer.error != "" for answer in answers) == cut
    assert metric(stack, INFLIGHT) == 0
    assert metric(stack, "sglfast_worker_removals_total", how="cut") == 1
    add(stack, url)
    assert metric(stack, "sglfast_worker_selected_requests_total", worker=url) == 0, "its counters begin anew"


def test_the_index_forgets_a_removed_worker_and_follows_it_again(prompts: Prompts) -> None:
    with small_stack() as stack:
        texts = [prompts.text(seed, 700) for seed in range(24)]
        send_all(stack.url, texts, connections=4)
        wait_until(lambda: metric(stack, "sglfast_kv_rank_blocks") == 240, "all blocks are known")
        url = stack.worker_urls[1]
        owned = metric(stack, "sglfast_kv_rank_blocks", worker=url)
        assert owned > 0
        remove(stack, url)
        wait_until(lambda: metric(stack, "sglfast_kv_blocks") == 240 - owned, "its blocks are cleared")
        assert samples(stack, "sglfast_[a-z_]+", worker=url) == [], "no series of it is left"
        answers = send_all(stack.url, texts, connections=4)
        assert not [answer for answer in answers if answer.error]
        add(stack, url)
        wait_until(lambda: metric(stack, "sglfast_kv_rank_blocks", worker=url) == owned, "replay brings its blocks back")


def test_both_shards_answer_alike_and_at_once(stack: Stack) -> None:
    """A change through one connection is seen by the next on any other: the kernel spreads them over the shards."""
    for turn in range(15):
        url = f"http://127.0.0.1:{turn + 1}"  # nothing listens there
        _, made = call(stack, "POST", "/workers", {"url": url, "labels": {"turn": str(turn)}})
        assert call(stack, "GET", made["location"])[1]["metadata"] == {"turn": str(turn)}
        assert call(stack, "POST", "/workers", {"url": url})[0] == 409
        assert call(stack, "GET", "/workers")[1]["total"] == 5
        assert call(stack, "DELETE", made["location"])[0] == 202
        wait_state(stack, url, "gone")
    pids = {process_of(stack, "sglfast.edge.main", number) for number in range(2)}
    assert len(pids) == 2
    assert metric(stack, "sglfast_worker_registrations_total", result="duplicate") == 15


def test_hammered_from_all_sides_while_requests_flow(stack: Stack, prompts: Prompts) -> None:
    """Four threads add and remove the same few workers at random; two workers stay. No request fails and nothing is left."""
    moving = stack.worker_urls[2:]
    router = stack.children[-1].pid
    pids = [router, *(process_of(stack, "sglfast.edge.main", number) for number in range(2)), process_of(stack, "sglfast.index.main")]
    send_all(stack.url, [prompts.text(1, 50)] * 16, connections=8)
    time.sleep(0.5)
    before = [open_files(pid) for pid in pids]
    statuses: list[int] = []
    end_s = time.monotonic() + 8.0

    def hammer(number: int) -> None:
        for turn in itertools.count():
            if time.monotonic() > end_s:
                return
            url = moving[(turn + number) % 2]
            if (turn // 2 + number) % 2:
                statuses.append(call(stack, "POST", "/workers", {"url": url})[0])
            else:
                statuses.append(call(stack, "DELETE", by_url(url))[0])
            if turn % 5 == 0:
                statuses.append(call(stack, "GET", "/workers")[0])

    with Traffic(stack, prompts, connections=12) as traffic:
        threads = [threading.Thread(target=hammer, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    traffic.assert_all_good()
    assert set(statuses) <= {200, 202, 404, 409}
    assert {202, 404, 409} <= set(statuses)
    for url in moving:
        wait_until(lambda url=url: call(stack, "DELETE", by_url(url))[0] == 404, f"{url} is gone")
    assert [row["url"] for row in call(stack, "GET", "/workers")[1]["workers"]] == stack.worker_urls[:2]
    for url in moving:
        add(stack, url)
    assert sorted(row["state"] for row in call(stack, "GET", "/workers")[1]["workers"]) == ["ready"] * 4
    wait_until(lambda: len(samples(stack, "sglfast_kv_rank_state")) == 4, "four ranks")
    assert metric(stack, INFLIGHT) == metric(stack, "sglfast_worker_inflight_tokens") == metric(stack, "sglfast_inflight_requests") == 0
    wait_until(  # idle connections to workers live for three seconds
        lambda: all(open_files(pid) <= then + 3 for pid, then in zip(pids, before, strict=True)), f"files are open as before: {before}"
    )
    stack.check_alive()
    assert "unforeseen" not in stack.children[-1].output()


def test_a_router_without_workers_gets_its_first_one_by_post(prompts: Prompts) -> None:
    with small_stack("round_robin") as workers:
        argv = [*SGLFAST, "serve", "--host", "127.0.0.1", "--port", "0", "--shards", "2"]
        empty = Stack.__new__(Stack)
        child = Child("router", argv)
        try:
            empty.url = f"http://127.0.0.1:{wait_listening(child)}"
            assert call(empty, "GET", "/workers") == (
                200,
                {"workers": [], "total": 0, "stats": {"prefill_count": 0, "decode_count": 0, "regular_count": 0}},
            )
            assert call(empty, "GET", "/readyz")[0] == 503
            assert send_all(empty.url, [prompts.text(1, 50)], connections=1)[0].status == 503
            for url in workers.worker_urls:
                add(empty, url)
            assert call(empty, "GET", "/readyz")[0] == 200
            answers = send_all(empty.url, [prompts.text(seed, 50) for seed in range(16)], connections=4)
            assert [(answer.error, answer.status) for answer in answers] == [("", 200)] * 16
            assert metric(empty, "sglfast_worker_selected_requests_total") == 17 - 1
            assert len(samples(empty, "sglfast_kv_rank_state")) == 4
        finally:
            child.stop()


def test_sighup_changes_the_list_of_workers(prompts: Prompts, tmp_path: Path) -> None:
    with small_stack("round_robin") as workers:
        first, second, third, _ = workers.worker_urls
        file = tmp_path / "router.yaml"

        def write(*urls: str) -> None:
            file.write_text("host: 127.0.0.1\nport: 0\nshards: 2\nworker_urls: [" + ", ".join(f'"{url}"' for url in urls) + "]\n")

        write(first, second)
        router = Stack.__new__(Stack)
        child = Child("router", [*SGLFAST, "serve", "--config", str(file)])
        try:
            router.url = f"http://127.0.0.1:{wait_listening(child)}"
            wait_until(lambda: call(router, "GET", "/readyz")[0] == 200, "ready")
            posted = workers.worker_urls[3]
            add(router, posted)
            write(second, third)
            os.kill(child.pid, signal.SIGHUP)
            wait_state(router, third, "ready")
            wait_state(router, first, "gone")
            assert {row["url"] for row in call(router, "GET", "/workers")[1]["workers"]} == {second, third, posted}
            answers = send_all(router.url, [prompts.text(seed, 50) for seed in range(16)], connections=4)
            assert [(answer.error, answer.status) for answer in answers] == [("", 200)] * 16
        finally:
            child.stop()


def test_fan_out_over_simulated_workers(stack: Stack) -> None:
    assert call(stack, "POST", "/flush_cache")[1]["workers_flushed"] == 4
    assert {row["load"] for row in call(stack, "GET", "/get_loads")[1]["workers"]} == {0}
    for path in ("/server_info", "/get_server_info"):
        status, info = call(stack, "GET", path)
        assert (status, info["served_model_name"]) == (200, "demo-model")
        assert b"sim-secret" not in orjson.dumps(info)
    assert call(stack, "GET", "/model_info")[1]["model_path"] == "demo-model"
    with urllib.request.urlopen(f"{stack.url}/health_generate", timeout=TIMEOUT_S) as answer:
        assert answer.status == 200
