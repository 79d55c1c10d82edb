"""sglfast.edge.pairs: which decode worker goes with a prefill worker."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from edge_harness import Memory
from test_edge_route import routed

from sglfast import _counters as c
from sglfast._counters import Column
from sglfast.edge.pairs import Decodes
from sglfast.edge.policy import Prompt
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard

HERE, THERE = "10.0.0.1", "10.0.0.2"
SAME, SHUT, BUSY = c.S_AFFINITY_SAME_HOST, c.S_AFFINITY_BREAKER, c.S_AFFINITY_LOAD


def choices(hosts: list[str], loads: list[int], host: str = HERE, draws: int = 40, policy: str | None = None) -> Counter[tuple[int, int]]:
    """How often which (position, counted word) is chosen for a prefill worker on a host; `!` before a host: its breaker is open."""
    urls = [f"http://{host.lstrip('!')}:{30000 + n}" for n, host in enumerate(hosts)]
    memory = Memory([*urls, f"http://{host}:29999"], roles=["decode"] * len(urls) + ["prefill"])
    column = Column(memory.segment, 0)
    for row, load in enumerate(loads):
        for _ in range(load):
            column.begin(row, 0, 16, 0)
    found: Counter[tuple[int, int]] = Counter()

    def test(router: Router, shard: Shard) -> None:
        for row, name in enumerate(hosts):
            if name.startswith("!"):
                shard.breakers.table.failed(row, 1, False, shard.loop.time())
        router.refresh()
        decodes = router.pools["demo"].decodes
        assert isinstance(decodes, Decodes)
        for _ in range(draws):
            position, word = decodes.choose(host, shard.loads, Prompt())
            found[int(decodes.upstreams[position].port) - 30000, word] += 1

    routed(memory, test, disable_circuit_breaker=False, cb_failure_threshold=1, decode_policy=policy)
    return found


def expected(loads: list[int], peers: list[int]) -> set[int]:
    """The rule as the specification has it, with the best of several peers: rows that may be chosen."""
    median = sorted(loads)[len(loads) // 2]
    best = [row for row in peers if loads[row] == min(loads[peer] for peer in peers)] if peers else []
    if best and (2 * median == 0 or loads[best[0]] <= 2 * median):
        return set(best)
    return {row for row, load in enumerate(loads) if load == min(loads)}


@pytest.mark.parametrize("loads", [list(loads) for loads in product((0, 1, 3, 4), repeat=3)])
def test_affinity_is_as_specified(loads: list[int]) -> None:
    found = choices([HERE, THERE, THERE], loads)
    assert {position for position, _ in found} == expected(loads, [0])
    is_here = (expected(loads, [0]) == {0} and loads[0] <= 2 * sorted(loads)[1]) or sorted(loads)[1] == 0
    assert {word for _, word in found} == {SAME if is_here else BUSY}


def test_of_several_on_the_host_the_least_loaded_and_ties_at_random() -> None:
    assert set(choices([HERE, HERE, HERE, THERE], [3, 2, 2, 2])) == {(1, SAME), (2, SAME)}
    assert set(choices([THERE, THERE, THERE], [1, 1, 1])) == {(0, 0), (1, 0), (2, 0)}, "nobody is here: the least loaded"
    assert set(choices([HERE, THERE, THERE], [9, 1, 1])) == {(1, BUSY), (2, BUSY)}


def test_the_one_here_has_failed() -> None:
    assert set(choices(["!" + HERE, THERE, THERE], [0, 2, 1])) == {(2, SHUT)}
    assert set(choices(["!" + HERE, HERE, THERE], [0, 2, 2])) == {(1, SAME)}
    assert set(choices(["!" + THERE, THERE, THERE], [0, 2, 1])) == {(2, 0)}, "that has nothing to do with affinity"


def test_one_alone_is_taken_whatever_its_load() -> None:
    assert set(choices([HERE], [50])) == {(0, SAME)}
    assert set(choices([THERE], [50])) == {(0, 0)}


@pytest.mark.parametrize("policy", ["random", "round_robin", "power_of_two", "least_load", "cache_aware", "auto"])
def test_a_named_policy_does_not_care_for_hosts(policy: str) -> None:
    found = choices([HERE, THERE, THERE], [0, 0, 0], draws=200, policy=policy)
    assert set(found) == {(0, 0), (1, 0), (2, 0)}
    if policy == "least_load":
        assert set(choices([HERE, THERE, THERE], [1, 2, 0], policy=policy)) == {(2, 0)}
