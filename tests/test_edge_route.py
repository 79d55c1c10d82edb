"""sglfast.edge.route: the KV index's answer and the choice; on real shared memory, without a network."""

from array import array
from collections.abc import Callable
from typing import Any

import pytest
from edge_harness import Memory, run, shard_in_loop

from sglfast import _counters as c
from sglfast import _workers, errors
from sglfast._counters import RANK_EXACT, Column, RankTable
from sglfast._hashtree import TreeWriter
from sglfast.edge.policy import CACHE_HIT, CACHE_MISS, ROUND_ROBIN, UNKEYED
from sglfast.edge.pools import Route
from sglfast.edge.request import ENDPOINTS, Facts
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH
from sglfast.shm import PARITY_HIGH, Variant

CHAT = ENDPOINTS[b"/v1/chat/completions"]
ENGINES = [f"http://10.0.0.{number}:30000" for number in range(1, 7)]
KEYS = array("Q", range(1000, 1020)).tobytes()


class FixedKeyer:
    """Finds the same facts in every body; with `is_late` they come only when the test says so."""

    def __init__(self, facts: Facts, *, is_late: bool = False) -> None:
        self.facts = facts
        self.is_late = is_late
        self.variants: tuple[Variant, ...] = ()
        self.waiting: list[Callable[[Facts], None]] = []

    def key(self, kind: int, body: bytes, variants: tuple[Variant, ...], then: Callable[[Facts], None], **_: object) -> None:
        self.variants = variants
        if self.is_late:
            self.waiting.append(then)
        else:
            then(self.facts)


def routed(memory: Memory, test: Callable[[Router, Shard], None], keyer: Any = None, **settings: Any) -> None:
    """Run `test` with the router of a shard on this memory."""

    async def inside() -> None:
        shard = shard_in_loop(memory, keyer, **settings)
        test(shard.router, shard)

    run(inside())


def choose(router: Router, body: bytes = b"{}") -> Route | errors.Reason:
    found: list[Route | errors.Reason] = []
    router.choose(CHAT, body, found.append)
    assert len(found) == 1
    return found[0]


def route_of(router: Router, body: bytes = b"{}") -> Route:
    found = choose(router, body)
    assert isinstance(found, Route), found
    return found


def chosen(router: Router, body: bytes = b"{}") -> int:
    return route_of(router, body).upstream.worker_idx


def keyed(memory: Memory, facts: Facts, test: Callable[[Router, Shard], None], **settings: Any) -> None:
    """`routed` under cache_aware with these facts of every prompt."""
    settings = {"policy": "cache_aware", "tokenizer_path": DEMO_TOKENIZER_PATH, **settings}
    routed(memory, test, FixedKeyer(facts), **settings)


# ---- the prompt ----


def stored(memory: Memory, **blocks: int) -> TreeWriter:
    """A tree in which rank `rN` holds the first so many blocks of KEYS."""
    writer = TreeWriter(memory.segment)
    for name, count in blocks.items():
        writer.store(int(name[1:]), 0, KEYS[: count * 8])
    return writer


def test_longest_overlap_is_found_and_described() -> None:
    memory = Memory(ENGINES[:3], block_size=64)
    stored(memory, r1=12, r2=5)
    RankTable(memory.segment).set(1, c.R_STATE, RANK_EXACT)

    def test(router: Router, shard: Shard) -> None:
        route = route_of(router)
        assert (route.upstream.worker_idx, route.decision, route.rank, route.dp_rank) == (1, CACHE_HIT, 1, 0)
        assert (route.overlap_blocks, route.prompt_blocks, route.uncached_tokens) == (12, 20, 1300 - 12 * 64)
        assert (route.predicted_tokens, route.is_trusted) == (12 * 64, True)
        assert router.describe(route) == f"worker={ENGINES[1]}; rank=0; overlap_blocks=12; prompt_blocks=20; state=EXACT".encode()
        column = shard.column
        assert [column.get(word) for word in (c.S_PROMPTS_KEYED, c.S_PROMPTS_UNKEYED, c.S_PROMPT_TOKENS)] == [1, 0, 1300]
        assert (memory.worker_word(1, c.W_PROMPT_BLOCKS), memory.worker_word(1, c.W_OVERLAP_BLOCKS)) == (20, 12)

    keyed(memory, Facts(1300, {Variant(64): KEYS}), test)


def test_a_short_overlap_only_saves_its_own_work() -> None:
    memory = Memory(ENGINES[:2], block_size=64)
    stored(memory, r0=10)  # half of the prompt: not more than the threshold

    def test(router: Router, shard: Shard) -> None:
        route = route_of(router)
        assert (route.upstream.worker_idx, route.decision, route.uncached_tokens) == (0, CACHE_MISS, 1300 - 640)
        Column(memory.segment, 0).begin(0, 641, 0, 0)  # the owner has more to do than the hit is worth
        route = route_of(router)
        assert (route.upstream.worker_idx, route.decision, route.uncached_tokens) == (1, CACHE_MISS, 1300)
        assert (route.overlap_blocks, route.predicted_tokens) == (0, 0)

    keyed(memory, Facts(1300, {Variant(64): KEYS}), test)


def test_ranks_of_a_data_parallel_worker() -> None:
    memory = Memory(ENGINES[:2])
    memory.put(0, rank_base=10, dp_size=4, block_size=16)
    memory.put(1, rank_base=20, dp_size=2, block_size=16)
    stored(memory, r11=3, r13=18, r20=17)

    def test(router: Router, shard: Shard) -> None:
        route = route_of(router)
        assert (route.upstream.worker_idx, route.rank, route.dp_rank, route.overlap_blocks) == (0, 13, 3, 18)
        assert b"rank=3; overlap_blocks=18; prompt_blocks=21" in router.describe(route)

    keyed(memory, Facts(340, {Variant(16): KEYS}), test)


def test_each_worker_is_looked_up_in_its_own_way_of_cutting() -> None:
    memory = Memory(ENGINES[:3])
    memory.put(0, block_size=64)
    memory.put(1, block_size=16, bigram=True)
    memory.put(2)  # publishes nothing
    writer = stored(memory, r0=5)
    other = array("Q", range(5000, 5080)).tobytes()
    writer.store(1, 0, other)
    writer.store(0, 0, other)  # keys of another way of cutting mean nothing for worker 0
    writer.store(2, 0, KEYS)
    keyer = FixedKeyer(Facts(1300, {Variant(64): KEYS, Variant(16, True): other}))

    def test(router: Router, shard: Shard) -> None:
        assert {chosen(router) for _ in range(30)} == {1}
        route = route_of(router)
        assert set(keyer.variants) == {Variant(64), Variant(16, True)}
        assert (route.upstream.worker_idx, route.overlap_blocks, route.prompt_blocks) == (1, 80, 81)
        assert route.uncached_tokens == 1300 - 80 * 16

    routed(memory, test, keyer, policy="cache_aware", tokenizer_path=DEMO_TOKENIZER_PATH)


def test_owners_outside_the_pool_do_not_count() -> None:
    memory = Memory(ENGINES[:3], models=["a", "a", "b"], block_size=64)
    stored(memory, r0=4, r1=15, r2=20, r40=20)
    memory.table.set_state(1, _workers.UNHEALTHY)

    def test(router: Router, shard: Shard) -> None:
        route = route_of(router, b'{"model":"a"}')
        assert (route.upstream.worker_idx, route.overlap_blocks) == (0, 4)

    keyed(memory, Facts(1300, {Variant(64): KEYS}), test)


@pytest.mark.parametrize("facts", [Facts(0, {}, "no JSON"), Facts(30, {Variant(64): b""})], ids=["unkeyed", "too short for a block"])
def test_prompts_without_a_block(facts: Facts) -> None:
    memory = Memory(ENGINES[:2], block_size=64)

    def test(router: Router, shard: Shard) -> None:
        route = route_of(router)
        assert route.decision == (CACHE_MISS if facts.keys else UNKEYED)
        assert (route.overlap_blocks, route.prompt_blocks, route.uncached_tokens) == (0, 0, facts.prompt_tokens)
        assert b"overlap_blocks=0; prompt_blocks=0; state=BLIND" in router.describe(route)

    keyed(memory, facts, test)


def test_without_a_tokenizer_or_events_the_load_decides() -> None:
    keyer = FixedKeyer(Facts(10, {}))

    def test(router: Router, shard: Shard) -> None:
        assert route_of(router).decision == UNKEYED
        assert shard.column.get(c.S_PROMPTS_UNKEYED) == 1

    routed(Memory(ENGINES[:2]), test, keyer, policy="cache_aware", tokenizer_path=DEMO_TOKENIZER_PATH)
    assert keyer.variants == (), "nobody asks for keys that no worker has"
    routed(Memory(ENGINES[:2], block_size=64), test, None, policy="cache_aware", tokenizer_path=DEMO_TOKENIZER_PATH)


def test_the_table_may_change_while_a_prompt_is_tokenized() -> None:
    memory = Memory(ENGINES[:2], block_size=64)
    stored(memory, r0=20)
    keyer = FixedKeyer(Facts(1300, {Variant(64): KEYS}), is_late=True)
    found: list[Route | errors.Reason] = []

    def test(router: Router, shard: Shard) -> None:
        for _ in range(2):
            router.choose(CHAT, b"{}", found.append)
        memory.table.set_state(0, _workers.FREE)
        keyer.waiting.pop()(keyer.facts)
        assert isinstance(found[-1], Route)
        assert found[-1].upstream.worker_idx == 1
        memory.table.set_state(1, _workers.FREE)
        keyer.waiting.pop()(keyer.facts)
        assert found[1:] == [errors.NO_HEALTHY_WORKERS]

    routed(memory, test, keyer, policy="cache_aware", tokenizer_path=DEMO_TOKENIZER_PATH)


# ---- what the header says ----


def test_state_in_the_header_is_that_of_the_chosen_worker() -> None:
    memory = Memory(ENGINES[:2])
    memory.put(0, rank_base=3, block_size=64)
    memory.put(1, rank_base=7, block_size=64)
    ranks = RankTable(memory.segment)
    ranks.set(3, c.R_STATE, c.RANK_DEGRADED)
    ranks.set(7, c.R_STATE, RANK_EXACT)
    ranks.set(0, c.R_STATE, c.RANK_SYNCING)  # nobody's of these two

    def test(router: Router, shard: Shard) -> None:
        seen = set()
        for _ in range(4):
            route = route_of(router)
            assert route.decision == ROUND_ROBIN
            seen.add((route.upstream.worker_idx, router.describe(route).rpartition(b"=")[2]))
        assert seen == {(0, b"DEGRADED"), (1, b"EXACT")}
        following = router.next_choice(route_of(router), (0,))
        assert following is not None
        assert router.describe(following).endswith(b"state=EXACT")

    routed(memory, test)


def test_a_worker_whose_reports_disagree_is_not_called_exact() -> None:
    memory = Memory(ENGINES[:1], block_size=64)
    memory.put(0, parity=PARITY_HIGH)
    stored(memory, r0=20)
    RankTable(memory.segment).set(0, c.R_STATE, RANK_EXACT)

    def test(router: Router, shard: Shard) -> None:
        assert router.describe(route_of(router)).endswith(b"state=DEGRADED")

    keyed(memory, Facts(1300, {Variant(64): KEYS}), test)
