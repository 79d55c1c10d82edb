"""Block keys made from the tokens of events: for vLLM, LoRA adapters, SGLang's format "dynamo" and engines that nobody knows.

Runs in: index, one a rank, in its thread alone. Contract: the engine's hash is an opaque name. `place` gives the keys of a store's
    blocks, chained to the key of its parent, and remembers hash -> key; removals and stores without tokens go through that
    memory. A block whose place in its prompt is unknown (its parent was never seen, its tokens do not fill it) is an orphan:
    left out and counted. The memory holds what the rank owns: `forget` and `prune` keep it so. What a batch removes is forgotten behind
    its end, so that `place_all`, which does a usual batch at once in C, and `place` and `resolve` event by event are the same.
What cannot be matched from a request must not be matched by accident: vLLM hashes images, salts and prompt embeddings beside a
    block's tokens (`extra_keys`); their bytes go into our chain, so that no prompt of plain tokens finds these blocks. A prompt with
    nothing but a salt is found by it (prompt/adapters.py).
Of a hybrid vLLM model only the main attention's cache counts; the blocks of its sliding windows and states come and go beside it. Where
several caches are full attention, the first one counts until an event says that it is none: all of them hold a prompt's blocks, and
who took stores from one and removals from another would believe in blocks that are gone.
Source: spec/kv_events.md 2.4, 2.7, 2.8; the chain itself is in sglfast._blockhash.
"""

import msgspec

from sglfast._blockhash import chain_seed, token_keys, xxh3
from sglfast._hashtree import TreeWriter
from sglfast._keymap import KeyMap
from sglfast._kvdecode import token_ids
from sglfast.errors import KvEventError
from sglfast.wire.kv_events import DEVICE, NIL, BlockRemoved, BlockStored, decode_token_ids, tier_mask

_MAX_SEEDS = 4096
_PRUNE_SLACK = 1024
UNTOLD_GROUP = -1

_decode_extras = msgspec.msgpack.Decoder(list[msgspec.Raw] | None).decode
_encode = msgspec.msgpack.Encoder().encode
_decode_names = msgspec.msgpack.Decoder().decode


# (events, runs of keys as of `_kvdecode.runs`, hashes that may be forgotten behind them, was something lost) of one batch or more.
Placed = tuple[int, list[tuple[int, int, bytes]], bytes, bool]


class TokenRoute:
    """Keys of one rank's blocks. model, block_size (tokens) and is_bigram: of the seed of its base model's keys.

    key_map, main_group: what a former process knew, and a memory that outlives this one; None, UNTOLD_GROUP = nothing and none.
    """

    def __init__(
        self, *, model: str, block_size: int, is_bigram: bool, key_map: KeyMap | None = None, main_group: int = UNTOLD_GROUP
    ) -> None:
        self.orphans = 0  # blocks
        self._model = model
        self._block_size = block_size
        self._base_seed = chain_seed(model, block_size, bigram=is_bigram)
        self._map = KeyMap() if key_map is None else key_map
        self._seeds: dict[tuple[int, bool, str, str], int] = {}
        self.main_group = main_group  # number of the main attention among a hybrid model's caches; as long as it is untold 0 counts

    def __len__(self) -> int:
        return len(self._map)

    def place(self, event: BlockStored) -> bytes:
        """Keys of the event's blocks, little-endian uint64; those of orphans and of other caches are left out.

        Raises: KvEventError when the token ids cannot be read, or are no ids.
        """
        if not self.is_main(event):
            return b""
        n_blocks = len(event.keys) // 8
        if tier_mask(event.medium) != DEVICE:
            # A copy of blocks of which some are known by their names. Some offloading connectors tell its tokens, but not what was
            # hashed beside these; keys made of such events would be other ones, and nobody would remove the first ones.
            _, keys = self._map.find(event.keys)
            if keys:
                self.orphans += n_blocks - len(keys) // 8
                return keys
        packed = token_ids(event.token_ids)
        units = decode_token_ids(event.token_ids) if packed is None else memoryview(packed).cast("I")
        if not units:
            _, keys = self._map.find(event.keys)
            self.orphans += n_blocks - len(keys) // 8
            return keys
        parent = 0 if event.parent_block_hash is None else self._map.get(event.parent_block_hash)
        if parent is None or not event.block_size or len(units) != n_blocks * event.block_size:
            if event.block_size in (0, self._block_size):  # blocks of another size are nothing that a request could miss
                self.orphans += n_blocks
            return b""
        try:
            keys = self._chain(event, units, parent)
        except ValueError as error:
            raise KvEventError(f"its token ids cannot be hashed: {error}") from None
        self._map.put(event.keys, keys)
        return keys

    def place_all(self, payload: bytes) -> Placed | None:
        """The same for all events of a batch; None when it is not entirely usual, and then nothing has changed."""
        placed = self._map.place(payload, seed=self._base_seed, block_size=self._block_size, main_group=self.main_group)
        if placed is None:
            return None
        n_events, n_orphans, n_orphans_live, self.main_group, runs, removed = placed
        self.orphans += n_orphans
        return n_events, runs, removed, n_orphans_live > 0

    def place_batches(self, payloads: bytes, ends: bytes, first: int) -> tuple[int, Placed | None]:
        """The same for batches one behind the other, as one, up to one that is not usual; (how many, None for none).

        ends: where each ends in `payloads`, as uint64; first: the one to begin with. Raises: MemoryError, and nothing has changed.
        """
        n_batches, placed = self._map.place_batches(
            payloads, ends, first, seed=self._base_seed, block_size=self._block_size, main_group=self.main_group
        )
        if placed is None:
            return 0, None
        n_events, n_orphans, n_orphans_live, self.main_group, runs, removed = placed
        self.orphans += n_orphans
        return n_batches, (n_events, runs, removed, n_orphans_live > 0)

    def resolve(self, event: BlockRemoved) -> tuple[bytes, bytes]:
        """(engine hashes, keys) of the event's blocks, as far as they are known."""
        if event.group_idx is not None and not self._is_main_group(event.group_idx):
            return b"", b""
        return self.find(event.keys)

    def find(self, hashes: bytes) -> tuple[bytes, bytes]:
        """(engine hashes, keys) of those that are known."""
        return self._map.find(hashes)

    def forget(self, hashes: bytes, writer: TreeWriter, rank: int) -> None:
        """Drop what the rank does not own any more in any tier."""
        known, keys = self._map.find(hashes)
        self._map.drop(known, writer.owns(rank, keys))

    def to_prune(self, owned_blocks: int) -> int:
        """Where `prune` is to begin when eviction may have taken half of the memory from the rank, which owns so many blocks; else 0."""
        return self._map.places if len(self._map) > 2 * owned_blocks + _PRUNE_SLACK else 0

    def prune(self, writer: TreeWriter, rank: int, end: int, n_places: int) -> int:
        """Drop what the rank does not own any more and what lies in the last places of the memory before `end`.

        Returns where they begin, which is the next turn's end; 0 = this was the last one.
        """
        start = max(0, end - n_places)
        hashes, keys = self._map.items(start, end)
        self._map.drop(hashes, writer.owns(rank, keys))
        return start

    def clear(self) -> None:
        """The rank owns nothing."""
        self._map.clear()

    def release(self) -> None:
        """Give the memory back."""
        self._map.release()

    def is_main(self, event: BlockStored) -> bool:
        """Whether the event speaks of the cache that counts; a hybrid model has others."""
        if event.group_idx is None:
            return True
        if event.spec_kind is not None:
            if not _holds_prompts(event.spec_kind):
                if event.group_idx == self.main_group:
                    self.main_group = UNTOLD_GROUP
                return False
            if self.main_group == UNTOLD_GROUP:
                self.main_group = event.group_idx
        return self._is_main_group(event.group_idx)

    def _is_main_group(self, group: int) -> bool:
        return group == (0 if self.main_group == UNTOLD_GROUP else self.main_group)

    def _chain(self, event: BlockStored, units: "list[int] | list[tuple[int, int]] | memoryview[int]", parent: int) -> bytes:
        last = units[-1]
        is_bigram = isinstance(last, tuple)
        tokens: list[int] | memoryview[int]
        if isinstance(units, memoryview):
            tokens = units
        else:
            tokens = [unit[0] if isinstance(unit, tuple) else unit for unit in units]
            if isinstance(last, tuple):
                tokens.append(last[1])
        seed = self._seed(event, is_bigram)
        extras = [] if event.extra_keys is NIL else _extras_of(event)
        if not any(extras):
            return token_keys(tokens, event.block_size, bigram=is_bigram, seed=seed, parent=parent)
        keys = []
        size = event.block_size
        for page, extra in enumerate(extras):
            if extra:
                parent = xxh3(extra, parent)
            key = token_keys(tokens[page * size : (page + 1) * size + is_bigram], size, bigram=is_bigram, seed=seed, parent=parent)
            parent = int.from_bytes(key, "little")
            keys.append(key)
        return b"".join(keys)

    def _seed(self, event: BlockStored, is_bigram: bool) -> int:
        # SGLang's tokens tell their block size and kind: an event that contradicts /server_info is kept apart, not matched wrongly.
        lora_name = event.lora_name or ("" if event.lora_id is None else f"\0{event.lora_id}")
        what = event.block_size, is_bigram, lora_name, event.cache_salt or ""
        seed = self._seeds.get(what)
        if seed is None:
            if len(self._seeds) >= _MAX_SEEDS:
                self._seeds.clear()
            seed = chain_seed(self._model, event.block_size, bigram=is_bigram, lora_name=lora_name, cache_salt=what[3])
            self._seeds[what] = seed
        return seed


def _holds_prompts(spec_kind: str) -> bool:
    """Of full_attention, sink_full_attention and mla_attention, but not of sliding_window_mla."""
    return "full" in spec_kind or ("mla" in spec_kind and "sliding" not in spec_kind)


def _extras_of(event: BlockStored) -> list[bytes]:
    """What was hashed beside each block's tokens, empty for nothing; the adapter's name is in the seed already."""
    n_blocks = len(event.keys) // 8
    try:
        extras = _decode_extras(event.extra_keys)
    except (msgspec.DecodeError, RecursionError):
        extras = [event.extra_keys]
    if extras is None:
        return [b""] * n_blocks
    if len(extras) != n_blocks:
        return [bytes(event.extra_keys)] * n_blocks
    return [_unknown_part(bytes(extra), event.lora_name) for extra in extras]


def _unknown_part(extra: bytes, lora_name: str | None) -> bytes:
    try:
        names = _decode_names(extra)
    except (msgspec.DecodeError, RecursionError, ValueError, TypeError):
        return extra
    if not isinstance(names, list):
        return extra if names else b""
    if lora_name in names:
        names.remove(lora_name)  # once: a salt may be the same text
    return _encode(names) if names else b""
