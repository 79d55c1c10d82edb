"""One rank's blocks: turns event batches into writes to the hash tree, and checks that its keys are the ones shards compute.

Runs in: index; called by the rank's subscriber thread, and by `main` when the worker goes.
Contract: the tree has one writer object in the process (`TreeLock`), its lock is held for one batch or event at a time, or for one turn of
    _TURN_KEYS keys where a batch is large, or a rank is cleared that has many blocks; what is done with a map of engine hashes is done
    without it, or in such turns. After `retire`
    nothing of this rank reaches the tree any more, whatever its thread still holds in hand. What cannot be decoded is counted
    and logged, never fatal. Applying batches again, in order, to a rank that has them already gives the same blocks, as long as
    it was not settled in between.
Root blocks are recomputed from their own tokens until one agrees (index/key_check.py); from then on batches in which all is usual
    are applied as runs of keys, made in one pass over their bytes.
Source: spec/kv_events.md 2.1 to 2.3, 2.6, 2.8.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from sglfast._hashtree import TreeWriter
from sglfast._keymap import KeyMap
from sglfast._kvdecode import CLEAR, REMOVE, STORE, runs, runs_of_batches
from sglfast.errors import KvEventError
from sglfast.index.key_check import disagreement
from sglfast.index.live import Run
from sglfast.index.sink import Outcome
from sglfast.index.token_route import UNTOLD_GROUP, TokenRoute
from sglfast.shm import REASON_HASH_MISMATCH, REASON_PAIRS, REASON_SINGLES, KeyRoute
from sglfast.wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch, tier_mask

_PLAIN, _CLEARED, _LOSSY = Outcome(), Outcome(is_cleared=True), Outcome(is_lossy=True)
# While no root block has agreed: all of the first few are recomputed, then now and then one.
_FIRST_CHECKS, _CHECK_EVERY = 8, 16
_LOG_EVERY_S = 10.0
_KIND_CHARS = 64  # of a name that somebody else has chosen
# Writing to the tree holds its lock and the GIL: what a larger batch says is written in turns, between which other ranks write.
_TURN_BYTES = 65536
_TURN_KEYS = 8192
_GIVE_WAY_S = 0.0001


def _turns(found: Iterable[tuple[int, int, bytes]]) -> Iterator[list[tuple[int, int, bytes]]]:
    """Runs of keys in turns of so many keys at most; small ones go together, since a turn costs a pause."""
    turn: list[tuple[int, int, bytes]] = []
    room = _TURN_KEYS
    for kind, tiers, keys in found:
        at = 0
        while True:
            part = keys[8 * at : 8 * (at + room)]
            turn.append((kind, tiers, part))
            at += room
            room -= len(part) // 8
            if not room:
                yield turn
                turn, room = [], _TURN_KEYS
            if 8 * at >= len(keys):
                break
    if turn:
        yield turn


@dataclass(slots=True)
class TreeLock:
    """The process's only TreeWriter and the lock that its users take for each batch."""

    writer: TreeWriter
    lock: threading.Lock = field(default_factory=threading.Lock)


def clear_rank(tree: TreeLock, rank: int, beat: Callable[[], None] | None = None) -> None:
    """Clear a rank that nobody writes, in turns, between which other ranks are written. beat: called behind each turn."""
    is_done = False
    while not is_done:
        with tree.lock:
            _, is_done = tree.writer.clear_some(rank, _TURN_KEYS)
        if beat is not None:
            beat()
        if not is_done:
            time.sleep(_GIVE_WAY_S)


@dataclass(slots=True)
class BlockCounters:
    """Totals since the rank was taken up. undecoded: events, of unknown kinds too, and batches that could not be read (each as one).

    orphans: blocks of the token route left out because their place in the prompt is unknown.
    """

    events: int = 0
    blocks_stored: int = 0
    blocks_removed: int = 0
    undecoded: int = 0
    orphans: int = 0


class RankIndex:
    """The blocks of tree rank `rank`; the keyword arguments are what shards use for this worker's keys (block_size in tokens).

    key_route: "sha256", the engine's hash is the key, except in events of a LoRA adapter; "tokens", keys are made of the tokens. model is
    hashed into keys of the route "tokens" only: on the other one it may become known later without harm. key_map, main_group: as of
    TokenRoute.
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
        key_map: KeyMap | None = None,
        main_group: int = UNTOLD_GROUP,
    ) -> None:
        self.counters = BlockCounters()
        self.last_event_ms = 0  # wall clock
        self.has_agreed = False  # a root block was found to have the keys that shards compute
        self.mismatch = ""  # why shards cannot find this rank's blocks; empty = they can, or no root block was seen yet
        self.mismatch_reason = 0  # the same as a position in RANK_REASONS
        self.rank = rank
        self._tree = tree
        self._block_size = block_size
        self._is_bigram = is_bigram
        self._is_by_tokens = key_route == "tokens"
        self._by_tokens = TokenRoute(
            model=model if self._is_by_tokens else "", block_size=block_size, is_bigram=is_bigram, key_map=key_map, main_group=main_group
        )
        self._removed = b""  # engine hashes that the token route may forget
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
        """Blocks whose engine hash is not their key, so that only who has the map can remove them; until `settle` also removed ones."""
        return len(self._by_tokens)

    @property
    def main_group(self) -> int:
        """Number of the main attention among a hybrid model's caches, UNTOLD_GROUP or as the events told it."""
        return self._by_tokens.main_group

    def apply(self, payload: bytes) -> Outcome:
        """Apply one batch, whatever it holds."""
        if self.has_agreed:
            outcome = self._apply_usual(payload)
            if outcome is not None:
                return outcome
        try:
            batch = decode_batch(payload)
        except KvEventError as error:
            self.note_undecoded(str(error))
            return _LOSSY
        outcome = _PLAIN
        undecoded, orphans = batch.undecoded, self._by_tokens.orphans
        stored_in: BlockStored | None = None
        for event in batch.events:
            match event:
                case BlockStored():
                    try:
                        self._store(event)
                    except KvEventError:
                        undecoded += 1
                    if self._tells(event):
                        stored_in = event
                case BlockRemoved():
                    self._remove(event)
                case AllBlocksCleared():
                    if self._is_by_tokens:
                        self._by_tokens.clear()
                    outcome = self._write(0, [(CLEAR, 0, b"")])
                    orphans = self._by_tokens.orphans
        self.counters.events += len(batch.events)
        self.last_event_ms = time.time_ns() // 1_000_000
        if stored_in is not None and not self.has_agreed:
            self._check(stored_in)
        self.counters.orphans = self._by_tokens.orphans
        n_events = len(batch.events) + batch.undecoded + len(batch.unknown)
        if batch.unknown:
            # No reason to distrust what is known: a newer engine tells more. If that was about blocks, the parity loop sees it.
            what = f"{len(batch.unknown)} of {n_events} events are of a kind that is not known here ({batch.unknown[0][:_KIND_CHARS]!r})"
            self.note_undecoded(what, len(batch.unknown))
        if undecoded:
            self.note_undecoded(f"{undecoded} of {n_events} events are malformed", undecoded)
            return _LOSSY
        return outcome if orphans == self._by_tokens.orphans else _LOSSY

    def apply_run(self, run: Run, first: int) -> tuple[int, Outcome]:
        """Apply batches of the run from `first` on, as many as are usual, as if they were one; (how many, what they did).

        For the others, of which the next one is the first: `apply`.
        """
        if not self.has_agreed:
            return 0, _PLAIN
        if not self._is_by_tokens:
            n_batches, n_events, found = runs_of_batches(run.payloads, run.ends, first)
            return n_batches, self._write_fairly(len(run.payloads), n_events, found) if n_batches else _PLAIN
        try:
            n_batches, placed = self._by_tokens.place_batches(run.payloads, run.ends, first)
        except MemoryError:  # perhaps not for one alone
            return 0, _PLAIN
        return n_batches, self._write_fairly(len(run.payloads), *placed) if placed is not None else _PLAIN

    def _apply_usual(self, payload: bytes) -> Outcome | None:
        """The same in one pass; None, and nothing has changed, when something in the batch is not usual."""
        usual = self._by_tokens.place_all(payload) if self._is_by_tokens else runs(payload)
        if usual is None:
            return None
        return self._write_fairly(len(payload), *usual)

    def _write_fairly(
        self, n_bytes: int, n_events: int, found: list[tuple[int, int, bytes]], removed: bytes = b"", is_lossy: bool = False
    ) -> Outcome:
        """As _write, in turns if `n_bytes` of events, a batch or a run with a large one, hold more keys than one turn's."""
        is_large = n_bytes > _TURN_BYTES and sum(len(keys) for _, _, keys in found) > 8 * _TURN_KEYS
        return (self._write_in_turns if is_large else self._write)(n_events, found, removed, is_lossy)

    def _write_in_turns(self, n_events: int, found: list[tuple[int, int, bytes]], removed: bytes = b"", is_lossy: bool = False) -> Outcome:
        """As _write, of a batch so large that other ranks are to write in between."""
        is_cleared = False
        for turn in _turns(found):
            is_cleared |= self._write(0, turn) is _CLEARED
            time.sleep(_GIVE_WAY_S)  # a lock goes to whoever is awake, and that would be this thread
        outcome = self._write(n_events, [], removed, is_lossy)
        return _CLEARED if is_cleared and not is_lossy else outcome

    def _write(self, n_events: int, found: list[tuple[int, int, bytes]], removed: bytes = b"", is_lossy: bool = False) -> Outcome:
        """Runs of keys to the tree; removed, is_lossy: as of TokenRoute.place_all."""
        by_tokens, counters, rank = self._by_tokens, self.counters, self.rank
        counters.orphans = by_tokens.orphans
        if removed:
            self._removed += removed
        outcome = _PLAIN
        with self._tree.lock:
            if self._is_retired:
                return _PLAIN
            writer = self._tree.writer
            for kind, tiers, keys in found:
                if kind == CLEAR:
                    if not self._clear_blocks(writer):
                        return _PLAIN
                    outcome = _CLEARED
                    if not self._is_by_tokens and not self._clear_map():
                        return _PLAIN
                elif not tiers:
                    continue
                elif kind == STORE:
                    counters.blocks_stored += writer.store(rank, tiers.bit_length() - 1, keys)
                else:
                    counters.blocks_removed += writer.remove(rank, tiers, keys)
                    if not self._is_by_tokens and len(by_tokens):
                        hashes, keys = by_tokens.find(keys)
                        counters.blocks_removed += writer.remove(rank, tiers, keys)
                        self._removed += hashes
        counters.events += n_events
        self.last_event_ms = time.time_ns() // 1_000_000
        return _LOSSY if is_lossy else outcome

    def expect(self, *, is_bigram: bool) -> None:
        """On the SHA route: from now on shards key the worker's blocks by pairs of tokens, or by single ones. The blocks stay."""
        with self._tree.lock:
            self._is_bigram = is_bigram
            self.has_agreed, self._roots = False, 0
            if self.mismatch_reason in (REASON_PAIRS, REASON_SINGLES):
                self.mismatch, self.mismatch_reason = "", 0

    def settle(self) -> None:
        """Nobody will apply again what was applied: the token route's memory holds what the rank owns now, and not much more."""
        by_tokens = self._by_tokens
        if not len(by_tokens):
            self._removed = b""
            return
        removed, self._removed = self._removed, b""
        for at in range(0, len(removed), 8 * _TURN_KEYS):
            with self._tree.lock:
                if self._is_retired:
                    return
                by_tokens.forget(removed[at : at + 8 * _TURN_KEYS], self._tree.writer, self.rank)
            if at + 8 * _TURN_KEYS < len(removed):
                time.sleep(_GIVE_WAY_S)
        at = by_tokens.to_prune(self.owned_blocks)
        while at:
            with self._tree.lock:
                if self._is_retired:
                    return
                at = by_tokens.prune(self._tree.writer, self.rank, at, _TURN_KEYS)
            if at:
                time.sleep(_GIVE_WAY_S)

    def clear(self) -> int:
        """Forget all blocks of the rank; returns how many they were."""
        before = self.counters.blocks_removed
        self._by_tokens.clear()  # without the lock: the kernel may have a GiB to get back
        self._by_tokens.main_group = UNTOLD_GROUP  # what comes may be another engine process's, whose caches count otherwise
        with self._tree.lock:
            if not self._is_retired:
                self._clear_blocks(self._tree.writer)
        gone, self.counters.blocks_removed = self.counters.blocks_removed - before, before  # they were removed by no event
        return gone

    def _clear_blocks(self, writer: TreeWriter) -> bool:
        """With the lock, which others get now and then when there are many blocks; False when the rank was retired meanwhile.

        What comes next for this rank waits; readers take it for no owner from the beginning.
        """
        while True:
            gone, is_done = writer.clear_some(self.rank, _TURN_KEYS)
            self.counters.blocks_removed += gone
            if is_done:
                return True
            self._tree.lock.release()
            try:
                time.sleep(_GIVE_WAY_S)
            finally:
                self._tree.lock.acquire()
            if self._is_retired:
                return False

    def _clear_map(self) -> bool:
        """With the lock, which others get meanwhile; False when the rank was retired by then."""
        self._tree.lock.release()
        try:
            self._by_tokens.clear()
        finally:
            self._tree.lock.acquire()
        return not self._is_retired

    def retire(self) -> None:
        """Nothing of the rank is to be found from now on, nor will be: then `wipe`."""
        with self._tree.lock:
            if not self._is_retired:
                self._is_retired = True
                self._tree.writer.hide(self.rank)

    def wipe(self, beat: Callable[[], None] | None = None) -> None:
        """Forget all blocks of a rank that is retired: behind this its number may be given to another worker. beat: see clear_rank."""
        clear_rank(self._tree, self.rank, beat)

    def release(self) -> None:
        """Give the map's memory back. After `retire`, when the rank's thread has ended."""
        self._by_tokens.release()

    def _store(self, event: BlockStored) -> None:
        tier = tier_mask(event.medium).bit_length() - 1
        if tier >= 0:
            is_by_tokens = self._is_by_tokens or event.lora_name is not None
            keys = self._by_tokens.place(event) if is_by_tokens else event.keys
            self._write_fairly(len(keys), 0, [(STORE, 1 << tier, keys)])

    def _remove(self, event: BlockRemoved) -> None:
        tiers = tier_mask(event.medium, is_removal=True)
        hashes, keys = self._by_tokens.resolve(event) if self._is_by_tokens else (b"", event.keys)
        self._write_fairly(len(keys), 0, [(REMOVE, tiers, keys)], hashes if tiers else b"")

    def _tells(self, event: BlockStored) -> bool:
        """Whether an event begins a prompt in the cache that counts, and so can tell how the rank's blocks are keyed."""
        return event.parent_block_hash is None and tier_mask(event.medium) != 0 and self._by_tokens.is_main(event)

    def _check(self, event: BlockStored) -> None:
        """Recompute a root block from its tokens and note whether shards will find it."""
        self._roots += 1
        if self._roots > _FIRST_CHECKS and self._roots % _CHECK_EVERY:
            return
        try:
            found = disagreement(event, block_size=self._block_size, is_bigram=self._is_bigram, is_by_tokens=self._is_by_tokens)
        except KvEventError as error:
            found = REASON_HASH_MISMATCH, str(error)
        if found is None:
            return
        reason, why = found
        if why and why != self.mismatch:
            self._log.error("the KV index cannot match this rank's blocks: %s", why)
        elif self.mismatch and not why:
            self._log.info("block keys of this rank agree now")
        self.mismatch, self.mismatch_reason = why, reason
        self.has_agreed = not why

    def note_undecoded(self, what: str, n: int = 1) -> None:
        """Count what could not be read, and say so now and then."""
        self.counters.undecoded += n
        now_s = time.monotonic()
        if now_s >= self._log_after_s:
            self._log_after_s = now_s + _LOG_EVERY_S
            self._log.warning("undecodable KV events: %s (%d so far)", what, self.counters.undecoded)
