"""A wrong prediction says nothing when the worker's cache has changed between the choice and the prefill."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from edge_harness import Memory
from test_edge_route import ENGINES, KEYS, keyed, route_of, stored

from sglfast import _counters as c
from sglfast._counters import Column, RankTable
from sglfast.edge.leg import Leg
from sglfast.edge.parity import is_impossible
from sglfast.edge.request import Facts
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard
from sglfast.shm import Variant

LOW, HIGH = c.W_PARITY_LOW, c.W_PARITY_HIGH
FACTS = Facts(1300, {Variant(64): KEYS})


def test_too_low_means_nothing_when_the_next_block_has_come_since() -> None:
    memory = Memory(ENGINES[:1], block_size=64)
    writer = stored(memory, r0=12)

    def test(router: Router, shard: Shard) -> None:
        route = route_of(router)
        assert route.basis[0] == KEYS[12 * 8 : 13 * 8]
        assert not is_impossible(shard.tree, route, 1300), "perhaps its prompt is another one, and longer"
        assert not router.is_overtaken(route, LOW, 1216), "nothing has come: these are not the keys of the worker's prompt"
        writer.store(0, 0, KEYS[15 * 8 :])
        assert not router.is_overtaken(route, LOW, 1216), "not what was behind the predicted blocks"
        writer.store(1, 0, KEYS)
        assert not router.is_overtaken(route, LOW, 1216), "another rank"
        writer.store(0, 0, KEYS[: 13 * 8])
        assert router.is_overtaken(route, LOW, 1216)
        assert router.is_overtaken(route, LOW, 1299)
        assert not router.is_overtaken(route, LOW, 1300), "no engine has a whole prompt in its cache before it computes the last token"
        assert not router.is_overtaken(route, LOW, 10**18)
        assert is_impossible(shard.tree, route, 1300), "its blocks are ours, so its prompt is"
        assert not is_impossible(shard.tree, route, 1299)
        assert not is_impossible(shard.tree, replace(route, is_estimated=True), 1300)

    keyed(memory, FACTS, test)


def test_a_prompt_without_a_next_block() -> None:
    memory = Memory(ENGINES[:1], block_size=64)
    stored(memory, r0=20)

    def test(router: Router, shard: Shard) -> None:
        route = route_of(router)
        assert (route.overlap_blocks, route.basis[0]) == (20, b"")
        assert not router.is_overtaken(route, LOW, 1216)
        assert is_impossible(shard.tree, route, 1300)
        assert not is_impossible(shard.tree, route, 1299)

    keyed(memory, FACTS, test)


def test_too_high_means_nothing_when_a_busy_worker_has_dropped_blocks_since() -> None:
    memory = Memory(ENGINES[:1], block_size=64)
    stored(memory, r0=12)
    ranks = RankTable(memory.segment)
    ranks.set(0, c.R_BLOCKS_REMOVED, 7)

    def test(router: Router, shard: Shard) -> None:
        quiet = route_of(router)
        Column(memory.segment, 0).begin(0, 641, 0, 0)
        busy = route_of(router)
        assert (quiet.basis[1], busy.basis[1]) == (-1, 7)
        assert not router.is_overtaken(quiet, HIGH, 640)
        assert not router.is_overtaken(busy, HIGH, 640)
        ranks.set(0, c.R_BLOCKS_REMOVED, 8)
        assert not router.is_overtaken(quiet, HIGH, 640), "nothing was on its way that could have dropped blocks before this request"
        assert router.is_overtaken(busy, HIGH, 640)

    keyed(memory, FACTS, test)


def count(cached: int, *, is_overtaken: bool, dp_size: int = 1, rank: int = -1) -> tuple[list[int], bool]:
    """(words of worker 3 that an answer counts, whether its block is waited for); of 200 tokens 64 were predicted."""
    found: list[tuple[int, int]] = []
    noted: list[Any] = []
    route = SimpleNamespace(
        upstream=SimpleNamespace(worker_idx=3, dp_size=dp_size),
        is_estimated=False,
        prompt=SimpleNamespace(prompt_tokens=200),
        basis=(b"", -1),
        predicted_tokens=64,
    )
    leg: Any = SimpleNamespace(
        route=route,
        predicted_tokens=64,
        cached_tokens=cached,
        rank=rank,
        shard=SimpleNamespace(
            router=SimpleNamespace(is_overtaken=lambda route, word, cached: is_overtaken),
            column=SimpleNamespace(add_worker=lambda idx, word: found.append((idx, word))),
            untold=SimpleNamespace(note=noted.append),
            tree=None,
        ),
    )
    Leg.count_parity(leg)
    assert all(idx == 3 for idx, _ in found)
    assert noted in ([], [route])
    return [word for _, word in found], bool(noted)


@pytest.mark.parametrize(
    ("cached", "is_overtaken", "words", "is_waited_for"),
    [
        (64, True, [c.W_PARITY_EXACT], False),
        (128, False, [c.W_PARITY_LOW], True),
        (128, True, [c.W_PARITY_CAME], False),
        (200, False, [c.W_PARITY_OVER, c.W_PARITY_LOW], False),
        (0, False, [c.W_PARITY_HIGH], False),
        (0, True, [c.W_PARITY_WENT], False),
    ],
)
def test_such_answers_are_counted_apart(cached: int, is_overtaken: bool, words: list[int], is_waited_for: bool) -> None:
    assert count(cached, is_overtaken=is_overtaken) == (words, is_waited_for)


def test_of_several_ranks_a_block_is_waited_for_where_the_worker_was_told_which() -> None:
    assert count(128, is_overtaken=False, dp_size=4) == ([c.W_PARITY_LOW], False)
    assert count(128, is_overtaken=False, dp_size=4, rank=9) == ([c.W_PARITY_LOW], True)
