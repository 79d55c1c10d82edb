"""The front of a rank's stream: batches are applied there in order, those behind it are known again, those beyond it are held back.

Runs in: index, inside the rank's subscriber thread. Pure. Contract: these are steps; when each is taken, index/stream decides.
"""

from sglfast.index.sink import Outcome
from sglfast.index.stream_state import LOST, StreamState, print_of

# Live batches that a replay overtook and that are still on their way: as many as one round of the subscriber reads, at most.
_REPLAYED_MEMORY_BATCHES = 1024


class StreamFront(StreamState):
    """What moves `next_seq` forward."""

    def _is_copy(self, seq: int, payload: bytes) -> bool:
        """Is this batch, behind the front, one that we have already? Then the engine has not restarted."""
        if (held := self._held.get(seq)) is not None:
            return held == payload
        known = self._last_print if self.next_seq is not None and seq == self.next_seq - 1 else self._replayed.get(seq)
        return known == print_of(payload)

    def _apply(self, seq: int, payload: bytes) -> None:
        self._held.pop(seq)
        self._applied(1, seq, payload, self._sink.apply(payload))

    def _applied(self, n_batches: int, seq: int, payload: bytes, outcome: Outcome) -> None:
        self.counters.batches += n_batches
        self.next_seq = seq + 1
        self._last_print = print_of(payload)
        if outcome.is_cleared:
            self._loss = 0
        if outcome.is_lossy:
            self._loss = LOST
            self._is_unproven = False  # even if the engine is the one that was left

    def _drain(self) -> None:
        while self.next_seq is not None and (payload := self._held.get(self.next_seq)) is not None:
            self._remember(self.next_seq, payload)
            self._apply(self.next_seq, payload)

    def _remember(self, seq: int, payload: bytes) -> None:
        self._replayed[seq] = print_of(payload)
        if len(self._replayed) > _REPLAYED_MEMORY_BATCHES:
            del self._replayed[next(iter(self._replayed))]

    def _hold(self, seq: int, payload: bytes) -> None:
        if self._held.get(seq) is not None:
            self.counters.duplicates += 1
        else:
            self._held.put(seq, payload)
