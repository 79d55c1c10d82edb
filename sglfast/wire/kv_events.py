"""KV event batches: the msgpack payload that SGLang and vLLM publish, decoded to block keys and encoded as SGLang does.

Runs in: index (decode), sim (encode). No I/O.
Contract: a batch is a msgpack array `[ts, events, rank]`, short and long arrays accepted; an event is a tagged array
    (sglang <= 0.5.19, vLLM <= 0.23) or a tagged map (later). An event that is malformed or lists more than MAX_BLOCK_HASHES blocks is
    counted in `Batch.undecoded`, one of a kind that is not known here is named in `Batch.unknown`; their siblings are kept: dropping a
    sibling removal would leave a stale owner. Only a payload that is no batch raises. Nothing here keeps prompt tokens: `token_ids`
    stays an undecoded view.
Why keys as bytes: nearly every hash is 9 bytes on the wire (a tag and a big-endian 64-bit number), so a whole list becomes the
    little-endian words that the tree takes with eight strided copies and no Python integer; other lists take the general road.
Source: spec/kv_events.md 1.3 to 1.5, 2.6.
"""

import struct
from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeVar

import msgspec

from sglfast.errors import KvEventError
from sglfast.wire.frames import live_frames as live_frames  # one import for whoever speaks to an engine
from sglfast.wire.frames import parse_live as parse_live
from sglfast.wire.frames import parse_replay as parse_replay
from sglfast.wire.frames import parse_replay_request as parse_replay_request
from sglfast.wire.frames import replay_data as replay_data
from sglfast.wire.frames import replay_end as replay_end
from sglfast.wire.frames import replay_request as replay_request

MAX_BLOCK_HASHES = 65_536
DEVICE, HOST, DISK = 1, 2, 4
ALL_TIERS = DEVICE | HOST | DISK

_FEW = 16  # below it the strided copies cost more than they save
_MASK = 0xFFFF_FFFF_FFFF_FFFF
NIL = msgspec.Raw(b"\xc0")  # an absent field that stays undecoded
_UNDECODABLE = (msgspec.DecodeError, RecursionError, ValueError)
# EXTERNAL storage belongs to no worker, so it is known but owns nothing; the rest of the names are SGLang's and vLLM's.
_TIERS = {"GPU": DEVICE, "CPU_PINNED": HOST, "CPU": HOST, "DISK": DISK, "STORAGE": DISK, "EXTERNAL": 0}


class BlockStored(msgspec.Struct):
    """Blocks that a rank now holds in one tier, in prefix order.

    keys: n block keys, little-endian uint64, 8*n bytes; parent_block_hash: key of the block before the first, None = root;
    token_ids: undecoded msgpack array (see `decode_token_ids`); block_size: tokens a block, 0 when a vLLM store has no tokens.
    Of vLLM only: extra_keys: undecoded array with one entry a block, what was hashed beside its tokens, nil for nothing;
    group_idx: which of a hybrid model's caches, None when there is one; spec_kind: the kind of that cache, None when not told.
    """

    keys: bytes
    parent_block_hash: int | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | str | None = None
    lora_name: str | None = None
    medium: str | None = None
    cache_salt: str | None = None
    extra_keys: msgspec.Raw = NIL
    group_idx: int | None = None
    spec_kind: str | None = None

    @property
    def block_hashes(self) -> list[int]:
        """The same keys as integers (uint64)."""
        return list(struct.unpack(f"<{len(self.keys) // 8}Q", self.keys))


class BlockRemoved(msgspec.Struct):
    """Blocks that a rank dropped from one tier, or from all when `medium` is None; in no particular order. group_idx: as stored."""

    keys: bytes
    medium: str | None = None
    group_idx: int | None = None

    @property
    def block_hashes(self) -> list[int]:
        """The same keys as integers (uint64)."""
        return list(struct.unpack(f"<{len(self.keys) // 8}Q", self.keys))


class AllBlocksCleared(msgspec.Struct):
    """The rank's cache is empty, in every tier.

    vLLM is about to tell of one tier alone (TierBlocksCleared, opt-in there). That is taken for all of them: what other tiers still hold
    costs a prefill or two, and owners that are none would cost many.
    """


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct):
    """One message: ts in unix seconds; rank as the engine names itself (None when it does not); undecoded: events left out.

    unknown: the kinds of those that were left out because no such kind is known; an engine that is newer than we are has them.
    """

    ts: float
    events: list[Event]
    rank: int | None
    undecoded: int
    unknown: tuple[str, ...] = ()


# ---- what stands on the wire ----


class _StoredMap(msgspec.Struct, tag="BlockStored"):
    block_hashes: msgspec.Raw
    parent_block_hash: int | bytes | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | str | None = None
    medium: str | None = None
    lora_name: str | None = None
    cache_salt: str | None = None
    extra_keys: msgspec.Raw = NIL
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _RemovedMap(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: msgspec.Raw
    medium: str | None = None
    group_idx: int | None = None


class _ClearedMap(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class _StoredArray(msgspec.Struct, tag="BlockStored", array_like=True):
    block_hashes: msgspec.Raw
    parent_block_hash: int | bytes | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | str | None = None
    medium: str | None = None
    # sglang 0.5.18-19: a map with cache_salt, only when salted. vLLM: lora_name.
    last: dict[str, msgspec.Raw] | str | None = None
    # vLLM 0.20 to 0.23
    extra_keys: msgspec.Raw = NIL
    group_idx: int | None = None


class _RemovedArray(msgspec.Struct, tag="BlockRemoved", array_like=True):
    block_hashes: msgspec.Raw
    medium: str | None = None
    group_idx: int | None = None


class _ClearedArray(msgspec.Struct, tag="AllBlocksCleared", array_like=True):
    pass


class _KindMap(msgspec.Struct):
    type: str


class _KindArray(msgspec.Struct, array_like=True):
    type: str


_KINDS = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})
_MapEvent = _StoredMap | _RemovedMap | _ClearedMap
_ArrayEvent = _StoredArray | _RemovedArray | _ClearedArray
E = TypeVar("E")


class _WireBatch(msgspec.Struct, Generic[E], array_like=True):
    ts: float
    events: list[E]
    rank: msgspec.Raw = NIL


_map_batch_decoder = msgspec.msgpack.Decoder(_WireBatch[_MapEvent])
_array_batch_decoder = msgspec.msgpack.Decoder(_WireBatch[_ArrayEvent])
_raw_batch_decoder = msgspec.msgpack.Decoder(_WireBatch[msgspec.Raw])
_map_decoder = msgspec.msgpack.Decoder(_MapEvent)
_array_decoder = msgspec.msgpack.Decoder(_ArrayEvent)
_map_kind_decoder = msgspec.msgpack.Decoder(_KindMap)
_array_kind_decoder = msgspec.msgpack.Decoder(_KindArray)
_rank_decoder = msgspec.msgpack.Decoder(int)
_salt_decoder = msgspec.msgpack.Decoder(str | None)
_hashes_decoder = msgspec.msgpack.Decoder(list[int | bytes])
_unigram_decoder = msgspec.msgpack.Decoder(list[int])
_bigram_decoder = msgspec.msgpack.Decoder(list[tuple[int, int]])
_encoder = msgspec.msgpack.Encoder()


def decode_batch(payload: bytes) -> Batch:
    """Decode one payload.

    Raises: KvEventError when the payload itself is no batch (the events inside never raise, see `Batch.undecoded`).
    """
    try:
        decoder = _map_batch_decoder if _begins_with_map(payload) else _array_batch_decoder
        wire = decoder.decode(payload)
        return Batch(wire.ts, [_event_of(event) for event in wire.events], _rank_of(wire.rank), 0)
    except _UNDECODABLE:
        return _decode_one_by_one(payload)


def _begins_with_map(payload: bytes) -> bool:
    """Is the first event a map? A guess from fixed places; a wrong one costs time, not correctness."""
    if len(payload) < 16:
        return True
    # array header, float64, then the header of the event list: 1, 3 or 5 bytes
    return _is_map(payload[{0xDC: 13, 0xDD: 15}.get(payload[10], 11)])


def _is_map(first: int) -> bool:
    return first & 0xF0 == 0x80 or first >= 0xDE


def _decode_one_by_one(payload: bytes) -> Batch:
    """The general road: at least one event is odd, or none is of the shape of the first."""
    try:
        wire = _raw_batch_decoder.decode(payload)
    except _UNDECODABLE as error:
        raise KvEventError(f"not a KV event batch [ts, events, rank]: {error} ({len(payload)} bytes)") from None
    events: list[Event] = []
    unknown: list[str] = []
    undecoded = 0
    for raw in wire.events:
        is_map = _is_map(memoryview(raw)[0])
        try:
            events.append(_event_of((_map_decoder if is_map else _array_decoder).decode(raw)))
        except _UNDECODABLE:
            kind = _kind_of(raw, is_map=is_map)
            if kind == "TierBlocksCleared":
                events.append(AllBlocksCleared())
            elif kind is None or kind in _KINDS:
                undecoded += 1
            else:
                unknown.append(kind)
    return Batch(wire.ts, events, _rank_of(wire.rank), undecoded, tuple(unknown))


def _kind_of(raw: msgspec.Raw, *, is_map: bool) -> str | None:
    """What an event calls itself, None when it has no name."""
    try:
        return (_map_kind_decoder if is_map else _array_kind_decoder).decode(raw).type
    except _UNDECODABLE:
        return None


def _rank_of(raw: msgspec.Raw) -> int | None:
    """Informational only (the socket tells the rank), so a wrong type is no reason to lose a batch."""
    try:
        return _rank_decoder.decode(raw)
    except _UNDECODABLE:
        return None


def _event_of(wire: _MapEvent | _ArrayEvent) -> Event:
    if isinstance(wire, (_RemovedMap, _RemovedArray)):
        return BlockRemoved(_keys_of(wire.block_hashes), wire.medium, wire.group_idx)
    if isinstance(wire, (_ClearedMap, _ClearedArray)):
        return AllBlocksCleared()
    if isinstance(wire, _StoredMap):
        lora_name, cache_salt = wire.lora_name, wire.cache_salt
    else:
        lora_name = wire.last if isinstance(wire.last, str) else None
        cache_salt = _salt_decoder.decode(wire.last.get("cache_salt", NIL)) if isinstance(wire.last, dict) else None
    parent = wire.parent_block_hash
    if wire.block_size < 0:
        raise ValueError("negative block_size")
    return BlockStored(
        _keys_of(wire.block_hashes),
        None if parent is None else _key_of(parent),
        wire.token_ids,
        wire.block_size,
        wire.lora_id,
        lora_name,
        wire.medium,
        cache_salt,
        wire.extra_keys,
        wire.group_idx,
        wire.kv_cache_spec_kind if isinstance(wire, _StoredMap) else None,
    )


def _key_of(block_hash: int | bytes) -> int:
    """uint64 of an engine's hash: two's complement of SGLang's signed one, the low end of vLLM's digest."""
    if isinstance(block_hash, bytes):
        if len(block_hash) < 8:
            raise ValueError("a hash of fewer than 8 bytes")
        return int.from_bytes(block_hash[-8:], "big")
    return block_hash & _MASK


def _keys_of(raw: msgspec.Raw) -> bytes:
    view = memoryview(raw)
    first = view[0]
    if first == 0x91 and len(view) == 10 and view[1] in (0xCF, 0xD3):  # an event a block, as sglang <= 0.5.14 sends
        return bytes(view[:1:-1])
    if first & 0xF0 == 0x90:
        n, start = first & 0x0F, 1
    elif first == 0xDC:
        n, start = int.from_bytes(view[1:3], "big"), 3
    elif first == 0xDD:
        n, start = int.from_bytes(view[1:5], "big"), 5
    else:
        raise ValueError("block_hashes is no array")
    if n > MAX_BLOCK_HASHES:
        raise ValueError("too many blocks in one event")
    if n >= _FEW and len(view) == start + 9 * n:
        tags = bytes(view[start::9])
        # All elements being 9 bytes long follows: the first tag fixes where the second stands, and so on.
        if tags.count(0xCF) + tags.count(0xD3) == n:
            keys = bytearray(8 * n)
            for byte in range(8):
                keys[byte::8] = view[start + 8 - byte :: 9]
            return bytes(keys)
    return struct.pack(f"<{n}Q", *map(_key_of, _hashes_decoder.decode(raw)))


def decode_token_ids(raw: msgspec.Raw | bytes) -> list[int] | list[tuple[int, int]]:
    """Token ids of a `BlockStored`: a flat list, or a list of pairs when the engine keys EAGLE bigrams.

    Raises: KvEventError when they are neither.
    """
    try:
        return _unigram_decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        return _bigram_decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise KvEventError(f"token_ids is neither a list of ids nor a list of id pairs: {error}") from None


def tier_mask(medium: str | None, *, is_removal: bool = False) -> int:
    """Bit mask of the tiers that an event with this `medium` speaks of (DEVICE, HOST, DISK).

    A store without medium comes from an engine that knows only the device. A removal without medium, or from a medium that we do
    not know, speaks of all tiers (a missing owner costs one prefill, a stale one costs many); a store in an unknown medium of none.
    """
    if medium is None:
        return ALL_TIERS if is_removal else DEVICE
    return _TIERS.get(medium, ALL_TIERS if is_removal else 0)


# ---- encoding, as SGLang publishes ----


class EventOut(msgspec.Struct, frozen=True):
    """An event on its way out: the keys of the map shape in SGLang's order, absent optional ones left out."""

    tag: str
    fields: dict[str, Any]


def stored(
    *,
    block_hashes: Sequence[int],
    parent_block_hash: int | None,
    token_ids: Sequence[int] | Sequence[Sequence[int]],
    block_size: int,
    medium: str | None = "GPU",
    lora_id: int | None = None,
    cache_salt: str | None = None,
    session_id: str | None = None,
    lora_name: str | None = None,
) -> EventOut:
    """A BlockStored for `encode_batch`; hashes are uint64 (or already signed). Pairs in token_ids for EAGLE bigrams."""
    fields: dict[str, Any] = {
        "block_hashes": _signed(block_hashes),
        "parent_block_hash": None if parent_block_hash is None else _signed([parent_block_hash])[0],
        "token_ids": token_ids,
        "block_size": block_size,
        "lora_id": lora_id,
    }
    optional = {"medium": medium, "cache_salt": cache_salt, "session_id": session_id, "lora_name": lora_name}
    fields.update((name, value) for name, value in optional.items() if value is not None)
    return EventOut("BlockStored", fields)


def removed(*, block_hashes: Sequence[int], medium: str | None = "GPU") -> EventOut:
    """A BlockRemoved for `encode_batch`; hashes as in `stored`."""
    fields: dict[str, Any] = {"block_hashes": _signed(block_hashes)}
    if medium is not None:
        fields["medium"] = medium
    return EventOut("BlockRemoved", fields)


def cleared() -> EventOut:
    """An AllBlocksCleared for `encode_batch`."""
    return EventOut("AllBlocksCleared", {})


def encode_batch(ts: float, events: Sequence[EventOut], rank: int | None, *, shape: Literal["map", "array"] = "map") -> bytes:
    """Payload as SGLang publishes it: `map` as 0.5.20 and later, `array` as 0.5.18 (which has no session_id and no lora_name)."""
    wire = [_as_map(event) if shape == "map" else _as_array(event) for event in events]
    return _encoder.encode((ts, wire, rank))


def _as_map(event: EventOut) -> dict[str, Any]:
    return {"type": event.tag, **event.fields}


def _as_array(event: EventOut) -> list[Any]:
    fields = event.fields
    match event.tag:
        case "BlockStored":
            names = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id")
            wire = [event.tag, *(fields[name] for name in names), fields.get("medium")]
            return [*wire, {"cache_salt": fields["cache_salt"]}] if "cache_salt" in fields else wire
        case "BlockRemoved":
            return [event.tag, fields["block_hashes"], fields.get("medium")]
        case _:
            return [event.tag]


def _signed(hashes: Sequence[int]) -> list[int]:
    """Block keys as the int64 that SGLang writes."""
    try:
        return list(struct.unpack(f"<{len(hashes)}q", struct.pack(f"<{len(hashes)}Q", *[h & _MASK for h in hashes])))
    except (struct.error, TypeError):
        raise ValueError("block hashes must be integers") from None
