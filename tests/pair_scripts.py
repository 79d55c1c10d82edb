"""Prefill and decode workers of scripts, for tests of pairs: what they do with a request, and what must hold of both halves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson
import pytest
from edge_harness import Edge, settled, wait_until
from raw_client import WAIT_S, chunk
from scripted_worker import SSE_HEAD, Call, Script, Worker, answer, echoes, says

from sglfast import _counters as c
from sglfast.shm import Role

DONE = says(answer(b'{"prefill":"is done"}'))
ROLES: tuple[Role, ...] = ("prefill", "decode")
P, D = 0, 1  # rows of the prefill and the decode worker where there is one of each
OUTCOMES = {"ok": c.W_OK, "client_error": c.W_CLIENT_ERRORS, "busy": c.W_BUSY, "error": c.W_ERRORS, "cancelled": c.W_CANCELLED}
ABORT = b"POST /abort_request HTTP/1.1"
SENT = b'{"model":"demo","messages":[{"role":"user","content":"hello"}]}'
AT_ONCE_S = 3.0  # "at once", on a machine with other things to do; what else would end a half takes 5 s or longer


class Half:
    """A worker that plays one half. `does`: its scripts by request, the last for all further ones; aborts are answered and kept."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.url = worker.url

    def does(self, *scripts: Script) -> None:
        def script(call: Call) -> None:
            if call.request_line == ABORT:
                call.send(answer(b""))
            else:
                scripts[min(len(self.calls), len(scripts)) - 1](call)

        self.worker.plan(script)

    @property
    def calls(self) -> list[Call]:
        """Requests, without aborts."""
        return [call for call in self.worker.calls if call.request_line != ABORT]

    @property
    def aborted(self) -> list[str]:
        """Requests that this worker was told to end."""
        return [orjson.loads(call.body)["rid"] for call in self.worker.calls if call.request_line == ABORT]

    def wait_calls(self, count: int) -> list[Call]:
        wait_until(lambda: len(self.calls) >= count, f"{self.worker.name} is asked {count} times")
        return self.calls


class Hang:
    """A script for a request that is never answered. ended_s: when the router closed each connection."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.ended_s: list[float] = []

    def __call__(self, call: Call) -> None:
        says(*self.pieces)(call)
        if call.wait_for_end():
            self.ended_s.append(time.monotonic())

    def wait(self, count: int = 1) -> None:
        wait_until(lambda: len(self.ended_s) >= count, "the other half is closed")


def fields(call: Call) -> dict[str, Any]:
    found = orjson.loads(call.body)
    assert isinstance(found, dict)
    return found


def rid_of(call: Call) -> str:
    return str(fields(call)["rid"])


def room_of(call: Call) -> Any:
    return fields(call)["bootstrap_room"]


def unloaded(edge: Edge) -> None:
    """Neither half counts as load any more, without anybody closing a connection for that."""
    wait_until(lambda: not edge.inflight(), lambda: f"all load is given back: {edge.inflight()}", AT_ONCE_S)


def was_aborted(half: Half, number: int = 0) -> None:
    """The worker's request of this number was ended by name, and no other."""
    wait_until(lambda: half.aborted, f"{half.worker.name} is told to end its request", WAIT_S)
    assert half.aborted == [rid_of(half.calls[number])]


def stream(*pieces: bytes, end: bool = True) -> Script:
    """A script that streams SSE events."""
    return says(SSE_HEAD, *(chunk(piece) for piece in pieces), *([chunk(b"")] if end else []))


def once_computed(prefills: Sequence[Half]) -> Script:
    """A decode worker's script that answers when one of the prefill workers has been asked for the same room, as engines do."""

    def script(call: Call) -> None:
        room = room_of(call)
        while not any(room_of(asked) == room for half in prefills for asked in half.calls):
            if call.wait_for_end(0.005):
                return
        call.sock.settimeout(None)
        echoes(call)

    return script


def after(is_time: Callable[[], object], script: Script) -> Script:
    """A script that first waits until something is so."""

    def waits(call: Call) -> None:
        wait_until(is_time, "it is time for the script")
        script(call)

    return waits


def after_other(ours: Sequence[Half], others: Sequence[Half], script: Script) -> Script:
    """A script for each request to `ours` that first waits until its other half has come to one of `others`."""
    return after(lambda: sum(len(half.calls) for half in others) >= sum(len(half.calls) for half in ours), script)


class Ends:
    """How the requests of both workers have ended since this was made."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._before = self._now()

    def _now(self) -> list[dict[str, int]]:
        return [{name: self._edge.worker_word(row, word) for name, word in OUTCOMES.items()} for row in (P, D)]

    @property
    def found(self) -> tuple[list[str], ...]:
        """The outcomes of the prefill and of the decode worker's requests."""
        return tuple(
            [name for name, count in now.items() for _ in range(count - before[name])]
            for now, before in zip(self._now(), self._before, strict=True)
        )


def status(line: str, body: bytes = b'{"error":"why"}') -> Script:
    return says(answer(body, "x-why: because", "content-type: application/json", status=line))


# ---- a shard before one of each; fixtures of every test file (conftest.py) ----


@pytest.fixture(scope="module")
def pair_workers() -> Iterator[list[Worker]]:
    halves = [Worker("prefill"), Worker("decode")]
    yield halves
    for worker in halves:
        worker.close()


@pytest.fixture(scope="module")
def shard_of_a_pair(pair_workers: list[Worker]) -> Iterator[Edge]:
    with Edge(pair_workers, takes_rid=True, roles=ROLES) as pair:
        yield pair


@pytest.fixture
def pair(shard_of_a_pair: Edge) -> Iterator[Edge]:
    with settled(shard_of_a_pair):
        yield shard_of_a_pair
        wait_until(lambda: not shard_of_a_pair.inflight(), "each half has ended")


@pytest.fixture
def prefill(pair_workers: list[Worker]) -> Half:
    half = Half(pair_workers[P])
    half.does(DONE)
    return half


@pytest.fixture
def decode(pair_workers: list[Worker]) -> Half:
    half = Half(pair_workers[D])
    half.does(echoes)
    return half
