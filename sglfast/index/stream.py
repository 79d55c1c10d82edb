"""One rank's event stream: which batch is applied when, and when the rank's blocks have to be forgotten.

Runs in: index, inside the rank's subscriber thread. Pure: no I/O, no thread, no clock; the time comes in as `now_s` (monotonic
    seconds) and what is to be done goes out as calls on a `Sink`.

The law. Batches of one engine process carry dense numbers from 0. Applied in order and without a hole they give the rank's blocks
exactly; a missing store costs one cold prefill, a missing removal leaves an owner that owns nothing, so a hole that nobody
can fill means: forget the rank.

    live batch                with replay                                      without replay
    --------------------      ---------------------------------------------    -----------------------------------
    first, number 0           apply                                            apply
    first, number > 0         hold, replay from 0                              apply; what came before is unknown
    next in line              apply                                            apply
    beyond (gap)              hold, replay from the last applied one           clear, apply
    behind, a known copy      drop                                             drop
    behind, otherwise         restart: clear, then as the first                restart: clear, then as the first
    (new connection)          replay from the last applied one                 a low number is a restart

A replay begins at the last batch applied, which is compared: a restarted engine counts from 0 again and may just now stand at the
number that we wait for; its time stamps give it away, and so does an answer that does not reach that number.
The end marker of a replay proves nothing (engines drop what their send queue does not hold): what counts is that no hole is left.
A hole is asked for again as long as each answer brings the front forward, `max_tries` times when it does not.
Batches held back are bounded; one that finds no room is dropped and comes back by replay, because its number was noted.
A replay that contradicts the live stream (another batch under a number, or `max_tries` times numbers far ahead of it) is of another
stream: until the next connection nobody asks again. An answer that repeats itself counts as silence.
A stream may begin where a former index process left it (`Resume`): as after a lost connection, and not called exact before replay or
the next number shows that nothing was missed.
Live batches come one at a time (`on_live`). While nothing is unusual (`steady_seq`), whoever reads them may apply those that are next in
line himself, many as one, and tells it (`on_applied`).
Source: spec/kv_events.md 1.6, 6.
"""

from dataclasses import dataclass

from sglfast._blockhash import xxh3
from sglfast._counters import RANK_DEGRADED, RANK_EXACT, RANK_SYNCING
from sglfast.index.held import HeldBatches, Limits
from sglfast.index.sink import Counters, Outcome, Resume, Sink

# Positions in sglfast.shm.RANK_REASONS.
NO_EVENT_YET, REPLAYING, UNKNOWN_HISTORY, LOST, HASH_MISMATCH, DISCONNECTED = 2, 3, 4, 5, 6, 7
RESUMED = 9

# A restarted engine has published at most some dozens of batches by the time the subscription reaches it.
_LOW_SEQ = 64
# A send queue of fewer batches than this loses nothing; a longer answer may have lost its tail unseen.
_CONFIRM_ABOVE_BATCHES = 256
# Live batches that a replay overtook and that are still on their way: as many as one round of the subscriber reads, at most.
_REPLAYED_MEMORY_BATCHES = 1024


def print_of(payload: bytes) -> int:
    """Enough of a batch to know it again, as 64 bits: its length, its head (with the time of publishing) and its tail. Never 0."""
    return xxh3(payload[:32] + payload[-32:], len(payload)) or 1


@dataclass(slots=True)
class _Request:
    """A replay under way. front: `next_seq` when it was asked; is_verified: the engine is known to be the one we followed."""

    front: int | None
    deadline_s: float
    is_verified: bool
    n_batches: int = 0


class RankStream:
    """State of one rank's stream. Feed it with the `on_*` methods; call `on_time` when `deadline_s` has passed."""

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
        self._request: _Request | None = None
        self._tries = 0
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
        return None if self.next_seq is None else Resume(self.next_seq, self._last_print or 0, self._loss)

    @property
    def deadline_s(self) -> float | None:
        """When `on_time` must be called at the latest; None = no need."""
        return self._request.deadline_s if self._request else None

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

    # ---- what happens ----

    def on_connected(self, now_s: float) -> None:
        """The subscription reached an engine, for the first time or again."""
        if self._was_lost:
            self._reconnected(now_s)
        elif self._can_replay and self.next_seq is None and self._request is None:
            self._tries = 0
            self._ask(now_s)

    def on_disconnected(self) -> None:
        """The connection is gone; the index stays a hint until the stream speaks again."""
        self._was_lost = True

    def on_live(self, seq: int, payload: bytes, now_s: float) -> None:
        """A batch came on the live socket."""
        if self._was_lost:
            self._reconnected(now_s)  # the notice is still on its way
        expected = self.next_seq
        if seq <= self._last_live or (expected is not None and seq < expected):
            if self._is_copy(seq, payload):
                self.counters.duplicates += 1
                self._last_live = max(self._last_live, seq)
                self._is_resumed = self._is_resumed and self._request is not None
                return
            if seq > self._last_live:
                self._refuted += 1  # the live stream has not gone back; it was replay that went ahead
                self._can_replay &= self._refuted < self._limits.max_tries
            self._restart("its sequence went back", now_s)
            expected = None
        elif self._is_suspect and seq == expected and seq < _LOW_SEQ:
            self._restart("its connection was lost and its sequence is low", now_s)
            expected = None
        self._is_suspect = False
        self._last_live = seq
        self._highest = max(self._highest, seq)
        if self._request is not None:
            self._hold(seq, payload)
            if self._request.is_verified:
                self._drain()
            return
        self._is_resumed = False
        if seq == expected or seq == 0:
            self._refuted = 0
            self._loss = 0 if expected is None else self._loss
            self._replayed.clear()
            self._apply(seq, payload)
        elif expected is None:
            self._begin_late(seq, payload, now_s)
        else:
            self.counters.gaps += 1
            if self._can_replay:
                self._hold(seq, payload)
                self._tries = 0
                self._ask(now_s)
            else:
                self._sink.clear(f"batches {expected}..{seq - 1} were lost and there is no replay")
                self._loss = LOST
                self._apply(seq, payload)

    def on_applied(self, n_batches: int, last_payload: bytes, outcome: Outcome) -> None:
        """`n_batches` live batches, from `steady_seq` on, were applied to the rank's blocks. outcome: of all of them, as of one."""
        assert self.next_seq is not None
        self._replayed.clear()
        self._refuted = 0
        self._last_live = self.next_seq + n_batches - 1
        self._highest = max(self._highest, self._last_live)
        self._applied(n_batches, self._last_live, last_payload, outcome)

    def on_replay(self, seq: int, payload: bytes, now_s: float) -> None:
        """A batch came as part of the answer to the last `ask_replay`."""
        request = self._request
        if request is None:
            return
        held = self._held.get(seq)
        known = print_of(held) if held is not None else self._replayed.get(seq) if request.is_verified else None
        if known is not None and known != print_of(payload):
            self._distrust(seq)
            return
        expected = self.next_seq
        if expected is None or seq > self._highest or (seq >= expected and held is None):
            request.deadline_s = now_s + self._limits.replay_timeout_s  # anything else brings nothing
        if expected is None:
            # The answer to "from 0": it begins at 0 or at the oldest batch that the engine still has.
            self._loss = 0 if seq == 0 else UNKNOWN_HISTORY
            self._held.drop(below=seq)
            expected = self.next_seq = seq
            request.is_verified = True
        elif not request.is_verified:
            if seq == expected - 1 and print_of(payload) == self._last_print:
                request.is_verified = True
                return
            if seq < expected:
                self._restart("another engine process answers", now_s)
                return
            # The engine does not show our last batch any more: a hole, even if `expected` itself is there.
        request.n_batches += 1
        self._highest = max(self._highest, seq)
        if seq < expected:
            self.counters.duplicates += 1
        elif seq > expected or not request.is_verified:
            self._hold(seq, payload)
        else:
            self._apply(seq, payload)
            self._remember(seq, payload)
            self._drain()

    def on_replay_end(self, now_s: float) -> None:
        """The end marker of the answer."""
        request = self._request
        if request is None:
            return
        if self.next_seq is None:
            # Nothing was ever published: the rank is empty, and 0 comes next.
            self.next_seq = 0
            self._loss = 0
        elif not request.is_verified and not request.n_batches:
            self._restart("its sequence does not reach the last batch seen", now_s)
            return
        self._after_answer(now_s, is_ended=True)

    def on_time(self, now_s: float) -> None:
        """Time passed; a replay that has gone silent counts as answered without an end marker."""
        if self._request is not None and now_s >= self._request.deadline_s:
            self._after_answer(now_s, is_ended=False)

    # ---- steps ----

    def _reconnected(self, now_s: float) -> None:
        """Is it the engine process that was left? Replay tells; without it the next number is looked at twice."""
        self._was_lost = False
        self._can_replay = self._has_replay
        if not self._has_replay:
            self._is_suspect = True
            return
        # What is held may come from another process than the one that answers now; it comes back if it is the same.
        self._held.drop()
        self._highest = (self.next_seq or 0) - 1
        if self.next_seq is None:
            self._last_live = -1
        self._tries = 0
        self._ask(now_s)

    def _is_copy(self, seq: int, payload: bytes) -> bool:
        """Is this batch, behind the front, one that we have already? Then the engine has not restarted."""
        if (held := self._held.get(seq)) is not None:
            return held == payload
        known = self._last_print if self.next_seq is not None and seq == self.next_seq - 1 else self._replayed.get(seq)
        return known == print_of(payload)

    def _begin_late(self, seq: int, payload: bytes, now_s: float) -> None:
        if self._can_replay:
            self._hold(seq, payload)
            self._tries = 0
            self._ask(now_s)
        else:
            self._loss = UNKNOWN_HISTORY
            self._apply(seq, payload)

    def _restart(self, why: str, now_s: float) -> None:
        """Another engine process speaks: nothing of the old one holds. A replay under way is asked for anew."""
        self.counters.restarts += 1
        self._is_resumed = False
        self._sink.clear(f"the engine restarted: {why}")
        self._held.drop()
        self._replayed.clear()
        self.next_seq = None
        self._last_live = self._highest = -1
        self._loss = NO_EVENT_YET
        if self._request is not None:
            self._request = None
            self._tries = 0
            if self._can_replay:
                self._ask(now_s)

    def _ask(self, now_s: float) -> None:
        front = self.next_seq
        self.counters.replays += 1
        self._request = _Request(front, now_s + self._limits.replay_timeout_s, is_verified=front == 0)
        self._sink.ask_replay(max((front or 0) - 1, 0))

    def _after_answer(self, now_s: float, *, is_ended: bool) -> None:
        """Is the stream whole now? If not, ask again or give up."""
        request = self._request
        assert request is not None
        self._request = None
        is_behind = self.next_seq is None or self.next_seq <= self._highest
        if is_ended and not is_behind and request.n_batches <= _CONFIRM_ABOVE_BATCHES:
            self._is_resumed = False
            return
        if self.next_seq == request.front and (is_behind or not is_ended):
            self._tries += 1
            if self._tries >= self._limits.max_tries:
                self._give_up(now_s, is_mute=request.n_batches == 0 and not is_ended)
                return
        else:
            self._tries = 0
        self._ask(now_s)

    def _give_up(self, now_s: float, *, is_mute: bool) -> None:
        self.counters.give_ups += 1
        self._can_replay = self._has_replay and not is_mute
        if self._held:
            last = self._begin_at_held(f"replay does not bring them (asked {self._limits.max_tries} times)")
            if last < self._highest and self._can_replay:
                self._tries = 0
                self._ask(now_s)
            elif last < self._highest:
                self._highest = last
                self._loss = LOST
        elif self.next_seq is not None:
            # Nobody can say whether this is still the engine whose blocks we know; the next number will tell.
            self._is_suspect = True
            self._loss = self._loss or LOST
            self._highest = self.next_seq - 1

    def _distrust(self, seq: int) -> None:
        """Replay has another batch under the number of one that is held: what it brought is not this stream's."""
        self.counters.give_ups += 1
        self._can_replay = False
        self._request = None
        why = f"replay is of another stream: it has another batch {seq}"
        if self._held:
            self._highest = self._begin_at_held(why)
        else:
            self._sink.clear(why)
            self._loss = LOST
            self._highest = (self.next_seq or 0) - 1

    def _begin_at_held(self, why: str) -> int:
        """Forget the rank, and go on with the newest batches that are held; returns the last one's number."""
        run = self._held.take_last_run()
        first = run[0][0]
        front = self.next_seq or 0
        self._sink.clear(f"batches {front}..{first - 1} were lost and {why}" if first > front else why)
        self._loss = LOST if self.next_seq is not None else UNKNOWN_HISTORY if first else 0
        self.next_seq = first
        for seq, payload in run:
            self._apply(seq, payload)
        return run[-1][0]

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
