"""What is known of a rank's event stream, and how it shows: in the rank's row, to who reads the sockets, to the next index process.

Runs in: index, inside the rank's subscriber thread. Contract: this is the state; index/stream.py is the law by which it changes, the
    steps of which index/stream_front.py has those at the front.
"""

from sglfast import shm
from sglfast._blockhash import xxh3
from sglfast._counters import RANK_DEGRADED, RANK_EXACT, RANK_SYNCING
from sglfast.index.asked import Looks, Request
from sglfast.index.held import HeldBatches, Limits
from sglfast.index.sink import Counters, Resume, Sink

# Positions in sglfast.shm.RANK_REASONS: what a stream's state may be put down to.
NO_EVENT_YET, REPLAYING, UNKNOWN_HISTORY = shm.REASON_NO_EVENT_YET, shm.REASON_REPLAYING, shm.REASON_UNKNOWN_HISTORY
LOST, NOT_KEPT, DISCONNECTED, RESUMED = shm.REASON_LOST, shm.REASON_NOT_KEPT, shm.REASON_DISCONNECTED, shm.REASON_RESUMED
FORGOTTEN = shm.REASON_FORGOTTEN


def print_of(payload: bytes) -> int:
    """Enough of a batch to know it again, as 64 bits: its length, its head (with the time of publishing) and its tail. Never 0."""
    return xxh3(payload[:32] + payload[-32:], len(payload)) or 1


class StreamState:
    """State of one rank's stream."""

    def __init__(self, sink: Sink, *, has_replay: bool, limits: Limits | None = None, resume: Resume | None = None) -> None:
        self.counters = Counters()
        self.next_seq: int | None = None  # number of the batch that comes next; None = nothing is known yet
        self._sink = sink
        self._limits = limits or Limits()
        self._has_replay = has_replay
        self._can_replay = has_replay  # False while the replay socket is known to be mute
        self._was_lost = False  # disconnected, and not heard of since
        self._is_suspect = False  # reconnected, and nobody can tell whether to the same engine process
        self._loss = NO_EVENT_YET  # 0: every batch since the rank was empty has been applied
        self._last_print: int | None = None  # of batch next_seq - 1
        self._last_live = -1  # live numbers only grow while one engine process speaks
        self._highest = -1  # highest number seen anywhere
        self._held = HeldBatches(self._limits.max_held_batches, self._limits.max_held_bytes)
        self._refuted = 0  # replays in a row that brought numbers which the live stream had not reached
        self._replayed: dict[int, int] = {}  # what was applied during a replay and may come once more, live or replayed
        self._request: Request | None = None
        self._tries = 0
        self._looks = Looks(self._limits.first_look_s, self._limits.last_look_s)
        self._is_foreign = False  # replay is of another stream: nobody asks before the next connection
        self._is_unproven = False  # all is there if the engine is the one that was left, which its mute socket did not tell
        self._known_from: int | None = None  # the rank's blocks are those of the batches from this one on; None = that is not known
        self._is_resumed = resume is not None  # the blocks are a former process's, and nothing has confirmed them yet
        if resume is not None:
            self.next_seq = resume.next_seq
            self._last_print = resume.last_print
            self._loss = resume.loss
            self._highest = resume.next_seq - 1
            self._was_lost = True

    @property
    def resume(self) -> Resume | None:
        """What another process would need to go on from here; None when nothing is known yet."""
        if self.next_seq is None:
            return None
        # Nothing was lost if this is the engine that was left: that is for the other process to find out, as it is for this one.
        return Resume(self.next_seq, self._last_print or 0, 0 if self._is_unproven else self._loss)

    @property
    def deadline_s(self) -> float | None:
        """When `on_time` must be called at the latest; None = no need."""
        return self._request.deadline_s if self._request else self._looks.deadline_s

    @property
    def is_asking(self) -> bool:
        """Whether an answer to the last `ask_replay` is waited for."""
        return self._request is not None or self._looks.under_way is not None

    @property
    def held_batches(self) -> int:
        """Batches held back behind a hole."""
        return len(self._held)

    @property
    def missing_batches(self) -> int:
        """Batches that are known to have been published and are not applied yet, the held ones included."""
        return max(0, self._highest + 1 - (self.next_seq or 0))

    def status(self) -> tuple[int, int]:
        """(RANK_* state, position in RANK_REASONS)."""
        if self._request is not None:
            return RANK_SYNCING, REPLAYING
        if self._is_resumed:
            return RANK_SYNCING, RESUMED
        if self._was_lost:
            return RANK_DEGRADED, DISCONNECTED
        if self._loss == 0:
            return RANK_EXACT, 0
        return (RANK_SYNCING if self._loss == NO_EVENT_YET else RANK_DEGRADED), self._loss

    @property
    def steady_seq(self) -> int | None:
        """Number of the live batch that would be applied with no further question; None while anything is unusual."""
        if self._request is not None or self._was_lost or self._is_suspect or self._is_resumed or self._held:
            return None
        seq = self.next_seq
        return seq if seq is not None and seq > self._last_live else None
