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
A hole is asked for again as long as each answer brings the front forward, `max_tries` times when it does not. Then the rank is emptied,
goes on behind the hole, and is FORGOTTEN: no block is taken for owned that is not, older ones are not known. Nobody asks for that hole
again, which the buffer had not: the rank is EXACT again when the engine clears its cache or is started again.
Batches held back are bounded; one that finds no room is dropped and comes back by replay, because its number was noted.
A replay that contradicts the live stream (another batch under a number, or `max_tries` times numbers far ahead of it) is of another
stream: until the next connection nobody asks again. An answer that repeats itself counts as silence.
A socket that is mute is given up, and looked at again after pauses that double: 1 s at first, a minute at last. What it says then is taken
from the beginning, or from the last batch applied if nothing but the engine's being the same one was in question. A buffer that does
not reach back behind the oldest batch that the rank's blocks are of brings nothing: then nobody asks again (NOT_KEPT).
A stream may begin where a former index process left it (`Resume`): as after a lost connection, and not called exact before replay or
the next number shows that nothing was missed.
Live batches come one at a time (`on_live`). While nothing is unusual (`steady_seq`), whoever reads them may apply those that are next in
line himself, many as one, and tells it (`on_applied`).
Source: spec/kv_events.md 1.6, 6.
"""

from sglfast.index.asked import Look, Request
from sglfast.index.sink import Outcome
from sglfast.index.stream_front import StreamFront
from sglfast.index.stream_state import FORGOTTEN, LOST, NO_EVENT_YET, NOT_KEPT, UNKNOWN_HISTORY, print_of

# A restarted engine has published at most some dozens of batches by the time the subscription reaches it.
_LOW_SEQ = 64
# A send queue of fewer batches than this loses nothing; a longer answer may have lost its tail unseen.
_CONFIRM_ABOVE_BATCHES = 256


class RankStream(StreamFront):
    """State of one rank's stream. Feed it with the `on_*` methods; call `on_time` when `deadline_s` has passed."""

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
                self._is_foreign |= self._refuted >= self._limits.max_tries
                self._can_replay &= not self._is_foreign
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
                self._loss = FORGOTTEN
                self._begin_at(seq, now_s)
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
            if self._looks.under_way is None or not self._believes_look(seq, payload, now_s):
                return
            request = self._request
            assert request is not None
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
            self._loss = 0 if seq == 0 else NOT_KEPT if request.is_late else UNKNOWN_HISTORY
            self._known_from = seq
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
        if self._request is None and self._looks.under_way is not None:
            self._was_empty(now_s)
            return
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
        if self._request is not None:
            if now_s >= self._request.deadline_s:
                self._after_answer(now_s, is_ended=False)
        elif self._looks.deadline_s is not None and now_s >= self._looks.deadline_s:
            if self._looks.under_way is not None:
                self._looks.plan(now_s)
            else:
                self._look(now_s)

    # ---- steps ----

    def _reconnected(self, now_s: float) -> None:
        """Is it the engine process that was left? Replay tells; without it the next number is looked at twice."""
        self._was_lost = False
        self._can_replay = self._has_replay
        self._is_foreign = self._is_unproven = False
        self._looks.reset()
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

    def _begin_late(self, seq: int, payload: bytes, now_s: float) -> None:
        if self._can_replay:
            self._hold(seq, payload)
            self._tries = 0
            self._ask(now_s)
        else:
            self._loss = UNKNOWN_HISTORY
            self._begin_at(seq, now_s)
            self._apply(seq, payload)

    def _begin_at(self, seq: int, now_s: float) -> None:
        """The rank is empty, and what comes before this batch is lost, unless a socket that is mute speaks again."""
        self._known_from = seq
        self._is_unproven = False
        if self._has_replay and not self._is_foreign:
            self._looks.take()  # whose answer would be taken for what it is not
            self._looks.plan(now_s)

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
        self._known_from = None
        self._is_unproven = False
        if self._looks.take() is not None:
            self._looks.plan(now_s)
        if self._request is not None:
            self._request = None
            self._tries = 0
            if self._can_replay:
                self._ask(now_s)

    def _ask(self, now_s: float) -> None:
        front = self.next_seq
        self._looks.end()
        self.counters.replays += 1
        self._request = Request(front, now_s + self._limits.replay_timeout_s, is_verified=front == 0)
        self._sink.ask_replay(max((front or 0) - 1, 0))

    def _after_answer(self, now_s: float, *, is_ended: bool) -> None:
        """Is the stream whole now? If not, ask again or give up."""
        request = self._request
        assert request is not None
        self._request = None
        is_behind = self.next_seq is None or self.next_seq <= self._highest
        if is_ended and not is_behind and request.n_batches <= _CONFIRM_ABOVE_BATCHES:
            self._looks.reset()
            if self._is_resumed and self._loss:
                self._looks.plan(now_s)  # what the former process could not have, this one may
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
        if is_mute:
            self._looks.plan(now_s)
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
            self._is_unproven = self._loss == 0
            self._loss = self._loss or LOST
            self._highest = self.next_seq - 1

    # ---- a socket that was mute ----

    def _look(self, now_s: float) -> None:
        """Does it speak again? Only if that could better anything."""
        if self._loss == 0 or self._was_lost:
            self._looks.end()
            return
        start_seq, last_print = 0, 0
        if self._is_unproven:
            assert self.next_seq is not None
            start_seq, last_print = max(self.next_seq - 1, 0), self._last_print or 0
        self.counters.replays += 1
        self._looks.begin(Look(start_seq, last_print, now_s + self._limits.replay_timeout_s))
        self._sink.ask_replay(start_seq)

    def _believes_look(self, seq: int, payload: bytes, now_s: float) -> bool:
        """It does, with this batch: whether it and what follows are a replay that is asked for."""
        look = self._looks.take()
        assert look is not None
        self._looks.end()
        self._can_replay = True
        front = self.next_seq
        if look.last_print:
            if seq == look.start_seq and print_of(payload) == look.last_print:
                self._is_unproven = self._is_suspect = False
                self._loss = 0
                self._request = Request(front, now_s + self._limits.replay_timeout_s, is_verified=True)
                return True
            if seq > look.start_seq:
                self._is_unproven = False  # nobody can tell any more; the live stream goes on, and that it is another is not seen
                self._loss = NOT_KEPT
            else:
                self._restart("another engine process answers", now_s)
                self._ask(now_s)
            return False
        # Of blocks that a former process left it is not known how far back they go.
        if front is not None and seq >= (1 if self._known_from is None else self._known_from):
            self._loss = NOT_KEPT if seq else self._loss
            return False
        if front is not None:
            self._sink.clear("replay answers again, and tells what came before")
            self._replayed = {front - 1: self._last_print or 0}
        self._held.drop()
        self.next_seq = None
        self._request = Request(None, now_s + self._limits.replay_timeout_s, is_verified=False, is_late=True)
        return True

    def _was_empty(self, now_s: float) -> None:
        """It speaks, and has nothing to say."""
        look = self._looks.take()
        assert look is not None
        if look.last_print:
            self._can_replay = True
            self._restart("its sequence does not reach the last batch seen", now_s)
            self._ask(now_s)
        elif not self.next_seq:
            self._can_replay = True
            self.next_seq = None
            self._request = Request(None, now_s, is_verified=False)
            self.on_replay_end(now_s)
        else:
            self._looks.plan(now_s)

    def _distrust(self, seq: int) -> None:
        """Replay has another batch under the number of one that is held: what it brought is not this stream's."""
        self.counters.give_ups += 1
        self._can_replay = False
        self._is_foreign = True
        self._looks.end()
        self._request = None
        why = f"replay is of another stream: it has another batch {seq}"
        if self._held:
            self._highest = self._begin_at_held(why)
        else:
            self._sink.clear(why)
            self._loss = FORGOTTEN
            self._is_resumed = False
            self._highest = (self.next_seq or 0) - 1

    def _begin_at_held(self, why: str) -> int:
        """Forget the rank, and go on with the newest batches that are held; returns the last one's number."""
        run = self._held.take_last_run()
        first = run[0][0]
        front = self.next_seq or 0
        self._sink.clear(f"batches {front}..{first - 1} were lost and {why}" if first > front else why)
        self._loss = FORGOTTEN if self.next_seq is not None else UNKNOWN_HISTORY if first else 0
        self.next_seq = self._known_from = first
        self._is_unproven = self._is_resumed = False
        for seq, payload in run:
            self._apply(seq, payload)
        return run[-1][0]
