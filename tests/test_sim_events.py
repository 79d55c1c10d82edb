"""sim/events.py: the events of a step, against what sglang 0.5.23 published for the same steps."""

import json
from pathlib import Path
from typing import Any

from sglfast._blockhash import page_keys
from sglfast.sim.events import EventLog, all_cleared
from sglfast.wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch, decode_token_ids, encode_batch

TOKENS = list(range(1, 21))
KEYS = page_keys(TOKENS, 4)


def decoded(log: EventLog) -> list[Any]:
    return decode_batch(encode_batch(1.0, log.take(), 0)).events


def test_bytes_equal_the_engines(golden: Path) -> None:
    steps = json.loads((golden / "kv_events/wire/engine_semantics_0.5.23.json").read_text())
    by_name = {step["step"]: step for step in steps}

    def expect(name: str, events: list[Any]) -> None:
        step = by_name[name]
        assert encode_batch(step["decoded"][0], events, 0).hex() == step["payload_hex"]

    expect("cache constructed (engine start)", all_cleared())
    expect("flush_cache -> AllBlocksCleared", all_cleared())
    log = EventLog(4)
    log.store(page_keys(TOKENS[:12], 4), 0, 3, TOKENS[:12], "")
    expect("prefill stored 3 pages on device", log.take())
    salted = list(range(50, 58))
    log.store(page_keys(salted, 4, cache_salt=b"tenant-a"), 0, 2, salted, "tenant-a")
    expect("cache_salt=tenant-a: salted hashes", log.take())
    log.remove(KEYS[16:24])
    expect("evict 4 tokens (LRU leaf)", log.take())


def test_a_store_behind_cached_blocks_names_its_parent_and_only_its_tokens() -> None:
    log = EventLog(4)
    log.store(KEYS, 2, 4, TOKENS, "")
    (event,) = decoded(log)
    assert isinstance(event, BlockStored)
    assert event.keys == KEYS[16:32]
    assert event.parent_block_hash == int.from_bytes(KEYS[8:16], "little")
    assert decode_token_ids(event.token_ids) == TOKENS[8:16]
    assert (event.block_size, event.medium, event.cache_salt) == (4, "GPU", None)


def test_neighbours_merge_as_the_engines_do() -> None:
    other = page_keys(TOKENS[4:], 4)
    log = EventLog(4)
    log.store(KEYS, 0, 2, TOKENS, "")
    log.store(KEYS, 2, 3, TOKENS, "")  # continues: one event
    log.store(other, 0, 1, TOKENS[4:], "")  # another root: another event
    log.remove(KEYS[:8])
    log.remove(KEYS[8:16])  # one event
    log.store(KEYS, 3, 4, TOKENS, "")  # its predecessor is not the tail any more: another event
    events = decoded(log)
    assert [type(event) for event in events] == [BlockStored, BlockStored, BlockRemoved, BlockStored]
    assert [event.keys for event in events] == [KEYS[:24], other[:8], KEYS[:16], KEYS[24:32]]
    assert decode_token_ids(events[0].token_ids) == TOKENS[:12]
    assert log.take() == []


def test_stores_of_different_salts_stay_apart() -> None:
    log = EventLog(4)
    log.store(KEYS, 0, 1, TOKENS, "a")
    log.store(KEYS, 1, 2, TOKENS, "b")
    assert [event.cache_salt for event in decoded(log)] == ["a", "b"]


def test_clearing() -> None:
    (event,) = decode_batch(encode_batch(1.0, all_cleared(), 3)).events
    assert isinstance(event, AllBlocksCleared)
