"""What a rank's stream asks of whoever holds its sockets and its blocks, and what it says of itself.

Runs in: index, inside the rank's subscriber thread. Contract: see index/stream; these are the words between it and the subscriber, the
    blocks (index/rank) and the next process (index/rank_note).
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a batch did to the certainty about the rank: it emptied the rank, or a part of it could not be read."""

    is_cleared: bool = False
    is_lossy: bool = False


class Sink(Protocol):
    """Who does what the stream decides."""

    def apply(self, payload: bytes) -> Outcome:
        """Apply one batch to the rank's blocks."""

    def clear(self, why: str) -> None:
        """Forget all blocks of the rank."""

    def ask_replay(self, start_seq: int) -> None:
        """Ask for all batches from `start_seq` on; answers to earlier requests must not be handed in any more."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a former index process was in this stream. last_print: `print_of` batch next_seq - 1; loss: as `RankStream.loss`."""

    next_seq: int
    last_print: int
    loss: int


@dataclass(slots=True)
class Counters:
    """Totals since the stream began. batches: applied; replays: requests sent."""

    batches: int = 0
    gaps: int = 0
    duplicates: int = 0
    restarts: int = 0
    replays: int = 0
    give_ups: int = 0
