"""sglfast.edge.explain with prefill and decode workers."""

from collections.abc import Callable
from typing import Any

import orjson
import pytest
from edge_harness import Memory, StubTransport, run, shard_in_loop, stub_client
from raw_client import post
from test_edge_route import ENGINES
from test_edge_route_pairs import with_roles

from sglfast import _counters as c
from sglfast import _workers
from sglfast._counters import Column
from sglfast.edge.server import ClientConnection
from sglfast.edge.shard import Shard


def explained(memory: Memory, test: Callable[[Callable[[], Any], Shard], None], **settings: Any) -> None:
    async def inside() -> None:
        shard = shard_in_loop(memory, **settings)
        connection: ClientConnection
        transport: StubTransport
        connection, transport = stub_client(shard)

        def ask() -> Any:
            connection.data_received(post(b"{}", target="/explain/v1/chat/completions"))
            return orjson.loads(transport.take().partition(b"\r\n\r\n")[2])

        test(ask, shard)

    run(inside())


def test_explain_shows_the_decode_choice() -> None:
    memory = with_roles("pdd")
    memory.put(1, url="http://10.0.0.1:9", is_new=False)  # on the prefill worker's host
    memory.put(2, _workers.UNHEALTHY, is_new=False)
    Column(memory.segment, 0).begin(1, 0, 16, 0)

    def test(ask: Callable[[], Any], shard: Shard) -> None:
        found = ask()
        assert found["choice"]["worker"] == ENGINES[0]
        assert [row["worker"] for row in found["candidates"]] == [ENGINES[0]], "decode workers are no candidates"
        assert found["decode"] == {
            "worker": "http://10.0.0.1:9",
            "policy": "affinity",
            "candidates": [
                {
                    "worker": "http://10.0.0.1:9",
                    "load": {"requests": 1},
                    "eligible": True,
                    "why": "is on the prefill worker's host",
                },
                {"worker": ENGINES[2], "load": {"requests": 0}, "eligible": False, "why": "fails its health checks"},
            ],
        }
        assert memory.word(c.S_AFFINITY_SAME_HOST) == 0, "nothing is counted"

    explained(memory, test)


def test_explain_uses_no_turn_of_the_decode_policy_up() -> None:
    def test(ask: Callable[[], Any], shard: Shard) -> None:
        found = [ask()["decode"] for _ in range(5)]
        assert {one["worker"] for one in found} == {found[0]["worker"]}
        assert found[0]["policy"] == "round_robin"
        assert [row["why"] for row in found[0]["candidates"] if row["worker"] == found[0]["worker"]] == ["is the choice of round_robin"]

    explained(with_roles("pdd"), test, decode_policy="round_robin")


def test_explain_of_a_regular_choice_and_of_a_half() -> None:
    def test(ask: Callable[[], Any], shard: Shard) -> None:
        found = ask()
        assert found["decode"] is None
        rows = {row["worker"]: row for row in found["candidates"]}
        assert rows[ENGINES[1]]["why"] == "has no decode worker to go with it"
        assert not rows[ENGINES[1]]["eligible"]

    explained(with_roles("rp"), test)


def test_explain_of_halves_only() -> None:
    """What is missing is told of those that are there, and what is wrong with the others."""
    memory = with_roles("ppdd")
    memory.table.set_state(1, _workers.UNHEALTHY)
    memory.table.set_state(2, _workers.UNHEALTHY)
    memory.table.set_state(3, _workers.DRAINING)

    def test(ask: Callable[[], Any], shard: Shard) -> None:
        found = ask()
        assert (found["choice"], found["would_answer"]["code"]) == (None, "no_decode_workers_available")
        assert [row["why"] for row in found["candidates"]] == ["has no decode worker to go with it", "fails its health checks"]
        assert (found["decode"]["worker"], found["decode"]["policy"]) == (None, "affinity")
        assert [row["why"] for row in found["decode"]["candidates"]] == [
            "fails its health checks",
            "is draining: it finishes its requests and takes no new ones",
        ]
        memory.table.set_state(0, _workers.UNHEALTHY)
        memory.table.set_state(2, _workers.READY)
        found = ask()
        assert found["would_answer"]["code"] == "no_prefill_workers_available"
        assert {row["why"] for row in found["candidates"]} == {"fails its health checks"}
        assert found["decode"]["candidates"][0]["why"] == "has no prefill worker to go with it"

    explained(memory, test)


@pytest.mark.parametrize("roles", ["pdd", "rpdd"])
def test_explain_where_all_decode_workers_are_full(roles: str) -> None:
    memory = with_roles(roles)
    decodes = [place for place, role in enumerate(roles) if role == "d"]
    column = Column(memory.segment, 0)
    column.begin(decodes[0], 0, 16, 0)

    def test(ask: Callable[[], Any], shard: Shard) -> None:
        for _ in range(8):
            found = ask()
            assert found["decode"] is None or found["decode"]["worker"] == ENGINES[decodes[1]]
        column.begin(decodes[1], 0, 16, 0)
        found = ask()
        assert {row["worker"]: row["eligible"] for row in found["candidates"]} == {
            ENGINES[place]: role == "r" for place, role in enumerate(roles) if role != "d"
        }
        if "r" in roles:
            assert found["choice"]["worker"] == ENGINES[0]
        else:
            assert (found["choice"], found["decode"]["worker"], found["would_answer"]["code"]) == (None, None, "queue_timeout")
            assert not any(row["eligible"] for row in found["decode"]["candidates"])

    explained(memory, test, worker_max_in_flight=1, queue_size=4)
