"""Bounds of a rank's stream, and the batches that wait behind a hole: by number, in bounded memory.

Runs in: index, inside the rank's subscriber thread. Pure. Contract: what finds no room is not taken and nobody is told; whoever holds
    batches back notes the highest number that there was, and has the missing ones replayed.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one stream. first_look_s, last_look_s: pauses before a replay socket that was mute is asked again, see index/asked."""

    replay_timeout_s: float = 3.0
    max_tries: int = 3
    first_look_s: float = 1.0
    last_look_s: float = 60.0
    max_held_batches: int = 20_000
    max_held_bytes: int = 64 << 20


class HeldBatches:
    """max_batches, max_bytes: of all payloads together."""

    def __init__(self, max_batches: int, max_bytes: int) -> None:
        self._max_batches = max_batches
        self._max_bytes = max_bytes
        self._payloads: dict[int, bytes] = {}
        self._n_bytes = 0

    def __len__(self) -> int:
        return len(self._payloads)

    def get(self, seq: int) -> bytes | None:
        """The batch with this number."""
        return self._payloads.get(seq)

    def put(self, seq: int, payload: bytes) -> None:
        """Keep a batch whose number is not held, if there is room."""
        if len(self._payloads) < self._max_batches and self._n_bytes + len(payload) <= self._max_bytes:
            self._payloads[seq] = payload
            self._n_bytes += len(payload)

    def pop(self, seq: int) -> None:
        """Let go of a batch, if it is held."""
        payload = self._payloads.pop(seq, None)
        if payload is not None:
            self._n_bytes -= len(payload)

    def drop(self, below: int | None = None) -> None:
        """Let go of all batches, or of those with lower numbers."""
        for seq in [seq for seq in self._payloads if below is None or seq < below]:
            self.pop(seq)

    def take_last_run(self) -> list[tuple[int, bytes]]:
        """The newest batches, as many as have no hole between them, as (number, payload) in order; nothing is held any more."""
        first = last = max(self._payloads)
        while first - 1 in self._payloads:
            first -= 1
        run = [(seq, self._payloads[seq]) for seq in range(first, last + 1)]
        self.drop()
        return run
