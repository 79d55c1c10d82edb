"""The token route: engines with hashes of their own, adapters, cache groups; random engines, and the recorded streams again."""

import base64
import json
import logging
import mmap
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import GOLDEN, SeededRandom

from sglfast._blockhash import chain_seed, token_keys
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast._segment import Segment, segment_bytes
from sglfast.index.rank import RankIndex, TreeLock
from sglfast.prompt.adapters import starts_of
from sglfast.shm import KeyRoute, Variant
from sglfast.wire import kv_events
from sglfast.wire.kv_events import EventOut

P = 4
TOKENS = list(range(100, 116))
RANK = 3


class House:
    """A tree of its own and one rank on the token route."""

    def __init__(self, *, block_size: int = P, key_route: KeyRoute = "tokens", capacity_blocks: int = 4096) -> None:
        sizes = {"max_workers": 2, "max_ranks": 64, "max_shards": 1, "capacity_blocks": capacity_blocks}
        self.segment = Segment.format(mmap.mmap(-1, segment_bytes(**sizes)), **sizes)
        self.tree = TreeLock(TreeWriter(self.segment))
        self.reader = TreeReader(self.segment)
        self.block_size = block_size
        self.model = "m" if key_route == "tokens" else ""
        log = logging.LoggerAdapter(logging.getLogger("test.tokens"), {})
        self.index = RankIndex(self.tree, RANK, block_size=block_size, is_bigram=False, log=log, key_route=key_route, model="m")

    def apply(self, *events: EventOut | dict[str, Any]) -> bool:
        """Publish and apply; True when something was lost."""
        out = [{"type": event.tag, **event.fields} if isinstance(event, EventOut) else event for event in events]
        is_lossy = self.index.apply(msgspec.msgpack.encode([1.0, out, 0])).is_lossy
        self.index.settle()
        return is_lossy

    def overlap(self, tokens: list[int], *, lora_name: str = "", cache_salt: str = "", tiers: int = 7) -> int:
        seed = chain_seed(self.model, self.block_size, lora_name=lora_name, cache_salt=cache_salt)
        self.reader.match(token_keys(tokens, self.block_size, seed=seed), tiers)
        return self.reader.overlap(RANK)

    def asked(self, tokens: list[int], model: str = "m", cache_salt: str = "", tiers: int = 7) -> int:
        """Overlap for a request of a vLLM worker."""
        variant = Variant(self.block_size, route="tokens", model="m", adapters="models")
        (start,) = starts_of((variant,), model, "", cache_salt)
        assert start is not None
        self.reader.match(token_keys(tokens, self.block_size, seed=start.seed, parent=start.parent), tiers)
        return self.reader.overlap(RANK)


def stored(hashes: list[Any], tokens: list[int], parent: Any = None, **more: Any) -> dict[str, Any]:
    fields = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens, "block_size": P}
    return fields | {"lora_id": None, "medium": "GPU"} | more


def removed(hashes: list[Any], **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU"} | more


def test_children_follow_their_parents() -> None:
    house = House()
    assert not house.apply(stored([11, 12], TOKENS[:8]), stored([13], TOKENS[8:12], 12))
    assert not house.apply(stored([2**64 - 1], TOKENS[12:], 13))
    assert house.overlap(TOKENS) == 4
    assert house.overlap(TOKENS[4:]) == 0
    assert house.index.mapped_blocks == house.index.owned_blocks == 4
    assert not house.apply(removed([13]))
    assert (house.overlap(TOKENS), house.index.mapped_blocks) == (2, 3)
    assert not house.apply({"type": "AllBlocksCleared"})
    assert (house.index.owned_blocks, house.index.mapped_blocks, house.index.mismatch) == (0, 0, "")


def test_orphans_are_left_out_and_counted() -> None:
    house = House()
    assert house.apply(stored([13, 14], TOKENS[8:], 12))  # parent never seen
    assert house.apply(stored([15], TOKENS[:8]))  # a window's skipped blocks: positions unknown
    assert house.apply(stored([12, 99], [], None, block_size=0, medium="CPU"))  # neither is known
    assert house.index.counters.orphans == 5
    assert house.index.owned_blocks == house.index.mapped_blocks == 0
    assert not house.apply(removed([13]))


def test_tiers_go_through_the_map() -> None:
    """vLLM's offloading stores name blocks without their tokens."""
    house = House()
    house.apply(stored([1, 2], TOKENS[:8]))
    house.apply(stored([2, 1], [], block_size=0, medium="CPU"))
    house.apply(removed([1, 2]))
    assert (house.overlap(TOKENS, tiers=1), house.overlap(TOKENS, tiers=2), house.index.mapped_blocks) == (0, 2, 2)
    house.apply(removed([2], medium="CPU"))
    assert (house.overlap(TOKENS), house.index.mapped_blocks) == (1, 1)


def test_bytes_hashes() -> None:
    house = House()
    house.apply(stored([bytes(range(32))], TOKENS[:4]), stored([b"x" * 32], TOKENS[4:8], bytes(range(32))))
    assert house.overlap(TOKENS) == 2


def test_adapters_and_salts_are_worlds_of_their_own() -> None:
    house = House()
    house.apply(stored([1], TOKENS[:4], lora_name="ad"), stored([2], TOKENS[4:8], 1, lora_name="ad"))
    house.apply(stored([3], TOKENS[:4], cache_salt="s"))
    assert house.overlap(TOKENS) == 0
    assert (house.overlap(TOKENS, lora_name="ad"), house.overlap(TOKENS, cache_salt="s")) == (2, 1)


def test_adapters_on_the_sha_route() -> None:
    """Their hashes are nobody's to compute; the blocks of the base model keep the engine's."""
    house = House(key_route="sha256")
    assert not house.apply(stored([1], TOKENS[:4], lora_name="ad"), stored([2], TOKENS[4:8], 1, lora_name="ad"), stored([7], TOKENS[:4]))
    assert house.overlap(TOKENS, lora_name="ad") == 2
    house.reader.match((7).to_bytes(8, "little"))
    assert house.reader.overlap(RANK) == 1
    assert house.index.mapped_blocks == 2
    house.apply(removed([2, 7]))
    assert (house.overlap(TOKENS, lora_name="ad"), house.index.owned_blocks, house.index.mapped_blocks) == (1, 1, 1)


def test_what_is_hashed_beside_the_tokens_hides_a_block() -> None:
    house = House()
    house.apply(stored([1, 2, 3], TOKENS[:12], extra_keys=[None, [["image", 3]], None]), stored([4], TOKENS[12:], 3))
    assert house.overlap(TOKENS) == 1
    assert house.index.owned_blocks == 4
    house.apply(removed([1, 2, 3, 4]))
    assert house.index.owned_blocks == 0
    house.apply(stored([5, 6], TOKENS[:8], lora_name="ad", extra_keys=[["ad"], ["ad"]]))
    assert house.overlap(TOKENS, lora_name="ad") == 2


def test_salts_of_vllm_stand_before_the_first_block() -> None:
    house = House()
    house.apply(stored([1, 2], TOKENS[:8], extra_keys=[["s"], None]), stored([3], TOKENS[8:12], 2))
    assert [house.asked(TOKENS, cache_salt=salt) for salt in ("s", "t", "")] == [3, 0, 0]
    house.apply(
        stored([4], TOKENS[:4], lora_name="ad", extra_keys=[["ad", "s"]]), stored([5], TOKENS[4:8], 4, lora_name="ad", extra_keys=[["ad"]])
    )
    assert [house.asked(TOKENS, "ad", salt) for salt in ("s", "t", "")] == [2, 0, 0]
    house.apply(stored([6], TOKENS[:4], extra_keys=[[["image", 0], "s"]]))
    assert house.asked(TOKENS, cache_salt="s") == 3, "an image beside the salt is another prompt"
    house.apply(removed([1, 2, 3, 4, 5, 6]))
    assert house.asked(TOKENS, cache_salt="s") == house.index.owned_blocks == 0


def test_only_the_main_attention_counts() -> None:
    house = House()
    house.apply(stored([1, 2], TOKENS[:8], group_idx=1, kv_cache_spec_kind="full_attention"))
    assert not house.apply(stored([1], TOKENS[:4], group_idx=0, kv_cache_spec_kind="sliding_window"))
    assert not house.apply(stored([9], TOKENS[4:8], 77, group_idx=2))
    house.apply(removed([1, 2], group_idx=0))
    assert house.overlap(TOKENS) == 2
    house.apply(removed([1, 2], group_idx=1))
    assert house.overlap(TOKENS) == 0


def test_mismatches_are_named() -> None:
    house = House()
    house.apply(stored([1], TOKENS[:8], block_size=8))
    assert "8 tokens, 4 are expected" in house.index.mismatch
    house = House()
    house.apply(stored([1], [[1, 2], [2, 3], [3, 4], [4, 5]]))  # type: ignore[list-item]
    assert "pairs of tokens" in house.index.mismatch
    assert house.overlap([1, 2, 3, 4, 5]) == 0
    house.reader.match(token_keys([1, 2, 3, 4, 5], P, bigram=True, seed=chain_seed("m", P, bigram=True)))
    assert house.reader.overlap(RANK) == 1


def test_unreadable_tokens_are_counted() -> None:
    house = House()
    assert house.apply(stored([1], ["a"]))  # type: ignore[list-item]
    assert house.index.counters.undecoded == 1


def test_memory_is_bounded_by_what_the_rank_owns() -> None:
    house = House(capacity_blocks=64)
    for prompt in range(2000):
        house.apply(stored([2 * prompt + 1, 2 * prompt + 2], [prompt] * 8))
    assert house.index.owned_blocks == 64
    assert house.index.mapped_blocks <= 2 * 64 + 1024
    assert house.overlap([1999] * 8) == 2


class Engine:
    """A paged cache with prefix sharing and opaque hashes; evicts leaves at random. Publishes in batches."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.hashes: dict[tuple[int, ...], int] = {}  # every prefix ever hashed
        self.cached: set[tuple[int, ...]] = set()

    def _hash(self, prefix: tuple[int, ...]) -> int:
        return self.hashes.setdefault(prefix, self.rng.getrandbits(64))

    def prefill(self, tokens: list[int]) -> list[dict[str, Any]]:
        pages = [tuple(tokens[: end + P]) for end in range(0, len(tokens) - P + 1, P)]
        new = [page for page in pages if page not in self.cached]
        events = []
        while new:
            n = self.rng.randint(1, len(new))
            run, new = new[:n], new[n:]
            parent = run[0][:-P]
            start = len(parent)
            event = stored([self._hash(page) for page in run], list(run[-1][start:]), self._hash(parent) if parent else None)
            events.append(event)
            self.cached.update(run)
        return events

    def evict(self) -> list[dict[str, Any]]:
        parents = {page[:-P] for page in self.cached}
        leaves = [page for page in self.cached if page not in parents]
        gone = self.rng.sample(leaves, self.rng.randint(0, len(leaves)))
        self.cached.difference_update(gone)
        return [removed([self._hash(page) for page in gone])] if gone else []

    def clear(self) -> list[dict[str, Any]]:
        self.cached.clear()
        return [{"type": "AllBlocksCleared"}]

    def overlap(self, tokens: list[int]) -> int:
        n = 0
        while len(tokens) >= (n + 1) * P and tuple(tokens[: (n + 1) * P]) in self.cached:
            n += 1
        return n


@pytest.mark.parametrize("round_", range(10))
def test_random_engine_with_opaque_hashes(rng: SeededRandom, round_: int) -> None:
    engine, house = Engine(rng), House()
    for _ in range(150):
        prompt = [rng.randrange(2) for _ in range(rng.randrange(40))]
        step = rng.choices((engine.evict, engine.clear, None), (4, 0.2, 10))[0]
        events = engine.prefill(prompt) if step is None else step()
        assert not house.apply(*events)
        assert house.index.owned_blocks == house.index.mapped_blocks == len(engine.cached), rng
        query = [rng.randrange(2) for _ in range(rng.randrange(40))]
        for tokens in (prompt, query):
            assert house.overlap(tokens) == engine.overlap(tokens), rng


RECORDED = sorted((Path(__file__).parent / "golden" / "vllm_recorded").glob("*.jsonl"))


@pytest.mark.parametrize("path", RECORDED, ids=[path.stem for path in RECORDED])
@pytest.mark.parametrize("is_general", [False, True], ids=["compiled", "event-by-event"])
def test_recorded_vllm_streams(path: Path, is_general: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the index believes after each batch is what vLLM's own cache manager would hit."""
    head, *steps = map(json.loads, path.read_text().splitlines())
    size, is_hybrid = head["block_size"], head["scenario"] not in ("mix", "mla")
    house = House(block_size=size)
    if is_general:
        monkeypatch.setattr(house.index, "_apply_usual", lambda payload: None)
    n_hits = n_longer = 0
    for step in steps:
        if step["events"]:
            assert not house.index.apply(base64.b64decode(step["events"])).is_lossy
            house.index.settle()
        for tokens, salt, adapter, hit_blocks in step["queries"]:
            found = min(house.asked(tokens, adapter or "m", salt), (len(tokens) - 1) // size)
            assert found == hit_blocks or (is_hybrid and found > hit_blocks), (path, found, hit_blocks)
            n_hits += hit_blocks > 0
            n_longer += found > hit_blocks
    assert n_hits >= 20
    assert n_longer < 10, "of a hybrid model the main attention decides, and that is nearly always right"
    assert house.index.has_agreed
    assert house.index.counters.orphans == house.index.counters.undecoded == 0


def test_a_window_over_mla_is_not_the_main_attention() -> None:
    for is_usual in (False, True):
        house = House()
        house.index.has_agreed = is_usual
        main = {"group_idx": 0, "kv_cache_spec_kind": "mla_attention"}
        window = {"group_idx": 1, "kv_cache_spec_kind": "sliding_window_mla"}
        house.apply(stored([1, 2], TOKENS[:8], **main), stored([1, 2], TOKENS[:8], **window))
        house.apply(removed([1, 2], group_idx=1))
        assert (house.overlap(TOKENS), house.index.main_group) == (2, 0)
        house.apply(removed([2], group_idx=0))
        assert house.overlap(TOKENS) == 1


@pytest.mark.parametrize("is_usual", [False, True])
def test_another_process_of_the_engine_may_count_another_group(is_usual: bool) -> None:
    house = House()
    house.index.has_agreed = is_usual
    full = {"kv_cache_spec_kind": "full_attention"}
    house.apply(stored([1, 2], TOKENS[:8], group_idx=1, **full))
    assert house.overlap(TOKENS) == 2
    house.index.clear()
    house.apply(stored([1, 2], TOKENS[:8], group_idx=0, **full))
    assert (house.overlap(TOKENS), house.index.main_group) == (2, 0)
    house.apply(removed([1, 2], group_idx=0))
    assert house.overlap(TOKENS) == 0


@pytest.mark.parametrize("is_usual", [False, True])
def test_of_two_full_attentions_the_first_counts_until_it_is_none(is_usual: bool) -> None:
    house = House()
    house.index.has_agreed = is_usual
    full = {"kv_cache_spec_kind": "full_attention"}
    for _ in range(2):
        house.apply(stored([1, 2], TOKENS[:8], group_idx=2, **full), stored([1, 2], TOKENS[:8], group_idx=1, **full))
        house.apply(stored([1, 2], TOKENS[:8], group_idx=1, **full))
        assert (house.overlap(TOKENS), house.index.main_group) == (2, 2)
        house.apply(removed([1, 2], group_idx=1))
        assert house.overlap(TOKENS) == 2
        house.apply(removed([1, 2], group_idx=2))
        assert house.overlap(TOKENS) == 0
    house.apply(stored([1], TOKENS[:4], group_idx=2, kv_cache_spec_kind="sliding_window"), stored([1], TOKENS[:4], group_idx=1, **full))
    assert (house.overlap(TOKENS), house.index.main_group) == (1, 1)


def test_only_the_main_attention_tells_how_blocks_are_cut() -> None:
    """A hybrid model's states come in larger pages, and a connector's copies in chunks."""
    house = House()
    main = {"group_idx": 1, "kv_cache_spec_kind": "full_attention"}
    house.apply(
        stored([1], TOKENS[:4], **main),
        stored([2], TOKENS[:8], block_size=8, group_idx=0, kv_cache_spec_kind="mamba"),
        stored([3], TOKENS[:8], block_size=8, medium="cpu"),
    )
    assert (house.index.has_agreed, house.index.mismatch) == (True, "")
    wrong = House()
    wrong.apply(stored([2], TOKENS[:8], block_size=8, **main))
    assert "hold 8 tokens" in wrong.index.mismatch


def test_blocks_of_another_size_are_no_orphans() -> None:
    """vLLM tells a hybrid model's parts of blocks, whose parents are nobody's blocks."""
    house = House()
    assert not house.apply(stored([1], TOKENS[:4]), stored([9], TOKENS[6:8], 8, block_size=2))
    assert (house.index.counters.orphans, house.overlap(TOKENS)) == (0, 1)


def test_a_copy_of_known_blocks_has_their_keys() -> None:
    """Offloading that describes itself tells tokens and parents, but neither salt nor image: the names tell more."""
    for is_usual in (False, True):
        house = House()
        house.apply(stored([1, 2], TOKENS[:8], extra_keys=[["s"], None]))
        house.index.has_agreed = is_usual
        house.apply(stored([1, 2], TOKENS[:8], medium="CPU"))
        assert [house.asked(TOKENS, cache_salt=salt, tiers=2) for salt in ("s", "")] == [2, 0]
        house.apply(removed([1, 2]))
        assert [house.asked(TOKENS, cache_salt="s", tiers=tiers) for tiers in (1, 2)] == [0, 2]
        house.apply(removed([1, 2], medium="CPU"))
        assert house.index.owned_blocks == house.index.mapped_blocks == 0
        assert not house.apply(stored([5], TOKENS[:4], medium="CPU"), stored([6], TOKENS[4:8], 5, medium="CPU"))
        assert house.overlap(TOKENS, tiers=2) == 2, "what nobody knows is named by its tokens"


def test_a_copy_of_blocks_of_which_some_are_known_makes_no_other_keys_of_them() -> None:
    for is_usual in (False, True):
        house = House()
        house.apply(stored([1, 2], TOKENS[:8], extra_keys=[["s"], None]))
        house.apply(removed([2]))
        house.index.has_agreed = is_usual
        house.apply(stored([1, 2], TOKENS[:8], medium="CPU"))
        assert [house.asked(TOKENS, cache_salt=salt, tiers=2) for salt in ("s", "")] == [1, 0]
        assert house.index.counters.orphans == 1
        house.apply(removed([1]), removed([1, 2], medium="CPU"))
        assert house.index.owned_blocks == house.index.mapped_blocks == 0


def test_a_salt_may_have_an_adapters_name() -> None:
    house = House()
    house.apply(stored([1], TOKENS[:4], lora_name="ad", extra_keys=[["ad", "ad"]]))
    assert [house.asked(TOKENS, "ad", salt) for salt in ("ad", "")] == [1, 0]


def test_golden_vllm() -> None:
    """Every recorded batch: what is not a child of something unseen is found again by its tokens."""
    n_found = n_salted = 0
    for path in sorted((GOLDEN / "kv_events" / "vllm_batches").glob("*/*.msgpack")):
        house = House(block_size=16)
        house.index.apply(path.read_bytes())
        assert house.index.counters.undecoded == 0, path
        assert house.index.mismatch == ""
        events = [event for event in msgspec.msgpack.decode(path.read_bytes())[1] if isinstance(event, dict)]
        for event in events if path.stem != "mixed" else []:
            if event["type"] == "BlockStored" and event["token_ids"] and event["parent_block_hash"] is None:
                extras = [extra for extra in event.get("extra_keys") or [] if extra]
                salt = extras[0][0] if len(extras) == 1 and isinstance(extras[0][0], str) else ""
                expected = 0 if event.get("group_idx") or (extras and not salt) else len(event["block_hashes"])
                tiers = kv_events.tier_mask(event["medium"])
                assert house.asked(event["token_ids"], event["lora_name"] or "m", salt, tiers) == expected, path
                n_salted += bool(salt)
                n_found += expected
    assert n_found >= 10
    assert n_salted >= 2
