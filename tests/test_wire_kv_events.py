"""KV event batches against the recorded bytes of sglang and vllm, and against what no engine sends."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglfast.errors import KvEventError
from sglfast.wire import kv_events
from sglfast.wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event

GOLDEN = Path(__file__).parent / "golden" / "kv_events"
SGLANG = sorted((GOLDEN / "sglang_batches").glob("*/*.json"))
VLLM = sorted((GOLDEN / "vllm_batches").glob("*/*.json"))
TS = 1700000000.5


def case_id(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def u64(block_hash: Any) -> int:
    if isinstance(block_hash, dict):
        return int(block_hash["__bytes_hex__"][-16:], 16)
    return int(block_hash) % 2**64


def plain(event: Event) -> dict[str, Any]:
    """A decoded event as the golden files write it, hashes as uint64; the tokens are decoded for the comparison only."""
    match event:
        case BlockStored():
            tokens = kv_events.decode_token_ids(event.token_ids)
            return {
                "type": "BlockStored",
                "block_hashes": event.block_hashes,
                "parent_block_hash": event.parent_block_hash,
                "token_ids": [list(unit) if isinstance(unit, tuple) else unit for unit in tokens],
                "block_size": event.block_size,
                "lora_id": event.lora_id,
                "lora_name": event.lora_name,
                "medium": event.medium,
                "cache_salt": event.cache_salt,
            }
        case BlockRemoved():
            return {"type": "BlockRemoved", "block_hashes": event.block_hashes, "medium": event.medium}
        case AllBlocksCleared():
            return {"type": "AllBlocksCleared"}


def golden_event(expected: dict[str, Any]) -> dict[str, Any]:
    kept = dict(expected)
    if "block_hashes" in kept:
        kept["block_hashes"] = [u64(block_hash) for block_hash in kept["block_hashes"]]
    kept.setdefault("medium", None)
    match kept["type"]:
        case "BlockStored":
            kept["cache_salt"] = (kept.get("metadata") or {}).get("cache_salt") or kept.get("cache_salt")
            if kept["parent_block_hash"] is not None:
                kept["parent_block_hash"] = u64(kept["parent_block_hash"])
            names = ["block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "cache_salt"]
            return {"type": "BlockStored", "lora_name": kept.get("lora_name"), **{name: kept[name] for name in names}}
        case "BlockRemoved":
            return {name: kept[name] for name in ("type", "block_hashes", "medium")}
    return {"type": kept["type"]}


def test_golden_files_are_all_here() -> None:
    assert len(SGLANG) >= 80
    assert len(VLLM) >= 40


@pytest.mark.parametrize("path", SGLANG + VLLM, ids=case_id)
def test_decode_golden(path: Path) -> None:
    case = json.loads(path.read_text())
    expected = case["expected"]
    batch = kv_events.decode_batch(path.with_suffix(".msgpack").read_bytes())
    assert batch.undecoded == 0
    assert batch.ts == expected["ts"]
    assert batch.rank == (expected["attn_dp_rank"] if "attn_dp_rank" in expected else expected["data_parallel_rank"])
    assert [plain(event) for event in batch.events] == [golden_event(event) for event in expected["events"]]


@pytest.mark.parametrize("path", [p for p in SGLANG if p.parent.name != "0.5.8"], ids=case_id)
def test_encode_golden(path: Path) -> None:
    expected = json.loads(path.read_text())["expected"]
    events = []
    for event in expected["events"]:
        fields = {name: value for name, value in event.items() if name not in ("type", "metadata")}
        fields.update(event.get("metadata") or {})
        if "block_hashes" in fields:  # the caller speaks uint64
            fields["block_hashes"] = [u64(block_hash) for block_hash in fields["block_hashes"]]
        if fields.get("parent_block_hash") is not None:
            fields["parent_block_hash"] = u64(fields["parent_block_hash"])
        match event["type"]:
            case "BlockStored":
                events.append(kv_events.stored(**fields))
            case "BlockRemoved":
                events.append(kv_events.removed(**fields))
            case _:
                events.append(kv_events.cleared())
    shape: Literal["map", "array"] = "array" if path.parent.name == "0.5.18" else "map"
    encoded = kv_events.encode_batch(expected["ts"], events, expected["attn_dp_rank"], shape=shape)
    assert encoded == path.with_suffix(".msgpack").read_bytes()


def test_token_ids_are_not_decoded() -> None:
    """Tokens of a kind that no token can be do not disturb the decoding of the event."""
    event = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": ["x", {}], "block_size": 2}
    batch = kv_events.decode_batch(msgspec.msgpack.encode([TS, [event], 0]))
    assert batch.undecoded == 0
    stored = batch.events[0]
    assert isinstance(stored, BlockStored)
    with pytest.raises(KvEventError, match="neither"):
        kv_events.decode_token_ids(stored.token_ids)


def good_siblings(bad: Any) -> bytes:
    return msgspec.msgpack.encode([TS, [["BlockRemoved", [7], "GPU"], bad, {"type": "AllBlocksCleared"}], 3])


@pytest.mark.parametrize(
    "bad",
    [
        [7, "BlockMoved"],
        {"type": 5},
        {"block_hashes": [1]},
        {"type": "BlockRemoved"},
        {"type": "BlockRemoved", "block_hashes": 5},
        {"type": "BlockRemoved", "block_hashes": [1.5]},
        {"type": "BlockRemoved", "block_hashes": ["a"]},
        {"type": "BlockRemoved", "block_hashes": [b"short"]},
        {"type": "BlockRemoved", "block_hashes": [1], "medium": 5},
        {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": [], "block_size": -4},
        {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": "x", "token_ids": [], "block_size": 4},
        ["BlockStored", [1], None, []],
        [],
        {},
        5,
        None,
        "BlockRemoved",
    ],
)
def test_bad_event_keeps_its_siblings(bad: Any) -> None:
    batch = kv_events.decode_batch(good_siblings(bad))
    assert batch.events == [BlockRemoved(struct.pack("<Q", 7), "GPU"), AllBlocksCleared()]
    assert (batch.undecoded, batch.unknown) == (1, ())
    assert batch.rank == 3


@pytest.mark.parametrize("shape", [["TierBlocksCleared", "GPU"], {"type": "TierBlocksCleared", "medium": "GPU"}])
def test_a_tier_that_is_cleared_counts_as_all_of_them(shape: Any) -> None:
    batch = kv_events.decode_batch(msgspec.msgpack.encode([TS, [shape], 0]))
    assert (batch.events, batch.undecoded, batch.unknown) == ([AllBlocksCleared()], 0, ())


@pytest.mark.parametrize(
    "new", [["BlockMoved"], ["BlockMoved", [1], {"to": "DISK"}], {"type": "BlockMoved"}, {"to": [1], "type": "BlockMoved"}]
)
def test_a_kind_of_event_that_is_not_known_is_named(new: Any) -> None:
    batch = kv_events.decode_batch(good_siblings(new))
    assert batch.events == [BlockRemoved(struct.pack("<Q", 7), "GPU"), AllBlocksCleared()]
    assert (batch.undecoded, batch.unknown) == (0, ("BlockMoved",))


@pytest.mark.parametrize("shape", ["map", "array"])
@pytest.mark.parametrize("first_hash", [1, 2**63 + 5])
def test_cap_of_hashes(shape: str, first_hash: int) -> None:
    """The cap holds for nine-byte hashes and for small ones, and costs the event only."""

    def payload(n: int) -> bytes:
        hashes = [first_hash + i for i in range(n)]
        event = {"type": "BlockRemoved", "block_hashes": hashes} if shape == "map" else ["BlockRemoved", hashes, None]
        return good_siblings(event)

    at_cap = kv_events.decode_batch(payload(65_536))
    assert at_cap.undecoded == 0
    removed = at_cap.events[1]
    assert isinstance(removed, BlockRemoved)
    assert removed.block_hashes == [first_hash + i for i in range(65_536)]
    above = kv_events.decode_batch(payload(65_537))
    assert above.undecoded == 1
    assert len(above.events) == 2


def test_hash_forms_agree() -> None:
    """One number as int64, uint64 or digest, alone or among small ones, has one key."""
    number = 0xFEDC_BA98_7654_3210
    forms: list[Any] = [number, number - 2**64, b"\x00" * 24 + number.to_bytes(8, "big")]
    for form in forms:
        for others in ([], [0, -1, 2**40]):
            batch = kv_events.decode_batch(msgspec.msgpack.encode([TS, [["BlockRemoved", [form, *others]]]]))
            removed = batch.events[0]
            assert isinstance(removed, BlockRemoved)
            assert removed.block_hashes == [number, *[u64(other) for other in others]]
            assert removed.keys == struct.pack(f"<{1 + len(others)}Q", number, *[u64(other) for other in others])


@pytest.mark.parametrize("at", [0, 7, 18])
def test_nine_byte_total_is_not_nine_byte_items(at: int) -> None:
    """A list whose encoded length is 9 n by accident: one item of 17 bytes and one of 1 among those of 9."""
    hashes: list[Any] = [2**63 + i for i in range(18)]
    expected = list(hashes)
    hashes[at:at] = [b"\xcf" * 15, 5]
    expected[at:at] = [0xCFCF_CFCF_CFCF_CFCF, 5]
    batch = kv_events.decode_batch(msgspec.msgpack.encode([TS, [["BlockRemoved", hashes]]]))
    removed = batch.events[0]
    assert isinstance(removed, BlockRemoved)
    assert removed.block_hashes == expected


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 255, 256, 65_536])
def test_every_length_of_list(n: int) -> None:
    hashes = [(i * 0x9E37_79B9_7F4A_7C15) % 2**64 | 1 << 40 for i in range(n)]
    for signed in (hashes, [h - 2**64 if h >= 2**63 else h for h in hashes]):
        batch = kv_events.decode_batch(msgspec.msgpack.encode([TS, [["BlockRemoved", signed]]]))
        assert batch.events == [BlockRemoved(struct.pack(f"<{n}Q", *hashes), None)]


def test_short_and_long_batches() -> None:
    for elements, rank in (([TS, []], None), ([TS, [], 2], 2), ([TS, [], None, "more", 5], None), ([TS, [], "odd"], None)):
        batch = kv_events.decode_batch(msgspec.msgpack.encode(elements))
        assert (batch.ts, batch.events, batch.rank, batch.undecoded) == (TS, [], rank, 0)


def test_extra_elements_and_keys_of_events() -> None:
    stored = ["BlockStored", [1], None, [5], 1, None, "GPU", "adapter", ["extra"], 0]
    cleared = {"type": "AllBlocksCleared", "reason": "flush"}
    batch = kv_events.decode_batch(msgspec.msgpack.encode([TS, [stored, cleared]]))
    assert batch.undecoded == 0
    assert isinstance(batch.events[0], BlockStored)
    assert batch.events[0].lora_name == "adapter"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x93",
        msgspec.msgpack.encode({"ts": TS}),
        msgspec.msgpack.encode([TS]),
        msgspec.msgpack.encode(["now", []]),
        msgspec.msgpack.encode([TS, {}]),
        msgspec.msgpack.encode([TS, [["BlockRemoved", [1]]]])[:-1],
        msgspec.msgpack.encode([TS, []]) + b"\x00",
        b"\x92\xcb" + struct.pack(">d", TS) + b"\xdd\xff\xff\xff\xff",
        b"\x92\xcb" + struct.pack(">d", TS) + b"\x91" * 100_000,
    ],
)
def test_payload_that_is_no_batch(payload: bytes) -> None:
    with pytest.raises(KvEventError, match="not a KV event batch"):
        kv_events.decode_batch(payload)


def test_deep_nesting_inside_an_event_is_refused() -> None:
    deep = b"\x82\xa4type\xacBlockRemoved\xacblock_hashes" + b"\x91" * 500 + b"\x90"
    batch = kv_events.decode_batch(b"\x92\xcb" + struct.pack(">d", TS) + b"\x91" + deep)
    assert (batch.events, batch.undecoded) == ([], 1)


def test_token_ids_of_both_kinds() -> None:
    assert kv_events.decode_token_ids(msgspec.msgpack.encode([1, 2**62])) == [1, 2**62]
    assert kv_events.decode_token_ids(msgspec.msgpack.encode([[1, 2], [2, 3]])) == [(1, 2), (2, 3)]
    assert kv_events.decode_token_ids(msgspec.msgpack.encode([])) == []


@pytest.mark.parametrize(
    ("medium", "stored", "removed"),
    [
        ("GPU", 1, 1),
        ("CPU_PINNED", 2, 2),
        ("CPU", 2, 2),
        ("DISK", 4, 4),
        ("STORAGE", 4, 4),
        ("EXTERNAL", 0, 0),
        ("HOLOGRAM", 0, 7),
        (None, 1, 7),
    ],
)
def test_tier_mask(medium: str | None, stored: int, removed: int) -> None:
    assert kv_events.tier_mask(medium) == stored
    assert kv_events.tier_mask(medium, is_removal=True) == removed


def test_encode_refuses_what_is_no_hash() -> None:
    with pytest.raises(ValueError, match="integers"):
        kv_events.removed(block_hashes=["x"])  # type: ignore[list-item]


PAYLOADS = [p.with_suffix(".msgpack").read_bytes() for p in SGLANG + VLLM if "large" not in p.stem]


@settings(max_examples=400, deadline=None, database=None)
@given(st.data())
def test_damaged_payloads_raise_one_error_only(data: st.DataObject) -> None:
    """Recorded payloads with bytes changed, cut out or put in: a batch or a KvEventError, nothing else."""
    payload = bytearray(data.draw(st.sampled_from(PAYLOADS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload)))
        payload[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        batch = kv_events.decode_batch(bytes(payload))
    except KvEventError:
        return
    for event in batch.events:
        if isinstance(event, BlockStored):
            assert all(0 <= block_hash < 2**64 for block_hash in event.block_hashes)
            assert event.parent_block_hash is None or 0 <= event.parent_block_hash < 2**64
            with contextlib.suppress(KvEventError):
                kv_events.decode_token_ids(event.token_ids)


@pytest.mark.parametrize("odd", [b"\xa1\xff", b"\x81\x80\x80", b"\xc7\x01\x05\x00", b"\x81\x90\xc0"])
def test_odd_rank_and_odd_extras_do_no_harm(odd: bytes) -> None:
    """Invalid UTF-8, unhashable map keys and extension types where nobody looks."""
    head = b"\x93\xcb" + struct.pack(">d", TS)
    removed = b"\x93\xacBlockRemoved\x91\x07\xa3GPU"
    batch = kv_events.decode_batch(head + b"\x91" + removed + odd)
    assert (len(batch.events), batch.rank, batch.undecoded) == (1, None, 0)
    noisy = b"\x83\xa4type\xacBlockRemoved\xacblock_hashes\x91\x07\xa5other" + odd
    batch = kv_events.decode_batch(head + b"\x91" + noisy + b"\xc0")
    assert (len(batch.events), batch.undecoded) == (1, 0)
