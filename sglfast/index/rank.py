"""One rank's blocks: turns event batches into writes to the hash tree, and checks that its keys are the ones shards compute.

Runs in: index; called by the rank's subscriber thread, and by `main` when the worker goes.
Contract: the tree has one writer object in the process (`TreeLock`), its lock is held for one batch at a time. After `retire`
    nothing of this rank reaches the tree any more, whatever its thread still holds in hand. What cannot be decoded is counted
    and logged, never fatal.
Why the check: a shard finds a block only if it computes the engine's key from the prompt. EAGLE pairs, another block size, another
    format or another engine make all keys differ, and then every lookup misses without a word. So root blocks are recomputed
    from their own tokens until one agrees. On the token route the keys are ours, so there only block size and pairs can differ.
Source: spec/kv_events.md 2.1 to 2.3, 2.6, 2.8.
"""

import logging
import threading
import time
from dataclasses import dataclass, field

from sglfast._blockhash import page_keys
from sglfast._hashtree import TreeWriter
from sglfast._kvdecode import CLEAR, STORE, runs
from sglfast.errors import KvEventError
from sglfast.index.stream import Outcome
from sglfast.index.token_route import TokenRoute
from sglfast.shm import KeyRoute
from sglfast.wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch, decode_token_ids, tier_mask

_PLAIN, _CLEARED, _LOSSY = Outcome(), Outcome(is_cleared=True), Outcome(is_lossy=True)
_CHECKED_PAGES = 4
# While no root block has agreed: all of the first few are recomputed, then now and then one.
_FIRST_CHECKS, _CHECK_EVERY = 8, 16
_LOG_EVERY_S = 10.0


@dataclass(slots=True)
class TreeLock:
    """The process's only TreeWriter and the lock that its users take for each batch."""

    writer: TreeWriter
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True)
class BlockCounters:
    """Totals since the rank was taken up. undecoded: events, and batches of which no event could be read (each as one).

    orphans: blocks of the token route left out because their place in the prompt is unknown.
    """

    events: int = 0
    blocks_stored: int = 0
    blocks_removed: int = 0
    undecoded: int = 0
    orphans: int = 0


class RankIndex:
    """The blocks of tree rank `rank`; the keyword arguments are what shards use for this worker's keys (block_size in tokens).

    key_route: "sha256", the engine's hash is the key, except in events of a LoRA adapter; "tokens", keys are made of the tokens.
    """

    def __init__(
        self,
        tree: TreeLock,
        rank: int,
        *,
        block_size: int,
        is_bigram: bool,
        log: logging.LoggerAdapter[logging.Logger],
        key_route: KeyRoute = "sha256",
        model: str = "",
    ) -> None:
        self.counters = BlockCounters()
        self.last_event_ms = 0  # wall clock
        self.has_agreed = False  # a root block was found to have the keys that shards compute
        self.mismatch = ""  # why shards cannot find this rank's blocks; empty = they can, or no root block was seen yet
        self.rank = rank
        self._tree = tree
        self._block_size = block_size
        self._is_bigram = is_bigram
        self._is_by_tokens = key_route == "tokens"
        self._by_tokens = TokenRoute(model=model, block_size=block_size, is_bigram=is_bigram)
        self._log = log
        self._is_retired = False
        self._roots = 0
        self._log_after_s = 0.0

    @property
    def owned_blocks(self) -> int:
        """Blocks that the rank owns in the tree."""
        return self._tree.writer.owned_blocks(self.rank)

    @property
    def mapped_blocks(self) -> int:
        """Blocks whose engine hash is not their key, so that only this process can remove them."""
        return len(self._by_tokens)

    def apply(self, payload: bytes) -> Outcome:
        """Apply one batch, whatever it holds."""
        # The check of root blocks needs their tokens, and removals the map of blocks keyed by tokens: else one pass is enough.
        if self.has_agreed and not self._is_by_tokens and not len(self._by_tokens):
            usual = runs(payload)
            if usual is not None:
                return self._apply_runs(*usual)
        try:
            batch = decode_batch(payload)
        except KvEventError as error:
            self.note_undecoded(str(error))
            return _LOSSY
        outcome = _PLAIN
        undecoded, orphans = batch.undecoded, self._by_tokens.orphans
        stored_in: BlockStored | None = None
        with self._tree.lock:
            if self._is_retired:
                return _PLAIN
            writer = self._tree.writer
            for event in batch.events:
                match event:
                    case BlockStored():
                        try:
                            self._store(writer, event)
                        except KvEventError:
                            undecoded += 1
                        if event.parent_block_hash is None:
                            stored_in = event
                    case BlockRemoved():
                        self._remove(writer, event)
                    case AllBlocksCleared():
                        self.counters.blocks_removed += writer.clear(self.rank)
                        self._by_tokens.clear()
                        outcome, orphans = _CLEARED, self._by_tokens.orphans
            self._by_tokens.prune(writer, self.rank)
        self.counters.events += len(batch.events)
        self.last_event_ms = time.time_ns() // 1_000_000
        if stored_in is not None and not self.has_agreed:
            self._check(stored_in)
        self.counters.orphans = self._by_tokens.orphans
        if undecoded:
            n_events = len(batch.events) + batch.undecoded
            self.note_undecoded(f"{undecoded} of {n_events} events are unknown or malformed", undecoded)
            return _LOSSY
        return outcome if orphans == self._by_tokens.orphans else _LOSSY

    def _apply_runs(self, n_events: int, found: list[tuple[int, int, bytes]]) -> Outcome:
        outcome = _PLAIN
        with self._tree.lock:
            if self._is_retired:
                return _PLAIN
            writer, counters, rank = self._tree.writer, self.counters, self.rank
            for kind, tiers, keys in found:
                if kind == CLEAR:
                    counters.blocks_removed += writer.clear(rank)
                    outcome = _CLEARED
                elif not tiers:
                    continue
                elif kind == STORE:
                    counters.blocks_stored += writer.store(rank, tiers.bit_length() - 1, keys)
                else:
                    counters.blocks_removed += writer.remove(rank, tiers, keys)
        counters.events += n_events
        self.last_event_ms = time.time_ns() // 1_000_000
        return outcome

    def clear(self) -> int:
        """Forget all blocks of the rank; returns how many they were."""
        with self._tree.lock:
            self._by_tokens.clear()
            return 0 if self._is_retired else self._tree.writer.clear(self.rank)

    def retire(self) -> None:
        """Forget all blocks, for good: the rank number may be given to another worker now."""
        with self._tree.lock:
            if not self._is_retired:
                self._is_retired = True
                self._tree.writer.clear(self.rank)

    def _store(self, writer: TreeWriter, event: BlockStored) -> None:
        tier = tier_mask(event.medium).bit_length() - 1
        if tier >= 0:
            is_by_tokens = self._is_by_tokens or event.lora_name is not None
            keys = self._by_tokens.place(event) if is_by_tokens else event.keys
            self.counters.blocks_stored += writer.store(self.rank, tier, keys)

    def _remove(self, writer: TreeWriter, event: BlockRemoved) -> None:
        tiers = tier_mask(event.medium, is_removal=True)
        if not tiers:
            return
        if not self._is_by_tokens:
            self.counters.blocks_removed += writer.remove(self.rank, tiers, event.keys)
        if len(self._by_tokens):
            hashes, keys = self._by_tokens.resolve(event)
            self.counters.blocks_removed += writer.remove(self.rank, tiers, keys)
            self._by_tokens.forget(hashes, keys, writer, self.rank)

    def _check(self, event: BlockStored) -> None:
        """Recompute a root block from its tokens and note whether shards will find it."""
        self._roots += 1
        if self._roots > _FIRST_CHECKS and self._roots % _CHECK_EVERY:
            return
        try:
            why = self._disagreement(event)
        except KvEventError as error:
            why = str(error)
        if why is None:
            return
        if why and why != self.mismatch:
            self._log.error("the KV index cannot match this rank's blocks: %s", why)
        elif self.mismatch and not why:
            self._log.info("block keys of this rank agree now")
        self.mismatch = why
        self.has_agreed = not why

    def _disagreement(self, event: BlockStored) -> str | None:
        """Empty when keys agree, None when this event cannot tell (no tokens, or the hashes of a LoRA adapter)."""
        is_adapter = event.lora_name is not None or event.lora_id is not None
        if (is_adapter and not self._is_by_tokens) or not event.block_size or not event.keys:
            return None
        units = decode_token_ids(event.token_ids)
        if not units:
            return None
        if event.block_size != self._block_size:
            return f"its blocks hold {event.block_size} tokens, /server_info says {self._block_size}"
        first = units[0]
        is_bigram = isinstance(first, tuple)
        if is_bigram != self._is_bigram:
            said = "pairs of tokens (EAGLE)" if self._is_bigram else "single tokens"
            return f"its blocks hold {'pairs of tokens (EAGLE)' if is_bigram else 'single tokens'}, /server_info says {said}"
        if self._is_by_tokens:
            return ""
        n_units = _CHECKED_PAGES * event.block_size
        tokens = [unit[0] if isinstance(unit, tuple) else unit for unit in units[: n_units + 1]]
        if is_bigram and len(units) <= n_units:
            last = units[-1]
            tokens.append(last[1] if isinstance(last, tuple) else last)
        salt = (event.cache_salt or "").encode()
        try:
            keys = page_keys(tokens, event.block_size, bigram=is_bigram, max_pages=_CHECKED_PAGES, cache_salt=salt)
        except ValueError as error:
            return f"its token ids cannot be hashed: {error}"
        n_bytes = min(len(keys), len(event.keys))
        if n_bytes and keys[:n_bytes] == event.keys[:n_bytes]:
            return ""
        return "its block hashes are not SGLang's SHA-256 chain of the event's tokens"

    def note_undecoded(self, what: str, n: int = 1) -> None:
        """Count what could not be read, and say so now and then."""
        self.counters.undecoded += n
        now_s = time.monotonic()
        if now_s >= self._log_after_s:
            self._log_after_s = now_s + _LOG_EVERY_S
            self._log.warning("undecodable KV events: %s (%d so far)", what, self.counters.undecoded)
