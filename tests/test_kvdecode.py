"""The one-pass decoder says what wire.kv_events says, or nothing: recorded batches, damaged ones, made ones."""

import itertools
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglfast._kvdecode import CLEAR, REMOVE, STORE, runs, runs_of_batches, token_ids
from sglfast.errors import KvEventError
from sglfast.wire import kv_events
from sglfast.wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch, tier_mask

GOLDEN = Path(__file__).parent / "golden" / "kv_events"
PAYLOADS = {path: path.read_bytes() for path in sorted(GOLDEN.glob("*_batches/*/*.msgpack"))}
SMALL = [payload for payload in PAYLOADS.values() if len(payload) < 1000]

Runs = list[tuple[int, int, bytes]]


def general(payload: bytes) -> tuple[int, Runs]:
    """The same from the general decoder; raises AssertionError when something was undecodable or is not for this road."""
    batch = decode_batch(payload)
    assert batch.undecoded == 0
    out: Runs = []
    for event in batch.events:
        match event:
            case BlockStored():
                assert event.lora_name is None
                assert event.group_idx is None
                out.append((STORE, tier_mask(event.medium), event.keys))
            case BlockRemoved():
                assert event.group_idx is None
                out.append((REMOVE, tier_mask(event.medium, is_removal=True), event.keys))
            case AllBlocksCleared():
                out.append((CLEAR, 7, b""))
    merged: Runs = []
    for (kind, tiers), group in itertools.groupby(out, key=lambda run: run[:2]):
        parts = [keys for _, _, keys in group]
        merged += [(kind, tiers, b"")] * len(parts) if kind == CLEAR else [(kind, tiers, b"".join(parts))]
    return len(batch.events), merged


def check(payload: bytes) -> bool:
    found = runs(payload)
    if found is None:
        return False
    try:
        expected = general(payload)
    except KvEventError as error:
        raise AssertionError(f"accepted what is no batch: {error}") from error
    assert found == expected
    return True


def test_recorded_batches() -> None:
    taken = {path for path, payload in PAYLOADS.items() if check(payload)}
    left = {path.stem for path in PAYLOADS if path not in taken and path.parent.parent.name == "sglang_batches"}
    # Adapters, and the salt that sglang 0.5.18 hides in a seventh element.
    assert left == {"stored_lora_id", "stored_lora_name", "stored_metadata_salt"}
    assert len(taken) > 80


@settings(max_examples=3000, database=None)
@given(st.data())
def test_damaged_batches(data: st.DataObject) -> None:
    payload = bytearray(data.draw(st.sampled_from(SMALL)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload)))
        payload[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    check(bytes(payload))


@settings(max_examples=300, database=None)
@given(st.integers(0, len(SMALL) - 1), st.data())
def test_cut_batches(number: int, data: st.DataObject) -> None:
    payload = SMALL[number]
    cut = payload[: data.draw(st.integers(0, len(payload) - 1))]
    assert runs(cut) is None
    assert runs(payload + b"\xc0") is None


INTS = st.integers(-(2**63), 2**64 - 1) | st.integers(-200, 70_000)
MEDIA = st.sampled_from([None, "GPU", "CPU_PINNED", "CPU", "DISK", "STORAGE", "EXTERNAL", "TAPE"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | INTS | st.floats(allow_nan=False) | st.text(max_size=40) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
STORED = st.fixed_dictionaries(
    {
        "type": st.just("BlockStored"),
        "block_hashes": st.lists(INTS, max_size=20),
        "parent_block_hash": st.none() | INTS,
        "token_ids": st.lists(INTS, max_size=20) | ANYTHING,
        "block_size": st.integers(0, 2**33),
    },
    optional={
        "medium": MEDIA,
        "lora_id": st.none() | st.just(3),
        "lora_name": st.none() | st.just("ad"),
        "cache_salt": st.none() | st.text(max_size=40),
        "session_id": ANYTHING,
        "extra_keys": st.none() | ANYTHING,
        "group_idx": st.none() | st.just(0),
    },
)
REMOVED = st.fixed_dictionaries(
    {"type": st.just("BlockRemoved"), "block_hashes": st.lists(INTS, max_size=20)}, optional={"medium": MEDIA, "more": ANYTHING}
)
CLEARED = st.just({"type": "AllBlocksCleared"})
ARRAYS = st.lists(INTS, max_size=5).flatmap(
    lambda hashes: st.sampled_from(
        [
            ["BlockStored", hashes, None, [1, 2], 4, None, "GPU"],
            ["BlockStored", hashes, 7, [1, 2], 4, None],
            ["BlockStored", hashes, 7, [1, 2], 4],
            ["BlockStored", hashes, 7, [1, 2]],
            ["BlockStored", hashes, 7, [1, 2], 4, None, "GPU", {"cache_salt": "s"}],
            ["BlockStored", hashes, 7, [1, 2], 4, None, "GPU", None],
            ["BlockRemoved", hashes, "CPU_PINNED"],
            ["BlockRemoved", hashes],
            ["BlockRemoved", hashes, None, 1],
            ["AllBlocksCleared"],
            ["AllBlocksCleared", 1],
            ["Other", hashes],
        ]
    )
)


@settings(max_examples=600, database=None)
@given(st.lists(STORED | REMOVED | CLEARED | ARRAYS, max_size=6), ANYTHING)
@example([{"type": "BlockRemoved", "block_hashes": list(range(-40, 40))}], 0)
def test_made_batches(events: list[Any], rank: Any) -> None:
    check(msgspec.msgpack.encode([1.5, events, rank]))


def packed(payloads: list[bytes]) -> tuple[bytes, bytes]:
    return b"".join(payloads), struct.pack(f"{len(payloads)}Q", *itertools.accumulate(map(len, payloads)))


EVENTS = st.lists(STORED | REMOVED | CLEARED | ARRAYS, max_size=4)


@settings(max_examples=400, database=None)
@given(st.lists(st.sampled_from(SMALL) | EVENTS.map(lambda events: msgspec.msgpack.encode([1.5, events, 0])), max_size=8), st.data())
def test_batches_as_one_are_the_batches(payloads: list[bytes], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(payloads)))
    usual = list(itertools.takewhile(lambda found: found is not None, map(runs, payloads[first:])))
    parts = [run for found in usual if found is not None for run in found[1]]
    merged: Runs = []
    for kind, tiers, keys in parts:
        if merged and merged[-1][:2] == (kind, tiers) and kind != CLEAR:
            merged[-1] = (kind, tiers, merged[-1][2] + keys)
        else:
            merged.append((kind, tiers, keys))
    n_events = sum(found[0] for found in usual if found is not None)
    assert runs_of_batches(*packed(payloads), first) == (len(usual), n_events, merged)


def test_what_a_refused_batch_began_is_taken_back() -> None:
    good = kv_events.encode_batch(1.0, [kv_events.removed(block_hashes=[5])], 0)
    bad = kv_events.encode_batch(1.0, [kv_events.removed(block_hashes=[6, 7]), kv_events.cleared()], 0) + b"\0"
    assert runs_of_batches(*packed([good, bad, good])) == (1, 1, [(REMOVE, 1, struct.pack("<Q", 5))])
    assert runs_of_batches(*packed([good, bad, good]), 1) == (0, 0, [])
    assert runs_of_batches(*packed([good, bad, good]), 2) == (1, 1, [(REMOVE, 1, struct.pack("<Q", 5))])


@pytest.mark.parametrize("ends", [(4,), (6,), (3, 2, 5), (2**64 - 1, 5), (5, 2**63)])
def test_ends_must_be_those_of_the_payloads(ends: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not those of batches in 5 bytes"):
        runs_of_batches(b"12345", struct.pack(f"{len(ends)}Q", *ends))


def test_there_must_be_a_first_batch() -> None:
    assert runs_of_batches(b"", b"") == (0, 0, [])
    for ends, first in ((struct.pack("2Q", 2, 5), 3), (struct.pack("Q", 5) + b"\0", 0), (b"", 0)):
        with pytest.raises(ValueError, match="not those of batches"):
            runs_of_batches(b"12345", ends, first)
    with pytest.raises(TypeError):
        runs_of_batches(b"", "text")  # type: ignore[arg-type]


def test_usual_batches_take_this_road() -> None:
    tokens = list(range(0, 200_000, 999))
    for shape in ("map", "array"):
        events = [
            kv_events.stored(block_hashes=[2**63 + 1, 5], parent_block_hash=2**64 - 1, token_ids=tokens, block_size=4),
            kv_events.stored(block_hashes=[6], parent_block_hash=None, token_ids=tokens, block_size=4),
            kv_events.removed(block_hashes=[5, 6], medium="CPU_PINNED"),
            kv_events.cleared(),
        ]
        found = runs(kv_events.encode_batch(1.0, events, 0, shape=shape))  # type: ignore[arg-type]
        assert found == (4, [(STORE, 1, struct.pack("<3Q", 2**63 + 1, 5, 6)), (REMOVE, 2, struct.pack("<2Q", 5, 6)), (CLEAR, 7, b"")])


def test_limits() -> None:
    def payload(n_hashes: int, **more: Any) -> bytes:
        return msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": [1] * n_hashes, **more}], 0])

    deep: Any = 0
    for _ in range(20):
        deep = [deep]
    assert runs(payload(65_536)) is not None
    assert runs(payload(65_537)) is None
    assert runs(payload(1, more=deep)) is None
    assert runs(b"\x93\xcb" + bytes(8) + b"\xdd\xff\xff\xff\xff") is None
    twice = msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": [1], "blocK_hashes": [2]}], 0])
    assert runs(twice) is not None
    assert runs(twice.replace(b"blocK", b"block")) is None


@given(st.lists(INTS | st.integers(0, 2**32 - 1), max_size=40) | st.lists(st.integers(0, 2**32 - 1), max_size=70) | ANYTHING)
def test_token_ids(ids: Any) -> None:
    raw = msgspec.msgpack.encode(ids)
    is_usual = isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**32 for i in ids)
    assert token_ids(raw) == (struct.pack(f"<{len(ids)}I", *ids) if is_usual else None)
    assert token_ids(raw + b"\0") is None
    assert token_ids(raw[:-1]) is None


def test_payload_must_be_bytes() -> None:
    with pytest.raises(TypeError):
        runs("text")  # type: ignore[arg-type]
